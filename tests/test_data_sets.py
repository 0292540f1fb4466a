import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from swiftsure import data
from swiftsure.data import catalogue, cifar, idx
from swiftsure.data.splits import OfficialParts, balanced_draw, split
from swiftsure.errors import InputError

rng = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool = False, train: int = 60, test: int = 20) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(train, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(test, dtype=np.uint8) % 10,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return arrays


# Where a set is looked for


def test_the_root_is_the_argument_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTSURE_DATA", str(tmp_path / "there"))
    assert data.data_root(tmp_path) == tmp_path
    assert data.data_root() == tmp_path / "there"
    monkeypatch.setenv("SWIFTSURE_DATA", "")
    assert data.data_root() == Path.home() / ".cache" / "swiftsure"


def test_a_missing_set_is_one_line_with_place_and_remedy(tmp_path):
    with pytest.raises(InputError) as error:
        data.load("mnist", tmp_path)
    line = str(error.value)
    assert "\n" not in line
    for part in (
        "mnist",
        str(tmp_path),
        "MNIST/raw",
        "swiftsure data fetch mnist",
        "--data",
        "$SWIFTSURE_DATA",
    ):
        assert part in line


def test_an_unknown_set_names_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="data set is 'mnits'; allowed: digits, mnist"):
        data.load("mnits", tmp_path)


