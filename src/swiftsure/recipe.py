"""The typed recipe of a run: the only source of options, for the command line, YAML files and Python alike."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from swiftsure.ball import Ball, parse_eps
from swiftsure.errors import InputError

BUDGETS = ("macs", "certified_macs", "forced_macs")
"""Options of `Exits` that are a mean number of multiply-adds: of clean images, proven, forced by attacks."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass
class DataChoice:
    """Which images, and how training copies of them are varied.

    Args:
        name: a data set's name (`swiftsure data list`).
        crop: pixels of zero padding before a random crop back to size; 0 for none.
        flip: mirror half of the images.
    """

    name: str = "digits"
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _require(self.crop >= 0, f"data.crop is {self.crop}; allowed: a number of pixels >= 0")


@dataclass
class ModelChoice:
    """Which network.

    Args:
        name: a registered network.
        options: keyword arguments of its builder.
        warm_start: a run or saved network whose weights training starts from; null for fresh ones.
    """

    name: str = "digits_small"
    options: dict[str, Any] = field(default_factory=dict)
    warm_start: str | None = None


@dataclass
class Exits:
    """Side exits, and when an image leaves at one.

    Args:
        at: where side exits go, and their heads: module names, each with the name of a head (linear, pooled, conv)
            or a table of its kind and options. Empty for none beside those that the model has by itself.
        count: instead of `at`, that many exits at equal shares of the cost, the last one included.
        policy: entropy (RDI-Nets' rule) or confidence (largest probability).
        thresholds: one for each exit but the last, by hand; null to fit them on the calibration half of the
            validation split when training is done. With certified_macs: those that training aims at.
        macs: fitted thresholds: the mean multiply-adds an image may cost, for the best accuracy within them; null for
            equally many images at each exit.
        certified_macs: fitted thresholds: the mean of the *proven* worst-case multiply-adds, for the best *verified*
            accuracy within them, by cheap bounds over the recipe's ball; null for one of the others.
        forced_macs: fitted thresholds: the mean multiply-adds that attacks on the cost may *force* within the recipe's
            ball, on 300 held-out images, for the best accuracy within them; null for one of the others.
        frozen: the network that exits are attached to stays as it is, as `model.warm_start` has it, in evaluation
            mode: their heads alone are trained, and the last exit remains that network.
        attacked: with macs or forced_macs: the best accuracy is that on clean images and under PGD on each exit and on
            their average.
    """

    at: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    policy: Literal["entropy", "confidence"] = "entropy"
    thresholds: list[float] | None = None
    macs: float | None = None
    certified_macs: float | None = None
    forced_macs: float | None = None
    frozen: bool = False
    attacked: bool = False

    def __post_init__(self) -> None:
        _require(not (self.at and self.count), "exits.at and exits.count are both given; give one of them")
        _require(
            self.count is None or self.count >= 1, f"exits.count is {self.count}; allowed: 1 or more, or null"
        )
        _require(
            not self.frozen or bool(self.at) or self.count is not None,
            "exits.frozen trains attached heads alone, and none are attached; give exits.at or exits.count",
        )
        ways = [name for name in ("thresholds", *BUDGETS) if getattr(self, name) is not None]
        _require(
            # Training towards thresholds and fitting others within a certified budget go together.
            len(ways) < 2 or ways == ["thresholds", "certified_macs"],
            f"exits.{' and exits.'.join(ways)} are given together; allowed: one of them, or thresholds with "
            "certified_macs",
        )
        high = 1.0 if self.policy == "confidence" else math.inf
        for value in self.thresholds or []:
            _require(
                0 <= value <= high and math.isfinite(value),
                f"exits.thresholds holds {value}; allowed: "
                + ("0 to 1" if self.policy == "confidence" else "finite entropies >= 0, in nats"),
            )
        for name in BUDGETS:
            budget = getattr(self, name)
            _require(budget is None or budget > 0, f"exits.{name} is {budget}; allowed: above 0, or null")
        _require(
            not self.attacked or self.macs is not None or self.forced_macs is not None,
            "exits.attacked fits thresholds within exits.macs or exits.forced_macs, and both are null; give a budget",
        )


@dataclass
class BallChoice:
    """The threat model: radius eps in pixel units (a number or "8/255") and its norm."""

    eps: float | str = 0.1
    norm: str = "inf"

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Ball:
        """The ball it names."""
        return Ball(self.eps, self.norm)


