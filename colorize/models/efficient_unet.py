"""Model 5: a U-Net whose encoder has seen ImageNet, and which names colours from a list instead of mixing them.

The encoder is an EfficientNet-Lite (Tan and Le, "EfficientNet" (2019), table 1, without squeeze-and-excitation), its modules
named as timm names them. The list of colours and its decoding are those of Zhang et al., "Colorful Image Colorization" (2016),
section 2: a network that has to commit itself cannot flee to the sepia between all that is plausible.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, pixel_unshuffle, relu, relu6, softmax

from ..color import AB_SCALE, LIGHTNESS_SCALE, fit_gamut, lightness_to_gray
from .attention import CrissCrossAttention

STAGES = (  # of the encoder: kernel, stride of the first block, expansion
    (3, 1, 1),
    (3, 2, 6),
    (5, 2, 6),
    (3, 2, 6),
    (5, 1, 6),
    (5, 2, 6),
    (3, 1, 6),
)
ENCODERS = {  # blocks and channels of the stages
    "lite0": ((1, 16), (2, 24), (2, 40), (3, 80), (3, 112), (4, 192), (1, 320)),
    "lite2": ((1, 16), (3, 24), (3, 48), (4, 88), (4, 120), (5, 208), (1, 352)),
}
LEVELS = (0, 1, 2, 4, 6)  # the last stage at each size: a half of the picture's, a quarter, ... a 32nd
COARSE = (2, 3)  # of these, the levels of the decoder with attention, as the bottom has: beyond a kernel's reach, and cheap
STEP = 32  # sides are padded to a multiple of it
BN_EPS = 1e-3
GRID = 10  # units of a*, b* from one class to the next


@dataclass(frozen=True)
class EfficientUNetConfig:
    architecture: str = "efficient-unet"
    encoder: str = "lite0"  # of EfficientNet-Lite: lite0 or lite2, which is wider and deeper
    width: int = 64  # channels of the decoder at half the picture's size; at a 32nd it has 4 times as many
    stride: int = 4  # pixels from one place that is given a colour to the next: 2 or 4
    temperature: float = 0.38  # 1: the mean of the classes, muted; towards 0: the likeliest one, vivid and patchy
    chroma: float = 1.0  # multiplies ab
    detail: int = 24  # channels of the layers that fit the colours to the picture's detail; 0: there are none
    image_size: int = 512  # pixels on the short side that it was trained at

    def __post_init__(self):
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be {' or '.join(ENCODERS)}, not {self.encoder!r}")
        if not 2 <= self.width <= 256 or self.width % 2:
            raise ValueError(f"width must be an even number from 2 to 256, not {self.width}")
        if self.stride not in (2, 4):
            raise ValueError(f"stride must be 2 or 4, not {self.stride}")
        if not 0.01 <= self.temperature <= 1:
            raise ValueError(f"temperature must be between 0.01 and 1, not {self.temperature}")
        if not 0 <= self.chroma <= 10:
            raise ValueError(f"chroma must be between 0 and 10, not {self.chroma}")
        if not 0 <= self.detail <= 256:
            raise ValueError(f"detail must be between 0 and 256, not {self.detail}")
        if not 16 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be between 16 and 4096, not {self.image_size}")


def ab_classes() -> torch.Tensor:
    """The colours on a grid of 10 units that sRGB can show at some lightness -> (Q, 2) ab in [-1, 1], on the CPU."""
    grid = torch.arange(-AB_SCALE, AB_SCALE + 1, GRID, dtype=torch.float64, device="cpu")  # also where meta is the default
    ab = torch.cartesian_prod(grid, grid).T[:, None]  # (2, 1, grid * grid)
    lightness = torch.arange(0, 2 * LIGHTNESS_SCALE + 1, dtype=torch.float64, device="cpu")[None, :, None]  # (1, L, 1)
    shape = (-1, lightness.shape[1], ab.shape[2])
    lab = torch.cat((lightness.expand(shape), ab.expand(shape)))[None]  # (1, 3, L, grid * grid)
    shown = (fit_gamut(lab) == lab).all(dim=1).any(dim=1)[0]  # (grid * grid,)
    return (ab[:, 0, shown].T / AB_SCALE).float()


class EncoderBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride), both sides even where the stride is 2.

    An inverted residual: 1x1 to more channels, where there is an expansion, depthwise, and 1x1 to few channels.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.stride, self.residual = stride, stride == 1 and inputs == outputs
        if expansion > 1:
            self.conv_pw = nn.Conv2d(inputs, wide, kernel_size=1)
        self.conv_dw = nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide)
        narrow = "conv_pwl" if expansion > 1 else "conv_pw"  # as timm has it
        self.add_module(narrow, nn.Conv2d(wide, outputs, kernel_size=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *widen, depthwise, narrow = self.children()
        y = x
        for conv in widen:
            y = relu6(conv(y))
        y = depthwise(y)
        if self.stride == 2:  # TensorFlow's SAME padding; and on a CPU the gradients of strided depthwise convolutions are slow
            y = y[..., 1::2, 1::2]
        y = narrow(relu6(y))
        return x + y if self.residual else y


class Encoder(nn.Module):
    """Gray or RGB (B, channels, H, W), (sRGB in 0 to 255, less 127) / 128, -> features at 1/2, 1/4, 1/8, 1/16, 1/32 of it.

    They have 16, 24, 40, 112 and 320 channels (lite0), or 16, 24, 48, 120 and 352 (lite2). H and W are multiples of 32. The
    batch norms are folded into the convolutions: their statistics are those of ImageNet, which a small batch of one's own would
    only blur.
    """

    def __init__(self, name: str = "lite0", channels: int = 1):
        super().__init__()
        self.name = name
        self.conv_stem = nn.Conv2d(channels, 32, kernel_size=3, stride=2)  # of gray, ImageNet's three kernels are summed
        stages, channels = [], 32
        for (kernel, stride, expansion), (blocks, outputs) in zip(STAGES, ENCODERS[name], strict=True):
            stage = [EncoderBlock(channels, outputs, kernel, stride, expansion)]
            stage += [EncoderBlock(outputs, outputs, kernel, 1, expansion) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = outputs
        self.blocks = nn.Sequential(*stages)

    def forward(self, gray: torch.Tensor) -> list[torch.Tensor]:
        x = relu6(self.conv_stem(pad(gray, (0, 1, 0, 1))))  # TensorFlow's SAME padding
        features = []
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in LEVELS:
                features.append(x)
        return features

    @classmethod
    @torch.no_grad()
    def from_timm(cls, weights: dict[str, torch.Tensor], channels: int = 1) -> "Encoder":
        """The one whose weights these are, timm's `tf_efficientnet_lite0` or `2`, without what follows the blocks.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        width = len(weights.get("blocks.6.0.conv_pwl.weight", ()))
        encoder = cls(next((name for name, stages in ENCODERS.items() if stages[-1][1] == width), "lite0"), channels)
        norms = {"conv_stem": "bn1"}
        for name, block in encoder.named_modules():
            if isinstance(block, EncoderBlock):
                norms |= {f"{name}.{conv}": f"{name}.bn{i}" for i, (conv, _) in enumerate(block.named_children(), start=1)}

        def take(key: str, *shape: int) -> torch.Tensor:
            found = tuple(weights[key].shape) if key in weights else "missing"
            if found != shape:
                wanted = f"EfficientNet-{encoder.name.capitalize()}"
                raise ValueError(f"these are no weights of {wanted}: {key} is {found}, not {shape}")
            return weights[key].float()

        for name, norm in norms.items():
            conv = encoder.get_submodule(name)
            outputs, inputs, *kernel = conv.weight.shape
            kernels = take(f"{name}.weight", outputs, 3 if name == "conv_stem" else inputs, *kernel)
            gain, shift, mean, var = (take(f"{norm}.{x}", outputs) for x in ("weight", "bias", "running_mean", "running_var"))
            gain = gain / (var + BN_EPS).sqrt()
            if inputs == 1 and name == "conv_stem":  # gray has three equal channels
                kernels = kernels.sum(dim=1, keepdim=True)
            conv.weight.copy_(kernels * gain[:, None, None, None])
            conv.bias.copy_(shift - mean * gain)
        return encoder


