"""Points of a ball that break a network: inner methods x objectives over exits."""

from swiftsure.attacks._fgsm import fgsm
from swiftsure.attacks._gradient import GradientReport
from swiftsure.attacks._pgd import pgd
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    average,
    cross_entropy,
    margin,
    misclassified,
    single,
)
from swiftsure.attacks.suite import SUITES, SuiteResult, run_suite

__all__ = [
    "SUITES",
    "GradientReport",
    "Judge",
    "Objective",
    "SuiteResult",
    "average",
    "cross_entropy",
    "fgsm",
    "margin",
    "misclassified",
    "pgd",
    "run_suite",
    "single",
]