FORMS = ("main", "average", "max_average", "mix")
"""Forms of an attack over exits, beside those of side exits, exit1 to exit<K - 1>."""


@dataclass
class Attack:
    """The attack that makes training images for the attacked term: projected gradient ascent, in a form over exits.

    One step from the image itself (steps 1, step_size eps, random_start false) is FGSM.

    Args:
        form: what is ascended, by RDI-Nets' names. main: the last exit; exit1, exit2, ...: a side exit, from 1;
            average: the mean over exits; max_average: each exit alone, of which each image keeps the one worst for
            all exits together; mix: a random mix of the exits, drawn anew for each batch. All are one with one exit.
        steps: gradient steps.
        step_size: in pixel units, a number or "2/255"; null for 2.5 * eps / steps.
        random_start: start at a random point of the ball; false: at the image.
        eps_factor: its radius as a multiple of the current training radius.
        precision: in which the attack runs the network; bfloat16 is mixed precision, about twice as fast on
            convolutions where the hardware has it. The loss is always of float32 passes.
    """

    form: str = "main"
    steps: int = 10
    step_size: float | str | None = None
    random_start: bool = True
    eps_factor: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.step_size is not None:
            self.step_size = parse_eps(self.step_size)
        _require(
            self.form in FORMS or self.side_exit is not None,
            f"attack.form is {self.form!r}; allowed: {', '.join(FORMS)}, exit1, exit2, ...",
        )
        _require(self.steps >= 1, f"attack.steps is {self.steps}; allowed: 1 or more")
        _require(self.eps_factor > 0, f"attack.eps_factor is {self.eps_factor}; allowed: above 0")

    @property
    def side_exit(self) -> int | None:
        """The number, from 0, of the side exit that the form names; None for other forms."""
        number = self.form.removeprefix("exit")
        plain = number != self.form and number.isdecimal() and number == str(int(number)) != "0"
        return int(number) - 1 if plain else None


@dataclass
class Mixing:
    """How the weight of the proven term moves from epoch to epoch (dynamic mixed training).

    Args:
        controller: constant: stays at `first`.
            ramp: from `first` to `last` along the eps ramp (linear).
            geometric: min(first * factor ** (epochs since the ramp // every), last).
            balanced: `first` until the radius is full; then times `factor` after an epoch whose clean accuracy on the
            validation split holds, divided by it when it does not; between `least` and `last`.
        first: the weight at the start.
        last: the largest weight (ramp: the weight at the end).
        least: the smallest weight of balanced.
        factor: step of geometric and balanced, above 1.
        every: epochs between two steps of geometric.
        clean_target: balanced: the clean accuracy to hold, in [0, 1]; null for "within tolerance of the best seen".
        tolerance: balanced: how far clean accuracy may fall below the best seen.
        gate: probability that a batch has the proven term at all; otherwise it is trained on the clean term alone.
    """

    controller: Literal["constant", "ramp", "geometric", "balanced"] = "balanced"
    first: float = 0.1
    last: float = 50.0
    least: float = 0.01
    factor: float = 1.5
    every: int = 1
    clean_target: float | None = None
    tolerance: float = 0.01
    gate: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self.first >= 0 and self.last >= 0 and self.least > 0,
            "mixing.first and last must be >= 0, least above 0",
        )
        _require(self.factor > 1, f"mixing.factor is {self.factor}; allowed: above 1")
        _require(self.every >= 1, f"mixing.every is {self.every}; allowed: 1 or more epochs")
        _require(0 < self.gate <= 1, f"mixing.gate is {self.gate}; allowed: above 0, up to 1")
        target = self.clean_target
        _require(target is None or 0 <= target <= 1, f"mixing.clean_target is {target}; allowed: 0 to 1")


