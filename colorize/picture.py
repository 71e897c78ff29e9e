"""Real-world image files <-> arrays: orientation, bit depth, alpha, colour profiles, metadata, limits.

Pillow opens every file and decodes all but one kind: colour with 16 bits a channel, of which it keeps 8. OpenCV reads those.
"""

import io
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from .atomic import atomic
from .encode import WRITERS, drop_properties, to_8_bit

MAX_PIXELS = 512_000_000  # a print of 48 x 60 cm scanned at 1100 dpi fits, a decompression bomb does not
BAND = 2**22  # pixels copied at once

# What a photograph comes as. Pillow knows more, some of which start other programs (EPS: Ghostscript). HEIF takes a plugin.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "TGA", "PSD", "PCX")
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".pgm", ".ppm", ".pbm", ".jp2", ".j2k", ".avif", ".heic",
    ".heif", ".tga", ".psd", ".pcx",
)  # fmt: skip

# The tags that tell of the photograph. All others in a file's first directory describe how that file was laid out.
KEPT_TAGS = {
    ExifTags.Base[name].value
    for name in (
        "DocumentName", "ImageDescription", "Make", "Model", "XResolution", "YResolution", "ResolutionUnit", "Software",
        "DateTime", "Artist", "HostComputer", "Rating", "Copyright", "XPTitle", "XPComment", "XPAuthor", "XPKeywords",
        "XPSubject",
    )
}  # fmt: skip
# An offset into the old file, and its size before it was turned upright.
DROPPED_TAGS = {ExifTags.IFD.Interop, ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight}

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # two TIFF tags, and a value of the second


