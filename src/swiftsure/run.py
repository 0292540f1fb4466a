"""A run directory: one training with all that it depends on, and all that was measured of it.

====================  =====================================================================================
recipe.yaml           every option, resolved; `swiftsure train` repeats the run from it
model.safetensors     the weights that were kept
config.json           how to rebuild the network; thresholds, ball, versions, class names, digests of the data
log.jsonl             one line an epoch
results.json          what was measured; its presence says that training is finished
samples.csv           one row a test image, with every verdict (see `swiftsure.samples`)
certificates.jsonl    the certificates (see `swiftsure.certificates`)
certificates.safetensors  slopes that some of them rest on
examples.npz          images with the worst found for each, for the page
sweep.json            accuracy and cost as thresholds change (see `swiftsure.sweep`), for the page
report.html           the page
state/                what a resume needs; gone once training is finished
====================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import swiftsure.files as files
from swiftsure import certificates, data, examples, models, recipe_file, results, run_exits, samples
from swiftsure.errors import InputError
from swiftsure.exits import MultiExit
from swiftsure.models.storage import CONFIG, WEIGHTS
from swiftsure.recipe import DataChoice, Recipe
from swiftsure.training import History, fit
from swiftsure.training.state import NAME as STATE_FILE

RECIPE, LOG, STATE, SWEEP = "recipe.yaml", "log.jsonl", "state", "sweep.json"
FILES = (
    *(
        RECIPE,
        LOG,
        STATE,
        WEIGHTS,
        CONFIG,
        results.NAME,
        samples.NAME,
        certificates.NAME,
        certificates.SLOPES_NAME,
    ),
    *(examples.NAME, examples.BROKEN, SWEEP, "report.html"),
)
"""All that swiftsure itself ever puts into a run directory."""


@dataclass(frozen=True)
class Trained:
    """What `train` did.

    Attributes:
        folder: the run directory.
        history: its log, the index of the kept epoch, and its seconds.
        finished_before: nothing was done, because the run was finished already.
    """

    folder: Path
    history: History
    finished_before: bool = False


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    data_root: str | Path | None = None,
    model: str | None = None,
) -> Trained:
    """Train a recipe into a run directory, and leave there all that is needed to measure or repeat it.

    Nothing is written before data, network and folder are known to be usable.

    Args:
        recipe: what to train.
        folder: a new or empty folder; with ``resume`` one that an earlier, interrupted call began.
        resume: go on after the last whole epoch. On one CPU thread the weights end bit for bit as if nothing
            had happened.
        device: "auto" (an accelerator if there is one) or a torch device.
        data_root: where the data sets lie; see `swiftsure.data.data_root`.
        model: "package.module:function", a builder to use in place of a registered name.

    Raises:
        InputError: a folder with something in it, another recipe to resume with, a frozen network of random weights,
            unusable data, network, device or folder.
    """
    folder = Path(folder)
    if model is None and ":" in recipe.model.name:
        raise InputError(
            f"the recipe is of a network of your own; name what builds it with --model {recipe.model.name}"
        )
    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, name=model))
    if not _begun(folder, recipe, resume):
        resume = False
    elif (folder / results.NAME).exists() and (folder / WEIGHTS).exists():
        shutil.rmtree(folder / STATE, ignore_errors=True)
        return Trained(folder, _history(read_log(folder)), finished_before=True)
    if recipe.exits.frozen and recipe.model.warm_start is None and model is None:
        raise InputError(
            "exits.frozen keeps a network as it is, and model.warm_start is null: that would be random weights; "
            "allowed: a run or saved network to start from"
        )
    where = pick_device(device)
    parts = data.load(recipe.data.name, data_root, recipe.seed)
    torch.manual_seed(recipe.seed)
    if model is None:
        net = models.build(recipe.model.name, **recipe.model.options)
    else:
        net = build_from(model, recipe.model.options)
    augment = _augment(recipe.data)
    _check_match(net, parts.train, augment)
    net = run_exits.with_exits(net, recipe.exits, parts.train.shape)
    # A run that was killed before its first epoch was kept starts again from the beginning.
    if recipe.model.warm_start is not None and not (resume and (folder / STATE / STATE_FILE).exists()):
        source = Path(recipe.model.warm_start)
        try:
            _warm_start(net, source / WEIGHTS)
        except InputError as error:
            place = "" if source.is_absolute() else f" (the path is relative to {Path.cwd()})"
            raise InputError(f"model.warm_start: {error}{place}") from None
    undo = _write_first(folder, recipe)

    def keep_log(records: list[dict[str, Any]]) -> None:
        _write_log(folder, records)

    try:
        history = fit(
            net,
            parts.train,
            parts.val,
            loss=recipe.loss,
            ball=recipe.ball.build(),
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            exits=recipe.exits,
            augment=augment,
            seed=recipe.seed,
            device=where,
            state_folder=folder / STATE,
            resume=resume,
            on_epoch=keep_log,
        )
    except Exception:
        # Whatever went wrong before the first epoch was kept, the folder is as it was found.
        if not (folder / STATE).exists():
            undo()
        raise
    _write_log(folder, history.records)
    _write_last(folder, net, recipe, parts, history, where)
    return Trained(folder, history)


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of a run directory.

    Raises:
        InputError: the folder is no run, or its recipe is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no run directory; allowed: a folder that `swiftsure train` wrote")
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} has no {RECIPE}; allowed: a folder that `swiftsure train` wrote")
    return recipe_file.read(folder / RECIPE)


def read_network(folder: str | Path, device: torch.device, model: str | None = None) -> nn.Module:
    """The trained network of a run, in evaluation mode on a device.

    Args:
        folder: the run directory.
        device: where to.
        model: "package.module:function" for an architecture that no name is registered for.

    Raises:
        InputError: training is not finished, or the files are missing, damaged or of another network.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).exists() and (folder / STATE).is_dir():
        raise InputError(
            f"{folder} has no {WEIGHTS}: its training is not finished; go on with {resume_command(folder)}"
        )
    if model is None and (folder / RECIPE).is_file() and ":" in (name := read_recipe(folder).model.name):
        raise InputError(f"{folder} holds a network of your own; name what builds it with --model {name}")
    built = None if model is None else build_from(model, read_recipe(folder).model.options)
    return models.load(folder, built).to(device)


