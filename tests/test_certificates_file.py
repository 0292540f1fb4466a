"""certificates.jsonl: nothing in it can change unnoticed, and what it claims is proven again."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swiftsure import models
from swiftsure.certificates import NAME, Certificate, certify, read, recheck, write
from swiftsure.certificates._plain_bounds import Box, PlainBounds
from swiftsure.data import ImageSet
from swiftsure.errors import InputError, SoundnessError
from trained import BALLS, held_out, network

COUNT = 24
Lines = list[dict[str, Any]]


@pytest.fixture
def images() -> ImageSet:
    return held_out(COUNT)


@pytest.fixture
def net() -> nn.Module:
    return copy.deepcopy(network()).eval()


@functools.cache
def certificates(count: int = COUNT) -> Certificate:
    return certify(copy.deepcopy(network()).eval(), *held_out(count).batch(slice(None)), BALLS[0])


@pytest.fixture
def made(net: nn.Module, images: ImageSet, tmp_path: Path) -> Certificate:
    models.save(net, tmp_path)
    write(tmp_path, certificates(), images)
    return certificates()


def lines_of(folder: Path) -> Lines:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()[:-1]]


def forge(folder: Path, lines: Lines) -> None:
    """Write lines with a digest that fits them."""
    body = "".join(json.dumps(line) + "\n" for line in lines)
    digest = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
    (folder / NAME).write_text(body + digest + "\n")


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(made: Certificate, images: ImageSet, tmp_path: Path) -> None:
    found = read(tmp_path)
    back = found.certificate
    for field in ("certified", "max_exit", "max_macs", "label"):
        assert torch.equal(getattr(back, field), getattr(made, field))
    assert torch.equal(back.margin, made.margin.double())
    assert (back.method, back.ball, back.asked, back.delta) == (
        made.method,
        made.ball,
        made.asked,
        made.delta,
    )
    assert found.data_sha256 == images.sha256()
    assert found.weights_sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert found.policy_sha256 is None
    assert found.versions["torch"] == torch.__version__
    assert 0 < back.certified.sum() < COUNT


def test_the_layout(made: Certificate, images: ImageSet, tmp_path: Path) -> None:
    header, *samples = lines_of(tmp_path)
    assert header["n"] == len(samples) == COUNT
    assert header["ball"] == BALLS[0].as_dict()
    assert header["method"] == "auto"
    assert header["delta"] == made.delta
    assert samples[3] == {
        "index": 3,
        "image": hashlib.sha256(images.images[3].numpy().tobytes()).hexdigest()[:16],
        "label": int(made.label[3]),
        "certified": bool(made.certified[3]),
        "margin": float(made.margin[3]),
        "method": made.method[3],
        "exits": [0],
        "max_exit": 0,
        "max_macs": int(made.max_macs[3]),
    }


def test_writing_is_repeatable_and_leaves_nothing_else(
    made: Certificate, images: ImageSet, tmp_path: Path
) -> None:
    first = (tmp_path / NAME).read_bytes()
    write(tmp_path, made, images)
    assert (tmp_path / NAME).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "model.safetensors", "config.json"}


def test_misclassified_samples_have_no_margin(net: nn.Module, images: ImageSet, tmp_path: Path) -> None:
    x, y = images.batch(slice(None))
    models.save(net, tmp_path)
    wrong = ImageSet.from_tensors(images.images, (y + 1) % 10, 10)
    write(tmp_path, certify(net, x, wrong.labels, BALLS[0]), wrong)
    assert all(line["margin"] is None and not line["certified"] for line in lines_of(tmp_path)[1:])
    assert (read(tmp_path).certificate.margin == -torch.inf).all()
    assert recheck(net, tmp_path, wrong).certified == 0


def test_a_flipped_byte_anywhere_is_refused(net: nn.Module, tmp_path: Path) -> None:
    models.save(net, tmp_path)
    images = held_out(3)
    write(tmp_path, certificates(3), images)
    path = tmp_path / NAME
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    flips = torch.randint(1, 256, (len(content),), generator=generator)
    # Every other flip changes the case of a letter, which a lenient comparison of digests would forgive.
    flips[::2] = 0x20
    for place, flip in enumerate(flips.tolist()):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        with pytest.raises(InputError):
            read(tmp_path)
    path.write_bytes(content)
    assert len(read(tmp_path).certificate) == 3


@pytest.mark.usefixtures("made")
def test_what_is_cut_or_added_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    others = [
        *(content[:end] for end in range(0, len(content), 37)),
        content[:-1],
        *(b"".join(lines[:index] + lines[index + 1 :]) for index in range(len(lines))),
        content + b"\n",
        content + b"{}\n",
        b"\n" + content,
        content * 2,
        b"".join([lines[0], lines[2], lines[1], *lines[3:]]),
        content.replace(b"\n", b"\r\n"),
    ]
    for other in others:
        path.write_bytes(other)
        with pytest.raises(InputError):
            read(tmp_path)


def _swap(lines: Lines) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def _claim(lines: Lines) -> None:
    sample = next(line for line in lines[1:] if not line["certified"])
    sample["certified"] = True


def _extra(lines: Lines) -> None:
    lines[1]["note"] = 1


EDITS: dict[str, Callable[[Lines], Any]] = {
    "contradict": _claim,
    "speaks of 24 samples, and 23": lambda lines: lines.pop(),
    "sample 1 stands where sample 0": _swap,
    "sample 0 must hold": _extra,
    "format is swiftsure-certificates 3": lambda lines: lines[0].update(format_version=3),
    "not written by swiftsure": lambda lines: lines[0].update(format="other"),
    "n of the header is True": lambda lines: lines[0].update(n=True),
    "delta": lambda lines: lines[0].update(delta=-1.0),
    "norm is '7'": lambda lines: lines[0]["ball"].update(norm="7"),
    "the ball must hold": lambda lines: lines[0]["ball"].pop("eps"),
    "names the method 'milp'": lambda lines: lines[1].update(method="milp"),
    "its method is 'milp'": lambda lines: lines[0].update(method="milp"),
    "exits of sample 0 are [0, 1]": lambda lines: lines[1].update(exits=[0, 1]),
    "exits of sample 1 are []": lambda lines: lines[2].update(exits=[]),
    "exits of sample 0 are [0], the last one 1": lambda lines: lines[1].update(max_exit=1),
    "digest that stands beside": lambda lines: lines[0].update(
        policy={"rule": "entropy", "thresholds": [0.5]}
    ),
    "label of sample 0 is -1": lambda lines: lines[1].update(label=-1),
    "max_macs of sample 0 is 1.5": lambda lines: lines[1].update(max_macs=1.5),
    "margin of sample 0 is '1'": lambda lines: lines[1].update(margin="1"),
}


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("message", EDITS)
def test_a_file_that_contradicts_itself_is_refused_in_spite_of_its_digest(
    message: str, tmp_path: Path
) -> None:
    lines = lines_of(tmp_path)
    forge(tmp_path, lines)
    read(tmp_path)
    EDITS[message](lines)
    forge(tmp_path, lines)
    assert message in refused(tmp_path)


@pytest.mark.usefixtures("made")
def test_another_spelling_is_refused(tmp_path: Path) -> None:
    """Readers differ on which of two equal keys they take."""
    body = b"".join((tmp_path / NAME).read_bytes().splitlines(keepends=True)[:-1])
    for old, new in ((b'{"index": 0,', b'{"index": 1, "index": 0,'), (b'"index": 0,', b'"index":0,')):
        edited = body.replace(old, new, 1)
        digest = json.dumps({"sha256": hashlib.sha256(edited).hexdigest()}).encode()
        (tmp_path / NAME).write_bytes(edited + digest + b"\n")
        assert "sample 0 is not in the form" in refused(tmp_path)


@pytest.mark.usefixtures("made")
def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    for value in (float("nan"), float("inf")):
        lines[1]["margin"] = value
        forge(tmp_path, lines)
        assert "sample 0 is not JSON" in refused(tmp_path)


def test_foreign_and_missing_files_are_refused(tmp_path: Path, images: ImageSet, net: nn.Module) -> None:
    assert "has no certificates.jsonl" in refused(tmp_path)
    for content in (b"", b"\xff\xfe\x00", b"[]\n", b'{"format": "else"}\n'):
        (tmp_path / NAME).write_bytes(content)
        assert "not written by swiftsure" in refused(tmp_path)
    certificate = certificates()
    (tmp_path / NAME).unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        write(tmp_path, certificate, images)
    models.save(net, tmp_path)
    with pytest.raises(InputError, match="24 certificates but 23 images"):
        write(tmp_path, certificate, images.select(slice(COUNT - 1)))
    assert not (tmp_path / NAME).exists()


def test_recheck_proves_everything_again(made: Certificate, images: ImageSet, tmp_path: Path) -> None:
    found = recheck(models.load(tmp_path), tmp_path, images)
    assert (found.n, found.certified) == (COUNT, int(made.certified.sum()))
    assert (found.by_reference, found.reason) == (COUNT, None)
    assert found.largest_difference < 1e-4
    assert found.seconds > 0
    part = recheck(models.load(tmp_path), tmp_path, images, limit=5)
    assert (part.n, part.certified) == (5, int(made.certified[:5].sum()))


def test_recheck_names_a_forged_verdict(
    made: Certificate, net: nn.Module, images: ImageSet, tmp_path: Path
) -> None:
    lines = lines_of(tmp_path)
    forged = next(line for line in lines[1:] if not line["certified"])
    forged.update(certified=True, margin=0.5, method="symbolic")
    forge(tmp_path, lines)
    with pytest.raises(SoundnessError, match=f"sample {forged['index']} .*symbolic with margin 0.5"):
        recheck(net, tmp_path, images)


def test_recheck_refuses_other_margins_and_costs(
    made: Certificate, net: nn.Module, images: ImageSet, tmp_path: Path
) -> None:
    index = int(made.certified.nonzero()[0])
    edits: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (InputError, "margin", {"margin": float(made.margin[index]) * 1.5}),
        (InputError, "margin", {"certified": False, "method": "none", "margin": -0.25}),
        (SoundnessError, "MACs", {"max_macs": int(made.max_macs[index]) - 1}),
        (InputError, "MACs", {"max_macs": int(made.max_macs[index]) + 1}),
    ]
    for error, word, edit in edits:
        lines = lines_of(tmp_path)
        original = copy.deepcopy(lines)
        lines[1 + index].update(edit)
        forge(tmp_path, lines)
        with pytest.raises(error, match=f"sample {index} .*{word}"):
            recheck(net, tmp_path, images)
        forge(tmp_path, original)
    recheck(net, tmp_path, images)


def test_half_of_the_slack_is_kept_for_recomputation(
    net: nn.Module, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A margin just above delta may come out just below it elsewhere; one that loses half of delta is no proof."""
    models.save(net, tmp_path)
    x, y = images.batch(slice(None))
    margin = certify(net, x, y, BALLS[0], method="interval").margin
    delta = 0.9999 * float(margin[margin > 0.05].min())
    write(tmp_path, certify(net, x, y, BALLS[0], method="interval", delta=delta), images)

    computed = PlainBounds.differences

    def lowered(by: float) -> None:
        def found(self: PlainBounds, *options: Any) -> list[Box]:
            return [(low, high + by) for low, high in computed(self, *options)]

        monkeypatch.setattr(PlainBounds, "differences", found)

    lowered(5e-4)
    assert recheck(net, tmp_path, images).largest_difference == pytest.approx(5e-4, rel=0.1)
    lowered(0.51 * delta)
    with pytest.raises(SoundnessError, match="cannot be proven again"):
        recheck(net, tmp_path, images, tolerance=1.0)


