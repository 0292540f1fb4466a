"""A defended network with channels removed, to be fine-tuned with the same defence: what early exits are compared with.

    python benchmarks/prune.py RUN --macs 7e6 --out pruned_7M [--epochs 10] [--importance magnitude]
    swiftsure train pruned_7M/recipe.yaml --out runs/pruned_7M
    swiftsure evaluate runs/pruned_7M
    swiftsure report RUN runs/pruned_7M --out page.html

RUN is of one exit, of a network that takes its channels as options (RDI-Nets' static ones). Every layer loses the same
share of its channels, the least important first, until an image costs at most so many multiply-adds: channels go, with
their weights in the layers behind (torch-pruning, Fang et al. 2023); masks would save nothing. OUT is a folder with a
saved network to start from and a recipe: the run's own, begun at the full radius and at a tenth of the learning rate.

Importance: magnitude, the L2 norm of all weights that make and read a channel (in residual networks, and all that is
added to it); taylor, |weight x gradient| of the loss on clean and attacked training images (Molchanov et al. 2019).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from swiftsure import attacks, data, models, recipe_file, run
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit, parameters, static_macs
from swiftsure.models.rdi import channel_options
from swiftsure.recipe import ModelChoice, Recipe

STEPS = 100
"""Rounds in which channels go, up to all but one of each layer, a layer after the other until the budget is met."""
SLOWER = 0.1
"""The learning rate of fine-tuning, as a share of the run's."""
START = "start"
TAYLOR_IMAGES = 1024
IMPORTANCE = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}


def pruned(net: nn.Module, macs: float, importance: str = "magnitude") -> nn.Module:
    """A smaller network, built anew, with the weights that are left of another one; that one stays as it is.

    Args:
        net: registered, of one exit, with its channels as options; for "taylor" its parameters hold gradients.
        macs: multiply-adds that an image may cost at most.
        importance: a name of `IMPORTANCE`.

    Raises:
        InputError: another kind of network, or a budget that it keeps already or can never keep.
    """
    channel_options(net)  # refuses others
    if not isinstance(net, MultiExit) or net.exits > 1:
        raise InputError("the network has several exits; allowed: one, such as a static version has")
    whole = static_macs(net)
    if not 0 < macs < whole:
        raise InputError(f"macs is {macs:,.0f}; allowed: above 0, below what the network costs, {whole:,}")
    smaller = _with_gradients(net).eval()
    outputs = [module for module in smaller.modules() if isinstance(module, nn.Linear)][-1]
    like = next(smaller.parameters())
    example = torch.zeros(1, *net.config["input_shape"], device=like.device)  # type: ignore[index]
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        example,
        importance=IMPORTANCE[importance](),
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[outputs],
        in_channel_groups={},  # its defaults are dictionaries that all pruners would share
        out_channel_groups={},
    )
    for group in chain.from_iterable(pruner.step(interactive=True) for _ in range(STEPS)):
        group.prune()
        if static_macs(smaller) <= macs:
            break
    else:
        raise InputError(f"macs is {macs:,.0f}; one channel in each layer costs {static_macs(smaller):,}")
    config = net.config
    assert isinstance(config, dict)
    again = models.build(config["name"], **{**config["options"], **channel_options(smaller)})
    models.load_state(again, {name: value.detach().cpu() for name, value in smaller.state_dict().items()})
    return again.eval()


def fine_tuning(recipe: Recipe, net: nn.Module, start: Path, name: str, epochs: int) -> Recipe:
    """The recipe of a run, for a pruned network: the same defence, at the full radius from the first step on."""
    config = net.config
    assert isinstance(config, dict)
    share = epochs / recipe.schedule.epochs
    optimizer = replace(
        recipe.optimizer,
        rate=recipe.optimizer.rate * SLOWER,
        decay_epochs=[max(1, round(share * epoch)) for epoch in recipe.optimizer.decay_epochs],
        decay_from=int(share * recipe.optimizer.decay_from),
    )
    return replace(
        recipe,
        name=name,
        model=ModelChoice(config["name"], config["options"], str(start)),
        optimizer=optimizer,
        schedule=replace(recipe.schedule, epochs=epochs, warmup=0, ramp=0),
    )


def note_gradients(net: nn.Module, recipe: Recipe, images: data.ImageSet) -> None:
    """The gradient of the loss, half on clean and half on attacked images, in ``.grad`` of the parameters."""
    net.eval().zero_grad()
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(images), generator=generator)[:TAYLOR_IMAGES]
    for part in chosen.split(256):
        x, y = images.batch(part, device)
        x_adv = attacks.pgd(
            net, x, y, recipe.ball.build(),
            judge=attacks.never, steps=recipe.loss.attack.steps, generator=generator,
        )  # fmt: skip
        loss: Tensor = F.cross_entropy(net(x), y, reduction="sum") + F.cross_entropy(
            net(x_adv), y, reduction="sum"
        )
        (loss / (2 * len(chosen))).backward()


def _with_gradients(net: nn.Module) -> nn.Module:
    """A copy; torch does not copy gradients along."""
    twin = copy.deepcopy(net)
    for mine, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return twin


def main() -> int:
    """Write the start and the recipe, and say what was removed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--macs", type=float, required=True, help="multiply-adds an image, at most")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: a third of the run's)")
    parser.add_argument("--importance", choices=IMPORTANCE, default="magnitude")
    parser.add_argument("--data", help="where the data sets lie")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    try:
        if options.epochs is not None and options.epochs < 1:
            raise InputError(f"--epochs is {options.epochs}; allowed: 1 or more")
        if options.out.exists():
            raise InputError(f"{options.out} is there already; choose a new folder with --out")
        recipe = run.read_recipe(options.run)
        net = run.read_network(options.run, run.pick_device(options.device))
        if options.importance == "taylor":
            note_gradients(net, recipe, data.load(recipe.data.name, options.data, recipe.seed).train)
        smaller = pruned(net, options.macs, options.importance)
        name = f"{recipe.name}_pruned_{static_macs(smaller) / 1e6:.3g}M"
        start = options.out.resolve() / START
        models.save(smaller, start)
        epochs = math.ceil(recipe.schedule.epochs / 3) if options.epochs is None else options.epochs
        written = fine_tuning(recipe, smaller, start, name, epochs)
        (options.out / run.RECIPE).write_text(recipe_file.dump(written), encoding="utf-8")
    except InputError as error:
        print(f"prune: {error}", file=sys.stderr)
        return 2
    print(
        f"{static_macs(net):,} -> {static_macs(smaller):,} multiply-adds, {parameters(net):,} -> "
        f"{parameters(smaller):,} parameters: {channel_options(smaller)}"
    )
    print(f"swiftsure train {options.out / run.RECIPE} --out runs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
