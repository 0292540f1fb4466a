import pytest
import torch

from swiftsure.data import augment
from swiftsure.errors import InputError


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def images(count: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every pixel of every image and channel is different, and none is black."""
    return torch.arange(1, count * 3 * 6 * 5 + 1).view(count, 3, 6, 5).to(dtype)


def test_every_image_is_one_of_the_possible_crops_and_flips():
    """Compared with the plain way: pad, cut, flip, one image at a time."""
    x, crop = images(), 2
    out = augment(x, crop=crop, flip=True, generator=generator())
    padded = torch.nn.functional.pad(x, (crop,) * 4)
    drawn = set()
    for i in range(len(x)):
        for top in range(2 * crop + 1):
            for left in range(2 * crop + 1):
                cut = padded[i, :, top : top + 6, left : left + 5]
                for flipped in (False, True):
                    if torch.equal(out[i], cut.flip(-1) if flipped else cut):
                        drawn.add((i, top, left, flipped))
    assert {i for i, *_ in drawn} == set(range(len(x)))
    assert len({(top, left) for _, top, left, _ in drawn}) > 15
    assert {flipped for *_, flipped in drawn} == {False, True}


def test_nothing_to_do_changes_nothing():
    x = images()
    torch.testing.assert_close(augment(x, crop=0, flip=False), x)


def test_a_flip_alone_mirrors_about_half():
    x = images(400)
    out = augment(x, crop=0, generator=generator())
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert torch.all(mirrored ^ kept)
    assert 140 < int(mirrored.sum()) < 260


def test_equal_seeds_give_equal_draws_and_the_input_stays():
    x = images()
    before = x.clone()
    first = augment(x, generator=generator())
    torch.testing.assert_close(first, augment(x, generator=generator()))
    assert not torch.equal(first, augment(x, generator=torch.Generator().manual_seed(4)))
    torch.testing.assert_close(x, before)


def test_bytes_and_floats_are_moved_alike():
    x = (images() % 251).to(torch.uint8)
    out = augment(x, generator=generator())
    assert out.dtype == torch.uint8
    torch.testing.assert_close(out.float(), augment(x.float(), generator=generator()))


def test_an_empty_batch_stays_empty():
    assert augment(images()[:0]).shape == (0, 3, 6, 5)


@pytest.mark.parametrize("crop", [-1, 5, 1.5, True])
def test_a_crop_out_of_range_is_refused(crop):
    with pytest.raises(InputError, match="allowed: an integer from 0 to 4"):
        augment(images(), crop=crop)


def test_one_image_without_a_batch_is_refused():
    with pytest.raises(InputError, match=r"allowed: \(batch, channels"):
        augment(images()[0])
