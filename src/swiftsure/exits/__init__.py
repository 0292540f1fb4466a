"""Exits: networks that answer early, when they do, and what running a network costs."""

from swiftsure.exits.attaching import attach, attach_again
from swiftsure.exits.cost import (
    adaptive_latency_ms,
    exit_macs,
    latency_ms,
    paper_macs,
    parameters,
    static_macs,
)
from swiftsure.exits.heads import head_names, register_head
from swiftsure.exits.multi_exit import Answer, MultiExit, give_adaptive, one_exit
from swiftsure.exits.policies import RULES, Policy, confidence, entropy
from swiftsure.exits.thresholds import all_logits, calibrate, equal_share, in_shares, within_macs

__all__ = [
    "RULES",
    "Answer",
    "MultiExit",
    "Policy",
    "adaptive_latency_ms",
    "all_logits",
    "attach",
    "attach_again",
    "calibrate",
    "confidence",
    "entropy",
    "equal_share",
    "exit_macs",
    "give_adaptive",
    "head_names",
    "in_shares",
    "latency_ms",
    "one_exit",
    "paper_macs",
    "parameters",
    "register_head",
    "static_macs",
    "within_macs",
]
