import pytest
import torch

from swiftsure.data import ImageSet, check_batch
from swiftsure.errors import InputError

X = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1])


def altered(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 0, 2, 3] = value
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_good_batch_of_any_float_type_passes(dtype):
    check_batch(X.to(dtype), Y, classes=3, shape=(2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_pass(dtype):
    check_batch(X, Y.to(dtype), classes=3)


def test_an_empty_batch_passes():
    check_batch(X[:0], Y[:0], classes=3, shape=(2, 4, 5))


def test_pixels_that_need_a_gradient_pass():
    check_batch(X.clone().requires_grad_())


def test_a_rounding_error_is_forgiven_and_more_is_not():
    check_batch(altered(1 + 1e-7))
    check_batch(altered(-1e-7))
    for value in (1.001, -0.001):
        with pytest.raises(InputError, match=r"pixels range .* allowed: \[0, 1\]"):
            check_batch(altered(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pixel_that_is_no_number_is_named(value):
    with pytest.raises(InputError, match="image 1 has a NaN or infinite pixel"):
        check_batch(altered(value))


@pytest.mark.parametrize(
    ("x", "y", "options", "line"),
    [
        (X[0], Y, {}, r"shape \(2, 4, 5\); allowed: \(batch, channels"),
        (X[:, :0], Y, {}, "must be at least 1"),
        (X, Y, {"shape": (2, 5, 4)}, r"\(2, 4, 5\) each; the network takes \(2, 5, 4\)"),
        ((X * 255).to(torch.uint8), Y, {}, "dtype uint8; allowed: a floating-point"),
        ((X * 255).to(torch.int64), Y, {}, "dtype int64; allowed: uint8, or floats"),
        (X.numpy(), Y, {}, "are a ndarray; allowed: a torch.Tensor"),
        (X, Y.tolist(), {}, "labels are a list"),
        (X, Y[:2], {}, "3 images but 2 labels"),
        (X, Y.float(), {}, "labels have dtype float32"),
        (X, Y > 0, {}, "labels have dtype bool"),
        (X, Y[:, None], {}, r"labels have shape \(3, 1\)"),
        (X, Y, {"classes": 2}, "label 1 is 2; allowed: 0 to 1"),
        (X, Y - 1, {"classes": 3}, "label 0 is -1; allowed: 0 to 2"),
        (X, Y - 1, {}, "label 0 is -1; allowed: >= 0"),
    ],
)
def test_a_bad_batch_is_refused_in_one_line(x, y, options, line):
    with pytest.raises(InputError, match=line) as error:
        check_batch(x, y, **options)
    assert "\n" not in str(error.value)


def test_a_set_from_float_tensors_keeps_them_and_stays_in_range():
    images = ImageSet.from_tensors(altered(1 + 1e-7).double(), Y)
    assert images.images.dtype == torch.float32
    assert images.images.max() <= 1
    assert images.classes == ("0", "1", "2")
    assert images.shape == (2, 4, 5)
    x, y = images.batch([2, 0])
    torch.testing.assert_close(x, X[[2, 0]])
    assert y.tolist() == [1, 0]


def test_a_set_from_bytes_becomes_float_batch_by_batch():
    raw = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = ImageSet.from_tensors(raw, Y.to(torch.int16), classes=("a", "b", "c"))
    assert images.images.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert images.batch(slice(0, 3))[0].flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_a_batch_is_a_copy():
    images = ImageSet.from_tensors(X.clone(), Y.clone())
    x, y = images.batch(slice(0, 2))
    x.zero_()
    y.fill_(9)
    one, label = images[0]
    one.zero_()
    label.fill_(9)
    torch.testing.assert_close(images.images, X)
    torch.testing.assert_close(images.labels, Y)


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), range(2, -1, -2)])
def test_every_kind_of_index_gives_the_same_batch(index):
    images = ImageSet.from_tensors(X, Y)
    assert images.batch(index)[1].tolist() == [1, 0]
    assert images.select(index).labels.tolist() == [1, 0]
    assert len(images.batch([])[0]) == 0
    assert images.batch(Y > 0)[1].tolist() == [2, 1]


def test_a_set_is_a_torch_dataset():
    images = ImageSet.from_tensors(X, Y)
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    batches = list(loader)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), X)
    assert torch.cat([y for _, y in batches]).tolist() == Y.tolist()


def test_the_digest_follows_pixels_labels_and_order():
    images = ImageSet.from_tensors(X, Y)
    assert images.sha256() == ImageSet.from_tensors(X.clone(), Y.clone()).sha256()
    others = [
        ImageSet.from_tensors(altered(0.5), Y),
        ImageSet.from_tensors(X, torch.tensor([0, 2, 2])),
        images.select([1, 0, 2]),
        ImageSet.from_tensors(X.reshape(3, 2, 5, 4), Y),
    ]
    assert len({s.sha256() for s in [images, *others]}) == 5


@pytest.mark.parametrize(
    ("x", "y", "classes", "line"),
    [
        (altered(float("nan")), Y, None, "image 1 has a NaN"),
        (X * 255, Y, None, "divide 8-bit values by 255"),
        (X, Y, 2, "label 1 is 2; allowed: 0 to 1"),
        (X, Y, ("cat", "dog"), "label 1 is 2; allowed: 0 to 1"),
        (X[:0], Y[:0], None, "holds no image"),
        (X.permute(1, 2, 3, 0)[0], Y, None, "allowed: .batch, channels"),
    ],
)
def test_bad_tensors_make_no_set(x, y, classes, line):
    with pytest.raises(InputError, match=line):
        ImageSet.from_tensors(x, y, classes)
