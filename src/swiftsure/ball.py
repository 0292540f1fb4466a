"""The threat model: all images within eps of x in a norm, inside the pixel range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from swiftsure.errors import InputError

NORMS = ("inf", "2", "1")


def parse_eps(value: float | str) -> float:
    """Read a radius in pixel units, written as a number or a fraction such as ``"8/255"``.

    Raises:
        InputError: it is not a finite number >= 0.
    """
    try:
        eps = float(Fraction(value.strip()) if isinstance(value, str) else value)
    except (ValueError, ZeroDivisionError, TypeError):
        raise InputError(f"eps is {value!r}; allowed: a number >= 0 such as 0.1, or a fraction such as '8/255'") from None
    if not math.isfinite(eps) or eps < 0:
        raise InputError(f"eps is {value!r}; allowed: a finite number >= 0, in pixel units (pixels lie in [0, 1])")
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
        InputError: negative or unreadable eps, unknown norm, or an empty pixel range.
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
        if not self.low < self.high:
            raise InputError(f"pixel range is [{self.low}, {self.high}]; low must be less than high")

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
        delta = (x_adv - x).flatten(1)
        return torch.linalg.vector_norm(delta, ord=math.inf if self.norm == "inf" else float(self.norm), dim=1)

    def contains(self, x_adv: Tensor, x: Tensor, slack: float = 1e-5) -> Tensor:
        """Whether each x_adv lies in the ball around x and in the pixel range: (batch,) bool. NaN never does."""
        inside = (x_adv >= self.low - 1e-7) & (x_adv <= self.high + 1e-7)
        return inside.flatten(1).all(1) & (self.distance(x_adv, x) <= self.radius * (1 + slack) + 1e-7)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Bring x_adv back into the ball around x and into the pixel range.

        For "inf" it is the nearest point. For "2" and "1": the nearest point of the ball, then of the pixel
        range; as x itself lies in the range, the second step cannot leave the ball.
        """
        if self.norm == "inf":
            lower, upper = self.box(x)
            return torch.minimum(torch.maximum(x_adv, lower), upper)
        delta = (x_adv - x).flatten(1)
        if self.norm == "2":
            length = delta.norm(dim=1, keepdim=True)
            delta = delta * (self.radius / length.clamp_min(1e-12)).clamp_max(1.0)
        else:
            delta = _project_l1(delta, self.radius)
        return (x + delta.view_as(x)).clamp(self.low, self.high)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the ball around each image: uniform for "inf"; for "2" and "1" uniform in direction
        and volume before the pixel range is applied. Shaped like x."""
        if self.norm == "inf":
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return self.project(x + (2 * noise - 1) * self.radius, x)
        dims = x[0].numel()
        length = torch.rand(len(x), 1, generator=generator, device=x.device, dtype=x.dtype) ** (1 / dims)
        if self.norm == "2":
            delta = torch.randn(len(x), dims, generator=generator, device=x.device, dtype=x.dtype)
            delta = delta / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)
        else:
            # Exponential magnitudes, normalised, are uniform on the simplex; random signs spread them on the sphere.
            uniform = torch.rand(len(x), dims, 2, generator=generator, device=x.device, dtype=x.dtype)
            magnitude = -uniform[..., 0].clamp_min(1e-12).log()
            delta = magnitude / magnitude.sum(1, keepdim=True) * (uniform[..., 1] - 0.5).sign()
        return self.project(x + (delta * length * self.radius).view_as(x), x)


def _project_l1(delta: Tensor, radius: float) -> Tensor:
    """The nearest point of the L1 ball of that radius, row by row (Duchi et al. 2008): (batch, dims)."""
    magnitude = delta.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius
    rank = torch.arange(1, delta.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    last = (ordered * rank > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0)
    return torch.where(magnitude.sum(1, keepdim=True) <= radius, delta, delta.sign() * (magnitude - threshold).clamp_min(0))
