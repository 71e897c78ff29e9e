"""sRGB <-> CIE Lab <-> what the networks see.

Three spaces, one range each, always as (B, C, H, W) float tensors:

* `rgb`: gamma-encoded sRGB in [0, 1];
* `lab`: L* in [0, 100], a* and b* in about [-108, 108], D65, 2 degree observer;
* the network's: `lightness` (B, 1, H, W) = L* / 50 - 1 in [-1, 1] and `ab` (B, 2, H, W) = a*, b* / 110 in [-1, 1].

Constants and thresholds are those of scikit-image (`skimage.color`), so figures compare; the formulas are IEC 61966-2-1
for sRGB and CIE 15:2004, section 8.2.1, for Lab. Half-precision tensors are computed in float32 and cast back.
"""

import torch

RGB_TO_XYZ = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]], dtype=torch.float64
)
WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)  # D65
# The white point goes into the matrices: one product less for every pixel.
RGB_TO_WHITE = RGB_TO_XYZ / WHITE[:, None]
WHITE_TO_RGB = torch.linalg.inv(RGB_TO_WHITE)

SRGB_KNEE, LINEAR_KNEE = 0.04045, 0.0031308  # the same point of the sRGB curve, encoded and linear
XYZ_KNEE, F_KNEE = 0.008856, 0.2068966  # the same point of the Lab curve, before and after the cube root
LIGHTNESS_SCALE, AB_SCALE = 50.0, 110.0
LUMINANCE = tuple(RGB_TO_XYZ[1].tolist())  # Y of linear red, green and blue


