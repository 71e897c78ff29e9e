"""The networks. `MODELS` says which class a checkpoint's `architecture` names."""

from .convnet import ConvNet, ConvNetConfig
from .critic import Critic, CriticConfig
from .efficient_unet import EfficientUNet, EfficientUNetConfig
from .unet import UNet, UNetConfig

MODELS = {
    "convnet": (ConvNet, ConvNetConfig),
    "unet": (UNet, UNetConfig),
    "efficient-unet": (EfficientUNet, EfficientUNetConfig),
}

__all__ = [
    "MODELS",
    "ConvNet",
    "ConvNetConfig",
    "Critic",
    "CriticConfig",
    "EfficientUNet",
    "EfficientUNetConfig",
    "UNet",
    "UNetConfig",
]
