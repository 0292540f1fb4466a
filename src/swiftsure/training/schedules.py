"""How the radius grows and the learning rate falls, as plain functions of where training stands."""

from __future__ import annotations

import math

from swiftsure.recipe import Optimizer, Schedule


def radius_share(schedule: Schedule, epoch: int, step: int, steps: int) -> float:
    """The training radius as a share of the full one, in [0, 1].

    Args:
        schedule: warmup, ramp and shape.
        epoch: from 1.
        step: of the epoch, from 0; steps: how many the epoch has.
    """
    if schedule.shape == "epoch":
        done, length = float(epoch - schedule.warmup), float(schedule.ramp)
        # The first epoch of a per-epoch ramp is at radius 0, as in HYDRA's trainer.
        done -= 1
    else:
        done = (epoch - 1 - schedule.warmup) * steps + step + 1.0
        length = float(schedule.ramp * steps)
    if epoch <= schedule.warmup:
        return 0.0
    if done >= length:
        return 1.0
    return _smooth(done, length) if schedule.shape == "smooth" else done / length


def _smooth(t: float, length: float) -> float:
    """t^4 for the first quarter of the ramp, then linear with the slope it has there, to 1 at the end."""
    seam = length / 4
    scale = 1 / ((length - seam) * 4 * seam**3 + seam**4)
    if t < seam:
        return scale * t**4
    return scale * (seam**4 + (t - seam) * 4 * seam**3)


def epochs_of(schedule: Schedule, steps: int) -> int:
    """How many epochs of so many steps are begun."""
    return -(-_length(schedule, steps) // steps)


def steps_of(schedule: Schedule, epoch: int, steps: int) -> int:
    """How many of its steps an epoch (from 1) makes: all, or in the last one what is left."""
    return min(steps, _length(schedule, steps) - (epoch - 1) * steps)


def _length(schedule: Schedule, steps: int) -> int:
    """All steps of a training whose epochs have so many."""
    whole = schedule.epochs * steps
    return whole if schedule.steps is None else min(whole, schedule.steps)


def learning_rate(optimizer: Optimizer, schedule: Schedule, epoch: int, step: int, steps: int) -> float:
    """The learning rate of a step: arguments as in `radius_share`."""
    before = (epoch - 1) * steps + step
    if optimizer.decay == "step":
        falls = sum(epoch > at for at in optimizer.decay_epochs)
        falls += sum(before >= at for at in optimizer.decay_steps)
        return optimizer.rate * optimizer.decay_factor**falls
    done = before - optimizer.decay_from * steps
    length = _length(schedule, steps) - optimizer.decay_from * steps
    share = max(0.0, done / max(1, length))
    if optimizer.decay == "cosine":
        return optimizer.rate * (1 + math.cos(math.pi * share)) / 2
    if optimizer.decay == "linear":
        return optimizer.rate * (1 - share)
    return optimizer.rate
