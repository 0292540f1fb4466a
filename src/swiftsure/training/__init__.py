"""Training: the three-term loss, mixing controllers, schedules, and the loop that joins them."""

from swiftsure.recipe import Attack, Loss, Mixing, Optimizer, Schedule
from swiftsure.training.loop import History, fit
from swiftsure.training.mixing import Controller, controller
from swiftsure.training.schedules import learning_rate, radius_share
from swiftsure.training.source import as_set, source
from swiftsure.training.statistics import BatchStatistics
from swiftsure.training.terms import classification_loss, mixtrain_loss, three_term_loss, worst_case_loss

__all__ = [
    "Attack",
    "BatchStatistics",
    "Controller",
    "History",
    "Loss",
    "Mixing",
    "Optimizer",
    "Schedule",
    "as_set",
    "classification_loss",
    "controller",
    "fit",
    "learning_rate",
    "mixtrain_loss",
    "radius_share",
    "source",
    "three_term_loss",
    "worst_case_loss",
]
