import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from colorize import Colorizer, PictureError
from colorize.color import fit_gamut, lab_to_rgb, rgb_to_lab
from colorize.colorizer import LONGEST, full_lightness, lab_to_levels, seen_shape, stretch_rows
from colorize.models import ConvNet, ConvNetConfig, UNetConfig
from conftest import OLD, PHOTOS


class Vivid(torch.nn.Module):
    """A network that paints strong colours everywhere, in and out of gamut, and remembers what it saw."""

    paints = "ab"
    config = UNetConfig(image_size=64)

    def forward(self, lightness):
        self.seen = lightness.shape
        h, w = lightness.shape[-2:]
        a = torch.linspace(-0.4, 0.4, w).expand(h, w)
        b = torch.linspace(-0.4, 0.4, h)[:, None].expand(h, w)
        return torch.stack((a, b)).expand(len(lightness), 2, h, w)


@pytest.fixture(scope="module")
def colorizer() -> Colorizer:
    return Colorizer(Vivid(), device="cpu")


@pytest.fixture(scope="module")
def trained(root) -> Colorizer:
    return Colorizer.from_pretrained(root / "checkpoints" / "unet-attention-gan", device="cpu")


def lightness(rgb) -> np.ndarray:
    rgb = np.asarray(rgb)
    rgb = rgb if rgb.ndim == 3 else cv2.cvtColor(rgb, cv2.COLOR_GRAY2RGB)
    return rgb2lab(rgb / np.iinfo(rgb.dtype).max)[..., 0]


@pytest.mark.parametrize("path", [*PHOTOS, *OLD], ids=lambda p: p.stem)
def test_lightness_is_the_originals(trained, path):
    """Within one 8-bit level, at full resolution, for gray, sepia and colour inputs."""
    before, after = cv2.imread(str(path))[..., ::-1], trained(path)
    assert np.asarray(after).shape == before.shape
    assert np.abs(lightness(before) - lightness(after)).max() < 100 / 255


def test_out_of_gamut_colours_keep_their_lightness(colorizer):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (128, 2))
    result = colorizer(ramp, saturation=3)
    assert np.abs(lightness(ramp) - lightness(result)).max() < 100 / 255


def test_trained_checkpoint_colours_photographs(trained):
    for path in PHOTOS:
        chroma = np.hypot(*np.moveaxis(rgb2lab(np.asarray(trained(path)))[..., 1:], -1, 0))
        assert chroma.mean() > 4, path


def test_only_the_lightness_of_a_colour_picture_counts(colorizer):
    rgb = cv2.imread(str(PHOTOS[0]))[..., ::-1]
    gray = np.asarray(colorizer(rgb, saturation=0))
    assert (gray.max(-1).astype(int) - gray.min(-1)).max() <= 1
    # A colour picture and its gray have the same lightness to within rounding, so the same colours.
    assert np.abs(np.asarray(colorizer(rgb)).astype(int) - np.asarray(colorizer(gray))).mean() < 1


def test_gray_without_saturation_comes_back_exactly(colorizer):
    for dtype in (np.uint8, np.uint16):
        ramp = np.linspace(0, np.iinfo(dtype).max, 256 * 64).astype(dtype).reshape(64, 256)
        result = np.asarray(colorizer(ramp, saturation=0))
        assert result.dtype == dtype
        assert np.abs(result.astype(int) - ramp[..., None]).max() <= (0 if dtype == np.uint8 else 2)  # of 65535: float32


def test_16_bits_stay_16_bits(colorizer):
    fine = np.linspace(20000, 22000, 300 * 200).astype(np.uint16).reshape(200, 300)
    result = np.asarray(colorizer(fine))
    assert result.dtype == np.uint16
    assert len(np.unique(result)) > 4 * 2000 / 257 * 3  # far more than 8 bits could tell apart
    assert np.abs(lightness(fine) - lightness(result)).max() < 0.01


def test_alpha_and_name_go_along(colorizer):
    rgba = np.dstack(
        [cv2.imread(str(PHOTOS[0]))[:60, :50, ::-1], np.arange(3000, dtype=np.uint16).reshape(60, 50).astype(np.uint8)]
    )
    result = colorizer(rgba)
    assert np.array_equal(np.asarray(result)[..., 3], rgba[..., 3])
    assert result.colorized_by == colorizer.name


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 5), (67, 131), (500, 33)])
def test_every_shape(colorizer, shape):
    result = np.asarray(colorizer(np.full(shape, 128, np.uint8)))
    assert result.shape == (*shape, 3)
    assert max(colorizer.model.seen[-2:]) <= LONGEST * colorizer.image_size


def test_the_net_sees_the_asked_size(colorizer):
    picture = np.zeros((300, 400), np.uint8)
    colorizer(picture)
    assert colorizer.model.seen == (1, 1, 64, 85)
    colorizer(picture, size=90)
    assert colorizer.model.seen == (1, 1, 90, 120)
    assert seen_shape(1, 4000, 64) == (1, 256)


