"""The samples of a film: luma and chroma <-> lightness and colours."""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch

from .color import fit_gamut, gray_to_lightness, lab_to_rgb, lightness_to_gray, rgb_to_lightness

# Shares of red and blue in luma, by the number that stands for a matrix in films (ITU-T H.273, table 4)
BT709, BT601, BT2020 = 1, 6, 9
MATRICES = {BT709: (0.2126, 0.0722), 5: (0.299, 0.114), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}
REACH, STEP = 112, 4  # the table of colours knows a* and b* from -REACH to REACH, at every STEP
NODES = 2 * REACH // STEP + 1


@dataclass(frozen=True)
class Coding:
    """How the samples of a film stand for colours: Y'CbCr of `depth` bits, over the full range or television's limited one.

    `matrix` is one of `MATRICES`. The transfer curve is taken for sRGB's, as players do.
    """

    matrix: int
    full: bool
    depth: int

    @property
    def middle(self) -> int:
        """Of chroma: no colour."""
        return 2 ** (self.depth - 1)

    @property
    def scales(self) -> tuple[float, float, float]:
        """Luma of black, luma's way from there to white, and the whole way of chroma (H.273, section 8.3)."""
        unit = 2 ** (self.depth - 8)
        top = 2**self.depth - 1
        return (0, top, top) if self.full else (16 * unit, 219 * unit, 224 * unit)

    def to_rgb(self, yuv: torch.Tensor) -> torch.Tensor:
        """Samples (B, 3, H, W) as floats -> sRGB in [0, 1]."""
        black, luma, chroma = self.scales
        red, blue = MATRICES[self.matrix]
        y, u, v = ((yuv[:, :1] - black) / luma, *((yuv[:, 1:] - self.middle) / chroma).split(1, dim=1))
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        return torch.cat((r, (y - red * r - blue * b) / (1 - red - blue), b), dim=1).clamp(0, 1)

    def from_rgb(self, rgb: torch.Tensor) -> torch.Tensor:
        """sRGB (B, 3, H, W) in [0, 1] -> samples as floats."""
        black, luma, chroma = self.scales
        red, blue = MATRICES[self.matrix]
        r, g, b = rgb.split(1, dim=1)
        y = red * r + (1 - red - blue) * g + blue * b
        u, v = (b - y) / (2 * (1 - blue)), (r - y) / (2 * (1 - red))
        return torch.cat((y * luma + black, u * chroma + self.middle, v * chroma + self.middle), dim=1)

    def lightness(self, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> torch.Tensor:
        """Samples (H, W) of one size -> L* (H, W). Of gray ones, without arithmetic."""
        if self.gray(u, v):
            return torch.from_numpy(np.take(_lightness(self), y))
        yuv = torch.from_numpy(np.stack((y, u, v)).astype(np.float32))[None]
        return rgb_to_lightness(self.to_rgb(yuv))[0, 0]

    def gray(self, *chroma: np.ndarray) -> bool:
        """No colour in these planes, or no more than compression puts there."""
        slack = 2 << (self.depth - 8)
        return all(abs(bound - self.middle) <= slack for plane in chroma for bound in cv2.minMaxLoc(plane)[:2])

    def paint(self, y: np.ndarray, u: np.ndarray, v: np.ndarray, ab: np.ndarray) -> None:
        """Give a frame colours, in place; its L* stays.

        Two colours of one L* differ in luma, which is mixed after the gamma curve: so luma changes as well, by what a table
        says for the chroma's resolution.

        Args:
            y: luma (H, W), uint8 or uint16.
            u, v: chroma (H, W) or (H / 2, W / 2) of the same type.
            ab: a*, b* (2, h, w) float32, of any size.
        """
        height, width = u.shape
        coarse = y if y.shape == u.shape else cv2.resize(y, (width, height), interpolation=cv2.INTER_AREA)
        shift = None
        if self.gray(u, v):
            block = np.take(_block(self), coarse)  # (height, width)
        else:
            lightness = self.lightness(coarse, u, v)
            gray = lightness_to_gray(lightness).numpy() * self.scales[1] + self.scales[0]
            shift = gray - coarse  # from this luma to that of a gray of the same lightness
            block = lightness.round().mul(NODES).numpy()
        ab = ab * min(1, REACH / max(np.abs(ab).max(), 1e-6))
        a, b = (cv2.resize((c + REACH) / STEP, (width, height)) for c in ab)  # bilinearly
        painted = cv2.remap(_table(self), a + block, b, cv2.INTER_LINEAR)  # (height, width, 3)
        change, u[:], v[:] = cv2.split(painted)
        if shift is not None:
            change = np.clip(change + shift, 0, 2 * self.middle - 1).round().astype(y.dtype)
        if change.shape != y.shape:
            change = cv2.resize(change, y.shape[::-1])
        y[:] = cv2.addWeighted(y, 1, change, 1, -self.middle)  # saturates at 8 bits
        if self.depth > 8:
            np.minimum(y, 2**self.depth - 1, out=y)


@cache
def _lightness(coding: Coding) -> np.ndarray:
    """L* of every luma value, of a gray pixel."""
    black, luma, _ = coding.scales
    values = torch.arange(2**coding.depth, dtype=torch.float64)
    return gray_to_lightness(((values - black) / luma).clamp(0, 1)).float().numpy()


@cache
def _block(coding: Coding) -> np.ndarray:
    """Where in `_table` the colours of every luma value begin, of a gray pixel."""
    return _lightness(coding).round() * NODES


@cache
def _table(coding: Coding) -> np.ndarray:
    """What colours look like in samples: (b*, L* and a*, 3) of change of luma + `middle`, Cb, Cr.

    Columns are blocks of `NODES` values of a*, one for each whole L* from 0 to 100. A picture for `cv2.remap`, which
    interpolates between them: a few milliseconds for a frame whose exact colours, fitted into the gamut, would take a hundred.
    """
    nodes = torch.arange(-REACH, REACH + 1, STEP, dtype=torch.float32)
    b, lightness, a = torch.meshgrid(nodes, torch.arange(101.0), nodes, indexing="ij")
    lab = torch.stack((lightness, a, b)).reshape(1, 3, NODES, -1)  # (1, 3, b, L and a)
    yuv = coding.from_rgb(lab_to_rgb(fit_gamut(lab)))
    gray = lightness_to_gray(lab[:, :1]) * coding.scales[1] + coding.scales[0]
    table = torch.cat((yuv[:, :1] - gray + coding.middle, yuv[:, 1:]), dim=1)[0].permute(1, 2, 0)
    dtype = np.uint8 if coding.depth == 8 else np.uint16
    return np.ascontiguousarray(table.round().clamp(0, 2**coding.depth - 1).numpy().astype(dtype))