class DecoderBlock(nn.Module):
    """(B, inputs, H, W) and the encoder's (B, skipped, 2 * H, 2 * W) -> (B, outputs, 2 * H, 2 * W)."""

    def __init__(self, inputs: int, skipped: int, outputs: int, attention: bool):
        super().__init__()
        self.up = nn.Conv2d(inputs, outputs, kernel_size=1)
        self.skip = nn.Conv2d(skipped, outputs, kernel_size=1, bias=False)
        self.conv = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.attention = CrissCrossAttention(outputs) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        x = interpolate(self.up(x), scale_factor=2, mode="bilinear", align_corners=False)
        x = relu(x + self.skip(skipped))
        return self.attention(relu(self.norm(self.conv(x))))


class Detail(nn.Module):
    """ab (B, 2, h, w) and what it was made from -> ab (B, 2, H / 2, W / 2) that keeps to the picture's edges.

    Colours that are right but coarse look wrong: EXPERIMENTS.md says by how much. It begins by changing nothing.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, kernel_size=1)
        self.convs = nn.Sequential(
            nn.Conv2d(width + 4 + 2, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2, kernel_size=3, padding=1),
        )
        nn.init.zeros_(self.convs[-1].weight)
        nn.init.zeros_(self.convs[-1].bias)

    def forward(self, ab: torch.Tensor, features: torch.Tensor, lightness: torch.Tensor) -> torch.Tensor:
        """`features` (B, inputs, h, w) of the decoder, `lightness` (B, 1, H, W)."""
        fine = pixel_unshuffle(lightness, 2)  # (B, 4, H / 2, W / 2)
        coarse = torch.cat((relu(self.reduce(features)), ab), dim=1)
        coarse = interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return coarse[:, -2:] + self.convs(torch.cat((coarse, fine), dim=1))


class EfficientUNet(nn.Module):
    """lightness (B, 1, H, W) in [-1, 1] -> ab (B, 2, H, W) in [-1, 1]. Any height and width."""

    paints = "ab"

    def __init__(self, config: EfficientUNetConfig = EfficientUNetConfig()):
        super().__init__()
        self.config = config
        w, finest = config.width, config.stride // 2 - 1  # level 0 is at half the size, level 4 at a 32nd
        widths = [w, 3 * w // 2, 2 * w, 3 * w, 4 * w]
        features = [ENCODERS[config.encoder][i][1] for i in LEVELS]
        self.encoder = Encoder(config.encoder)
        self.bottom = nn.Sequential(nn.Conv2d(features[4], widths[4], kernel_size=1), nn.ReLU(), CrissCrossAttention(widths[4]))
        self.decoder = nn.ModuleList(
            DecoderBlock(widths[i + 1], features[i], widths[i], attention=i in COARSE) for i in range(3, finest - 1, -1)
        )
        self.register_buffer("colours", ab_classes(), persistent=False)  # (Q, 2) ab in [-1, 1]
        self.head = nn.Conv2d(widths[finest], len(self.colours), kernel_size=1)
        self.detail = Detail(widths[finest], config.detail) if config.detail else None

    def forward(self, lightness: torch.Tensor, classes: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """With `classes`: ab and logits (B, Q, h, w) of the classes; h and w are H and W by `config.stride`, rounded up."""
        height, width = lightness.shape[-2:]
        stride = self.config.stride
        padded = pad(lightness, (0, -width % STEP, 0, -height % STEP), mode="replicate")
        gray = (lightness_to_gray((padded + 1) * LIGHTNESS_SCALE) * 255 - 127) / 128
        *skipped, x = self.encoder(gray)
        x = self.bottom(x)
        for block in self.decoder:
            x = block(x, skipped.pop())
        logits = self.head(x)
        ab = self.decode(logits)
        if self.detail:
            ab = self.detail(ab, x, padded)
        ab = interpolate(ab, padded.shape[2:], mode="bilinear", align_corners=False)[..., :height, :width].clamp(-1, 1)
        return (ab, logits[..., : -(-height // stride), : -(-width // stride)]) if classes else ab

    def decode(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, Q, h, w) -> ab (B, 2, h, w): the annealed mean of Zhang et al., section 2.3, equation 5."""
        shares = softmax(logits.float() / self.config.temperature, dim=1)
        return torch.einsum("bqhw,qc->bchw", shares, self.colours) * self.config.chroma
