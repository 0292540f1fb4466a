"""The networks are those of the layer tables, and what is saved comes back or is refused in one line."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import swiftsure as ss
from swiftsure.errors import InputError

# Counted by hand from the layer tables: kernel area * channels in * channels out + channels out, and so on.
PARAMETERS = {
    "mnist_small": 166_406,
    "mnist_large": 1_974_762,
    "cifar_small": 214_918,
    "cifar_large": 2_466_858,
    "cifar_resnet": 1_145_410,
    "imagenet200_resnet": 739_720,
    "digits_small": 41_866,
    "cnn7": 17_192_650,
    "cnn5": 4_400_074,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_shapes_and_config(name):
    net = ss.models.build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert all(p.requires_grad for p in net.parameters())
    shape, classes = net.config["input_shape"], net.config["classes"]
    with torch.no_grad():
        assert net(torch.rand(2, *shape)).shape == (2, classes)
    assert json.loads(json.dumps(net.config)) == net.config


def test_all_registered_networks_of_the_package_are_counted():
    assert set(PARAMETERS) <= set(ss.models.names())


def shapes(net):
    return [
        (*m.weight.shape, m.stride[0], m.padding[0]) if isinstance(m, nn.Conv2d) else tuple(m.weight.shape)
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]


def test_layers_of_the_small_and_the_residual_network():
    assert shapes(ss.models.build("mnist_small")) == [
        (16, 1, 4, 4, 2, 1), (32, 16, 4, 4, 2, 1), (100, 1568), (10, 100),
    ]  # fmt: skip
    assert shapes(ss.models.build("cifar_resnet")) == [
        (16, 3, 3, 3, 1, 1),
        (16, 16, 4, 4, 2, 1), (16, 16, 3, 3, 1, 1), (16, 16, 2, 2, 2, 0),
        (16, 16, 3, 3, 1, 1), (16, 16, 3, 3, 1, 1), (16, 16, 1, 1, 1, 0),
        (32, 16, 4, 4, 2, 1), (32, 32, 3, 3, 1, 1), (32, 16, 2, 2, 2, 0),
        (64, 32, 4, 4, 2, 1), (64, 64, 3, 3, 1, 1), (64, 32, 2, 2, 2, 0),
        (1000, 1024), (10, 1000),
    ]  # fmt: skip


def test_layers_of_the_networks_of_certified_training():
    net = ss.models.build("cnn7")
    assert shapes(net) == [
        (64, 3, 3, 3, 1, 1), (64, 64, 3, 3, 1, 1), (128, 64, 3, 3, 2, 1), (128, 128, 3, 3, 1, 1),
        (128, 128, 3, 3, 1, 1), (512, 32768), (10, 512),
    ]  # fmt: skip
    kinds = [type(m).__name__ for m in net]
    assert kinds[:4] == ["Normalize", "Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds[1:16] == kinds[1:4] * 5
    assert kinds[16:] == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert shapes(ss.models.build("cnn5", input_shape=[1, 28, 28], classes=3)) == [
        (64, 1, 3, 3, 1, 1), (64, 64, 4, 4, 2, 1), (128, 64, 4, 4, 2, 1), (512, 6272), (3, 512),
    ]  # fmt: skip


def test_networks_of_certified_training_take_other_images(tmp_path):
    net = ss.models.build("cnn7", input_shape=[1, 28, 28], classes=4).eval()
    # The layer table for 1x28x28: 640 + 36,928 + 73,856 + 2 * 147,584; 128 * 14 * 14 * 512 + 512; 2,052; 2,048.
    assert sum(p.numel() for p in net.parameters()) == 13_256_260
    ss.models.save(net, tmp_path)
    again, x = ss.load(tmp_path), torch.rand(1, 1, 28, 28)
    assert again.config == net.config
    assert torch.equal(again(x), net(x))
    for shape in ([2, 32, 32], [3, 30, 32], [3, 32], [1, 4, 4]):
        with pytest.raises(InputError, match="allowed: \\[1 or 3, height, width\\]"):
            ss.models.build("cnn5", input_shape=shape)


def test_weights_of_the_networks_of_certified_training_keep_intervals_as_wide():
    torch.manual_seed(0)
    net = ss.models.build("cnn5")
    for layer in (m for m in net if isinstance(m, nn.Conv2d | nn.Linear)):
        rows = layer.weight.flatten(1).abs().sum(1).mean().item()
        # PyTorch's own draw of the last layer gives sqrt(512) / 2.
        assert rows == pytest.approx(11.3 if layer is net[-1] else 2.0, rel=0.05)


def test_convolutions_start_with_the_papers_variance():
    torch.manual_seed(0)
    conv = ss.models.build("mnist_large")[5]
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx((2 / (3 * 3 * 64)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


def test_normalisation_is_inside_and_a_residual_block_is_its_formula():
    x = torch.rand(2, 3, 32, 32)
    normalised = ss.models.build("cifar_small")[0](x)
    torch.testing.assert_close(normalised[:, 1], (x[:, 1] - 0.456) / 0.225)
    block = ss.models.ResidualBlock(3, 4, down=True)
    expected = (block.conv_b(block.conv_a(x).relu()) + block.skip(x)).relu()
    torch.testing.assert_close(block(x), expected)


def test_options_are_kept_and_built_again(tmp_path):
    net = ss.models.build("digits_small", width=4, hidden=12, classes=3)
    ss.models.save(net, tmp_path, note="mine")
    again = ss.load(tmp_path)
    assert again.config == net.config
    assert not again.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "mine"


def test_an_unregistered_network_is_passed_again_and_checked_strictly(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    ss.models.save(net, tmp_path)
    x = torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(
        ss.load(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))(x), net(x)
    )
    with pytest.raises(InputError, match="names no architecture"):
        ss.load(tmp_path)
    with pytest.raises(InputError, match=r"1\.weight has shape \(3, 4\), the network needs \(2, 4\)"):
        ss.load(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(InputError, match=r"tensor"):
        ss.load(tmp_path, model=nn.Sequential(nn.Linear(4, 3)))


def damage_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    first = next(iter(state))
    state[first] = state[first] * float("nan")
    safetensors.torch.save_file(state, path)


def flip(folder):
    """One bit of one number: still safetensors, still finite."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "is not the file that config.json was written with"),
        (lambda f: damage_config(f, weights_sha256="0" * 64), "one is damaged"),
        (truncate, "damaged or not a safetensors file"),
        (poison, "NaN or infinite"),
        (lambda f: (f / "model.safetensors").write_text("hello"), "damaged or not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not written by swiftsure"),
        (lambda f: damage_config(f, format="other"), "not written by swiftsure"),
        (lambda f: damage_config(f, format_version=99), "format version 99"),
        (lambda f: damage_config(f, model={"name": "digits_smal"}), "did you mean 'digits_small'"),
        (
            lambda f: damage_config(f, model={"name": "digits_small", "options": {"colour": 1}}),
            "cannot be built",
        ),
        (lambda f: damage_config(f, model={"name": "mnist_small", "options": {}}), "contradicts|has shape"),
    ],
)
def test_damaged_and_foreign_folders_are_refused_in_one_line(tmp_path, damage, words):
    ss.models.save(ss.models.build("digits_small", width=4), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        ss.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_a_name_taken_twice():
    with pytest.raises(InputError, match=r"unknown model 'mnist_smal'; did you mean 'mnist_small'\?"):
        ss.models.build("mnist_smal")
    with pytest.raises(InputError, match="registered already"):
        ss.models.register("mnist_small")(lambda: nn.Identity())
