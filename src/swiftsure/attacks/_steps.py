"""The step rules of apgd: where a climb goes next, and when its steps shrink.

A rule holds one number or image for each sample that is still climbing; `kept` drops the others. The climb tells it
how each new point compares (`note`), lets it look back now and then (`check`), and asks it for the next point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swiftsure.ball import Ball


@dataclass
class Climb:
    """Where some samples are, and their best so far: (B, ...) each."""

    x: Tensor
    y: Tensor
    now: Tensor
    grad: Tensor
    best: Tensor
    best_loss: Tensor
    best_grad: Tensor

    def back_to_best(self, which: Tensor) -> None:
        """Samples of a mask go on from their best point."""
        which = which.view(-1, *[1] * (self.x.dim() - 1))
        self.now = torch.where(which, self.best, self.now)
        self.grad = torch.where(which, self.best_grad, self.grad)


class Rule(Protocol):
    """How a climb moves in one norm."""

    def note(self, rose: Tensor) -> None:
        """Whether the objective rose at each sample's latest step: (B,) bool."""

    def check(self, done: int, climb: Climb) -> None:
        """After `done` steps, from 0: look back, change the steps, and send samples back to their best point."""

    def next(self, climb: Climb) -> Tensor:
        """The next points, in the ball and the pixel range."""


def kept(state: object, which: Tensor) -> None:
    """Drop all samples outside a mask from a climb or a rule."""
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(state, name, value[which])


class Momentum:
    """L-inf and L2 (Croce and Hein 2020, algorithm 1).

    Steps begin at 2 eps, whole, with 0.75 of the step and 0.25 of the last move carried on. At checkpoints that come
    ever more often, a sample halves its step and goes back to its best point if fewer than 75% of the steps since the
    last one raised its objective, or if neither its step nor its best has changed since.

    Args:
        ball: the threat model.
        x: images, (B, ...).
        steps: how many the whole climb has.
    """

    def __init__(self, ball: Ball, x: Tensor, steps: int) -> None:
        self.ball = ball
        self.checkpoints = checkpoints(steps)
        self.last_check = 0
        self.size = x.new_full((len(x),), 2 * ball.radius)
        self.rises = x.new_zeros(len(x))
        self.halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.best_then = x.new_full((len(x),), -math.inf)
        self.before = x[:, :0]
        """The points before the present ones; empty at first."""

    def note(self, rose: Tensor) -> None:
        """As `Rule`."""
        self.rises += rose

    def check(self, done: int, climb: Climb) -> None:
        """As `Rule`."""
        if done not in self.checkpoints:
            return
        seldom = self.rises < 0.75 * (done - self.last_check)
        stuck = ~self.halved & (climb.best_loss <= self.best_then)
        self.halved, self.last_check = seldom | stuck, done
        self.size[self.halved] /= 2
        self.best_then, self.rises = climb.best_loss.clone(), torch.zeros_like(self.rises)
        climb.back_to_best(self.halved)

    def next(self, climb: Climb) -> Tensor:
        """As `Rule`."""
        now, size = climb.now, self.size.view(-1, *[1] * (climb.x.dim() - 1))
        direction = climb.grad.sign() if self.ball.norm == "inf" else unit_l2(climb.grad)
        there = self.ball.project(torch.addcmul(now, size, direction), climb.x)
        if self.before.shape == now.shape:
            there = self.ball.project(now + 0.75 * (there - now) + 0.25 * (now - self.before), climb.x)
        self.before = now
        return there