@pytest.mark.usefixtures("made")
def test_recheck_does_not_take_a_larger_ball(net: nn.Module, images: ImageSet, tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    lines[0]["ball"]["eps"] = 0.2
    forge(tmp_path, lines)
    with pytest.raises(SoundnessError, match="cannot be proven again"):
        recheck(net, tmp_path, images)


@pytest.mark.usefixtures("made")
def test_recheck_refuses_other_data_and_weights(net: nn.Module, images: ImageSet, tmp_path: Path) -> None:
    pixels, labels = images.images.clone(), images.labels.clone()
    pixels[7, 0, 3, 3] ^= 1
    labels[7] = (labels[7] + 1) % 10
    for other in (
        ImageSet(images.name, pixels, images.labels, images.classes),
        ImageSet(images.name, images.images, labels, images.classes),
        images.select(slice(COUNT - 1)),
    ):
        with pytest.raises(InputError, match="images are not the 24"):
            recheck(net, tmp_path, other)
    with torch.no_grad():
        net[1].weight[0, 0, 0, 0] = torch.nextafter(net[1].weight[0, 0, 0, 0], torch.tensor(9.0))
    with pytest.raises(InputError, match="does not hold the weights"):
        recheck(net, tmp_path, images)
    with pytest.raises(InputError, match="does not hold the weights"):
        recheck(models.build("digits_small"), tmp_path, images)
    models.save(net, tmp_path)
    with pytest.raises(InputError, match="has changed since"):
        recheck(net, tmp_path, images)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        recheck(net, tmp_path, images)
    with pytest.raises(InputError, match="limit is 0"):
        recheck(net, tmp_path, images, limit=0)
