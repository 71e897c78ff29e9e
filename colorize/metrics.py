"""How good a colorization is. PSNR rewards grey: read it beside the colourfulness ratio, never alone."""

import numpy as np
import torch

from .steady import CUT, change, motion, warp


def colourfulness(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) sRGB in [0, 1] -> (B,) colourfulness: 0 for gray, about 40 for a usual photograph, in 8-bit values.

    Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), equation 3.
    """
    r, g, b = (rgb.float() * 255).unbind(1)
    axes = torch.stack((r - g, (r + g) / 2 - b), dim=1).flatten(2)  # (B, 2, H * W)
    return axes.std(-1, correction=0).norm(dim=1) + 0.3 * axes.mean(-1).norm(dim=1)


def psnr(rgb: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Two (B, 3, H, W) sRGB tensors in [0, 1] -> (B,) peak signal-to-noise ratio in dB, at most 100."""
    error = (rgb.float() - truth.float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def colour_histograms(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 256), how often each value occurs in each channel, adding up to 1."""
    offsets = torch.arange(len(rgb) * 3, device=rgb.device)[:, None] * 256
    counts = torch.bincount((rgb.flatten(0, 1).flatten(1) + offsets).flatten(), minlength=len(offsets) * 256)
    return counts.view(-1, 3, 256) / (rgb.shape[2] * rgb.shape[3])


def colour_divergence(histograms: torch.Tensor, gaps: tuple[int, ...] = (1, 2, 4)) -> float:
    """How much a film's colours come and go: CDC, 0 for none, 0.7 at most.

    `histograms` is (T, 3, 256) of `colour_histograms`, of more frames than the widest gap. The Jensen-Shannon divergence
    between frames so far apart, averaged over channels and frames, then gaps: Liu et al., "Temporally consistent video
    colorization with deep feature propagation and self-regularization learning" (2021), section 4.1. The truth has some too,
    as things move: compare.
    """
    divergences = []
    for gap in gaps:
        p, q = histograms[:-gap].double(), histograms[gap:].double()
        middle = (p + q) / 2
        entropies = [torch.special.entr(x).sum(-1) for x in (middle, p, q)]  # (T - gap, 3) each
        divergences.append((entropies[0] - (entropies[1] + entropies[2]) / 2).mean())
    return float(torch.stack(divergences).mean())


def warped_difference(last: np.ndarray, now: np.ndarray) -> float:
    """How far colours jump from a frame to the next: two (3, H, W) Lab frames -> mean distance in a*, b*; NaN over a cut.

    The last frame is moved along the optical flow of the lightness; where that is not to be trusted, nothing counts. After
    Lai et al., "Learning blind video temporal consistency" (2018), section 4.1, but without lightness, which a colorization
    keeps.
    """
    before, after = ((lab[0] * 2.55).astype(np.uint8) for lab in (last, now))
    field, trust = motion(before, after)
    if change(before, after) >= CUT or trust.mean() < 0.05:
        return float("nan")
    return float((trust * np.linalg.norm(now[1:] - warp(last[1:], field), axis=0)).sum() / trust.sum())