@dataclass
class Loss:
    """sum over exits of clean * CE(x) + attacked * CE(x_adv) + c * CE(worst case over the ball), c from `mixing`.

    Args:
        clean: weight of the clean term; null for what the other two leave of 1 (at least 0).
        attacked: weight of the attacked term; 0 to do without an attack.
        proven: whether there is a proven term.
        bound: the technique that bounds the worst case; "best": the tighter of interval and symbolic at each margin.
        k: samples of each batch that are bounded, drawn anew without replacement; null for all of them
            (stochastic robust approximation).
        interval_share: share of the proven weight that goes to intervals on the whole batch, in [0, 1]; the rest
            goes to `bound` on the k samples. A cheap bound on all and a tight one on a few is ours, not the paper's.
        tight_from: epochs before `bound` joins; until then the whole proven weight goes to intervals, which are cheap.
        weights: of the exits, one for each; null: 1 for each, as in RDI-Nets.
        leaving: weight, in units of the proven term's, of the term by which side exits learn to leave provably where
            their label is proven, and to stay silent where it is not; needs exits.thresholds. Ours.
        mixing: the weight of the proven term.
        attack: the attack of the attacked term.
        l1: weight of the sum of |parameter| of all weights.
    """

    clean: float | None = 1.0
    attacked: float = 0.0
    proven: bool = True
    bound: Literal["interval", "crown-ibp", "symbolic", "crown", "best"] = "symbolic"
    k: int | None = 1
    interval_share: float = 0.0
    tight_from: int = 0
    weights: list[float] | None = None
    leaving: float = 0.0
    mixing: Mixing = field(default_factory=Mixing)
    attack: Attack = field(default_factory=Attack)
    l1: float = 0.0

    def __post_init__(self) -> None:
        _require(self.k is None or self.k >= 1, f"loss.k is {self.k}; allowed: 1 or more, or null for all")
        share = self.interval_share
        _require(0 <= share <= 1, f"loss.interval_share is {share}; allowed: 0 to 1")
        _require(self.tight_from >= 0, f"loss.tight_from is {self.tight_from}; allowed: epochs >= 0")
        _require(self.clean is None or self.clean >= 0, f"loss.clean is {self.clean}; allowed: >= 0, or null")
        _require(self.attacked >= 0 and self.l1 >= 0, "loss.attacked and loss.l1 must be >= 0")
        _require(
            self.weights is None or all(0 <= weight < math.inf for weight in self.weights),
            f"loss.weights is {self.weights}; allowed: finite numbers >= 0, one for each exit",
        )
        _require(self.leaving >= 0, f"loss.leaving is {self.leaving}; allowed: >= 0")
        _require(
            self.proven or self.attacked > 0 or self.clean is None or self.clean > 0,
            "the loss has no term; give loss.clean, loss.attacked or loss.proven",
        )


@dataclass
class Optimizer:
    """The optimiser and its learning rate.

    Args:
        name: adam or sgd.
        rate: learning rate at the start.
        momentum: of sgd.
        weight_decay: L2 penalty.
        clip: largest gradient norm; null for no clipping.
        decay: constant; step: times `decay_factor` after each epoch of `decay_epochs` and after each so many steps of
            `decay_steps`; cosine, linear: to 0 at the end, batch by batch.
        decay_from: cosine, linear: the epoch where the fall begins.
    """

    name: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    decay: Literal["constant", "step", "cosine", "linear"] = "cosine"
    decay_epochs: list[int] = field(default_factory=list)
    decay_steps: list[int] = field(default_factory=list)
    decay_factor: float = 0.1
    decay_from: int = 0

    def __post_init__(self) -> None:
        _require(self.rate > 0, f"optimizer.rate is {self.rate}; allowed: above 0")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; allowed: >= 0")
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}; allowed: 0 to below 1")
        _require(self.decay_factor > 0, f"optimizer.decay_factor is {self.decay_factor}; allowed: above 0")
        _require(self.decay_from >= 0, f"optimizer.decay_from is {self.decay_from}; allowed: an epoch >= 0")
        _require(
            self.clip is None or self.clip > 0, f"optimizer.clip is {self.clip}; allowed: above 0, or null"
        )


