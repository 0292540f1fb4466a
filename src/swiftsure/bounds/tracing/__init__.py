"""Reading a network: torch.fx traces its forward pass (`forward`), a rule for each call says what it becomes
(`spellings` lists them), and the result is checked against the network (`reader`)."""

from swiftsure.bounds.tracing.reader import trace

__all__ = ["trace"]
