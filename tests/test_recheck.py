"""Rechecks of adaptive networks: what was proven is proven again from the stored slopes, what was forged is found."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftsure import bounds, models
from swiftsure.ball import Ball
from swiftsure.bounds import Slopes
from swiftsure.certificates import NAME, Certificate, certify, read, recheck, write
from swiftsure.certificates._slopes import SLOPES_NAME, packed
from swiftsure.data import ImageSet
from swiftsure.errors import InputError, SoundnessError
from swiftsure.exits import MultiExit, Policy, attach
from trained import digits, held_out, network

COUNT = 16
POLICY = Policy("entropy", [0.5])
BALL = Ball(0.06)
Lines = list[dict[str, Any]]


@functools.cache
def trained() -> MultiExit:
    """The trained network with a side exit behind its second convolution."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 10))
    x, y = digits().train.batch(slice(0, 600))
    net = attach(copy.deepcopy(network()).eval(), {"4": head}, example=x[:2]).eval()
    optimizer = torch.optim.Adam(net.heads[0].parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(net(x)[0], y).backward()
        optimizer.step()
    net.policy = POLICY
    return net


@functools.cache
def certificates(method: str = "alpha-crown") -> Certificate:
    return certify(copy.deepcopy(trained()), *held_out(COUNT).batch(slice(None)), BALL, method=method)


@pytest.fixture
def images() -> ImageSet:
    return held_out(COUNT)


@pytest.fixture
def net() -> MultiExit:
    return copy.deepcopy(trained())


@pytest.fixture
def made(net: MultiExit, images: ImageSet, tmp_path: Path) -> Certificate:
    models.save(net, tmp_path)
    write(tmp_path, certificates(), images)
    return certificates()


def forge(folder: Path, edit: Callable[[Lines], None]) -> None:
    """Change lines, and write a digest that fits them."""
    lines: Lines = [json.loads(line) for line in (folder / NAME).read_text().splitlines()[:-1]]
    edit(lines)
    body = "".join(json.dumps(line) + "\n" for line in lines)
    digest = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
    (folder / NAME).write_text(body + digest + "\n")


def forge_slopes(folder: Path, content: bytes) -> None:
    """Put other slopes in the place of the stored ones, and their digest into the header."""
    (folder / SLOPES_NAME).write_bytes(content)
    forge(folder, lambda lines: lines[0].update(slopes_sha256=hashlib.sha256(content).hexdigest()))


def test_proofs_of_several_exits_are_found_again(
    made: Certificate, net: MultiExit, images: ImageSet, tmp_path: Path
) -> None:
    assert 0 < made.certified.sum() < COUNT
    assert 0 < (made.max_exit == 0).sum() < COUNT
    assert sum(slopes is not None for slopes in made.slopes) > 3
    found = recheck(net, tmp_path, images)
    assert (found.n, found.certified, found.by_reference) == (COUNT, int(made.certified.sum()), COUNT)
    assert found.largest_difference < 1e-4


def test_the_slopes_are_what_the_proofs_rest_on(
    made: Certificate, net: MultiExit, images: ImageSet, tmp_path: Path
) -> None:
    """Without them the reference does not reach what the file claims: it does not search."""
    forge(tmp_path, lambda lines: lines[0].update(slopes_sha256=None))
    with pytest.raises((InputError, SoundnessError), match="sample"):
        recheck(net, tmp_path, images)


def test_techniques_in_turn_are_found_again(net: MultiExit, images: ImageSet, tmp_path: Path) -> None:
    for policy in (POLICY, Policy("confidence", [0.8])):
        net.policy = policy
        models.save(net, tmp_path)
        certificate = certify(net, *images.batch(slice(None)), BALL)
        write(tmp_path, certificate, images)
        assert len(set(certificate.method)) > 1
        found = recheck(net, tmp_path, images)
        assert found.certified == int(certificate.certified.sum()) > 0
        assert found.largest_difference < 1e-4


@pytest.mark.parametrize("ball", [Ball(0.2, "2"), Ball(0.4, "1")])
def test_other_balls_are_found_again(ball: Ball, net: MultiExit, tmp_path: Path) -> None:
    images = held_out(4)
    models.save(net, tmp_path)
    for method in ("symbolic", "alpha-crown"):
        certificate = certify(net, *images.batch(slice(None)), ball, method=method)
        write(tmp_path, certificate, images)
        found = recheck(net, tmp_path, images)
        assert found.certified == int(certificate.certified.sum()) > 0
        assert found.largest_difference < 1e-4


def test_slopes_are_read_as_they_were_written(made: Certificate, tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.slopes_sha256 == hashlib.sha256((tmp_path / SLOPES_NAME).read_bytes()).hexdigest()
    for before, after in zip(made.slopes, found.certificate.slopes, strict=True):
        assert (before or {}).keys() == (after or {}).keys()
        for key, slopes in (before or {}).items():
            assert after is not None
            for field in ("function", "unit", "levels"):
                assert torch.equal(getattr(slopes, field), getattr(after[key], field))


def test_certificates_without_slopes_leave_none(
    made: Certificate, net: MultiExit, images: ImageSet, tmp_path: Path
) -> None:
    assert (tmp_path / SLOPES_NAME).exists()
    write(tmp_path, certify(net, *images.batch(slice(None)), BALL, method="interval"), images)
    assert not (tmp_path / SLOPES_NAME).exists()
    assert read(tmp_path).slopes_sha256 is None


@pytest.mark.usefixtures("made")
def test_damaged_and_missing_slopes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / SLOPES_NAME
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 97)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="beside it, are not those"):
            read(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.usefixtures("made")
def test_slopes_of_another_form_are_refused(tmp_path: Path) -> None:
    tensors = safetensors.torch.load((tmp_path / SLOPES_NAME).read_bytes())
    far, double = tensors["block"].clone(), tensors["block"].clone()
    far[0, 0], double[1] = COUNT, double[0]
    others: dict[str, dict[str, Tensor]] = {
        "of types that": {**tensors, "level": tensors["level"].float() * 2},
        "lengths of its blocks": {**tensors, "level": tensors["level"][:-1]},
        f"block for sample {COUNT}": {**tensors, "block": far},
        "block for sample": {**tensors, "block": double, **_resized(tensors, double)},
        "below 0": {**tensors, "unit": -tensors["unit"]},
        "its blocks are not": {**tensors, "block": tensors["block"][:, :4].contiguous()},
    }
    for message, other in others.items():
        forge_slopes(tmp_path, safetensors.torch.save(other))
        with pytest.raises(InputError, match=message):
            read(tmp_path)
    forge_slopes(tmp_path, b"other")
    with pytest.raises(InputError, match="not a safetensors file"):
        read(tmp_path)


def _resized(tensors: dict[str, Tensor], block: Tensor) -> dict[str, Tensor]:
    sizes = {"class": block[:, 3], "unit": block[:, 4], "level": block[:, 3] * block[:, 4]}
    return {name: tensors[name].new_zeros(int(size.sum())) for name, size in sizes.items()}


def test_forged_slopes_prove_nothing_that_is_false(
    made: Certificate, net: MultiExit, images: ImageSet, tmp_path: Path
) -> None:
    """Any byte is a sound slope. The best that others can do is to prove less."""
    generator = torch.Generator().manual_seed(0)

    def scrambled(slopes: Slopes) -> Slopes:
        levels = torch.randint(0, 256, slopes.levels.shape, generator=generator).to(torch.uint8)
        return replace(slopes, levels=levels)

    others = [
        None if own is None else {key: scrambled(slopes) for key, slopes in own.items()}
        for own in made.slopes
    ]
    content = packed(others)
    assert content is not None
    forge_slopes(tmp_path, content)
    with pytest.raises((InputError, SoundnessError), match="sample"):
        recheck(net, tmp_path, images)


def first(lines: Lines, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return next(line for line in lines[1:] if condition(line))


def _claim(lines: Lines) -> None:
    first(lines, lambda line: not line["certified"]).update(certified=True, margin=0.5, method="alpha-crown")


def _cheaper(lines: Lines) -> None:
    dear = first(lines, lambda line: line["max_exit"] == 1)
    cheap = first(lines, lambda line: line["max_exit"] == 0)
    dear.update(max_exit=0, max_macs=cheap["max_macs"], exits=[0])


def _fewer_macs(lines: Lines) -> None:
    lines[1]["max_macs"] -= 1


def _more_macs(lines: Lines) -> None:
    lines[1]["max_macs"] += 1


def _fewer_exits(lines: Lines) -> None:
    first(lines, lambda line: line["exits"] == [0, 1])["exits"] = [1]


def _dearer(lines: Lines) -> None:
    dear = first(lines, lambda line: line["max_exit"] == 1)
    first(lines, lambda line: line["max_exit"] == 0).update(
        max_exit=1, max_macs=dear["max_macs"], exits=[0, 1]
    )


def _wider(lines: Lines) -> None:
    first(lines, lambda line: line["certified"] and line["margin"] is not None)["margin"] += 0.1


def _image(lines: Lines) -> None:
    lines[1]["image"] = "0" * 16


EDITS: dict[str, tuple[type[Exception], Callable[[Lines], None], str]] = {
    "a label": (SoundnessError, _claim, "cannot be proven again"),
    "a cheaper exit": (SoundnessError, _cheaper, "states the largest exit as 0, but it is 1"),
    "fewer multiply-adds": (SoundnessError, _fewer_macs, "MACs"),
    "more multiply-adds": (InputError, _more_macs, "MACs"),
    "fewer exits": (SoundnessError, _fewer_exits, r"leave by exits \[1\], but they may by \[0, 1\]"),
    "a dearer exit": (InputError, _dearer, "last as 1, but they are"),
    "a larger margin": (InputError, _wider, "in the file, but it is"),
    "another image": (InputError, _image, "another image"),
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("what", EDITS)
def test_forged_lines_are_found(what: str, net: MultiExit, images: ImageSet, tmp_path: Path) -> None:
    error, edit, message = EDITS[what]
    forge(tmp_path, edit)
    read(tmp_path)
    with pytest.raises(error, match=message):
        recheck(net, tmp_path, images)


@pytest.mark.parametrize("name", ["interval", "symbolic", "crown"])
def test_an_unsound_technique_is_found(
    name: str, net: MultiExit, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that certificates are made with is not one that they are rechecked with."""
    technique = bounds.TECHNIQUES[name]

    def unsound(*options: Any, **more: Any) -> Any:
        return [(low + 0.05, high - 0.05) for low, high in technique(*options, **more)]

    monkeypatch.setitem(bounds.TECHNIQUES, name, unsound)
    models.save(net, tmp_path)
    write(tmp_path, certify(net, *images.batch(slice(None)), BALL, method=name), images)
    with pytest.raises((InputError, SoundnessError), match="sample"):
        recheck(net, tmp_path, images)


def test_other_thresholds_are_refused(
    made: Certificate, net: MultiExit, images: ImageSet, tmp_path: Path
) -> None:
    for policy in (Policy("entropy", [0.51]), Policy("confidence", [0.5]), None):
        net.policy = policy
        with pytest.raises(InputError, match=r"thresholds are .* about entropy \[0.5\]; certify"):
            recheck(net, tmp_path, images)
    models.save_policy(net, tmp_path)
    with pytest.raises(InputError, match="thresholds are none"):
        recheck(models.load(tmp_path, model=copy.deepcopy(trained())), tmp_path, images)


def test_other_networks_are_bounded_in_float64(tmp_path: Path) -> None:
    """Here by the ordinary code, which is said, and which finds forgeries as well."""
    images = held_out(4)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 10)
    ).eval()
    models.save(net, tmp_path)
    x = images.batch(slice(None))[0]
    images = ImageSet(images.name, images.images, net(x).argmax(1), images.classes)
    certificate = certify(net, *images.batch(slice(None)), Ball(0.002))
    assert certificate.certified.sum() > 0
    write(tmp_path, certificate, images)
    found = recheck(net, tmp_path, images)
    assert (found.n, found.by_reference) == (4, 0)
    assert found.reason == "'sigmoid' is neither affine nor a ReLU of each sample alone"
    assert found.certified == int(certificate.certified.sum())

    def claim(lines: Lines) -> None:
        lines[0]["ball"]["eps"] = 0.5

    forge(tmp_path, claim)
    with pytest.raises(SoundnessError, match="cannot be proven again"):
        recheck(net, tmp_path, images)
