"""The networks. `MODELS` says which class a checkpoint's `architecture` names."""

from .convnet import ConvNet, ConvNetConfig
from .critic import Critic, CriticConfig
from .unet import UNet, UNetConfig

MODELS = {"convnet": (ConvNet, ConvNetConfig), "unet": (UNet, UNetConfig)}

__all__ = ["MODELS", "ConvNet", "ConvNetConfig", "Critic", "CriticConfig", "UNet", "UNetConfig"]
