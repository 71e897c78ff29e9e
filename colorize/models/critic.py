"""Model 4's critic: three patch critics, each looking at the picture at half the size of the one before.

Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs" (2018), section 3.2, with the
spectral norm of Miyato et al. (2018) on every convolution. It serves in training only.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class CriticConfig:
    num_filters: int = 64
    num_layers: int = 5  # convolutions before the one that gives the logits
    num_scales: int = 3


def _conv(inputs: int, outputs: int, stride: int, bias: bool) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1, bias=bias))


class PatchCritic(nn.Module):
    """(B, 3, H, W) lightness and ab -> the feature maps of every layer, the last one (B, 1, h, w) being the logits."""

    def __init__(self, num_filters: int, num_layers: int):
        super().__init__()
        widths = [num_filters * min(2**i, 8) for i in range(num_layers)]
        self.layers = nn.ModuleList([nn.Sequential(_conv(3, widths[0], stride=2, bias=True), nn.LeakyReLU(0.2))])
        for i in range(1, num_layers):
            conv = _conv(widths[i - 1], widths[i], stride=2 if i < num_layers - 1 else 1, bias=False)
            self.layers.append(nn.Sequential(conv, nn.InstanceNorm2d(widths[i]), nn.LeakyReLU(0.2)))
        self.layers.append(_conv(widths[-1], 1, stride=1, bias=True))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features


class Critic(nn.Module):
    """lightness (B, 1, H, W) and ab (B, 2, H, W), both in [-1, 1] -> for each scale, the feature maps of its patch critic.

    The last map of each scale holds its logits: high where the colours look real. With three scales a side needs
    at least 128 pixels.
    """

    def __init__(self, config: CriticConfig = CriticConfig()):
        super().__init__()
        self.config = config
        self.scales = nn.ModuleList(PatchCritic(config.num_filters, config.num_layers) for _ in range(config.num_scales))

    def forward(self, lightness: torch.Tensor, ab: torch.Tensor) -> list[list[torch.Tensor]]:
        x = torch.cat((lightness, ab), dim=1)  # (B, 3, H, W)
        maps = []
        for i, critic in enumerate(self.scales):
            if i:
                x = avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False)
            maps.append(critic(x))
        return maps
