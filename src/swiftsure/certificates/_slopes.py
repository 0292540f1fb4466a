"""certificates.safetensors: the slopes of alpha-CROWN's proofs, so that they are computed again without a search.

Any slope from 0 to 1 gives a sound bound, and a byte holds one of 256 of them: whatever this file says, nothing false
can be proven with it. Blocks of one sample, exit and direction follow one another; each has classes, units and, for
every pair of them, a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from swiftsure.bounds import Slopes
from swiftsure.certificates._proof import SampleSlopes

SLOPES_NAME = "certificates.safetensors"
FORMAT = "swiftsure-slopes"
_COLUMNS = 5
"""Of a block: sample, exit, whether z_y - z_j is bounded from above, number of classes, number of units."""
_TYPES = {"block": torch.int64, "class": torch.int16, "unit": torch.int32, "level": torch.uint8}


class DamagedSlopes(Exception):
    """What is wrong with the bytes of a file of slopes."""


def packed(slopes: Sequence[SampleSlopes | None]) -> bytes | None:
    """The bytes of a file; None where there is nothing to write."""
    blocks: list[list[int]] = []
    parts: dict[str, list[Tensor]] = {"class": [], "unit": [], "level": []}
    for sample, found in enumerate(slopes):
        for (exit, above), one in sorted((found or {}).items()):
            blocks.append([sample, exit, int(above), len(one.function), len(one.unit)])
            for name, tensor in (
                ("class", one.function),
                ("unit", one.unit),
                ("level", one.levels.flatten()),
            ):
                parts[name].append(tensor.to(_TYPES[name]))
    if not blocks:
        return None
    tensors = {"block": torch.tensor(blocks), **{name: torch.cat(part) for name, part in parts.items()}}
    return safetensors.torch.save(tensors, metadata={"format": FORMAT})


def unpacked(content: bytes, samples: int, exits: int) -> list[SampleSlopes | None]:
    """The slopes of each of so many samples.

    Raises:
        DamagedSlopes: these are no slopes of so many samples and exits.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedSlopes(f"not a safetensors file ({error})") from None
    if {name: tensor.dtype for name, tensor in tensors.items()} != _TYPES:
        raise DamagedSlopes(f"it must hold {', '.join(_TYPES)}, of types that swiftsure writes")
    block = tensors["block"]
    if block.dim() != 2 or block.shape[1] != _COLUMNS or not len(block) or bool((block < 0).any()):
        raise DamagedSlopes("its blocks are not those that swiftsure writes")
    rows, units = block[:, 3], block[:, 4]
    lengths = {"class": rows, "unit": units, "level": rows * units}
    if any(
        tensors[name].dim() != 1 or len(tensors[name]) != int(sizes.sum()) for name, sizes in lengths.items()
    ):
        raise DamagedSlopes("the lengths of its blocks are not those of its tensors")
    parts = {name: tensors[name].split(sizes.tolist()) for name, sizes in lengths.items()}
    slopes: list[SampleSlopes | None] = [None] * samples
    found: dict[int, dict[tuple[int, bool], Slopes]] = {}
    for place, (sample, exit, above, row_count, unit_count) in enumerate(block.tolist()):
        own, key = found.setdefault(sample, {}), (exit, bool(above))
        if sample >= samples or exit >= exits or above > 1 or key in own:
            raise DamagedSlopes(f"it has a block for sample {sample}, exit {exit}")
        function, unit = parts["class"][place].long(), parts["unit"][place].long()
        if bool((function < 0).any()) or bool((unit < 0).any()):
            raise DamagedSlopes(f"classes or units of sample {sample} are below 0")
        own[key] = Slopes(function, unit, parts["level"][place].view(row_count, unit_count))
        slopes[sample] = own
    return slopes
