import cv2
import numpy as np
import pytest
import torch
from skimage.color import lab2rgb, rgb2lab

from colorize.color import (
    fit_gamut,
    gray_to_lightness,
    lab_to_network,
    lab_to_rgb,
    lightness_to_gray,
    network_to_lab,
    rgb_to_lab,
    rgb_to_lightness,
)  # fmt: skip
from conftest import PHOTOS

# Every corner of the RGB cube, the straight foot of both curves, and the greys around it.
COLOURS = np.array(
    [[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)]
    + [[v / 255] * 3 for v in range(256)]
    + [[v / 255, 0, 0] for v in range(24)]
)[None]  # (1, N, 3)


def tensor(rgb: np.ndarray, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(rgb).permute(2, 0, 1)[None].to(dtype)  # (1, 3, H, W)


def array(x: torch.Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


@pytest.fixture(params=[*PHOTOS, COLOURS], ids=lambda p: "colours" if isinstance(p, np.ndarray) else p.stem)
def rgb(request) -> np.ndarray:
    return request.param if isinstance(request.param, np.ndarray) else cv2.imread(str(request.param))[..., ::-1] / 255


def test_lab_is_that_of_scikit_image(rgb):
    assert np.abs(array(rgb_to_lab(tensor(rgb))) - rgb2lab(rgb)).max() < 1e-4


def test_rgb_is_that_of_scikit_image(rgb):
    lab = rgb2lab(rgb)
    assert np.abs(array(lab_to_rgb(tensor(lab))) - lab2rgb(lab)).max() < 1e-5


def test_round_trip(rgb):
    x = tensor(rgb)
    assert (lab_to_rgb(rgb_to_lab(x)) - x).abs().max() < 1e-5


def test_round_trip_through_the_network_range(rgb):
    lab = rgb_to_lab(tensor(rgb))
    lightness, ab = lab_to_network(lab)
    assert lightness.abs().max() <= 1 + 1e-5 and ab.abs().max() <= 1
    assert torch.allclose(network_to_lab(lightness, ab), lab, atol=1e-4)


def test_lightness_alone_is_the_first_channel_of_lab(rgb):
    assert (rgb_to_lightness(tensor(rgb)) - rgb_to_lab(tensor(rgb))[:, :1]).abs().max() < 1e-4


def test_grey_is_black_to_white():
    gray = torch.arange(256) / 255
    assert torch.allclose(lightness_to_gray(gray_to_lightness(gray)), gray, atol=1e-6)
    assert torch.allclose(gray_to_lightness(gray), rgb_to_lab(gray.expand(1, 3, 1, 256))[0, 0, 0], atol=1e-4)


@pytest.mark.parametrize("dtype, close", [(torch.float16, 0.1), (torch.bfloat16, 1.0), (torch.float64, 1e-4)])
def test_other_float_types_come_back_as_they_came(dtype, close):
    lab = rgb_to_lab(tensor(COLOURS, dtype))
    assert lab.dtype == dtype
    # What half precision itself loses, on the way in and on the way out, is not held against the formulas.
    exact = rgb2lab(
        array(tensor(COLOURS, dtype)).astype(np.float64) if dtype != torch.bfloat16 else array(tensor(COLOURS, dtype).double())
    )
    assert np.abs(array(lab.double()) - exact).max() < close
    assert lab_to_rgb(lab).dtype == dtype


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        rgb_to_lab(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("function", [rgb_to_lab, lab_to_rgb])
def test_gradients_are_finite_everywhere(function):
    x = tensor(COLOURS) if function is rgb_to_lab else torch.cat((rgb_to_lab(tensor(COLOURS)), torch.zeros(1, 3, 1, 1)), dim=3)
    x.requires_grad_(True)
    function(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(1, 3, 2, 3, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    assert torch.autograd.gradcheck(rgb_to_lab, rgb.requires_grad_(True))
    assert torch.autograd.gradcheck(lab_to_rgb, rgb_to_lab(rgb.detach()).requires_grad_(True))


def test_out_of_gamut_colours_lose_chroma_and_nothing_else():
    lightness, a, b = torch.meshgrid(
        torch.linspace(2, 98, 25), torch.linspace(-110, 110, 23), torch.linspace(-110, 110, 23), indexing="ij"
    )
    lab = torch.stack((lightness, a, b)).flatten(2)[None]  # (1, 3, 25, 529)
    fitted = fit_gamut(lab)
    shown = rgb_to_lab(lab_to_rgb(fitted))  # clipping has nothing left to do
    assert (shown - fitted).abs().max() < 0.1
    assert torch.equal(fitted[:, 0], lab[:, 0])
    chroma, before = fitted[:, 1:].norm(dim=1), lab[:, 1:].norm(dim=1)
    assert (chroma <= before + 1e-4).all() and (chroma < before - 1).any()
    turned = fitted[:, 1] * lab[:, 2] - fitted[:, 2] * lab[:, 1]  # cross product: 0 where the hue is the same
    assert (turned.abs() < 1e-2).all() and ((fitted[:, 1:] * lab[:, 1:]).sum(1) >= 0).all()
    # No more is taken than has to be: a third of a unit more would be outside.
    beyond = torch.cat((fitted[:, :1], fitted[:, 1:] * (1 + 0.3 / chroma[:, None].clamp(min=1e-3))), dim=1)
    shown = lab_to_rgb(beyond)
    clipped = ((shown < 1e-6) | (shown > 1 - 1e-6)).any(dim=1)
    assert clipped[(chroma < before - 1e-3) & (chroma > 1)].all()


def test_colours_in_gamut_are_left_alone(photo):
    lab = rgb_to_lab(tensor(cv2.imread(str(photo))[..., ::-1] / 255))
    assert torch.equal(fit_gamut(lab), lab)
