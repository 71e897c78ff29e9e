"""How good a colorization is. PSNR rewards grey: read it beside the colourfulness ratio, never alone."""

import torch


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