def _float(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        raise ValueError(f"colour tensors are floating point, not {x.dtype}: divide 8-bit values by 255 first")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mix(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    m = matrix.to(device=x.device, dtype=x.dtype)
    return (m @ x.flatten(2)).view_as(x)  # (B, 3, H, W)


def _decode(rgb: torch.Tensor) -> torch.Tensor:
    """sRGB -> linear light, any shape."""
    # Each branch is clamped to its own side: the gradient of the one not taken must be finite too.
    return torch.where(rgb > SRGB_KNEE, ((rgb.clamp(min=SRGB_KNEE) + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def _encode(linear: torch.Tensor) -> torch.Tensor:
    """Linear light -> sRGB, any shape."""
    return torch.where(linear > LINEAR_KNEE, 1.055 * linear.clamp(min=LINEAR_KNEE) ** (1 / 2.4) - 0.055, linear * 12.92)


def _cube_root(t: torch.Tensor) -> torch.Tensor:
    """Lab's f: a cube root with a straight foot."""
    return torch.where(t > XYZ_KNEE, t.clamp(min=XYZ_KNEE) ** (1 / 3), 7.787 * t + 16 / 116)


def _cube(f: torch.Tensor) -> torch.Tensor:
    """The inverse of `_cube_root`."""
    curve = f.clamp(min=F_KNEE)
    return curve**3 + (f - curve) / 7.787  # the foot goes on straight from the knee; `where` takes twice as long


def rgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) sRGB in [0, 1] -> (B, 3, H, W) L* in [0, 100], a*, b*."""
    fx, fy, fz = _cube_root(_mix(RGB_TO_WHITE, _decode(_float(rgb)))).unbind(1)
    lab = torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=1)
    return lab.to(rgb.dtype)


def _lab_to_linear(lab: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) Lab -> linear RGB, outside [0, 1] where the colour is outside the sRGB gamut."""
    lightness, a, b = lab.unbind(1)
    fy = (lightness + 16) / 116
    f = torch.stack((fy + a / 500, fy, fy - b / 200), dim=1)
    return _mix(WHITE_TO_RGB, _cube(f))


def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) Lab -> (B, 3, H, W) sRGB, clipped to [0, 1]. See `fit_gamut` for what clipping would spoil."""
    return _encode(_lab_to_linear(_float(lab)).clamp(0, 1)).to(lab.dtype)


def rgb_to_lightness(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) sRGB in [0, 1] -> (B, 1, H, W) L* in [0, 100]: the first channel of `rgb_to_lab`, for less."""
    r, g, b = _decode(_float(rgb)).split(1, dim=1)
    return luminance_to_lightness(LUMINANCE[0] * r + LUMINANCE[1] * g + LUMINANCE[2] * b).to(rgb.dtype)


def luminance_to_lightness(luminance: torch.Tensor) -> torch.Tensor:
    """Luminance Y in [0, 1], any shape -> L* in [0, 100]."""
    return (116 * _cube_root(_float(luminance)) - 16).to(luminance.dtype)


def gray_to_linear(gray: torch.Tensor) -> torch.Tensor:
    """Gray sRGB values in [0, 1], any shape -> luminance Y in [0, 1]."""
    return _decode(_float(gray)).to(gray.dtype)


def gray_to_lightness(gray: torch.Tensor) -> torch.Tensor:
    """Gray sRGB values in [0, 1], any shape -> L* in [0, 100]."""
    return luminance_to_lightness(_decode(_float(gray))).to(gray.dtype)


def lightness_to_gray(lightness: torch.Tensor) -> torch.Tensor:
    """L* in [0, 100], any shape -> gray sRGB values in [0, 1]."""
    return _encode(_cube((_float(lightness) + 16) / 116).clamp(0, 1)).to(lightness.dtype)


def fit_gamut(lab: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """Bring colours that sRGB cannot show into its gamut by taking chroma from them, never lightness or hue.

    (B, 3, H, W) Lab -> the same. The share of the chroma that fits is bisected along the line to gray, `steps` halvings
    (10: within a thousandth of the chroma). Colours in gamut come back untouched. Clipping RGB instead changes all three.
    """
    x = _float(lab)
    outside = _outside(x)  # (B, H, W)
    if not outside.any():
        return lab
    fitted = x.movedim(1, 0).clone()  # (3, B, H, W)
    lightness, a, b = fitted[:, outside]  # (N,) each
    # `_lab_to_linear`, with what does not change taken out of the loop.
    fy, chroma = (lightness + 16) / 116, torch.stack((a / 500, b / -200))  # (N,), (2, N)
    of_x, of_y, of_z = WHITE_TO_RGB.to(x).unbind(1)
    gray, of_xz = torch.outer(of_y, _cube(fy)), torch.stack((of_x, of_z), dim=1)  # (3, N), (3, 2)
    share, step = torch.zeros_like(fy), 1.0
    for _ in range(steps):
        step /= 2
        linear = torch.addmm(gray, of_xz, _cube(torch.addcmul(fy, share + step, chroma)))  # (3, N)
        share.add_(~_beyond(linear.amin(0), linear.amax(0)), alpha=step)
    fitted[1:, outside] *= share
    return fitted.movedim(0, 1).to(lab.dtype)


def _outside(lab: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) Lab -> (B, H, W) bool: sRGB cannot show it."""
    linear = _lab_to_linear(lab)
    return _beyond(linear.amin(1), linear.amax(1))


def _beyond(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The smallest and largest of linear R, G and B -> bool: sRGB cannot show it."""
    slack = 2e-5  # rounding in float32 must not make white or a pure primary count as outside
    return (low < -slack) | (high > 1 + slack)


def lab_to_network(lab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) Lab -> lightness (B, 1, H, W) and ab (B, 2, H, W), both in [-1, 1]."""
    return lab[:, :1] / LIGHTNESS_SCALE - 1, lab[:, 1:] / AB_SCALE


def network_to_lab(lightness: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
    """lightness (B, 1, H, W) and ab (B, 2, H, W), both in [-1, 1] -> (B, 3, H, W) Lab."""
    return torch.cat(((lightness + 1) * LIGHTNESS_SCALE, ab * AB_SCALE), dim=1)
