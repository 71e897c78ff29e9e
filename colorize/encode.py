"""A `Picture` into the bytes of a PNG, TIFF, JPEG or WebP file, metadata included.

16-bit colour is why PNG and TIFF are not left to Pillow, which has 8 bits, nor to OpenCV, which has no place for the metadata.
"""

import re
import struct
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

if TYPE_CHECKING:
    from .picture import Picture

STRIP = 2**20  # bytes of pixels in a strip of a TIFF
SEGMENT = 65_000  # bytes of metadata that a JPEG holds in one piece

# https://cv.iptc.org/newscodes/digitalsourcetype: a photograph composed with what a trained algorithm made
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
MARK = """<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
  xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
  xmp:CreatorTool={tool} Iptc4xmpExt:DigitalSourceType={source}/>
"""


def to_8_bit(array: np.ndarray) -> np.ndarray:
    """uint8 as it is; uint16 (0 to 65535) -> uint8 (0 to 255), rounded."""
    return array if array.dtype == np.uint8 else cv2.convertScaleAbs(array, alpha=1 / 257).reshape(array.shape)


def icc_of(picture: "Picture") -> bytes | None:
    """The profile, which is one for RGB, unless the file will be gray."""
    return picture.icc if picture.pixels.ndim == 3 or picture.alpha is not None else None


def xmp_of(picture: "Picture") -> bytes:
    """The XMP packet of a picture, with the AI mark if it was colorized; b"" for none."""
    xmp = picture.xmp or b""
    if picture.colorized_by is None:
        return xmp
    if b"</rdf:RDF>" not in xmp:
        xmp = XMP.encode()
    mark = MARK.format(tool=quoteattr(f"Colorize ({picture.colorized_by})"), source=quoteattr(SOURCE_TYPE))
    xmp = drop_properties(xmp, "xmp:CreatorTool", "Iptc4xmpExt:DigitalSourceType")  # stated twice, they would be an error
    before, end, after = xmp.rpartition(b"</rdf:RDF>")
    return before + mark.encode() + end + after


def drop_properties(xmp: bytes, *names: str) -> bytes:
    """An XMP packet without some simple properties, which it may write as attributes or as elements."""
    for name in names:
        xmp = re.sub(
            rf"""\s{name}\s*=\s*("[^"]*"|'[^']*')|<{name}\b[^>]*/>|<{name}\b.*?</{name}>""".encode(), b"", xmp, flags=re.DOTALL
        )
    return xmp


def write_jpeg(picture: "Picture", file: BinaryIO, quality: int) -> None:
    image = picture.to_pil()
    if picture.alpha is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    exif = picture.exif if picture.exif and len(picture.exif) < SEGMENT else b""
    xmp = xmp_of(picture)
    if len(xmp) > SEGMENT:
        xmp = xmp_of(replace(picture, xmp=None))
    # chroma at full size, or the lightness that was so carefully kept would not be
    image.save(file, "JPEG", quality=quality, subsampling="4:4:4", exif=exif, icc_profile=icc_of(picture), xmp=xmp)


def write_webp(picture: "Picture", file: BinaryIO, quality: int) -> None:
    metadata = {"exif": picture.exif or b"", "icc_profile": icc_of(picture), "xmp": xmp_of(picture)}
    picture.to_pil().save(file, "WEBP", quality=quality, **metadata)


def write_png(picture: "Picture", file: BinaryIO, quality: int) -> None:
    """OpenCV's PNG, with the metadata put behind its header (PNG specification, third edition, section 11)."""
    array = np.asarray(picture)
    if array.ndim == 3:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    data = cv2.imencode(".png", array)[1]
    header = 8 + 25  # the signature and the IHDR chunk
    file.write(data[:header])
    if icc := icc_of(picture):
        write_chunk(file, b"iCCP", b"icc\0\0" + zlib.compress(icc))
    if picture.exif:
        write_chunk(file, b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    if xmp := xmp_of(picture):
        write_chunk(file, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    file.write(data[header:])


def write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def write_tiff(picture: "Picture", file: BinaryIO, quality: int) -> None:
    """One directory, then strips of deflated differences (TIFF 6.0, section 14; compression 8 of its Photoshop supplement)."""
    array = np.asarray(picture)
    array = array.reshape(picture.height, picture.width, -1)  # (H, W, 1, 3 or 4)
    height, width, channels = array.shape
    rows = max(STRIP // array[0].nbytes, 1)
    strips = [deflate(array[top : top + rows]) for top in range(0, height, rows)]
    sizes = [len(strip) for strip in strips]

    directory = TiffImagePlugin.ImageFileDirectory_v2()
    if picture.exif:
        tags = Image.Exif()
        tags.load(picture.exif)
        for tag in tags:
            directory[tag] = tags.get_ifd(tag) or tags[tag]
    directory[TiffImagePlugin.IMAGEWIDTH] = width
    directory[TiffImagePlugin.IMAGELENGTH] = height
    directory[TiffImagePlugin.BITSPERSAMPLE] = (array.itemsize * 8,) * channels
    directory[TiffImagePlugin.COMPRESSION] = 8
    directory[TiffImagePlugin.PREDICTOR] = 2
    directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if channels == 1 else 2
    directory[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    directory[TiffImagePlugin.ROWSPERSTRIP] = rows
    directory[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(sizes)
    directory[TiffImagePlugin.STRIPOFFSETS] = tuple(np.cumsum([0, *sizes[:-1]]).tolist())  # `save` adds where they begin
    if channels == 4:
        directory[TiffImagePlugin.EXTRASAMPLES] = 2  # alpha that the colours are not multiplied with
    if icc := icc_of(picture):
        directory[TiffImagePlugin.ICCPROFILE] = icc
    if xmp := xmp_of(picture):
        directory[TiffImagePlugin.XMP] = xmp
    directory.save(file)
    file.writelines(strips)


def deflate(strip: np.ndarray) -> bytes:
    """(rows, W, C) -> the differences to the pixel on the left, compressed."""
    strip = strip.astype(strip.dtype.newbyteorder("<"))  # a copy
    strip[:, 1:] -= strip[:, :-1].copy()
    return zlib.compress(strip, 1)  # 6 takes four times as long for 4 % less


WRITERS = {
    ".png": write_png,
    ".jpg": write_jpeg,
    ".jpeg": write_jpeg,
    ".tif": write_tiff,
    ".tiff": write_tiff,
    ".webp": write_webp,
}
