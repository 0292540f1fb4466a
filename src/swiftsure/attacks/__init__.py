"""Points of a ball that break a network: inner methods x objectives over exits."""

from swiftsure.attacks._apgd import apgd, apgd_targeted
from swiftsure.attacks._exits import at_exit, max_average
from swiftsure.attacks._fab import fab_targeted
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import Gradient, GradientReport, input_gradient
from swiftsure.attacks._interval import interval_attack
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._replay import Replayed, replayed
from swiftsure.attacks._square import square
from swiftsure.attacks._suites import SUITES
from swiftsure.attacks._wrm import wrm, wrm_unprojected
from swiftsure.attacks.forced import Forced, within_forced_macs
from swiftsure.attacks.forms import SUITE_NAMES, attacks_for
from swiftsure.attacks.gates import deployed, force_gates, gate_forcing
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    TargetedObjective,
    average,
    cross_entropy,
    dlr,
    margin,
    misclassified,
    never,
    random_mix,
    single,
    targeted_dlr,
    targeted_margin,
    weighted,
)
from swiftsure.attacks.slowdown import above_thresholds, deepsloth, delayed, one_by_one
from swiftsure.attacks.slowdown_suite import SLOWDOWNS, SlowdownResult, run_slowdown, slowdown_attacks
from swiftsure.attacks.suite import SuiteResult, run_suite

__all__ = [
    "SLOWDOWNS",
    "SUITES",
    "SUITE_NAMES",
    "Forced",
    "Gradient",
    "GradientReport",
    "Judge",
    "Objective",
    "Replayed",
    "SlowdownResult",
    "SuiteResult",
    "TargetedObjective",
    "above_thresholds",
    "apgd",
    "apgd_targeted",
    "at_exit",
    "attacks_for",
    "average",
    "cross_entropy",
    "deepsloth",
    "delayed",
    "deployed",
    "dlr",
    "fab_targeted",
    "fgsm",
    "force_gates",
    "gate_forcing",
    "input_gradient",
    "interval_attack",
    "margin",
    "max_average",
    "misclassified",
    "never",
    "one_by_one",
    "pgd",
    "random_mix",
    "replayed",
    "run_slowdown",
    "run_suite",
    "single",
    "slowdown_attacks",
    "square",
    "targeted_dlr",
    "targeted_margin",
    "weighted",
    "within_forced_macs",
    "wrm",
    "wrm_unprojected",
]