class Sparse:
    """L1 (Croce and Hein 2021, "Mind the box"), and a last part of our own.

    A step of length s moves the k pixels of largest slope that have room by s / k each. k begins at two thirds of the
    pixels that the start has moved, a fifth of all where it has moved none, and follows the best point in the same
    way. Steps begin at eps; every 4% of the climb those of a sample whose number of moved pixels has settled are
    divided by 1.5, down to eps / 10; where it still falls, they are eps again, and go on from the best point.

    The last 30% begin again at the best point, and settle: a pixel counts towards the k only as far as its range, from
    the clean image on, could take eps / k, so that those chosen can hold all of eps; and where the number has settled
    but the objective hardly rises, k falls further. Without this a linear objective ends up to 8% short of its
    optimum wherever pixels are full; with nothing else, curved ones end lower.
    """

    STEADY = 0.95
    SETTLING = 0.7

    def __init__(self, ball: Ball, x: Tensor, steps: int) -> None:
        self.ball = ball
        self.period = max(1, round(0.04 * steps))
        self.settles_at = round(self.SETTLING * steps)
        self.settling = False
        self.size = x.new_full((len(x),), ball.radius)
        self.moved, self.count = x.new_full((2, len(x)), math.nan)
        self.first, self.best_then = x.new_full((2, len(x)), -math.inf)

    def note(self, rose: Tensor) -> None:
        """As `Rule`; what counts here is how many pixels moved."""

    def check(self, done: int, climb: Climb) -> None:
        """As `Rule`."""
        begins = done == 0 or (done >= self.settles_at and not self.settling)
        if not begins and done % self.period:
            return
        moved = (climb.best != climb.x).flatten(1).sum(1).to(self.size.dtype)
        if begins:
            self.settling = done >= self.settles_at
            self.first, self.moved = climb.best_loss.clone(), torch.full_like(moved, math.nan)
            moved = torch.where(moved == 0, 0.3 * climb.x[0].numel(), moved)
        falling = ~(moved >= self.STEADY * self.moved)
        self.size = torch.where(falling, self.ball.radius, (self.size / 1.5).clamp_min(self.ball.radius / 10))
        stuck = torch.zeros_like(falling)
        if self.settling:
            stuck = ~falling & (climb.best_loss - self.best_then <= 0.01 * (climb.best_loss - self.first))
        self.count = torch.where(stuck, self.count, moved) / 1.5
        self.moved, self.best_then = moved, climb.best_loss.clone()
        climb.back_to_best(falling)

    def next(self, climb: Climb) -> Tensor:
        """As `Rule`."""
        grad = torch.nan_to_num(climb.grad, nan=0.0)
        slope, eps = grad.flatten(1), self.ball.radius
        count = self.count.floor().clamp_min(1)[:, None]
        if self.settling:
            order = slope.abs().argsort(dim=1, descending=True)
            room = self.ball.room(climb.x, grad).flatten(1)
            takes = torch.minimum(room, eps / count).gather(1, order)
            left = eps * (1 + 1e-5) - (takes.cumsum(1) - takes)
            share = torch.zeros_like(slope).scatter_(1, order, (left / takes.clamp_min(1e-12)).clamp(0, 1))
        else:
            steep = slope.abs() * (self.ball.room(climb.now, grad).flatten(1) > 0)
            least = steep.sort(dim=1, descending=True).values.gather(1, count.long() - 1)
            share = ((steep >= least) & (steep > 0)).to(slope.dtype)
            count = share.sum(1, keepdim=True).clamp_min(1)
        step = slope.sign() * share * (self.size[:, None] / count)
        return self.ball.project(climb.now + step.view_as(climb.now), climb.x)


def checkpoints(steps: int) -> frozenset[int]:
    """After how many steps a sample looks back: at 22% of all, then at intervals that shrink from 19% to 6%."""
    marks, percent, gap = [], 0, 22
    while (percent := percent + gap) < 100:
        marks.append(math.ceil(percent * steps / 100))
        gap = max(gap - 3, 6)
    return frozenset(marks)


def unit_l2(grad: Tensor) -> Tensor:
    """Gradients (B, ...) of length 1; 0 where they are 0, NaN counting as 0."""
    grad = torch.nan_to_num(grad, nan=0.0)
    # Scaled by the largest entry first: squares of a saturated network's gradients underflow.
    flat = grad.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)).view_as(grad)


RULES: dict[str, Callable[[Ball, Tensor, int], Rule]] = {"inf": Momentum, "2": Momentum, "1": Sparse}
"""The rule of each norm."""