@pytest.mark.parametrize("argument", [{"size": 5}, {"size": 10**6}, {"saturation": -1}, {"saturation": float("nan")}])
def test_absurd_arguments_are_refused_by_name(colorizer, argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        colorizer(OLD[0], **argument)


def test_saturation_scales_chroma(colorizer):
    gray = np.full((64, 64), 36_000, np.uint16)  # 16 bits, so that rounding does not blur what is measured
    mild, strong = (rgb2lab(np.asarray(colorizer(gray, saturation=s)) / 65535)[..., 1:] for s in (0.2, 0.4))
    assert np.abs(mild).max() > 5
    assert np.allclose(strong, 2 * mild, atol=0.1)


def test_same_input_same_output_bit_for_bit(trained):
    first = trained(OLD[0])
    assert np.array_equal(first.pixels, trained(OLD[0]).pixels)
    again = Colorizer.from_pretrained("unet-attention-gan", device="cpu")
    assert np.array_equal(first.pixels, again(OLD[0]).pixels)


def test_a_list_runs_as_batches_and_keeps_its_order(trained, monkeypatch):
    shapes = []
    forward = trained.model.forward
    monkeypatch.setattr(trained.model, "forward", lambda x: shapes.append(tuple(x.shape)) or forward(x))
    paths = [PHOTOS[0], OLD[0], PHOTOS[1], PHOTOS[2]]
    results = trained(paths)
    assert sorted(s[0] for s in shapes) == [1, 3]  # the Kodak pictures are of one shape
    for path, result in zip(paths, results, strict=True):
        assert np.abs(result.pixels.astype(int) - trained(path).pixels).max() <= 1


def test_pictures_that_the_net_sees_large_come_in_smaller_batches(colorizer):
    pictures = [np.zeros((300, 300), np.uint8)] * 12
    for size, batch in ((64, 4), (128, 4), (256, 1)):  # 12 are 8 and 4 at the size of the training
        colorizer(pictures, size=size)
        assert colorizer.model.seen == (batch, 1, size, size)


def test_one_bad_picture_of_a_list_is_named(trained, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    with pytest.raises(PictureError, match="bad.jpg"):
        trained([PHOTOS[0], bad])


def test_convnet_goes_through_the_same_door():
    torch.manual_seed(0)
    model = ConvNet(ConvNetConfig(width=4, image_size=64))
    torch.nn.init.constant_(model.decoder[-1].bias, 0.4)
    model.decoder[-1].bias.data[0] = 0.7  # reddish
    result = Colorizer(model, device="cpu")(OLD[0])
    assert np.abs(lightness(cv2.imread(str(OLD[0]))[..., ::-1]) - lightness(result)).max() < 100 / 255
    assert rgb2lab(result.pixels)[..., 1].mean() > 3


def test_stretched_in_strips_as_in_one():
    torch.manual_seed(0)
    ab = torch.randn(2, 13, 17)
    whole = torch.nn.functional.interpolate(ab[None], size=(101, 90), mode="bilinear", align_corners=False)
    ab = ab.permute(1, 2, 0).contiguous().numpy()
    strips = [stretch_rows(ab, 101, 90, top, min(top + 30, 101)) for top in range(0, 101, 30)]
    assert np.allclose(np.concatenate(strips), whole[0].permute(1, 2, 0), atol=1e-5)


def test_eight_bits_are_joined_as_the_formulas_say(photo):
    """The short cuts for 8 bits: OpenCV's Lab, and tables for the lightness of colours."""
    rgb = cv2.imread(str(photo))[..., ::-1].copy()
    lab = rgb_to_lab(torch.from_numpy(rgb / 255).permute(2, 0, 1)[None])
    assert (full_lightness(rgb) - lab[:, :1]).abs().max() < 0.01
    lab[:, 1:] *= 2  # out of gamut here and there
    lab = lab.float()
    exact = lab_to_rgb(fit_gamut(lab))[0].permute(1, 2, 0).numpy() * 255
    shown = lab_to_levels(lab[0].permute(1, 2, 0).contiguous().numpy())
    assert np.abs(shown - exact).max() < 0.55  # 0.5 is rounding


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_scan_of_100_megapixels_takes_bounded_memory(tmp_path):
    program = """
import re, numpy as np, torch
from colorize import Colorizer
from colorize.models import UNet, UNetConfig
torch.set_num_threads(1)
colorizer = Colorizer(UNet(UNetConfig(num_filters=4, num_downs=5, image_size=64)), device="cpu")
colorizer(np.zeros((64, 64), np.uint8))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss has the parent's peak in it
before = peak()
scan = np.random.default_rng(0).integers(100, 120, (10_000, 10_000), dtype=np.uint8)
result = colorizer(scan, saturation=0.1)
assert result.pixels.shape == (10_000, 10_000, 3)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1000  # MB: 100 of input, 300 of output, and the strips
