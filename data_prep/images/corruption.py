"""Whether an image's bytes are what was written: forgiving decoders turn damage into grey areas without a word.

JPEG is decoded by libjpeg-turbo with its warnings as errors (`strict_jpeg`); a progressive one whose last scans are
missing gives no warning, so its scans are counted. Of the other formats those that carry checksums or lengths have them
checked: PNG's CRCs, WebP's and HEIF's box sizes, deflate's and JPEG's streams within TIFF. Damage in uncompressed pixels
cannot be seen by anybody.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
import simplejpeg

from data_prep.images.skip_reasons import CORRUPT, FAILED, TRUNCATED, BadImage

# Not the picture's fault: kinds that the fast decoder cannot do, which Pillow then decodes.
_OTHER_KINDS = ("subsampling", "precision", "unsupported", "not implemented")
_DEFLATE, _JPEG_IN_TIFF = (8, 32946), 7


def strict_jpeg(data: bytes, colorspace: str = "RGB", buffer: np.ndarray | None = None) -> np.ndarray | None:
    """Pixels [H, W, C] uint8 of a whole JPEG; None for a kind that this decoder can't do. Raises BadImage for damage."""
    try:
        pixels = simplejpeg.decode_jpeg(_known_revision(data), colorspace, buffer=buffer, strict=True)
    except ValueError as error:
        text = " ".join(str(error).split())
        if any(word in text.lower() for word in _OTHER_KINDS):
            return None
        if "end of jpeg" in text.lower():
            raise BadImage(FAILED, TRUNCATED, text) from None
        raise BadImage(FAILED, CORRUPT, text) from None
    if missing := _missing_scans(data):
        raise BadImage(FAILED, TRUNCATED, missing)
    return pixels


def _known_revision(data: bytes) -> bytes:
    """JFIF's version is told to nobody, but an unknown one is a warning: taken for 1.1."""
    if data[6:11] == b"JFIF\0" and data[11:12] not in (b"\x01", b"\x02"):
        return data[:11] + b"\x01\x01" + data[13:]
    return data


def _missing_scans(data: bytes) -> str | None:
    """What the scans of a JPEG leave out: components without a scan, coefficients not refined to their last bit.

    ITU T.81, B.2.3: a progressive scan brings the band Ss..Se of its components down to bit Al.
    """
    components: list[int] = []
    sharpest: dict[tuple[int, int], int] = {}  # (component, coefficient) -> lowest bit so far
    progressive = False
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xD9:
            break
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            progressive = marker in (0xC2, 0xCA)
            components = [body[6 + 3 * number] for number in range(body[5])]
        position += 2 + length
        if marker == 0xDA:
            count = body[0]
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            bands = range(first, last + 1) if progressive else range(64)
            for number in range(count):
                for band in bands:
                    sharpest[body[1 + 2 * number], band] = bits & 15 if progressive else 0
            if not progressive and count == len(components):
                return None  # the usual file: one scan with everything
            position = _next_marker(data, position)
    missing = [c for c in components if any((c, band) not in sharpest for band in ((0,) if progressive else range(64)))]
    if missing:
        return f"{len(missing)} of {len(components)} color components are missing"
    coarse = [place for place, bit in sharpest.items() if bit]
    absent = [c for c in components for band in range(1, 64) if (c, band) not in sharpest]
    return "the last of its progressive scans are missing" if coarse or absent else None


def _next_marker(data: bytes, position: int) -> int:
    found = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, position)
    return found.start() if found else len(data)


def check(image: Any, data: bytes) -> None:
    """Raise BadImage when the bytes of an opened Pillow image are damaged, as far as its format can tell.

    RGB and grey JPEGs are checked by decoding them (`strict_jpeg`), and pass here.
    """
    kind = image.format
    if kind in ("JPEG", "MPO") and image.mode not in ("RGB", "L"):
        strict_jpeg(data, "CMYK" if image.mode == "CMYK" else "RGB")
    elif kind == "PNG":
        _check_png(data)
    elif kind == "WEBP" and (size := int.from_bytes(data[4:8], "little") + 8) > len(data):
        raise BadImage(FAILED, TRUNCATED, f"{len(data)} of {size} bytes")
    elif kind in ("AVIF", "HEIF"):
        _check_boxes(data)
    elif kind == "TIFF":
        _check_strips(image, data)


def _check_png(data: bytes) -> None:
    """CRCs of the critical chunks (PNG 5.3); Pillow leaves out those of the pixels."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if name[:1].isupper():
            found = zlib.crc32(memoryview(data)[position + 4 : end])
            if found != int.from_bytes(data[end : end + 4], "big"):
                raise BadImage(FAILED, CORRUPT, f"wrong checksum of chunk {name.decode('ascii', 'replace')}")
        if name == b"IEND":
            return
        position = end + 4
    raise BadImage(FAILED, TRUNCATED, "the PNG ends before its end mark")


def _check_boxes(data: bytes) -> None:
    """Sizes of the outermost boxes (ISO 14496-12, 4.2)."""
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size == 0:
            return  # to the end of the file
        if size < 8 or position + size > len(data):
            raise BadImage(FAILED, TRUNCATED, f"a box of {size} bytes at {position} of {len(data)}")
        position += size


def _check_strips(image: Any, data: bytes) -> None:
    """Compressed strips and tiles of a TIFF's first page: deflate has checksums, JPEG is decoded strictly."""
    tags = image.tag_v2
    offsets = tags.get(273, tags.get(324, ()))
    sizes = tags.get(279, tags.get(325, ()))
    offsets, sizes = (value if isinstance(value, tuple) else (value,) for value in (offsets, sizes))
    compression = tags.get(259, 1)
    if compression not in (*_DEFLATE, _JPEG_IN_TIFF) or len(offsets) != len(sizes):
        return
    tables = bytes(tags.get(347, b""))
    for offset, size in zip(offsets, sizes, strict=True):
        part = data[offset : offset + size]
        if len(part) < size:
            raise BadImage(FAILED, TRUNCATED, f"a strip of {size} bytes at {offset} of {len(data)}")
        if compression in _DEFLATE:
            _check_deflate(part)
        else:
            stream = tables[:-2] + part[2:] if len(tables) > 4 else part
            strict_jpeg(stream, "CMYK" if image.mode == "CMYK" else "GRAY" if image.mode == "L" else "RGB")


def _check_deflate(data: bytes) -> None:
    """Decompress to nowhere, up to the checksum at the end."""
    stream, rest = zlib.decompressobj(), data
    try:
        while rest and not stream.eof:
            stream.decompress(rest, 1 << 20)
            rest = stream.unconsumed_tail
    except zlib.error as error:
        raise BadImage(FAILED, CORRUPT, str(error)) from None
    if not stream.eof:
        raise BadImage(FAILED, TRUNCATED, "deflate data without an end")
