"""Model 1: a plain convolutional encoder and decoder that paints RGB from gray."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class ConvNetConfig:
    architecture: str = "convnet"
    width: int = 32  # channels after the first convolution; the widest layer has 32 times as many
    image_size: int = 512  # pixels on the short side that it was trained at

    def __post_init__(self):
        if not 4 <= self.width <= 256 or self.width % 2:
            raise ValueError(f"width must be an even number from 4 to 256, not {self.width}")
        if not 16 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be between 16 and 4096, not {self.image_size}")


def _double(inputs: int, middle: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, middle, kernel_size=3, padding=1), nn.SiLU(inplace=True),
        nn.Conv2d(middle, outputs, kernel_size=3, padding=1), nn.SiLU(inplace=True),
    ]  # fmt: skip


def _up(inputs: int, middle: int, outputs: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(inputs, middle, kernel_size=2, stride=2), nn.SiLU(inplace=True),
        nn.Conv2d(middle, outputs, kernel_size=3, padding=1), nn.SiLU(inplace=True),
    ]  # fmt: skip


class ConvNet(nn.Module):
    """Gray (B, 1, H, W) in [0, 1] -> RGB (B, 3, H, W), meant to be in [0, 1] but not bounded. Any height and width."""

    paints = "rgb"

    def __init__(self, config: ConvNetConfig = ConvNetConfig()):
        super().__init__()
        self.config = config
        w = config.width
        self.encoder = nn.Sequential(
            *_double(1, w, 2 * w), nn.MaxPool2d(2),
            *_double(2 * w, 4 * w, 8 * w), nn.MaxPool2d(2),
            *_double(8 * w, 16 * w, 32 * w), nn.MaxPool2d(2),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            *_up(32 * w, 16 * w, 8 * w),
            *_up(8 * w, 4 * w, 2 * w),
            *_up(2 * w, w, w // 2),
            nn.Conv2d(w // 2, 3, kernel_size=3, padding=1),
        )

    def forward(self, gray: torch.Tensor) -> torch.Tensor:
        h, w = gray.shape[-2:]
        gray = pad(gray, (0, -w % 8, 0, -h % 8), mode="replicate")  # three poolings: a multiple of 8
        return self.decoder(self.encoder(gray))[..., :h, :w]
