"""The threat model: all images within eps of x in a norm, inside the pixel range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftsure.errors import InputError

NORMS = ("inf", "2", "1")
LARGEST = 1e15
"""Of a radius: far beyond all images, and its square is a number in float32."""


def parse_eps(value: float | str) -> float:
    """Read a radius in pixel units, written as a number or a fraction such as ``"8/255"`` or ``"1.785/255"``.

    Raises:
        InputError: it is not a number from 0 to `LARGEST`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        above, *below = value.split("/") if isinstance(value, str) else (value,)
        eps = float(above) if not below else float(above) / float(*below)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        allowed = "a number >= 0 such as 0.1, or a fraction such as '8/255'"
        raise InputError(f"eps is {value!r}; allowed: {allowed}") from None
    if not 0 <= eps <= LARGEST:
        raise InputError(
            f"eps is {value!r}; allowed: a finite number >= 0, up to {LARGEST:g}, in pixel units (pixels lie in [0, 1])"
        )
    return eps


@dataclass(frozen=True)
class Ball:
    """All x' with ||x' - x||_norm <= eps and every pixel in [low, high].

    Args:
        eps: radius in pixel units, a number or a fraction such as "8/255".
        norm: "inf", "2" or "1".
        low: smallest valid pixel.
        high: largest valid pixel.

    Raises:
        InputError: negative or unreadable eps, unknown norm, or an empty or unbounded pixel range.
    """

    eps: float | str
    norm: str = "inf"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_eps(self.eps))
        norm = str(self.norm).strip().lower().removeprefix("l").removesuffix(".0")
        if norm not in NORMS:
            raise InputError(f"norm is {self.norm!r}; allowed: {', '.join(map(repr, NORMS))}")
        object.__setattr__(self, "norm", norm)
        if not (self.low < self.high and math.isfinite(self.low) and math.isfinite(self.high)):
            raise InputError(
                f"pixel range is [{self.low}, {self.high}]; allowed: two finite numbers, low less than high"
            )

    @property
    def radius(self) -> float:
        """eps as a float."""
        return float(self.eps)

    def with_eps(self, eps: float | str) -> Ball:
        """The same ball with another radius."""
        return Ball(eps, self.norm, self.low, self.high)

    def as_dict(self) -> dict[str, float | str]:
        """Plain values for JSON: eps, norm, low, high."""
        return {"eps": self.radius, "norm": self.norm, "low": self.low, "high": self.high}

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest box that holds the ball around each image: (lower, upper), shaped like x.

        Exact for "inf"; for "2" and "1" it is the enclosing box. An image of the ball never leaves it.
        """
        return (x - self.radius).clamp(self.low, self.high), (x + self.radius).clamp(self.low, self.high)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The norm of x_adv - x per image: (batch,)."""
        return torch.linalg.vector_norm((x_adv - x).flatten(1), ord=float(self.norm), dim=1)

    def contains(self, x_adv: Tensor, x: Tensor, slack: float = 1e-5) -> Tensor:
        """Whether each x_adv lies in the ball around x and in the pixel range: (batch,) bool. NaN never does.

        slack is relative to eps; a float32 rounding of the largest pixel is allowed on top.
        """
        rounding = 1e-7 * max(1.0, abs(self.low), abs(self.high))
        in_range = (x_adv >= self.low - rounding) & (x_adv <= self.high + rounding)
        return in_range.flatten(1).all(1) & (self.distance(x_adv, x) <= self.radius * (1 + slack) + rounding)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point (Euclidean) to x_adv that lies in the ball around x and in the pixel range.

        x itself must lie in the pixel range. A NaN pixel stays NaN for "inf"; else it spoils its whole image.
        """
        if self.norm == "inf":
            lower, upper = self.box(x)
            return torch.clamp(x_adv, lower, upper)
        delta = x_adv - x
        room = self.room(x, delta).flatten(1)
        nearest = _project_l2 if self.norm == "2" else _project_l1
        return self._moved(x, nearest(delta.flatten(1), room, self.radius))

    def room(self, x: Tensor, direction: Tensor) -> Tensor:
        """How far each pixel of x can move along the sign of direction inside the pixel range.

        Both are shaped like x, and so is the result: >= 0, and 0 where the direction is 0.
        """
        # Products and a maximum: torch.where costs ten times as much on a CPU, and attacks ask at every step.
        sign = direction.sign()
        return torch.maximum(sign * (self.high - x), sign * (self.low - x))

    def maximiser(self, x: Tensor, direction: Tensor) -> Tensor:
        """The point x' of the ball around x, inside the pixel range, with the largest <direction, x'>.

        Exact for every norm: a corner of the box ("inf"), a point of the clipped sphere ("2"), the budget
        spent on the steepest pixels first, each to the end of its range ("1"). Pixels of zero slope stay.

        Args:
            x: images in the pixel range, (B, ...).
            direction: finite slopes, shaped like x.
        """
        if self.norm == "inf":
            lower, upper = self.box(x)
            return torch.where(direction > 0, upper, torch.where(direction < 0, lower, x))
        slope, room = direction.flatten(1), self.room(x, direction).flatten(1)
        if self.norm == "1":
            return self._moved(x, steepest_l1(slope, room, self.radius))
        # Far out along the slope, the nearest point of a convex set is its furthest in that direction.
        peak = slope.abs().amax(1, keepdim=True)
        far = torch.where(peak > 0, slope / peak, 0.0) * (1e4 * (self.high - self.low))
        return self._moved(x, _project_l2(far, room, self.radius))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the ball around each image, shaped like x.

        Uniform for "inf" (then clipped to the pixel range); for "2" and "1" uniform in direction and volume
        before the range is applied. The numbers are drawn where the generator lives and then moved to x.
        """
        batch, dims = len(x), math.prod(x.shape[1:])
        if self.norm == "inf":
            noise = _uniform(x.shape, x, generator).mul_(2).sub_(1)
            return self.project(x + noise * self.radius, x)
        length = _uniform((batch, 1), x, generator) ** (1 / max(dims, 1))
        if self.norm == "2":
            device = generator.device if generator else x.device
            delta = torch.randn((batch, dims), generator=generator, device=device, dtype=x.dtype).to(x.device)
            delta = delta / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)
        else:
            # Normalised exponential magnitudes are uniform on the simplex; random signs reach every orthant.
            uniform = _uniform((batch, dims, 2), x, generator)
            magnitude = -uniform[..., 0].clamp_min(1e-12).log()
            delta = magnitude / magnitude.sum(1, keepdim=True) * (uniform[..., 1] - 0.5).sign()
        return self.project(x + (delta * length * self.radius).view_as(x), x)

    def _moved(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta, rounded towards x: thousands of pixels rounded outwards add up to more than eps."""
        return torch.nextafter(x + delta.view_as(x), x).clamp(self.low, self.high)


def steepest_l1(slope: Tensor, room: Tensor, length: float) -> Tensor:
    """The move of that L1 length with the largest <slope, move>, where each entry has only so much room.

    The length goes to the entries of largest |slope| first. All arguments and the result are (batch, dims);
    room >= 0 is counted in the direction of the slope. Entries of zero slope do not move.
    """
    order = slope.abs().argsort(dim=1, descending=True)
    reach = room.gather(1, order)
    spent = torch.minimum(reach, (length - (reach.cumsum(1) - reach)).clamp_min(0))
    return torch.zeros_like(spent).scatter_(1, order, spent) * slope.sign()


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator else like.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def _project_l2(delta: Tensor, room: Tensor, radius: float) -> Tensor:
    """The nearest point to delta in the L2 ball of that radius whose entries move no further than room.

    By the KKT conditions it is clip(t * delta) for the largest t <= 1 that keeps the norm. Given which
    entries clip, t has a closed form; it only grows from round to round, and no round leaves the ball.
    All arguments and the result are (batch, dims); room >= 0 is counted in the direction of delta.
    """
    clips_at = room / delta.abs()
    squares, room_squares = delta.square(), room.square()
    left, free = radius**2, squares.sum(1, keepdim=True)
    t = torch.zeros_like(free)
    for _ in range(32):
        before = t
        t = torch.maximum(t, (left / free.clamp_min(1e-30)).clamp(0, 1).sqrt())
        if bool((t - before <= 1e-6 * t).all()):
            break
        is_free = (clips_at - t).clamp_min_(0).sign_()
        free = torch.linalg.vecdot(squares, is_free)[:, None]
        left = radius**2 - torch.linalg.vecdot(room_squares, 1 - is_free)[:, None]
    return torch.minimum(delta.abs() * t, room) * delta.sign()


def _project_l1(delta: Tensor, room: Tensor, radius: float) -> Tensor:
    """The nearest point to delta in the L1 ball of that radius whose entries move no further than room.

    By the KKT conditions it is clip(soft(delta, theta)), soft thresholding by the least theta >= 0 that keeps
    the norm; found by bisection from the side that always stays inside the ball. Without clipping it is the
    projection of Duchi et al. (2008). Shapes and room as in `_project_l2`.
    """
    magnitude = delta.abs()
    peak = magnitude.amax(1, keepdim=True)
    inside = torch.minimum(magnitude, room).sum(1, keepdim=True) <= radius
    # Searched as the distance below the peak: far from a small ball, theta itself has too few digits.
    below_peak = peak - magnitude
    fits, beyond = torch.zeros_like(peak), peak
    for _ in range(32):
        depth = (fits + beyond) / 2
        ok = torch.minimum((depth - below_peak).clamp_min_(0), room).sum(1, keepdim=True) <= radius
        fits, beyond = torch.where(ok, depth, fits), torch.where(ok, beyond, depth)
    shrunk = torch.where(inside, magnitude, (fits - below_peak).clamp_min_(0))
    return torch.minimum(shrunk, room) * delta.sign()
