"""Exits, and what running a network costs."""

from swiftsure.exits.cost import latency_ms, parameters, static_macs

__all__ = ["latency_ms", "parameters", "static_macs"]