def test_a_set_that_lacks_a_file_says_which(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"MNIST.raw lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)


def test_found_lists_what_is_there(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    there = data.found(tmp_path)
    assert set(there) == {"digits", "fashion_mnist"}
    assert there["fashion_mnist"] == tmp_path / "FashionMNIST" / "raw"
    assert there["digits"].is_dir()


def test_importing_the_package_loads_neither_pillow_nor_scikit_learn():
    import subprocess
    import sys

    code = "import sys, swiftsure.data; print([m for m in ('PIL', 'sklearn', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Division


def parts_of(labels: np.ndarray) -> OfficialParts:
    images = np.arange(len(labels), dtype=np.int64).view(np.uint8).reshape(-1, 1, 2, 4)
    return OfficialParts(
        images, labels, images[:3], labels[:3], tuple(map(str, range(int(labels.max()) + 1)))
    )


def numbers(images: data.ImageSet) -> np.ndarray:
    """The place that each image of ``parts_of`` had in the training set."""
    return images.images.numpy().reshape(-1, 8).view(np.int64)[:, 0]


@pytest.mark.parametrize(
    ("count", "classes", "half"), [(20_000, 10, 2500), (19_999, 10, 999), (41_000, 200, 2500)]
)
def test_val_and_calibration_are_disjoint_and_balanced(count, classes, half):
    labels = np.random.default_rng(1).permutation(np.arange(count) % classes)
    splits = split("made", parts_of(labels), seed=5)
    drawn = [numbers(s) for s in (splits.train, splits.val, splits.calibration)]
    assert sorted(np.concatenate(drawn)) == list(range(count))
    assert len(splits.val) == len(splits.calibration) == half
    for part, index in zip((splits.train, splits.val, splits.calibration), drawn, strict=True):
        assert np.all(np.diff(index) > 0)
        assert np.array_equal(part.labels.numpy(), labels[index])
    for part in (splits.val, splits.calibration):
        share = part.labels.bincount(minlength=classes)
        assert share.max() - share.min() <= 1
    held_out = splits.val.labels.bincount(minlength=classes) + splits.calibration.labels.bincount(
        minlength=classes
    )
    assert held_out.max() - held_out.min() <= 1


def test_the_seed_alone_decides_the_draw():
    labels = np.arange(1000) % 7
    first, again, other = (split("made", parts_of(labels), seed) for seed in (0, 0, 1))
    assert np.array_equal(numbers(first.val), numbers(again.val))
    assert not np.array_equal(numbers(first.val), numbers(other.val))
    assert np.array_equal(numbers(first.test), numbers(other.test))


def test_the_draw_is_the_same_on_every_machine():
    """Splits are part of every published figure: this pins the draw itself."""
    labels = np.arange(40) % 2
    val, calibration, rest = balanced_draw(labels, (3, 3), 2, seed=0)
    assert val.tolist() == [2, 11, 20]
    assert calibration.tolist() == [3, 13, 32]
    assert len(rest) == 34


def test_a_rare_class_keeps_half_of_its_images():
    labels = np.array([0] * 500 + [1] * 3)
    splits = split("made", parts_of(labels))
    assert (splits.train.labels == 1).sum() == 2
    assert (splits.val.labels == 1).sum() + (splits.calibration.labels == 1).sum() == 1


@pytest.mark.parametrize("seed", [-1, 0.5, "a", True])
def test_a_seed_that_is_no_count_is_refused(seed):
    with pytest.raises(InputError, match="allowed: an integer >= 0"):
        data.load("digits", seed=seed)


def test_too_few_images_cannot_be_divided():
    with pytest.raises(InputError, match="19 training images; at least 20"):
        split("made", parts_of(np.zeros(19, dtype=np.int64)))


# Digits


def test_digits_have_a_test_part_that_no_seed_moves():
    first, other = data.load("digits", seed=0), data.load("digits", seed=1)
    assert [len(s) for s in (first.train, first.val, first.calibration, first.test)] == [1295, 71, 71, 360]
    assert first.test.labels.bincount().tolist() == [36] * 10
    assert first.test.sha256() == other.test.sha256()
    assert first.test.sha256().startswith("bc5377d6c92f64cd"), "published figures rest on these 360 images"
    assert first.val.sha256() != other.val.sha256()
    assert first.train.shape == (1, 8, 8)
    every = torch.cat([s.images for s in (first.train, first.val, first.calibration, first.test)])
    assert len(every) == 1797
    # The 17 levels 0 to 16, spread over a byte and rounded.
    assert every.unique().tolist() == [round(level * 255 / 16) for level in range(17)]


# idx


@pytest.mark.parametrize("place", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_wherever_they_may_lie(tmp_path, place, zipped):
    arrays = write_idx(tmp_path / place, zipped)
    splits = data.load("mnist", tmp_path)
    assert splits.test.images.shape == (20, 1, 28, 28)
    assert np.array_equal(splits.test.images.numpy()[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert splits.test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert len(splits.train) + len(splits.val) + len(splits.calibration) == 60
    assert splits.train.classes == tuple("0123456789")


def cut(content: bytes) -> bytes:
    """cut"""
    return content[:-1]


def lengthened(content: bytes) -> bytes:
    """lengthened"""
    return content + b"\0"


def no_header(content: bytes) -> bytes:
    """no header"""
    return content[:3]


def wrong_magic(content: bytes) -> bytes:
    """wrong magic"""
    return b"\0\0\x0d" + content[3:]


def other_size(content: bytes) -> bytes:
    """other size"""
    return content[:8] + struct.pack(">II", 14, 56) + content[16:]


def fewer(content: bytes) -> bytes:
    """fewer"""
    return content[:4] + struct.pack(">I", 59) + content[8:-1]


def huge(content: bytes) -> bytes:
    """huge"""
    return content[:4] + struct.pack(">I", 2**32 - 1) + content[8:]


def label_ten(content: bytes) -> bytes:
    """label ten"""
    return content[:-1] + b"\x0a"


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("train-images-idx3-ubyte", cut, "header announces"),
        ("train-images-idx3-ubyte", lengthened, "header announces"),
        ("train-images-idx3-ubyte", huge, "header announces"),
        ("train-images-idx3-ubyte", no_header, "not an idx file"),
        ("train-images-idx3-ubyte", wrong_magic, "not an idx file"),
        ("train-images-idx3-ubyte", other_size, "14x56; allowed: 28x28"),
        ("train-labels-idx1-ubyte", fewer, "60 training images but 59 labels"),
        ("t10k-labels-idx1-ubyte", label_ten, "test label 10; allowed: 0 to 9"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_idx_file_is_refused(tmp_path, name, change, line, zipped):
    write_idx(tmp_path, zipped)
    path = tmp_path / (f"{name}.gz" if zipped else name)
    if zipped:
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=line) as error:
        data.load("mnist", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not gzip", "truncated", "flipped"])
def test_a_damaged_gzip_file_is_refused(tmp_path, content):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    if content == "truncated":
        content = whole[: len(whole) // 2]
    elif content == "flipped":
        content = whole[:1000] + bytes([whole[1000] ^ 255]) + whole[1001:]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz"):
        data.load("mnist", tmp_path)


def test_the_two_sets_with_the_same_file_names_are_told_apart(tmp_path):
    write_idx(tmp_path)
    labels = idx._FASHION_START + bytes(4)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.frombuffer(labels, np.uint8)))
    with pytest.raises(InputError, match="holds fashion_mnist"):
        data.load("mnist", tmp_path)
    assert data.load("fashion_mnist", tmp_path).train.classes[9] == "Ankle boot"


@pytest.mark.real_data("mnist")
def test_real_mnist():
    splits = data.load("mnist")
    assert [len(s) for s in (splits.train, splits.val, splits.calibration, splits.test)] == [
        55_000,
        2_500,
        2_500,
        10_000,
    ]
    assert bytes(splits.test.labels[:16].tolist()) == idx._MNIST_START
    assert splits.val.labels.bincount().tolist() == [250] * 10
    assert splits.val.sha256().startswith("6c7beb5c893c8ba7"), "published figures rest on this draw"
    x, _ = splits.train.batch(slice(0, 5000))
    assert 0.12 < float(x.mean()) < 0.14


# CIFAR-10


def write_cifar(folder: Path, records: int = 30) -> None:
    folder.mkdir(parents=True)
    for name in (*cifar.TRAIN_FILES, cifar.TEST_FILE):
        record = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        record[:, 0] = np.arange(records) % 10
        (folder / name).write_bytes(record.tobytes())


@pytest.fixture
def small_cifar(tmp_path, monkeypatch) -> Path:
    """A root with CIFAR-10 of 30 images a file."""
    monkeypatch.setattr(cifar, "_RECORDS", 30)
    write_cifar(tmp_path / "cifar-10-batches-bin")
    return tmp_path


def test_cifar_records_are_a_label_and_three_planes(small_cifar):
    splits = data.load("cifar10", small_cifar)
    record = np.frombuffer((small_cifar / "cifar-10-batches-bin/test_batch.bin").read_bytes(), np.uint8)
    record = record.reshape(30, 3073)
    assert splits.test.images.shape == (30, 3, 32, 32)
    assert splits.test.images[4, 2, 1, 5] == record[4, 1 + 2 * 1024 + 1 * 32 + 5]
    assert splits.test.labels.tolist() == [i % 10 for i in range(30)]
    assert len(splits.train) + len(splits.val) + len(splits.calibration) == 150


@pytest.mark.parametrize("size", [0, 3073 * 29, 3073 * 30 - 1, 3073 * 31])
def test_a_cifar_file_of_another_length_is_refused(small_cifar, size):
    (small_cifar / "cifar-10-batches-bin/data_batch_3.bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=rf"data_batch_3.bin has {size} bytes; a whole batch has 92190"):
        data.load("cifar10", small_cifar)


def test_a_cifar_label_out_of_range_is_refused(small_cifar):
    (small_cifar / "cifar-10-batches-bin/data_batch_3.bin").write_bytes(b"\x0a" + bytes(3073 * 30 - 1))
    with pytest.raises(InputError, match="label 10; allowed: 0 to 9"):
        data.load("cifar10", small_cifar)


def test_the_pickled_version_of_cifar_is_refused_with_reason_and_remedy(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="pickle") as error:
        data.load("cifar10", tmp_path)
    assert "swiftsure data fetch cifar10" in str(error.value)
    assert "cifar-10-binary.tar.gz" in str(error.value)
    assert "cifar10" not in data.found(tmp_path)


@pytest.mark.real_data("cifar10")
def test_real_cifar10():
    splits = data.load("cifar10")
    assert len(splits.train) == 45_000
    assert splits.val.labels.bincount().tolist() == [250] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert splits.test.classes[int(splits.test.labels[0])] == "cat"


def test_every_set_is_documented_by_its_layout():
    assert data.names() == ("digits", "mnist", "fashion_mnist", "cifar10", "tiny_imagenet", "folder")
    assert set(catalogue.LAYOUTS) == set(data.names())
