"""A picture in, a picture out, at full resolution."""

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from . import hub
from .color import (
    LIGHTNESS_SCALE,
    LUMINANCE,
    fit_gamut,
    gray_to_lightness,
    gray_to_linear,
    lab_to_network,
    lab_to_rgb,
    lightness_to_gray,
    luminance_to_lightness,
    network_to_lab,
    rgb_to_lab,
    rgb_to_lightness,
)  # fmt: skip
from .picture import Picture, read

BATCH = 8  # pictures of equal shape that the network sees at once
CPU_PIXELS = 2**17  # and of all of them together on a CPU, which gains nothing by more than its cache holds
LONGEST = 4  # the network sees at most this many times `size` on the long side: a panorama is squeezed, not refused
STRIP = 2**20  # pixels that are joined with their colours at once: what bounds the memory


def predict_ab(model: nn.Module, lightness: torch.Tensor) -> torch.Tensor:
    """lightness (B, 1, H, W) -> ab (B, 2, H, W), both in [-1, 1], whatever the network paints."""
    if model.paints == "ab":
        return model(lightness)
    gray = lightness_to_gray((lightness + 1) * LIGHTNESS_SCALE)
    return lab_to_network(rgb_to_lab(model(gray).clamp(0, 1)))[1]


class Colorizer:
    """Colours pictures with a network. `device` is any of torch's; by default the GPU where there is one.

    >>> colorizer = Colorizer.from_pretrained("checkpoints/efficient-unet-gan")
    >>> colorizer("photo.jpg").save("colour.png")
    """

    def __init__(self, model: nn.Module, name: str = "an unnamed model", device: str | torch.device | None = None):
        self.device = torch.device(device or best_device())
        self.model = model.eval().to(self.device)
        self.name = name
        self.image_size: int = model.config.image_size
        # A GPU has memory for one batch at a time, and not every kind of them may be used by two threads at once.
        self._turn = nullcontext() if self.device.type == "cpu" else threading.Lock()

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, device: str | torch.device | None = None):
        """From a checkpoint's folder, or its id on the Hub; see `hub.load` for both arguments and the errors."""
        label = Path(name).name if Path(name).is_dir() else str(name)
        return cls(hub.load(name, revision), f"{label}, {revision}" if revision else label, device)

    def __call__(self, picture, size: int | None = None, saturation: float = 1.0):
        """Colour a picture, or each of a list: paths, bytes, PIL images, arrays (see `picture.read`) or `Picture`s.

        Args:
            size: what the network sees of it, pixels on the short side; by default the size it was trained at. Larger
                tells finer things apart, and understands large ones worse.
            saturation: multiplies the chroma: 0 gives gray, more than 1 vivid colours.

        Returns:
            A `Picture` (or a list of them) of the same height, width and depth, upright. Its L* is that of the input; its
            colours lose chroma where sRGB cannot show them.

        Raises:
            PictureError: what is no picture.
            ValueError: `size` or `saturation` is out of range.
        """
        size = self.image_size if size is None else size
        if not 16 <= size <= 4096:
            raise ValueError(f"size must be between 16 and 4096 pixels, not {size}")
        if not 0 <= saturation <= 10:  # NaN is refused too
            raise ValueError(f"saturation must be between 0 and 10, not {saturation}")
        many = isinstance(picture, (list, tuple))
        pictures = [read(p) for p in (picture if many else [picture])]
        results: list[Picture | None] = [None] * len(pictures)
        for indices in self._batches(pictures, size):
            for i, ab in zip(indices, self._paint([pictures[i] for i in indices], size), strict=True):
                results[i] = self._join(pictures[i], ab, saturation)
        return results if many else results[0]

    def _batches(self, pictures: list[Picture], size: int) -> Iterable[list[int]]:
        """Indices of pictures that the network sees in the same shape, at most `BATCH` at a time, or fewer large ones."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            groups.setdefault(seen_shape(picture.height, picture.width, size), []).append(i)
        for (h, w), indices in groups.items():
            many = min(max(BATCH * 2 * self.image_size**2 // (h * w), 1), BATCH)
            yield from (indices[i : i + many] for i in range(0, len(indices), many))

    @torch.inference_mode()
    def _paint(self, pictures: list[Picture], size: int) -> torch.Tensor:
        """Pictures that the network sees in one shape (h, w) -> a*, b* (B, 2, h, w)."""
        return self.paint(torch.cat([_small_lightness(p, size) for p in pictures]))

    @torch.inference_mode()
    def paint(self, lightness: torch.Tensor) -> torch.Tensor:
        """What the network makes of lightness (B, 1, h, w) in [-1, 1]: a*, b* (B, 2, h, w), on the CPU."""
        with self._turn, torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            at_once = max(CPU_PIXELS // lightness[0].numel(), 1) if self.device.type == "cpu" else len(lightness)
            ab = torch.cat([predict_ab(self.model, part.to(self.device)) for part in lightness.split(at_once)])
            return network_to_lab(lightness, ab.float().cpu())[:, 1:]

    @torch.inference_mode()
    def _join(self, picture: Picture, ab: torch.Tensor, saturation: float) -> Picture:
        """A picture's own lightness and a*, b* (2, h, w) -> the picture in colour, a strip at a time."""
        height, width = picture.height, picture.width
        depth = np.iinfo(picture.pixels.dtype).max
        pixels = np.empty((height, width, 3), picture.pixels.dtype)
        ab = (ab * saturation).permute(1, 2, 0).contiguous().numpy()  # (h, w, 2)
        rows = max(STRIP // width, 1)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            lightness = full_lightness(picture.pixels[top:bottom])[0, 0].numpy()  # (rows, W)
            lab = cv2.merge([lightness, stretch_rows(ab, height, width, top, bottom)])  # (rows, W, 3)
            pixels[top:bottom] = lab_to_levels(lab) if depth == 255 else (_show(lab) * depth).round()
        return replace(picture, pixels=pixels, colorized_by=self.name)


def grayscale(picture: Picture) -> Picture:
    """What the network goes by: the picture's lightness alone, (H, W) of the same depth."""
    gray = lightness_to_gray(full_lightness(picture.pixels))[0, 0]  # (H, W)
    depth = np.iinfo(picture.pixels.dtype)
    return replace(picture, pixels=(gray * depth.max).round().numpy().astype(depth.dtype), icc=None)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seen_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """What the network sees of a picture: `size` pixels on the short side, at most `LONGEST` times that on the long one."""
    scale = min(size / min(height, width), LONGEST * size / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def full_lightness(pixels: np.ndarray) -> torch.Tensor:
    """(H, W) gray or (H, W, 3) sRGB, 8 or 16 bit -> L* (1, 1, H, W)."""
    if pixels.ndim == 2:
        table = _gray_table(pixels.dtype.name)
        return torch.from_numpy(cv2.LUT(pixels, table) if pixels.dtype == np.uint8 else table[pixels])[None, None]
    if pixels.dtype == np.uint8:
        linear, lightness = _linear_tables()
        steps = cv2.transform(cv2.LUT(pixels, linear), np.array([LUMINANCE], np.float32))  # (H, W)
        return torch.from_numpy(np.take(lightness, (steps + 0.5).astype(np.int32)))[None, None]
    return rgb_to_lightness(torch.from_numpy(pixels.astype(np.float32) / 65535).permute(2, 0, 1)[None])


@cache
def _gray_table(dtype: str) -> np.ndarray:
    """L* of every gray value that the type has."""
    top = np.iinfo(dtype).max
    return gray_to_lightness(torch.arange(top + 1, dtype=torch.float64) / top).float().numpy()


@cache
def _linear_tables() -> tuple[np.ndarray, np.ndarray]:
    """Linear light in 65535ths of every 8-bit sRGB value, and L* of every 65535th of luminance: right to 0.01."""
    linear = gray_to_linear(torch.arange(256, dtype=torch.float64) / 255) * 65535
    lightness = luminance_to_lightness(torch.arange(65536, dtype=torch.float64) / 65535)
    return linear.float().numpy(), lightness.float().numpy()


def lab_to_levels(lab: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 Lab -> (H, W, 3) 8-bit sRGB, fitted to its gamut.

    OpenCV takes a sixth of the time of `lab_to_rgb` and stays within 0.03 of a level. What it had to clip is done again.
    """
    rgb = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    clipped = np.flatnonzero(cv2.inRange(rgb, (1e-6,) * 3, (1 - 1e-6,) * 3) == 0)  # (N,)
    if len(clipped):
        rgb.reshape(-1, 3)[clipped] = _show(lab.reshape(-1, 1, 3)[clipped])[:, 0]
    return cv2.convertScaleAbs(rgb, alpha=255)


def _show(lab: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 Lab -> (H, W, 3) sRGB in [0, 1], fitted to its gamut."""
    return lab_to_rgb(fit_gamut(torch.from_numpy(lab).permute(2, 0, 1)[None].contiguous()))[0].permute(1, 2, 0).numpy()


def _small_lightness(picture: Picture, size: int) -> torch.Tensor:
    """What the network sees of a picture: lightness (1, 1, h, w) in [-1, 1]."""
    h, w = seen_shape(picture.height, picture.width, size)
    shrinks = h * w < picture.height * picture.width
    small = cv2.resize(picture.pixels, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return full_lightness(small) / LIGHTNESS_SCALE - 1


def stretch_rows(ab: np.ndarray, height: int, width: int, top: int, bottom: int) -> np.ndarray:
    """Rows `top` to `bottom` of ab (h, w, 2) stretched bilinearly to (height, width) -> (bottom - top, width, 2)."""
    h = len(ab)
    y = ((np.arange(top, bottom, dtype=np.float32) + 0.5) * h / height - 0.5).clip(0, h - 1)
    above = y.astype(int)
    rows, below = ab.take(above, 0), ab.take((above + 1).clip(max=h - 1), 0)  # (rows, w, 2)
    rows += (below - rows) * (y - above).astype(np.float32)[:, None, None]
    return cv2.resize(rows, (width, bottom - top), interpolation=cv2.INTER_LINEAR)