class PictureError(ValueError):
    """A picture that cannot be read or written; the message is one line that names it and the remedy."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, turned upright, and what its file said about it.

    `np.asarray(picture)` is (H, W), (H, W, 3) or, with alpha, (H, W, 4).

    Attributes:
        pixels: (H, W) gray or (H, W, 3) RGB, uint8 or uint16 over its full range; sRGB unless `icc` says otherwise.
        alpha: (H, W) of the same dtype; 0 is transparent.
        exif: tags on the photograph; Orientation is 1, the thumbnail is gone.
        icc: an RGB profile. Those for gray and CMYK have been applied to the pixels instead.
        xmp: the file's XMP packet, without its Orientation.
        name: what messages call it: its path, "bytes", "array" or "PIL image".
        colorized_by: the checkpoint that coloured it; `save` then marks the file as coloured by AI.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    name: str = "picture"
    colorized_by: str | None = None

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.pixels
        if self.alpha is not None:
            rgb = array if array.ndim == 3 else cv2.cvtColor(array, cv2.COLOR_GRAY2RGB)
            array = np.dstack([rgb, self.alpha])  # (H, W, 4)
        return np.array(array, dtype=dtype, copy=copy)

    def to_pil(self) -> Image.Image:
        """An 8-bit image of mode L, RGB or RGBA, with its colour profile."""
        image = Image.fromarray(to_8_bit(np.asarray(self)))
        if self.icc and image.mode != "L":
            image.info["icc_profile"] = self.icc
        return image

    def save(self, path: str | os.PathLike, quality: int = 95) -> None:
        """Write the file, whole or not at all, in the format of its suffix: .png, .jpg, .jpeg, .tif, .tiff or .webp.

        PNG and TIFF are lossless and keep 16 bits; JPEG and WebP have 8, and JPEG shows what is transparent as white. EXIF, XMP
        and the colour profile go along.

        Args:
            quality: 1 to 100, of JPEG and WebP.

        Raises:
            PictureError: another suffix, or the file cannot be written. An older file is then still there.
        """
        write = WRITERS.get(Path(path).suffix.lower())
        if write is None:
            raise PictureError(f"{path} has no suffix of a picture that can be written: use one of {', '.join(WRITERS)}")
        try:
            with atomic(path) as temporary, open(temporary, "wb") as file:
                write(self, file, quality)
        except (OSError, ValueError, struct.error, cv2.error) as error:  # the disk's, and the format's limits of size
            raise PictureError(f"{path} cannot be written: {_reason(error)}") from error


def read(source: str | os.PathLike | bytes | Image.Image | np.ndarray | Picture) -> Picture:
    """A picture from a path, a file's bytes, a PIL image or an array.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, uint16 or bool, and are not copied. PNG and TIFF keep 16 bits.
    Of an animation, or a file of several pages, the first is read.

    Raises:
        PictureError: not there, not a picture, damaged, cut short, or of more than `MAX_PIXELS` pixels.
    """
    match source:
        case Picture():
            return source
        case np.ndarray():
            return _from_array(source)
        case Image.Image():
            return _from_image(source, getattr(source, "filename", "") or "PIL image")
        case bytes() | bytearray() | memoryview():
            return _from_file(io.BytesIO(source), "bytes")
        case str() | os.PathLike():
            return _from_path(source)
    raise PictureError(f"{type(source).__name__} is no picture: pass a path, a file's bytes, a PIL image or an array")


def weigh(path: str | os.PathLike) -> int:
    """About how many bytes it takes to read, colour and write a picture, by its header; 0 if that cannot be read."""
    Image.init()
    with suppress(Exception), _lifted_limit(), Image.open(path, formats=_formats()) as image:  # `read` will say what is wrong
        depth = 2 if "16" in _layout(image) else 1
        return image.width * image.height * depth * 8  # 1 to 4 channels as read, 3 in colour, and the copies of the codecs
    return 0


def _formats() -> list[str]:
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _from_array(array: np.ndarray) -> Picture:
    if array.dtype == bool:
        array = array * np.uint8(255)
    shaped = array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if not shaped or not array.size or array.dtype not in (np.uint8, np.uint16):
        raise PictureError(
            f"array of shape {array.shape} and type {array.dtype} is no picture: "
            "pass uint8 (0 to 255) or uint16 (0 to 65535) of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    pixels, alpha = _split(array)
    return Picture(pixels, alpha, name="array")


def _from_path(path: str | os.PathLike) -> Picture:
    if os.path.isdir(path):
        raise PictureError(f"{path} is a folder: pass the pictures in it")
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise PictureError(f"{path} cannot be opened: {_reason(error)}; check the path") from error
    with file:
        return _from_file(file, str(path))


def _from_file(file: BinaryIO, name: str) -> Picture:
    Image.init()
    with _lifted_limit():
        try:
            image = Image.open(file, formats=_formats())
        except UnidentifiedImageError as error:
            raise PictureError(f"{name} is not a picture that can be read: save it as JPEG, PNG, TIFF or WebP") from error
        except Exception as error:  # a decoder raises what it stumbles over: OSError, SyntaxError, struct.error, IndexError...
            raise _damaged(name, error) from error
        return _from_image(image, name, file)


_LOCK = threading.Lock()
_readers, _limit = 0, None


@contextmanager
def _lifted_limit() -> Iterator[None]:
    """Without Pillow's limit on pixels, a global far below ours, until the last thread in here is done."""
    global _readers, _limit
    with _LOCK:
        if _readers == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _LOCK:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def _from_image(image: Image.Image, name: str, file: BinaryIO | None = None) -> Picture:
    """`file` is where the image was opened from: OpenCV reads there what Pillow cannot."""
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise PictureError(f"{name} has {size}, more than {MAX_PIXELS // 10**6} megapixels: scale it down")
    layout = _layout(image)
    deep = ";16" in layout or image.mode.startswith("I;16")
    tiff = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode in ("I", "F") or layout and not deep and max(tiff.get(BITS_PER_SAMPLE, (8,))) > 8:
        raise PictureError(f"{name} has samples of another kind than 8 or plain 16 bits: save it as an 8- or 16-bit PNG")

    profile = image.info.get("icc_profile") or b""
    space = profile[16:20]  # of the profile's header: b"RGB ", b"GRAY" or b"CMYK"
    try:
        if file and layout.startswith(("RGB;16", "RGBX;16", "RGBA;16", "LA;16")):
            array = _decode_deep(file, layout)
        else:
            image.load()
            array = _decode(image, profile if space == b"CMYK" else None)
    except MemoryError:
        raise
    except Exception as error:  # as in _from_file
        raise _damaged(name, error) from error
    pixels, alpha = _split(array)
    if deep and tiff.get(PHOTOMETRIC) == WHITE_IS_ZERO and pixels.ndim == 2:
        pixels = ~pixels  # Pillow sees to it at 8 bits only
    if space == b"GRAY" and pixels.ndim == 2:
        pixels = _gray_to_srgb(pixels, profile)

    xmp = image.info.get("xmp")
    orientation, exif = _exif(image)
    if image.format == "TIFF":
        orientation = 1  # both decoders turn it upright themselves, and no other kind of file
    return Picture(
        pixels=_upright(pixels, orientation),
        alpha=None if alpha is None else _upright(alpha, orientation),
        exif=exif,
        icc=profile if space == b"RGB " and image.mode not in ("CMYK", "LAB") else None,
        xmp=drop_properties(xmp, "tiff:Orientation") if isinstance(xmp, bytes) else None,
        name=name,
    )


