"""Real photographs in every kind of file that reaches us, and back out."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps

from colorize.atomic import atomic
from colorize.encode import SOURCE_TYPE
from colorize.picture import PictureError, read

ROOT = Path(__file__).parents[1]
GRAY_PHOTO = ROOT / "examples" / "killarney-1910.jpg"
COLOR_PHOTO = ROOT / "tests" / "photos" / "kodak-03.jpg"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
ORIENTATION, MAKE, EXIF_IFD, GPS_IFD, EXPOSURE_TIME = 0x0112, 0x010F, 0x8769, 0x8825, 0x829A
PNG = b"\x89PNG\r\n\x1a\n"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def gray() -> np.ndarray:
    """An old photograph, (111, 151) uint8: odd sides, and no symmetry."""
    return np.asarray(Image.open(GRAY_PHOTO).convert("L"))[100:211, 50:201]


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """A colour photograph, (111, 151, 3) uint8."""
    return np.asarray(Image.open(COLOR_PHOTO))[100:211, 200:351]


def deep(array: np.ndarray) -> np.ndarray:
    """8 bits -> 16 whose low byte matters, and is lost in any detour through 8."""
    return array.astype(np.uint16) * 256 + np.arange(array.size, dtype=np.uint16).reshape(array.shape) % 251


def pillow(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def png(array: np.ndarray, color_type: int, chunks: bytes = b"") -> bytes:
    """A PNG of any kind of pixel: (H, W) or (H, W, C), uint8 or uint16; `chunks` go before the pixels."""
    height, width = array.shape[:2]
    rows = array.astype(array.dtype.newbyteorder(">")).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, array.itemsize * 8, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return PNG + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.4."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4x4s4s4s4s12x4s", start + len(body), b"\x02\x40\0\0", kind, space, connection, b"acsp")
    return header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + table + body


def gray_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))})


def black_only_profile() -> bytes:
    """A CMYK press that prints nothing but black: L* = 100 - K, whatever the coloured inks."""
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table += bytes(range(256)) * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + bytes(range(256)) * 3
    return profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table})


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


# What is read


def test_path_bytes_image_and_array_are_the_same_picture():
    expected = np.asarray(Image.open(COLOR_PHOTO))
    for source in (COLOR_PHOTO, str(COLOR_PHOTO), COLOR_PHOTO.read_bytes(), Image.open(COLOR_PHOTO), expected):
        picture = read(source)
        assert np.array_equal(picture.pixels, expected)
        assert (picture.height, picture.width, picture.alpha) == (*expected.shape[:2], None)
    assert read(picture) is picture
    loaded = Image.open(io.BytesIO(tiff(deep(expected[..., 0]))))
    loaded.load()
    assert np.array_equal(read(loaded).pixels, deep(expected[..., 0]))
    assert read(COLOR_PHOTO).name == str(COLOR_PHOTO)


def test_gray_stays_one_channel(gray):
    image = Image.fromarray(gray)
    files = [pillow(image, "PNG"), pillow(image, "TIFF"), pillow(image, "BMP"), pillow(image, "PPM"), tiff(gray, tile=(64, 64))]
    files += [tiff(255 - gray, photometric="miniswhite"), png(deep(gray), 0), tiff(deep(gray)), tiff(deep(gray), byteorder=">")]
    files += [tiff(~deep(gray), photometric="miniswhite"), cv2.imencode(".tiff", deep(gray))[1].tobytes()]
    for file in files:
        pixels = read(file).pixels
        assert np.array_equal(pixels, gray if pixels.dtype == np.uint8 else deep(gray))
        assert pixels.dtype.isnative and pixels.flags.c_contiguous


def test_color_of_8_and_16_bits(rgb):
    image = Image.fromarray(rgb)
    files = [pillow(image, "PNG"), pillow(image, "TIFF"), pillow(image, "WEBP", lossless=True), pillow(image, "BMP")]
    files += [tiff(np.moveaxis(rgb, 2, 0), photometric="rgb", planarconfig="separate"), png(deep(rgb), 2)]
    files += [tiff(deep(rgb), photometric="rgb"), tiff(deep(rgb), photometric="rgb", byteorder=">", tile=(64, 64))]
    files += [tiff(np.dstack([deep(rgb), deep(rgb[..., 0])]), photometric="rgb", extrasamples=["unspecified"])]
    for file in files:
        picture = read(file)
        assert np.array_equal(picture.pixels, rgb if picture.pixels.dtype == np.uint8 else deep(rgb))
        assert picture.pixels.dtype.isnative and picture.pixels.flags.c_contiguous and picture.alpha is None


def test_alpha_is_carried(gray, rgb):
    rgba, la = np.dstack([rgb, gray]), np.dstack([gray, rgb[..., 0]])
    files = [(pillow(Image.fromarray(rgba), "PNG"), rgba), (pillow(Image.fromarray(rgba), "TIFF"), rgba), (png(la, 4), la)]
    files += [(png(deep(rgba), 6), deep(rgba)), (png(deep(la), 4), deep(la))]
    files += [(tiff(deep(rgba), photometric="rgb", extrasamples=["unassalpha"]), deep(rgba))]
    for file, expected in files:
        picture = read(file)
        assert np.array_equal(picture.pixels, expected[..., :3] if expected.shape[2] == 4 else expected[..., 0])
        assert np.array_equal(picture.alpha, expected[..., -1]) and picture.alpha.dtype == expected.dtype


@pytest.mark.parametrize("depth", [8, 16])
def test_one_value_may_stand_for_transparent(gray, rgb, depth):
    gray, rgb = (gray, rgb) if depth == 8 else (deep(gray), deep(rgb))
    hole = chunk(b"tRNS", struct.pack(">H", gray[3, 4]))
    assert np.array_equal(read(png(gray, 0, hole)).alpha == 0, gray == gray[3, 4])
    hole = chunk(b"tRNS", struct.pack(">3H", *rgb[3, 4]))
    assert np.array_equal(read(png(rgb, 2, hole)).alpha == 0, (rgb == rgb[3, 4]).all(axis=2))


def test_palette_bilevel_and_animated(gray, rgb):
    palette = Image.fromarray(rgb).quantize(32)
    assert np.array_equal(read(pillow(palette, "PNG")).pixels, np.asarray(palette.convert("RGB")))
    hole = np.asarray(palette)[5, 6]
    picture = read(pillow(palette, "PNG", transparency=int(hole)))
    assert np.array_equal(picture.alpha == 0, np.asarray(palette) == hole)

    bilevel = Image.fromarray(gray).convert("1")
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(read(pillow(bilevel, kind)).pixels, np.asarray(bilevel) * np.uint8(255))

    frames = [palette, palette.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    for kind in ("GIF", "PNG", "TIFF"):
        animated = pillow(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.array_equal(read(animated).pixels, np.asarray(palette.convert("RGB")))


def test_cmyk(rgb, gray):
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert np.array_equal(read(pillow(cmyk, "TIFF")).pixels, rgb)
    jpeg = pillow(cmyk, "JPEG", quality=98)  # written inverted, with an Adobe marker, as Photoshop does
    assert b"Adobe" in jpeg
    assert np.abs(read(jpeg).pixels.astype(int) - rgb).mean() < 2

    inks = Image.merge("CMYK", [*Image.fromarray(rgb).split(), Image.fromarray(gray)])
    picture = read(pillow(inks, "TIFF", icc_profile=black_only_profile()))
    luminance = np.where((L := 100 - gray / 2.55) > 8, ((L + 16) / 116) ** 3, L / 903.3)
    assert np.abs(picture.pixels - 255 * srgb_curve(luminance)[..., None]).max() <= 2
    assert picture.icc is None
    assert np.array_equal(read(pillow(cmyk, "TIFF", icc_profile=SRGB)).pixels, rgb)  # not a profile for CMYK
    assert np.array_equal(read(pillow(cmyk, "TIFF", icc_profile=black_only_profile()[:200])).pixels, rgb)  # a broken one


def test_lab_and_ycbcr(rgb):
    image = Image.fromarray(rgb)
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    files = [pillow(ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB"), "TIFF")]
    files += [pillow(image.convert("YCbCr"), "TIFF", compression="tiff_lzw")]
    for file in files:
        assert np.abs(read(file).pixels.astype(int) - rgb).mean() < 2


def test_rgb_profile_is_carried_and_a_gray_one_applied(rgb, gray):
    assert read(pillow(Image.fromarray(rgb), "PNG", icc_profile=SRGB)).icc == SRGB

    for pixels in (gray, deep(gray)):
        full = np.iinfo(pixels.dtype).max
        chunks = chunk(b"iCCP", b"icc\0\0" + zlib.compress(gray_profile(1.8)))
        picture = read(png(pixels, 0, chunks))
        expected = full * srgb_curve((pixels / full) ** 1.8)
        assert picture.pixels.dtype == pixels.dtype and picture.icc is None
        assert np.abs(picture.pixels - expected).max() <= full / 255 * (0.55 if full == 255 else 0.2)
    assert len(np.unique(picture.pixels)) > 0.95 * len(np.unique(pixels))  # the curve is smooth, not 256 stairs

    broken = chunk(b"iCCP", b"icc\0\0" + zlib.compress(gray_profile(1.8)[:140]))
    assert np.array_equal(read(png(gray, 0, broken)).pixels, gray)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_come_upright(orientation, rgb, gray):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[MAKE] = "Kodak"
    image = Image.fromarray(rgb)
    upright = np.asarray(ImageOps.exif_transpose(read_with(image, exif)))
    files = [pillow(image, kind, exif=exif.tobytes()) for kind in ("PNG", "TIFF")]
    files += [
        pillow(image, "WEBP", exif=exif.tobytes(), lossless=True),
        pillow(image, "TIFF", exif=exif, compression="tiff_lzw"),
    ]
    files += [png(deep(rgb), 2, chunk(b"eXIf", exif.tobytes()[6:]))]
    files += [tiff(deep(rgb), photometric="rgb", extratags=[(ORIENTATION, 3, 1, orientation, True)])]
    for file in files:
        pixels = read(file).pixels
        assert np.array_equal(pixels if pixels.dtype == np.uint8 else pixels >> 8, upright)
        assert pixels.flags.c_contiguous

    upright = np.asarray(ImageOps.exif_transpose(read_with(Image.fromarray(gray), exif)))
    gray_16 = tiff(deep(gray), extratags=[(ORIENTATION, 3, 1, orientation, True)])
    jpeg = pillow(Image.fromarray(gray), "JPEG", exif=exif.tobytes(), quality=100)
    assert np.array_equal(read(gray_16).pixels >> 8, upright)
    assert np.abs(read(jpeg).pixels.astype(int) - upright).mean() < 1

    alpha = np.dstack([rgb, gray])
    assert np.array_equal(read(pillow(Image.fromarray(alpha), "PNG", exif=exif.tobytes())).alpha, upright)
    assert Image.open(io.BytesIO(pillow(read(jpeg).to_pil(), "PNG", exif=read(jpeg).exif))).getexif()[ORIENTATION] == 1


def read_with(image: Image.Image, exif: Image.Exif) -> Image.Image:
    return Image.open(io.BytesIO(pillow(image, "PNG", exif=exif.tobytes())))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 5), (257, 2), (1, 1, 3), (1, 4000, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_shape_goes_out_and_in(tmp_path, shape, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    for suffix in (".png", ".tif"):
        read(array).save(tmp_path / f"out{suffix}")
        assert np.array_equal(np.asarray(read(tmp_path / f"out{suffix}")), array)


def test_arrays(gray, rgb):
    assert np.array_equal(read(gray[..., None]).pixels, gray)
    assert np.array_equal(read(gray > 100).pixels, (gray > 100) * 255)
    rgba = np.dstack([rgb, gray])
    assert np.array_equal(read(rgba).alpha, gray) and np.array_equal(read(rgba), rgba)
    for bad in (rgb / 255, gray[:0], gray[0], rgba[..., :2], gray.astype(np.int64), np.float32(1)[None]):
        with pytest.raises(PictureError, match=r"uint8 \(0 to 255\) or uint16"):
            read(bad)
    with pytest.raises(PictureError, match="NoneType is no picture: pass a path"):
        read(None)


# What is refused

JPEG = COLOR_PHOTO.read_bytes()
REFUSED = {
    "empty.jpg": (b"", "not a picture"),
    "text.jpg": (b"Dear Sir or Madam,\n" * 99, "not a picture"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a picture"),
    "paper.pdf": (b"%PDF-1.7\n" + b"\0" * 99, "not a picture"),
    "phone.heic": (struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "not a picture"),
    "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "damaged"),
    "nearly.jpg": (JPEG[:-5000], "damaged"),
    "header.jpg": (JPEG[:300], "damaged|not a picture"),
    "bomb.png": (
        PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b""),
        "512 megapixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_by_name(tmp_path, name):
    data, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    refused(path, f"{name}.*({reason})")
    refused(data, f"^bytes .*({reason})")


def refused(source, pattern: str) -> None:
    with pytest.raises(PictureError, match=pattern) as caught:
        read(source)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_truncated_lossless_files_are_refused(gray, rgb, kind):
    rgba = np.dstack([rgb, gray])
    for array in (gray, rgb, deep(gray), deep(rgb), deep(rgba)):
        file = cv2.imencode("." + kind, array)[1].tobytes()
        refused(file[: len(file) // 2], "damaged|not a picture")
    for array in (rgb, deep(rgb)) if kind == "tif" else ():  # the directory in front, the pixels cut
        file = tiff(array, photometric="rgb")
        refused(file[: len(file) // 2], "damaged|not a picture")


def test_numbers_that_are_no_gray_levels_are_refused(gray, rgb):
    for array in (gray.astype(np.float32), gray.astype(np.int32), gray.astype(np.int16)):
        refused(tiff(array), "8- or 16-bit")
    refused(tiff(rgb.astype(np.float32), photometric="rgb"), "bytes")
    refused(tiff(np.moveaxis(deep(rgb), 2, 0), photometric="rgb", planarconfig="separate"), "8- or 16-bit")  # Pillow garbles it


def test_paths_that_lead_nowhere(tmp_path):
    refused(tmp_path / "missing.jpg", "missing.jpg cannot be opened: No such file or directory; check the path")
    refused(tmp_path, "is a folder")
    refused("nul\0.jpg", "cannot be opened")


def test_a_truncated_pil_image_is_refused():
    refused(Image.open(io.BytesIO(JPEG[:-5000])), "PIL image is damaged")


@pytest.mark.filterwarnings("error")
def test_pillows_own_limit_is_left_alone_and_does_not_bind_us(monkeypatch, gray):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    wide = np.zeros((3, 3 * 2**20), np.uint8)
    files = [
        JPEG,
        pillow(Image.fromarray(gray), "TIFF", compression="tiff_lzw"),
        tiff(deep(gray)),
        pillow(Image.fromarray(wide), "PNG"),
    ]
    with ThreadPoolExecutor(4) as pool:
        shapes = [picture.pixels.shape for picture in pool.map(read, 9 * files)]
    assert shapes == 9 * [(512, 768, 3), gray.shape, gray.shape, wide.shape]
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(JPEG))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_100_megapixel_scan_takes_two_bytes_a_pixel(tmp_path):
    scan = cv2.resize(np.asarray(Image.open(GRAY_PHOTO).convert("L")), (12500, 8000), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(tmp_path / "scan.jpg"), scan, [cv2.IMWRITE_JPEG_QUALITY, 50])
    program = (
        "import re, sys; from colorize.picture import read\n"
        "def kilobytes(field): return int(re.search(field + r':\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = kilobytes('VmRSS'); pixels = read(sys.argv[1]).pixels\n"
        "print(pixels.shape, pixels.nbytes, (kilobytes('VmHWM') - before) * 1024)"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "scan.jpg")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("(8000, 12500) 100000000 ")
    assert int(printed.split()[-1]) < 240e6


# What is written


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_goes_along(tmp_path, rgb, suffix):
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = "Kodak", 6
    exif[EXIF_IFD] = {EXPOSURE_TIME: 0.01}
    exif[GPS_IFD] = {1: "N", 2: (51.0, 54.0, 33.0)}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"></rdf:RDF></x:xmpmeta>'
    picture = read(pillow(Image.fromarray(rgb), "JPEG", exif=exif, icc_profile=SRGB, xmp=xmp))
    for pixels in (picture.pixels, deep(picture.pixels)):
        picture = replace(picture, pixels=pixels)
        picture.save(tmp_path / f"out{suffix}")
        written = Image.open(tmp_path / f"out{suffix}")
        tags = written.getexif()
        assert (tags[MAKE], tags[ORIENTATION]) == ("Kodak", 1)
        assert tags.get_ifd(EXIF_IFD)[EXPOSURE_TIME] == pytest.approx(0.01)
        assert tags.get_ifd(GPS_IFD)[2] == (51.0, 54.0, 33.0)
        assert written.info["icc_profile"] == SRGB and written.info["xmp"] == xmp
        assert written.size == (picture.width, picture.height) == (111, 151)


def test_a_tiffs_own_layout_does_not_travel_in_the_exif(tmp_path, rgb):
    picture = read(
        tiff(deep(rgb), photometric="rgb", tile=(64, 64), software="scanner", resolution=(600, 600), resolutionunit=2)
    )
    for suffix in SUFFIXES:
        picture.save(tmp_path / f"out{suffix}")
        tags = dict(Image.open(tmp_path / f"out{suffix}").getexif())
        assert tags[0x0131] == "scanner" and tags[0x011A] == 600
        assert 0x0142 not in tags  # TileWidth
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), deep(rgb))


def test_the_thumbnail_is_dropped(rgb):
    thumbnail = pillow(Image.fromarray(rgb[:60, :80]), "JPEG")
    first = struct.pack("<H2HI4sI", 1, MAKE, 2, 4, b"Kod\0", 26)  # one tag, then the place of the second directory
    second = struct.pack("<H2H2I2H2II", 2, 0x201, 4, 1, 56, 0x202, 4, 1, len(thumbnail), 0)
    jpeg = pillow(Image.fromarray(rgb), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + first + second + thumbnail)
    assert Image.open(io.BytesIO(jpeg)).getexif().get_ifd(ExifTags.IFD.IFD1)[0x202] == len(
        thumbnail
    )  # it is there to be dropped
    assert b"Kod" in read(jpeg).exif and thumbnail not in read(jpeg).exif


def test_damaged_exif_does_not_cost_the_picture(rgb):
    jpeg = pillow(Image.fromarray(rgb), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40)
    with pytest.warns(UserWarning):
        assert read(jpeg).pixels.shape == rgb.shape


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("depth", [8, 16])
def test_a_colorized_picture_is_marked(tmp_path, rgb, suffix, depth):
    xmp = (
        b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
        b' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        b' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
        b' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmp:CreatorTool="Scan 1.0" xmp:Rating="4">'
        b"<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/print</Iptc4xmpExt:DigitalSourceType>"
        b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
    for before, rating in (
        (None, None),
        (xmp, "4"),
        (b"no packet", None),
        (xmp.replace(b"</rdf:D", b" " * 70_000 + b"</rdf:D"), ...),
    ):
        chunks = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + before) if before else b""
        picture = read(png(rgb if depth == 8 else deep(rgb), 2, chunks))
        replace(picture, colorized_by='unet "A" & <B>').save(tmp_path / f"out{suffix}")
        said = properties(Image.open(tmp_path / f"out{suffix}").info["xmp"])
        assert said["DigitalSourceType"] == [SOURCE_TYPE]
        assert said["CreatorTool"] == ['Colorize (unet "A" & <B>)']
        assert "Orientation" not in said
        assert rating is ... or said.get("Rating") == (rating and [rating])


def properties(xmp: bytes) -> dict[str, list[str]]:
    """Every property of a packet, by its local name."""
    found: dict[str, list[str]] = {}
    for description in ElementTree.fromstring(xmp.decode()).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"):
        for name, value in [*description.attrib.items(), *((child.tag, child.text) for child in description)]:
            found.setdefault(name.rpartition("}")[2], []).append(value)
    return found


def test_an_orientation_in_the_xmp_is_applied_once(tmp_path, rgb):
    xmp = b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" tiff:Orientation="6"></rdf:RDF>'
    picture = read(png(rgb, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)))
    assert np.array_equal(picture, np.rot90(rgb, -1))
    for suffix in SUFFIXES:
        picture.save(tmp_path / f"out{suffix}")
        assert read(tmp_path / f"out{suffix}").pixels.shape == picture.pixels.shape


def test_a_picture_that_was_not_colorized_is_not_marked(tmp_path, rgb):
    for suffix in SUFFIXES:
        read(rgb).save(tmp_path / f"out{suffix}")
        assert b"DigitalSourceType" not in (tmp_path / f"out{suffix}").read_bytes()


def test_a_gray_file_gets_no_rgb_profile(tmp_path, gray):
    for suffix in (".png", ".jpg", ".tif"):
        replace(read(gray), icc=SRGB).save(tmp_path / f"out{suffix}")
        written = Image.open(tmp_path / f"out{suffix}")
        assert written.mode == "L" and "icc_profile" not in written.info


def test_depth_and_alpha_by_format(tmp_path, gray, rgb):
    picture = read(np.dstack([deep(rgb), deep(gray)]))
    for suffix in (".png", ".tif", ".tiff"):
        picture.save(tmp_path / f"out{suffix}")
        assert np.array_equal(read(tmp_path / f"out{suffix}"), picture)
        other = cv2.imread(str(tmp_path / f"out{suffix}"), cv2.IMREAD_UNCHANGED)  # by another reader than ours
        assert np.array_equal(cv2.cvtColor(other, cv2.COLOR_BGRA2RGBA), picture)
    picture.save(tmp_path / "out.webp")
    assert np.array_equal(read(tmp_path / "out.webp").alpha, np.asarray(picture.to_pil())[..., 3])

    picture.save(tmp_path / "out.jpg", quality=100)
    alpha = gray[..., None] / 255
    written = read(tmp_path / "out.jpg")
    assert np.abs(written.pixels - (rgb * alpha + 255 * (1 - alpha))).mean() < 1.5 and written.alpha is None


def test_quality_is_heeded(tmp_path, rgb):
    for suffix in (".jpg", ".webp"):
        sizes = []
        for quality in (30, 95):
            read(rgb).save(tmp_path / f"out{suffix}", quality=quality)
            sizes.append((tmp_path / f"out{suffix}").stat().st_size)
        assert sizes[0] < sizes[1] / 2


def test_16_bits_are_rounded_to_8():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(read(every).to_pil()), np.round(every / 257))


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path, gray):
    path = tmp_path / "out.webp"
    path.write_bytes(b"old")
    with pytest.raises(PictureError, match="out.webp cannot be written.*16383"):
        read(np.zeros((1, 20000), np.uint8)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.webp"] and path.read_bytes() == b"old"
    with pytest.raises(PictureError, match="nowhere.*cannot be written: No such file or directory"):
        read(gray).save(tmp_path / "nowhere" / "out.png")
    with pytest.raises(PictureError, match=r"out.bmp.*use one of .png, .jpg, .jpeg, .tif, .tiff, .webp"):
        read(gray).save(tmp_path / "out.bmp")
    read(gray).save(path)
    assert read(path).pixels.shape[:2] == gray.shape and len(list(tmp_path.iterdir())) == 1


def test_atomic_cleans_up_after_ctrl_c(tmp_path):
    path = tmp_path / ("a" * 240 + ".png")  # a name that leaves no room to append to
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png"
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
    with atomic(path) as temporary:
        temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"new"
