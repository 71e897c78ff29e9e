"""EfficientNet-Lite as ImageNet has left it: an encoder to train on from, and an eye that compares pictures."""

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize

from colorize.color import lab_to_rgb, network_to_lab
from colorize.models.efficient_unet import Encoder

HOME = "timm/tf_efficientnet_lite2.in1k"  # of the weights, on the Hub
WINDOW = 128  # pixels of the side that is compared, anywhere in the picture: 192 would take twice as long


def load_encoder(name: str, channels: int = 1) -> Encoder:
    """The encoder whose weights are in a safetensors file, or in a repository of the Hub."""
    try:
        path = name if name.endswith(".safetensors") else hf_hub_download(name, "model.safetensors")
        return Encoder.from_timm(load_file(path), channels)
    except (OSError, ValueError, SafetensorError, HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--encoder {name} cannot be read ({reason}): name a .safetensors file or a Hub id") from error


def freeze(encoder: Encoder, stages: int) -> None:
    """Let the first stages and all depthwise kernels be.

    The gradient of a 5x5 depthwise kernel, biases included, takes a CPU ten times as long as all else that its block does.
    """
    for part in (encoder.conv_stem, *encoder.blocks[:stages]):
        part.requires_grad_(False)
    for conv in encoder.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            conv.requires_grad_(False)


class Perceptual(nn.Module):
    """How different two pictures look to a network that names what is in them, EfficientNet-Lite here.

    The distance of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), section 3, of
    features at five sizes with all channels alike.
    """

    def __init__(self, name: str):
        super().__init__()
        self.network = load_encoder(name, channels=3)
        self.requires_grad_(False)

    def features(self, lightness: torch.Tensor, ab: torch.Tensor) -> list[torch.Tensor]:
        """(B, 1, H, W) and (B, 2, H, W) in [-1, 1], H and W multiples of 32 -> features of length 1 in every place."""
        rgb = lab_to_rgb(network_to_lab(lightness, ab))
        return [normalize(x) for x in self.network((rgb * 255 - 127) / 128)]

    def forward(self, lightness: torch.Tensor, painted: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        """`painted` and true `ab` (B, 2, H, W) of pictures with that lightness -> the mean distance of windows in them."""
        height, width = ab.shape[2:]
        top, left = (int(torch.randint(max(side - WINDOW, 0) + 1, ())) for side in (height, width))
        lightness, painted, ab = (x[..., top : top + WINDOW, left : left + WINDOW] for x in (lightness, painted, ab))
        with torch.no_grad():
            truth = self.features(lightness, ab)
        seen = self.features(lightness, painted)
        return sum((x - y).square().sum(1).mean() for x, y in zip(seen, truth, strict=True))
