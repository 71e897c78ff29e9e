import pytest
import torch

from colorize.models import MODELS, ConvNet, ConvNetConfig, Critic, CriticConfig, UNet, UNetConfig
from colorize.models.attention import CrissCrossAttention

SMALL = {
    "convnet": ConvNet(ConvNetConfig(width=4)),
    "unet": UNet(UNetConfig(num_filters=4, num_downs=5, attention=False)),
    "unet with attention": UNet(UNetConfig(num_filters=8, num_downs=5)),
}


def count(tensors) -> int:
    return sum(t.numel() for t in tensors)


def on_meta(network, *config):
    with torch.device("meta"):
        return network(*config)


def test_sizes_of_the_report():
    assert count(on_meta(ConvNet).parameters()) == 9_783_459
    assert count(on_meta(UNet, UNetConfig(attention=False)).parameters()) == 54_409_858
    assert count(on_meta(UNet).parameters()) == 54_980_593
    critic = Critic()  # spectral norm cannot be set up on the meta device
    assert count(critic.parameters()) == 20_874_435
    assert count(critic.buffers()) == 75_219


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (33, 7), (64, 64), (97, 130)])
def test_any_height_and_width(name, size):
    model = SMALL[name].eval()
    with torch.inference_mode():
        out = model(torch.rand(2, 1, *size))
    assert out.shape == (2, 3 if model.paints == "rgb" else 2, *size)
    assert out.isfinite().all()


def test_what_is_padded_is_cropped_back_in_place():
    model = UNet(UNetConfig(num_filters=4, num_downs=5)).eval()
    x = torch.rand(1, 1, 32, 32) * 2 - 1
    with torch.inference_mode():
        cut = model(x[..., :31, :30])
        whole = model(torch.nn.functional.pad(x[..., :31, :30], (0, 2, 0, 1), mode="replicate"))
    assert torch.equal(cut, whole[..., :31, :30])


def changed(layers: int) -> torch.Tensor:
    """Where the output of so many attention layers changes when one pixel of the input does: (7, 9) bool."""
    torch.manual_seed(0)
    attention = torch.nn.Sequential(*(CrissCrossAttention(16) for _ in range(layers))).double()
    for layer in attention:
        layer.gamma.data.fill_(1)
    x = torch.randn(1, 16, 7, 9, dtype=torch.float64)
    y = x.clone()
    y[..., 2, 5] += 1
    with torch.inference_mode():
        return (attention(x) - attention(y)).abs().amax(1)[0] > 1e-12


def test_one_layer_looks_along_row_and_column():
    cross = torch.zeros(7, 9, dtype=torch.bool)
    cross[2], cross[:, 5] = True, True
    assert torch.equal(changed(1), cross)


def test_two_layers_look_everywhere():
    assert changed(2).all()


def test_attention_is_softmax_over_positions():
    """Against the sum written out for one pixel."""
    torch.manual_seed(1)
    layer = CrissCrossAttention(16).double()
    layer.gamma.data.fill_(0.7)
    x = torch.randn(1, 16, 4, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].chunk(3)  # each (2, 4, 6)
    row = torch.softmax(q[:, 1, 3] @ k[:, 1] / 2**0.5, dim=0) @ v[:, 1].T
    column = torch.softmax(q[:, 1, 3] @ k[:, :, 3] / 2**0.5, dim=0) @ v[:, :, 3].T
    expected = x[0, :, 1, 3] + layer.project((0.7 * (row + column))[None, :, None, None])[0, :, 0, 0]
    assert torch.allclose(layer(x)[0, :, 1, 3], expected)


def test_a_new_attention_layer_changes_nothing():
    x = torch.randn(1, 16, 4, 5)
    layer = CrissCrossAttention(16)
    torch.nn.init.zeros_(layer.project.bias)
    assert torch.equal(layer(x), x)


def test_critic_gives_every_feature_map_of_every_scale():
    maps = Critic(CriticConfig(num_filters=4))(torch.zeros(2, 1, 256, 256), torch.zeros(2, 2, 256, 256))
    assert [len(m) for m in maps] == [6, 6, 6]
    assert [tuple(m[0].shape) for m in maps] == [(2, 4, 128, 128), (2, 4, 64, 64), (2, 4, 32, 32)]
    assert [tuple(f.shape[1:]) for f in maps[0]] == [
        (4, 128, 128),
        (8, 64, 64),
        (16, 32, 32),
        (32, 16, 16),
        (32, 15, 15),
        (1, 14, 14),
    ]


@pytest.mark.parametrize(
    "config, value",
    [
        (UNetConfig, {"num_filters": 0}),
        (UNetConfig, {"num_downs": 40}),
        (UNetConfig, {"image_size": 10**9}),
        (ConvNetConfig, {"width": 7}),
    ],
)
def test_absurd_sizes_are_refused_by_name(config, value):
    with pytest.raises(ValueError, match=next(iter(value))):
        config(**value)


def test_table_of_models():
    for architecture, (network, config) in MODELS.items():
        assert config().architecture == architecture
        assert hasattr(network, "paints")