def resume_command(folder: Path) -> str:
    """The command that goes on with an interrupted training."""
    return f"`swiftsure train {folder / RECIPE} --out {folder} --resume`"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl.

    Raises:
        InputError: missing or damaged.
    """
    path = folder / LOG
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from None


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        InputError: no such device here.
    """
    there = ["cpu"]
    there += (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(there[min(1, len(there) - 1)])
    canonical = "cuda:0" if name == "cuda" else name
    if canonical not in there:
        raise InputError(f"device is {name!r}; allowed here: auto, {', '.join(there)}")
    return torch.device(canonical)


def device_name(device: torch.device) -> str:
    """What results call a device: "cpu", or the name of the graphics card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """The versions that figures may depend on."""
    return {
        "swiftsure": metadata.version("swiftsure"),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def build_from(spec: str, options: dict[str, Any]) -> nn.Module:
    """A network from a builder of the caller's own.

    Args:
        spec: "package.module:function"; the module is looked for in the working directory too.
        options: keyword arguments of the function.

    Raises:
        InputError: no such module or function, or what it returns is no network.
    """
    place, colon, name = spec.partition(":")
    if not (place and colon and name):
        raise InputError(f"--model is {spec!r}; allowed: package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        builder = getattr(import_module(place), name)
        net = builder(**options)
    except Exception as error:
        # Whatever a stranger's code raises, the line names it; the user can run the module for the whole story.
        line = (str(error).splitlines() or [""])[0]
        raise InputError(f"--model {spec} cannot be built: {type(error).__name__}: {line}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"--model {spec} returned a {type(net).__name__}; allowed: a torch.nn.Module")
    return net


def _begun(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether there is a run to go on with; False for a folder to begin in.

    Raises:
        InputError: there is something in the folder that must not be lost, or it is of another recipe.
    """
    try:
        # A kill before recipe.yaml was in place leaves nothing but a temporary file.
        there = [item for item in folder.iterdir() if not item.name.startswith(f".{RECIPE}.")]
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"cannot use {folder} as a run directory: {error.strerror}") from None
    if not there:
        return False
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} is not empty and no run; choose a new folder with --out")
    if not resume:
        raise InputError(
            f"{folder} holds a run already; go on with it with --resume, or choose a new folder with --out"
        )
    difference = recipe_file.first_difference(read_recipe(folder), recipe)
    if difference is not None:
        key, old, new = difference
        raise InputError(
            f"{folder} was begun with {key} = {old!r}, now it is {new!r}; resume with the recipe it has"
        )
    return True


