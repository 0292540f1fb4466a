"""The sets that are folders of image files: Tiny ImageNet, and a user's own."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swiftsure import data
from swiftsure.data import decoding, tiny_imagenet
from swiftsure.errors import InputError

rng = np.random.default_rng(0)


def write_image(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix.lower().startswith(".jp") else "PNG")


def write_tiny(folder: Path) -> None:
    wnids = ["n02", "n01"]
    for wnid in wnids:
        for i in range(12):
            write_image(
                folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", mode="L" if i == 3 else "RGB"
            )
    for i in range(4):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t63\t63\n" for i in range(4)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\n")


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A root with a Tiny ImageNet of two classes."""
    write_tiny(tmp_path / "tiny-imagenet-200")
    return tmp_path


def caches(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.name != "tiny-imagenet-200")


def test_tiny_imagenet_comes_in_sorted_classes_with_val_as_test(tiny):
    splits = data.load("tiny_imagenet", tiny)
    assert splits.train.classes == ("goldfish", "bullfrog")
    assert splits.test.labels.tolist() == [1, 0, 1, 0]
    assert splits.train.subset is None
    with Image.open(tiny / "tiny-imagenet-200/val/images/val_2.JPEG") as image:
        assert np.array_equal(splits.test.images[2].numpy(), np.asarray(image).transpose(2, 0, 1))
    labels = torch.cat([s.labels for s in (splits.train, splits.val, splits.calibration)])
    assert labels.bincount().tolist() == [12, 12]


def test_images_keep_their_order_through_all_threads(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 3)
    test = data.load("tiny_imagenet", tiny).test
    for i in range(4):
        with Image.open(tiny / f"tiny-imagenet-200/val/images/val_{i}.JPEG") as image:
            assert np.array_equal(test.images[i].numpy(), np.asarray(image).transpose(2, 0, 1))


def test_tiny_imagenet_is_decoded_once(tiny, monkeypatch):
    first = data.load("tiny_imagenet", tiny)
    assert len(caches(tiny)) == 1
    monkeypatch.setattr(tiny_imagenet, "decode", None)
    again = data.load("tiny_imagenet", tiny)
    assert first.train.sha256() == again.train.sha256()
    assert first.test.sha256() == again.test.sha256()
    again.test.images.zero_()


def test_the_folder_itself_can_be_the_root_and_moves_with_its_cache(tiny, monkeypatch):
    first = data.load("tiny_imagenet", tiny)
    moved = tiny / "moved"
    moved.mkdir()
    for path in (tiny / "tiny-imagenet-200", *caches(tiny)):
        if path != moved:
            path.rename(moved / path.name)
    monkeypatch.chdir(moved / "tiny-imagenet-200")
    monkeypatch.setattr(tiny_imagenet, "decode", None)
    assert data.load("tiny_imagenet", ".").train.sha256() == first.train.sha256()


@pytest.mark.parametrize("change", ["added", "removed", "rewritten"])
def test_a_changed_folder_is_decoded_again(tiny, change):
    data.load("tiny_imagenet", tiny)
    (before,) = caches(tiny)
    images = tiny / "tiny-imagenet-200/train/n01/images"
    if change == "added":
        write_image(images / "n01_99.JPEG")
    elif change == "removed":
        (images / "n01_0.JPEG").unlink()
    else:
        os.utime(images / "n01_0.JPEG", ns=(1, 1))
    splits = data.load("tiny_imagenet", tiny)
    (after,) = caches(tiny)
    assert before != after
    expected = {"added": 25, "removed": 23, "rewritten": 24}[change]
    assert len(splits.train) + len(splits.val) + len(splits.calibration) == expected


@pytest.mark.parametrize("content", [b"", b"garbage", "cut"])
def test_a_damaged_cache_is_made_again(tiny, content):
    first = data.load("tiny_imagenet", tiny)
    (cache,) = caches(tiny)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:1000] if content == "cut" else content)
    assert data.load("tiny_imagenet", tiny).train.sha256() == first.train.sha256()
    assert cache.read_bytes() == whole


def test_a_root_that_cannot_be_written_costs_only_the_cache(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "save", refuse)
    assert len(data.load("tiny_imagenet", tiny).test) == 4
    assert caches(tiny) == []