@dataclass
class Schedule:
    """How long, how much at once, and how the radius grows.

    Args:
        epochs: passes over the training part.
        steps: optimiser steps after which training ends, if the epochs have not ended it before; null for all of them.
        batch: images a step.
        warmup: epochs with radius 0 (clean training) before the ramp.
        ramp: epochs over which the radius grows to its full size.
        shape: epoch: linear, constant within an epoch; batch: linear from step to step; smooth: a fourth power for
            the first quarter of the ramp, then linear with the same slope at the seam.
        eps_factor: the full training radius as a multiple of the ball's.
        augment_until: the last epoch whose images are varied (data.crop, data.flip); null for all epochs.
        check_images: validation images for the attacked and the verified figure of each epoch (the first ones).
        check_steps: PGD steps of the attacked figure.
        check_method: technique of the verified figure; auto: intervals, and symbolic where they fail.
        choose: the figure by which the kept epoch is chosen on the validation split; auto: verified with a proven
            term, attacked with an attacked one, else clean. Only epochs at the full radius count. last: the last epoch,
            where the rate falls to 0 and the figures of so few images are noise.
        clean_floor: epochs with a lower clean accuracy on the validation split are kept only if there is no other.
    """

    epochs: int = 20
    steps: int | None = None
    batch: int = 50
    warmup: int = 0
    ramp: int = 5
    shape: Literal["epoch", "batch", "smooth"] = "batch"
    eps_factor: float = 1.0
    augment_until: int | None = None
    check_images: int = 500
    check_steps: int = 10
    check_method: Literal["auto", "interval", "crown-ibp", "symbolic", "crown"] = "auto"
    choose: Literal["auto", "clean", "attacked", "verified", "last"] = "auto"
    clean_floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "check_images", "check_steps"):
            _require(
                getattr(self, name) >= 1, f"schedule.{name} is {getattr(self, name)}; allowed: 1 or more"
            )
        _require(
            self.steps is None or self.steps >= 1,
            f"schedule.steps is {self.steps}; allowed: 1 or more, or null",
        )
        _require(self.warmup >= 0 and self.ramp >= 0, "schedule.warmup and ramp must be >= 0 epochs")
        _require(
            self.warmup + self.ramp <= self.epochs,
            f"schedule.warmup + ramp is {self.warmup + self.ramp} epochs, more than all {self.epochs}",
        )
        _require(
            self.shape != "epoch" or self.ramp == 0 or self.warmup + self.ramp < self.epochs,
            "schedule.shape epoch reaches the full radius an epoch after the ramp; warmup + ramp must be below epochs",
        )
        _require(self.eps_factor > 0, f"schedule.eps_factor is {self.eps_factor}; allowed: above 0")
        until = self.augment_until
        _require(
            until is None or until >= 0, f"schedule.augment_until is {until}; allowed: an epoch >= 0, or null"
        )


@dataclass
class Evaluation:
    """What `swiftsure evaluate` measures by default.

    Args:
        suite: the attacks (quick, standard, full, or rdi: RDI-Nets' forms with the paper's steps).
        method: a bound technique, or auto (cheap ones first).
        limit: the first so many test images; null for all.
        guards: samples that the guards of the attacks ask about; 0 for no guards.
    """

    suite: Literal["quick", "standard", "full", "rdi"] = "quick"
    method: Literal["auto", "interval", "crown-ibp", "symbolic", "crown", "alpha-crown"] = "auto"
    limit: int | None = None
    guards: int = 200

    def __post_init__(self) -> None:
        _require(self.guards >= 0, f"evaluate.guards is {self.guards}; allowed: 0 or more samples")
        _require(
            self.limit is None or self.limit >= 1,
            f"evaluate.limit is {self.limit}; allowed: 1 or more, or null",
        )


@dataclass
class Recipe:
    """All that a run depends on.

    Args:
        name: what the run is called in reports.
        seed: of weights, splits, order, random starts and samples.
        data: the images.
        model: the network.
        exits: side exits, and when an image leaves at one; null for none beside those of the model.
        ball: the threat model.
        loss: the three terms.
        optimizer: the optimiser.
        schedule: length, batch, radius.
        evaluate: what is measured at the end.
    """

    name: str = "run"
    seed: int = 0
    data: DataChoice = field(default_factory=DataChoice)
    model: ModelChoice = field(default_factory=ModelChoice)
    exits: Exits = field(default_factory=Exits)
    ball: BallChoice = field(default_factory=BallChoice)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluate: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        # fit draws each epoch from seed * 1,000,003 + epoch, which must fit a generator's 64 bits.
        _require(0 <= self.seed < 1 << 40, f"seed is {self.seed}; allowed: 0 to {(1 << 40) - 1}")

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON."""
        return asdict(self)


def option_names(kind: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted option of a recipe, for messages: "loss.mixing.gate" and so on."""
    names = []
    example = kind()
    for item in fields(kind):
        value = getattr(example, item.name)
        if is_dataclass(value):
            names += option_names(type(value), f"{prefix}{item.name}.")
        else:
            names.append(prefix + item.name)
    return names