def _write_first(folder: Path, recipe: Recipe) -> Callable[[], None]:
    """Write recipe.yaml; returns what takes it back, for a training that cannot so much as begin."""
    new_folder, new_recipe = not folder.exists(), not (folder / RECIPE).exists()

    def undo() -> None:
        if new_recipe:
            (folder / RECIPE).unlink(missing_ok=True)
        if new_folder:
            with contextlib.suppress(OSError):
                folder.rmdir()

    try:
        files.write_text(folder / RECIPE, recipe_file.dump(recipe))
    except InputError:
        with contextlib.suppress(OSError):
            undo()
        raise
    return undo


def _write_log(folder: Path, records: list[dict[str, Any]]) -> None:
    files.write_text(folder / LOG, "".join(json.dumps(record) + "\n" for record in records))


def _write_last(
    folder: Path, net: nn.Module, recipe: Recipe, parts: data.Splits, history: History, device: torch.device
) -> None:
    """Weights and config, then results.json, which says that all is there; only then is the state let go."""
    if isinstance(net, MultiExit):
        net.policy = run_exits.fit_policy(net, recipe.exits, parts.calibration, recipe.ball.build())
    models.save(
        net,
        folder,
        ball=recipe.ball.build().as_dict(),
        versions=versions(),
        classes_names=list(parts.test.classes),
        seed=recipe.seed,
        data={
            "name": recipe.data.name,
            "subset": parts.train.subset,
            "train_sha256": parts.train.sha256(),
            "test_sha256": parts.test.sha256(),
        },
    )
    found = {
        "seconds": {"train": history.seconds},
        "seed": recipe.seed,
        "device": device_name(device),
        "versions": versions(),
        "weights_sha256": models.read_config(folder)["weights_sha256"],
    }
    files.write_json(folder / results.NAME, results.merge_parts(results.empty_results(), found))
    shutil.rmtree(folder / STATE, ignore_errors=True)


def _warm_start(net: nn.Module, source: Path) -> None:
    """Begin with stored weights: of the whole network, or of the backbone that exits were attached to."""
    state = models.read_weights(source)
    backbone = getattr(net, "backbone", None)
    if isinstance(backbone, nn.Module) and state.keys() == backbone.state_dict().keys():
        net = backbone
    models.load_state(net, state, source)


def _check_match(
    net: nn.Module, images: data.ImageSet, augment: Callable[[Tensor, torch.Generator], Tensor] | None
) -> None:
    """Refuse a network or an augmentation that does not fit the data, before anything is written."""
    if augment is not None:
        augment(images.batch(slice(0, 1))[0], torch.Generator())
    config = getattr(net, "config", None)
    if not isinstance(config, dict):
        return
    name = config.get("name", "given")
    if tuple(config["input_shape"]) != images.shape:
        raise InputError(
            f"model {name} takes images of {_size(config['input_shape'])}, "
            f"{images.name} has {_size(images.shape)}"
        )
    if config["classes"] != len(images.classes):
        raise InputError(
            f"model {name} has {config['classes']} classes, {images.name} has {len(images.classes)}"
        )


def _size(shape: Any) -> str:
    return "x".join(map(str, shape))


def _augment(choice: DataChoice) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    if not choice.crop and not choice.flip:
        return None

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        return data.augment(x, crop=choice.crop, flip=choice.flip, generator=generator)

    return augment


def _history(records: list[dict[str, Any]]) -> History:
    best = next((index for index, record in enumerate(records) if record.get("chosen")), len(records) - 1)
    return History(records, best, sum(record["seconds"] for record in records))
