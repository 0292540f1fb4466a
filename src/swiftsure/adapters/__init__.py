"""Where other evaluations and this one meet: AutoAttack's interface, others' attacks as ours, RobustBench's record."""

from swiftsure.adapters.autoattack import AutoAttack
from swiftsure.adapters.inner import from_foolbox, from_torchattacks
from swiftsure.adapters.record import COLUMNS, as_row, record

__all__ = ["COLUMNS", "AutoAttack", "as_row", "from_foolbox", "from_torchattacks", "record"]