def test_a_partial_training_set_is_named_in_every_part(tiny):
    (tiny / "tiny-imagenet-200/SUBSET.txt").write_text("train: 12 of 500\n")
    splits = data.load("tiny_imagenet", tiny)
    for part in (splits.train, splits.val, splits.calibration, splits.test, splits.train.select([0])):
        assert part.subset == "train: 12 of 500"
    assert "12 of 500" in repr(splits.train)


def test_damage_to_tiny_imagenet_is_named(tiny):
    folder = tiny / "tiny-imagenet-200"

    def refuses(line: str) -> None:
        with pytest.raises(InputError, match=line) as error:
            data.load("tiny_imagenet", tiny)
        assert "\n" not in str(error.value)

    image = folder / "train/n01/images/n01_0.JPEG"
    whole = image.read_bytes()
    image.write_bytes(whole[:300])
    refuses(r"n01_0\.JPEG cannot be read as an image")
    image.write_bytes(b"hello")
    refuses(r"n01_0\.JPEG cannot be read as an image: not an image file")
    write_image(image, size=(64, 63))
    refuses(r"n01_0\.JPEG is 64x63 pixels")
    image.write_bytes(whole)
    annotations = folder / "val/val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn01\t0\n")
    refuses("has no val_9.JPEG")
    annotations.write_text(good + "val_0.JPEG\tn01\t0\n")
    refuses("must name a new image")
    annotations.write_text(good.replace("n01", "n77"))
    refuses("must name a new image and a class")
    annotations.write_text("")
    refuses("names no image")
    annotations.write_text(good)
    (folder / "wnids.txt").write_text("n01\nn01\n")
    refuses("must name every class once")
    (folder / "wnids.txt").write_text("n01\nn02\nn03\n")
    refuses("n03.images cannot be read")
    (folder / "train/n03/images").mkdir(parents=True)
    refuses("holds no JPEG")


@pytest.mark.real_data("tiny_imagenet")
def test_real_tiny_imagenet():
    splits = data.load("tiny_imagenet")
    assert splits.train.shape == (3, 64, 64)
    assert len(splits.train.classes) == 200
    assert splits.test.labels.bincount().tolist() == [50] * 200
    share = splits.val.labels.bincount()
    assert share.max() - share.min() == 1
    assert (splits.train.subset is None) == (len(splits.train) == 95_000)


# A folder of one's own


def write_folder(root: Path, mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> None:
    for part, count in (("train", 15), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(root / part / name / f"{i:02}.png", size, mode)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3)])
def test_a_folder_of_images(tmp_path, mode, channels):
    write_folder(tmp_path, mode)
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    (tmp_path / "train/cat/.hidden.png").write_text("not an image")
    splits = data.load("folder", tmp_path)
    assert splits.train.shape == (channels, 5, 7)
    assert splits.train.classes == ("cat", "dog")
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    with Image.open(tmp_path / "test/dog/01.png") as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(5, 7, channels)
    assert np.array_equal(splits.test.images[3].numpy(), pixels.transpose(2, 0, 1))


def test_grey_and_coloured_images_together_become_coloured(tmp_path):
    write_folder(tmp_path, "L")
    write_image(tmp_path / "test/dog/09.png", (7, 5), "RGB")
    assert data.load("folder", tmp_path).train.shape == (3, 5, 7)


def test_damage_to_a_folder_is_named(tmp_path):
    def refuses(line: str) -> None:
        with pytest.raises(InputError, match=line) as error:
            data.load("folder", tmp_path)
        assert "\n" not in str(error.value)

    refuses("it is your own data, as train")
    write_folder(tmp_path)
    write_image(tmp_path / "test/dog/09.png", (6, 5))
    refuses(r"09\.png is 6x5 pixels .* the other images are 7x5")
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "test/dog/09.png")
    refuses("allowed: 8 bits a channel")
    (tmp_path / "test/dog/09.png").write_bytes(b"")
    refuses("not an image file")
    (tmp_path / "test/dog/09.png").unlink()
    (tmp_path / "test/eel").mkdir()
    refuses("eel holds no image")
    write_image(tmp_path / "test/eel/0.png", (7, 5))
    refuses("class 'eel' in only one of train/ and test/")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    refuses("holds no folder")
