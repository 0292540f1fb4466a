"""The square attack: random search over square windows, by queries alone (Andriushchenko et al. 2020)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from swiftsure.attacks._gradient import (
    GradientReport,
    assert_inside,
    attacking,
    check_count,
    checked_inputs,
    looked_at,
)
from swiftsure.attacks._restarts import Found, worst_of
from swiftsure.attacks.objectives import Judge, Objective, margin, misclassified
from swiftsure.ball import Ball
from swiftsure.errors import InputError

# After these shares of all queries the share of pixels in a window halves (the paper's schedule for 10,000).
_HALVINGS = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)
# Budget moves are whole up to this share of the queries; from then on every other one is a part.
_BOLD = 0.2
# Of so many queries in L2 and L1 one goes where those before it say that the objective rises.
_ASK_MEMORY = 10


def square(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    objective: Objective = margin,
    judge: Judge = misclassified,
    steps: int = 5000,
    restarts: int = 1,
    share: float = 0.8,
    generator: torch.Generator | None = None,
    report: GradientReport | None = None,
) -> Tensor:
    """Change one random window at a time and keep what does not lower the objective. No gradient is asked for.

    So a network that hides its gradients does not hide from it. L-inf: the start is vertical stripes of +-eps; a
    window sets all its pixels of a channel to +eps or -eps. L2 and L1: the start is a mosaic of bumps; a window takes
    the budget that another has, in the shape of a bump and its negative side by side. Each sample has windows and
    signs of its own, and drops out of the batch as soon as it is broken.

    Ours: ties are kept; a window that would change nothing takes the other sign; the smallest window is one pixel; a
    bump in L1 is one pixel, as budget spread thinly there moves little; in L2 and L1 every other late query moves
    only a random part of the budget, half of the time in the shape of one bump, and every tenth goes some or all of
    the way to the point of the ball that is best by the slope which all answers so far tell (`learned`).

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit; left as found.
        x: images, (B, C, H, W), in the ball's pixel range.
        y: labels, (B,), integers.
        ball: the threat model.
        objective: what to raise, (tuple of logits, y) -> (B,).
        judge: what counts as broken, (tuple of logits, y) -> (B,) bool.
        steps: queries per sample and restart, the start not counted; 0 returns the start.
        restarts: how many runs at most.
        share: of the pixels that a window covers at first; it halves eight times.
        generator: makes the run reproducible; None draws from torch's global one.
        report: takes no part, as there are no gradients; here so that all attacks are called alike.

    Returns:
        Adversarial images, shaped like x, inside the ball and the pixel range, outside any autograd graph.

    Raises:
        InputError: as `apgd`; a share outside (0, 1].
    """
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; allowed: above 0 and at most 1")
    x, y = checked_inputs(net, x, y, ball)
    if ball.radius == 0 or len(x) == 0:
        return x.clone()
    boxed = ball.norm == "inf"
    begin, propose = (stripes, set_window) if boxed else (mosaic, move_budget)
    height, width = x.shape[2:]

    def run(number: int, x: Tensor, y: Tensor) -> Found:
        draw = Draw(generator, x)
        found = Found(x.clone(), x.new_full((len(x),), -math.inf), torch.zeros_like(y, dtype=torch.bool))
        left = torch.arange(len(x), device=x.device)
        best, best_loss, tried = x, found.loss, begin(x, ball, draw)
        slope = torch.zeros_like(x)
        for step in range(steps + 1):
            logits, loss, _ = looked_at(net, tried, y, objective, gradient=False)
            broken = judge(logits, y)
            if not boxed:
                slope = learned(slope, tried - best, (loss - best_loss).to(x.dtype))
            # Not only where it rises: outputs that were rounded have plateaus, and this walks across them.
            better = (loss >= best_loss) | broken
            best = torch.where(better.view(-1, 1, 1, 1), tried, best)
            best_loss = torch.where(better, loss.to(x.dtype), best_loss)
            if bool(broken.any()):
                done = left[broken]
                found.x_adv[done], found.loss[done] = best[broken], best_loss[broken]
                found.broken[done] = True
                left, x, y, best, best_loss, slope = (
                    t[~broken] for t in (left, x, y, best, best_loss, slope)
                )
            if step == steps or len(left) == 0:
                break
            part = share / 2 ** sum(step >= mark * steps for mark in _HALVINGS)
            side = min(max(1, int(math.sqrt(part * height * width))), height, width)
            fine = step > _BOLD * steps and step % 2 == 1
            tried = propose(x, best, side, fine, ball, draw)
            if not boxed and step % _ASK_MEMORY == _ASK_MEMORY - 1:
                tried = torch.where(
                    slope.flatten(1).any(1).view(-1, 1, 1, 1), uphill(x, best, slope, ball, draw), tried
                )
        found.x_adv[left], found.loss[left] = best, best_loss
        return found

    with attacking(net):
        worst = worst_of(x, y, restarts, run)
    return assert_inside(worst, x, ball)


class Draw:
    """Random signs and places, drawn where the generator lives and moved to the images."""

    def __init__(self, generator: torch.Generator | None, like: Tensor) -> None:
        self.generator, self.like = generator, like
        self.device = generator.device if generator else like.device

    def signs(self, *shape: int) -> Tensor:
        """+1 or -1."""
        drawn = torch.randint(0, 2, shape, generator=self.generator, device=self.device)
        return (2 * drawn - 1).to(self.like)

    def shares(self, batch: int) -> Tensor:
        """Uniform in [0, 1): (batch, 1, 1)."""
        return torch.rand(batch, 1, 1, generator=self.generator, device=self.device).to(self.like)

    def windows(self, count: int, side: int, height: int, width: int) -> Tensor:
        """Flat indices of the pixels of one random window each: (count, side * side), row by row."""
        places = torch.rand(2, count, generator=self.generator, device=self.device).to(self.like.device)
        top, left = (places * places.new_tensor([[height - side + 1], [width - side + 1]])).long()
        return _pixels(top, left, side, width)

    def window_of(self, held: Tensor, side: int) -> Tensor:
        """As `windows`, each around one pixel of those where held (count, height, width) is above 0, any of them."""
        count, height, width = held.shape
        drawn = torch.rand(count, height * width, generator=self.generator, device=self.device).to(held)
        pixel = ((1 - drawn) * (held.flatten(1) > 0)).argmax(1)
        top = (pixel // width - side // 2).clamp(0, height - side)
        left = (pixel % width - side // 2).clamp(0, width - side)
        return _pixels(top, left, side, width)


def _pixels(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """Flat indices of the pixels of the windows with those corners, (count,) each: (count, side * side)."""
    offsets = torch.arange(side, device=top.device)
    return (top * width + left)[:, None] + (offsets[:, None] * width + offsets).flatten()


def stripes(x: Tensor, ball: Ball, draw: Draw) -> Tensor:
    """Vertical stripes of +-eps, one pixel wide, a sign of its own for every channel: like x."""
    batch, channels, _, width = x.shape
    return ball.project(x + ball.radius * draw.signs(batch, channels, 1, width), x)


def set_window(x: Tensor, best: Tensor, side: int, fine: bool, ball: Ball, draw: Draw) -> Tensor:
    """best with a window of each image at x + eps or x - eps, a sign for every channel: like x."""
    (batch, channels, height, width), radius = x.shape, ball.radius
    window = draw.windows(batch, side, height, width)[:, None].expand(-1, channels, -1)
    clean, signs = x.flatten(2).gather(2, window), draw.signs(batch, channels, 1)
    there = (clean + radius * signs).clamp(ball.low, ball.high)
    # A window that is there already would be a query for nothing: it goes to the other side.
    same = (there == best.flatten(2).gather(2, window)).flatten(1).all(1).view(-1, 1, 1)
    there = torch.where(same, (clean - radius * signs).clamp(ball.low, ball.high), there)
    return best.flatten(2).scatter(2, window, there).view_as(x)


def mosaic(x: Tensor, ball: Ball, draw: Draw) -> Tensor:
    """Bumps of random sign on a grid of five by five, of length eps together: like x."""
    batch, channels, height, width = x.shape
    side = max(1, min(height, width) // 5)
    rows, columns = height // side, width // side
    shape = bump(side, side, x, ball.norm).repeat(rows, columns)
    signs = draw.signs(batch, channels, rows, columns)
    signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    delta = torch.zeros_like(x)
    delta[..., : rows * side, : columns * side] = shape * signs
    length = ball.distance(x + delta, x).view(-1, 1, 1, 1)
    return ball.project(x + delta * (ball.radius / length), x)


def move_budget(x: Tensor, best: Tensor, side: int, fine: bool, ball: Ball, draw: Draw) -> Tensor:
    """best with budget taken from one window and given, with all that lies idle, to another: like x.

    The other's new values are its old ones plus a bump, both of length 1, scaled to what it now holds.
    """
    batch, channels, height, width = x.shape
    power = float(ball.norm)
    side = max(side, 2) if fine else max(side + 1 - side % 2, 3)
    side = min(side, height, width)
    delta = (best - x).flatten(2)
    gains, loses = (draw.windows(batch, side, height, width) for _ in "12")
    # Of an empty window nothing can be taken, and in L1 most are empty.
    held = delta.abs().sum(1)
    empty = held.gather(1, loses).sum(1, keepdim=True) == 0
    loses = torch.where(empty, draw.window_of(held.view(batch, height, width), side), loses)
    gains, loses = (windows[:, None].expand(-1, channels, -1) for windows in (gains, loses))
    kept = 1 - draw.shares(batch) ** 2 if fine else torch.zeros_like(delta[:, :1, :1])
    rest = delta.scatter(2, loses, delta.gather(2, loses) * kept ** (1 / power))
    rest = rest.scatter(2, gains, 0.0)

    def spent(delta: Tensor) -> Tensor:
        """What of the budget each channel takes: (batch, channels, 1). Budgets add up, lengths do not."""
        return delta.abs().pow(power).sum(2, keepdim=True)

    # What lies idle belongs to all channels alike; what the two windows give up stays in its channel.
    idle = (ball.radius**power - spent(delta).sum(1, keepdim=True)).clamp_min(0) / channels
    budget = (spent(delta) - spent(rest)).clamp_min(0) + idle
    old = delta.gather(2, gains)
    new = _unit(_shapes(side, fine, batch, draw, ball.norm) * draw.signs(batch, channels, 1), power)
    new = _unit((new * draw.shares(batch) if fine else new) + _unit(old, power), power)
    new = new * budget ** (1 / power)
    return ball.project(x + rest.scatter(2, gains, new).view_as(x), x)


def learned(slope: Tensor, move: Tensor, rise: Tensor) -> Tensor:
    """The slope nearest to the one believed in that explains what a move did (Kaczmarz's projection).

    Args:
        slope: of the objective by pixel as far as it is known, (B, C, H, W).
        move: a change of the image, shaped like it.
        rise: of the objective by that move, (B,); nothing is learned where it is no number, or nothing moved.
    """
    length = move.flatten(1).square().sum(1)
    surprise = rise - (slope * move).flatten(1).sum(1)
    step = torch.where((length > 0) & surprise.isfinite(), surprise / length, 0.0)
    better = slope + step.view(-1, 1, 1, 1) * move
    return torch.where(better.isfinite(), better, slope)


def uphill(x: Tensor, best: Tensor, slope: Tensor, ball: Ball, draw: Draw) -> Tensor:
    """best moved towards the point of the ball that is furthest up the slope; one time in three all the way."""
    part = (1.5 * draw.shares(len(x))).clamp_max(1).view(-1, 1, 1, 1)
    return ball.project(best + part * (ball.maximiser(x, slope) - best), x)


def _shapes(side: int, fine: bool, batch: int, draw: Draw, norm: str) -> Tensor:
    """Two bumps of opposite sign side by side or one upon the other; if fine, half of them one bump: (batch, 1, n)."""
    halves = torch.cat(
        [bump(side // 2, side, draw.like, norm), -bump(side - side // 2, side, draw.like, norm)]
    )
    shapes = torch.where(draw.signs(batch, 1, 1) > 0, halves.flatten(), halves.t().flatten())
    if fine:
        shapes = torch.where(draw.signs(batch, 1, 1) > 0, bump(side, side, draw.like, norm).flatten(), shapes)
    return shapes


def _unit(values: Tensor, power: float) -> Tensor:
    """Rows (batch, channels, n) of length 1 in that norm; 0 where they are 0."""
    return values / torch.linalg.vector_norm(values, ord=power, dim=2, keepdim=True).clamp_min(1e-10)


def bump(height: int, width: int, like: Tensor, norm: str = "2") -> Tensor:
    """A pyramid of nested rectangles, highest in the middle; in L1 one pixel: (height, width), never negative."""
    return _bump(height, width, norm).to(like)


@functools.cache
def _bump(height: int, width: int, norm: str) -> Tensor:
    """The k-th ring from outside, of n, is higher than the one around it by 1 / (n + 1 - k)^2."""
    if norm == "1":
        point = torch.zeros(height, width)
        # An image of one row has no half above the other.
        point[height // 2 : height // 2 + 1, width // 2 : width // 2 + 1] = 1
        return point
    rings = max(height, width) // 2 + 1
    total = torch.zeros(height, width)
    for ring in range(rings):
        top, left = min(ring, (height - 1) // 2), min(ring, (width - 1) // 2)
        total[top : height - top, left : width - left] += 1 / (rings - ring) ** 2
    return total
