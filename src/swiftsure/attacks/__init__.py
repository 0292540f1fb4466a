"""Points of a ball that break a network: inner methods x objectives over exits."""

from swiftsure.attacks._apgd import apgd, apgd_targeted
from swiftsure.attacks._exits import max_average
from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import GradientReport
from swiftsure.attacks._interval import interval_attack
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks._square import square
from swiftsure.attacks._wrm import wrm, wrm_unprojected
from swiftsure.attacks.forms import SUITE_NAMES, attacks_for
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
from swiftsure.attacks.slowdown import above_thresholds, deepsloth, delayed
from swiftsure.attacks.suite import SUITES, SuiteResult, run_suite

__all__ = [
    "SUITES",
    "SUITE_NAMES",
    "GradientReport",
    "Judge",
    "Objective",
    "SuiteResult",
    "TargetedObjective",
    "above_thresholds",
    "apgd",
    "apgd_targeted",
    "attacks_for",
    "average",
    "cross_entropy",
    "deepsloth",
    "delayed",
    "dlr",
    "fgsm",
    "interval_attack",
    "margin",
    "max_average",
    "misclassified",
    "never",
    "pgd",
    "random_mix",
    "run_suite",
    "single",
    "square",
    "targeted_dlr",
    "targeted_margin",
    "weighted",
    "wrm",
    "wrm_unprojected",
]