def _layout(image: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's words: "RGB;16B", "I;16", "L"...; "" for an image made in memory."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _decode_deep(file: BinaryIO, layout: str) -> np.ndarray:
    """16-bit colour, or gray and alpha, as (H, W, 2), (H, W, 3) or (H, W, 4), not turned upright."""
    file.seek(0)
    array = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)  # (H, W, 3 or 4): BGR, BGRA
    if array is None:
        raise OSError("cut short")
    rows = max(BAND // array.shape[1], 1)
    for top in range(0, len(array), rows):  # in bands, as NumPy copies what it writes over
        band = array[top : top + rows]
        band[:, :, :3] = band[:, :, 2::-1]
    if layout.startswith("RGBX"):
        return array[:, :, :3]
    return array[:, :, 2:] if layout.startswith("LA") else array


def _decode(image: Image.Image, cmyk_profile: bytes | None) -> np.ndarray:
    """Any loaded image as (H, W) or (H, W, 2 to 4): gray or RGB, then alpha; uint8, or uint16 for a mode I;16."""
    if image.mode.startswith("I;16"):
        gray = _to_array(image)
        clear = image.info.get("transparency")  # the gray value that stands for nothing
        return gray if clear is None else np.dstack([gray, np.where(gray == clear, 0, 65535).astype(np.uint16)])
    if image.mode == "CMYK" and cmyk_profile:
        with suppress(ImageCms.PyCMSError):  # a broken profile is as good as none
            image = _to_srgb(image, cmyk_profile)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode += "A" if image.has_transparency_data else ""
    return _to_array(image if image.mode == mode else image.convert(mode))


def _to_array(image: Image.Image) -> np.ndarray:
    """`np.asarray` in bands: of a whole image it makes two more copies on the way."""
    pixel = np.asarray(image.crop((0, 0, 1, 1)))
    array = np.empty((image.height, image.width, *pixel.shape[2:]), pixel.dtype.newbyteorder("="))
    rows = max(BAND // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        array[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return array


def _split(array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) or (H, W, 1 to 4) -> pixels (H, W) or (H, W, 3), and alpha (H, W) where there are 2 or 4 channels."""
    if array.ndim == 2:
        return array, None
    channels = array.shape[2]
    pixels, alpha = (array, None) if channels % 2 else (array[:, :, :-1], array[:, :, -1])
    return pixels[:, :, 0] if channels < 3 else pixels, alpha


def _to_srgb(image: Image.Image, profile: bytes, flags: ImageCms.Flags = ImageCms.Flags.NONE) -> Image.Image:
    return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)


def _gray_to_srgb(gray: np.ndarray, profile: bytes) -> np.ndarray:
    """Gray values of a profile's tone curve -> those of sRGB's, (H, W) of the same dtype.

    Pillow takes 16 bits through a profile but gives 8. Where the result steps from one of its levels to the next is known to 16
    bits, though, and that is the curve.
    """
    ramp = np.arange(65536, dtype=np.uint16)
    try:
        # optimized, it is 10 levels off in the shadows
        stepped = np.asarray(_to_srgb(Image.fromarray(ramp[None]), profile, ImageCms.Flags.NOOPTIMIZE))[0, :, 1].astype(float)
    except ImageCms.PyCMSError:  # a broken profile is as good as none
        return gray
    steps = np.flatnonzero(np.diff(stepped))  # the last value before each step
    levels = (stepped[steps] + stepped[steps + 1]) / 2 * 257
    curve = np.interp(ramp, [0, *steps + 0.5, 65535], [stepped[0] * 257, *levels, stepped[-1] * 257])
    if gray.dtype == np.uint8:
        return (curve[::257] / 257).round().astype(np.uint8)[gray]
    return curve.round().astype(np.uint16)[gray]


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored -> as meant, for the 8 values of EXIF's Orientation (others are taken for 1)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _exif(image: Image.Image) -> tuple[int, bytes | None]:
    """EXIF's Orientation, and the tags worth keeping, with Orientation 1."""
    orientation = 1
    with suppress(Exception):  # tags too damaged to parse must not cost us the picture
        tags = image.getexif()
        orientation = tags.get(ExifTags.Base.Orientation, 1)
        kept = Image.Exif()
        for tag in KEPT_TAGS & set(tags):
            kept[tag] = tags[tag]
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if details := tags.get_ifd(ifd):
                kept[ifd] = {tag: value for tag, value in details.items() if tag not in DROPPED_TAGS}
        if kept:
            kept[ExifTags.Base.Orientation] = 1
            return orientation, kept.tobytes()
    return orientation, None


def _damaged(name: str, error: Exception) -> PictureError:
    return PictureError(f"{name} is damaged ({_reason(error)}): copy it again or save it anew")


def _reason(error: Exception) -> str:
    """One line of an error's text."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
