"""Guards of an evaluation: cheap checks that tell a robust network from an attack that did not work.

A figure of robust accuracy is an upper bound, and a broken attack makes it a wrong one (Athalye et al. 2018; Carlini
et al. 2019, "On evaluating adversarial robustness", whose list these follow). Each guard asks one question of a few
hundred samples and ends as reliable, suspicious or not evaluated, with its reason in a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from swiftsure.attacks import questions
from swiftsure.attacks._gradient import at_once, checked_inputs
from swiftsure.attacks.gates import deployed
from swiftsure.attacks.objectives import (
    Judge,
    Objective,
    misclassified,
)
from swiftsure.attacks.questions import (
    CHECKS,
    LEAST,
    NOT_EVALUATED,
    RELIABLE,
    SAMPLES,
    SUSPICIOUS,
    Asked,
    Check,
)
from swiftsure.attacks.suite import SuiteResult
from swiftsure.ball import Ball
from swiftsure.exits.policies import Policy
from swiftsure.precision import in_full_precision


@dataclass(frozen=True)
class Guards:
    """What all guards say.

    Attributes:
        n: how many samples were asked about.
        checks: by the names of `CHECKS`.
        seconds: for all of them.
        broken: images of the ball that guards found and the suite did not, by the places of their samples.
    """

    n: int
    checks: dict[str, Check] = field(default_factory=dict)
    seconds: float = 0.0
    broken: dict[int, Tensor] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Suspicious if any is; reliable if all but transfer, which needs another network, are; else not evaluated."""
        said = {name: check.verdict for name, check in self.checks.items()}
        if SUSPICIOUS in said.values():
            return SUSPICIOUS
        needed = [said.get(name, NOT_EVALUATED) for name in CHECKS if name != "transfer"]
        return NOT_EVALUATED if NOT_EVALUATED in needed else RELIABLE

    @property
    def reason(self) -> str:
        """In a line: every reason for suspicion, or what was missing, or what was asked."""
        verdict = self.verdict
        if verdict == RELIABLE:
            asked = [name for name, check in self.checks.items() if check.verdict == RELIABLE]
            return f"{', '.join(asked)} asked of {self.n} samples"
        reasons = dict.fromkeys(check.reason for check in self.checks.values() if check.verdict == verdict)
        return "; ".join(reasons)

    def as_dict(self) -> dict[str, object]:
        """Plain values for results.json."""
        checks = {
            name: {"verdict": check.verdict, "reason": check.reason} for name, check in self.checks.items()
        }
        return {"n": self.n, "verdict": self.verdict, "reason": self.reason, "checks": checks}


def not_evaluated(reason: str) -> Guards:
    """No guard was asked, for that reason."""
    return Guards(0, {name: Check(NOT_EVALUATED, reason) for name in CHECKS})


@in_full_precision
def guard(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    found: SuiteResult,
    *,
    policy: Policy | None = None,
    sources: Mapping[str, nn.Module] | None = None,
    samples: int = SAMPLES,
    batch: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Guards:
    """Ask whether what a suite left standing was really attacked.

    - randomness: do the same images get the same answers twice, in another order, and in smaller batches?
    - gradients: of the suite's gradient attacks, is even the least blind one blind? With a policy: at an exit that may
      answer, are they blind there, whatever they see elsewhere?
    - steps: does twice as many steps of apgd (of pgd, for suites without apgd) break what the suite left?
    - restarts: do five random starts of apgd on the margin, a loss that does not saturate; with a policy, towards each
      gate as well?
    - queries: does square, which asks for no gradient, break what all gradient attacks left; with a policy, does it by
      forcing any gate?
    - eps: does accuracy fall with the radius, to that of a constant answer where the ball holds every image?
    - noise: do random images of the ball break what the suite left?
    - transfer: do images made on another network? Not evaluated where none is given.

    Args:
        net: returns logits (B, classes), or a tuple of them, one per exit; its modes are left as found.
        x: the images of the suite, in its order, (n, C, H, W).
        y: their labels, (n,).
        ball: the threat model.
        found: what the suite found on all of them.
        policy: of a network with several exits; success is then a wrong answer of the exit that answers.
        sources: other networks for the same images, by name.
        samples: how many are asked about, at most: the first ones.
        batch: how many samples are attacked at a time; None: 500, on a CPU 100, of
            tiny images 500.
        seed: of all random numbers.
        progress: called with the name of each check before it begins.
        clock: what seconds are read from.

    Raises:
        InputError: images or labels that do not fit.
    """
    n = min(samples, len(x))
    if n < LEAST:
        return not_evaluated(f"{n} samples are too few; guards need {LEAST}")
    began = clock()
    x, y = checked_inputs(net, x[:n], y[:n], ball)
    judge: Judge = misclassified if policy is None else policy.misclassified
    over: Callable[[Objective], Objective] = (
        (lambda of: of) if policy is None else (lambda of: deployed(policy, of))
    )
    device = next((parameter.device for parameter in net.parameters()), x.device)
    asked = Asked(
        net, x, y, ball, found.union[:n], judge, over, policy, device, at_once(batch, x, device), seed
    )
    checklist: dict[str, Callable[[], Check]] = {
        "randomness": lambda: questions.randomness(asked),
        "gradients": lambda: questions.gradients(asked, found),
        "steps": lambda: questions.steps(asked, found.suite),
        "restarts": lambda: questions.restarts(asked, found.suite),
        "queries": lambda: questions.queries(asked, found),
        "eps": lambda: questions.eps(asked),
        "noise": lambda: questions.noise(asked),
        "transfer": lambda: questions.transfer(asked, sources or {}),
    }
    checks = {}
    for name, question in checklist.items():
        if progress is not None:
            progress(name)
        checks[name] = question()
    return Guards(n, checks, clock() - began, asked.found)
