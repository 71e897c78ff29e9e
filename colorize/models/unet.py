"""Models 2 and 3: a U-Net from lightness to ab, with or without criss-cross attention. Model 4's generator is model 3.

The network of Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), appendix 6.1.1, built
from the innermost block outwards: each block halves the picture, hands it to the next, doubles it again and joins what it
had received.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from .attention import CrissCrossAttention


@dataclass(frozen=True)
class UNetConfig:
    architecture: str = "unet"
    num_filters: int = 64  # channels of the outermost block; the inner ones have up to 8 times as many
    num_downs: int = 8  # how often the picture is halved
    attention: bool = True  # in every block whose outer width is at most 512, except the outermost
    dropout: bool = False  # in the decoder of the widest blocks
    image_size: int = 512  # pixels on the short side that it was trained at

    def __post_init__(self):
        if not 1 <= self.num_filters <= 256:
            raise ValueError(f"num_filters must be between 1 and 256, not {self.num_filters}")
        if not 5 <= self.num_downs <= 10:
            raise ValueError(f"num_downs must be between 5 and 10, not {self.num_downs}")
        if not 16 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be between 16 and 4096, not {self.image_size}")


class UNetBlock(nn.Module):
    """(B, outer, H, W) -> (B, 2 * outer, H, W): the input, and beside it what the blocks within make of it."""

    def __init__(self, outer: int, inner: int, within: nn.Module | None = None, dropout: bool = False, attention: bool = False):
        super().__init__()
        innermost = within is None
        self.down = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, kernel_size=4, stride=2, padding=1, bias=False))
        if not innermost:  # innermost, a picture may be down to one pixel: nothing to normalise over
            self.down.append(nn.BatchNorm2d(inner))
        self.within = nn.Identity() if innermost else within
        self.up = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(inner if innermost else 2 * inner, outer, kernel_size=4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.Dropout(0.5) if dropout and not innermost else nn.Identity(),
        )
        self.attention = CrissCrossAttention(outer) if attention and outer <= 512 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.within(self.down(x))  # (B, inner or 2 * inner, H / 2, W / 2)
        return torch.cat((x, self.attention(self.up(inner))), dim=1)


class UNet(nn.Module):
    """lightness (B, 1, H, W) in [-1, 1] -> ab (B, 2, H, W) in [-1, 1]. Any height and width."""

    paints = "ab"

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        f, attention = config.num_filters, config.attention
        block = UNetBlock(8 * f, 8 * f, attention=attention)
        for _ in range(config.num_downs - 5):
            block = UNetBlock(8 * f, 8 * f, block, dropout=config.dropout, attention=attention)
        for width in (4 * f, 2 * f, f):
            block = UNetBlock(width, 2 * width, block, attention=attention)
        self.down = nn.Conv2d(1, f, kernel_size=4, stride=2, padding=1, bias=False)
        self.blocks = block
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * f, 2, kernel_size=4, stride=2, padding=1), nn.Tanh())

    def forward(self, lightness: torch.Tensor) -> torch.Tensor:
        h, w = lightness.shape[-2:]
        step = 2**self.config.num_downs
        x = pad(lightness, (0, -w % step, 0, -h % step), mode="replicate")
        return self.up(self.blocks(self.down(x)))[..., :h, :w]
