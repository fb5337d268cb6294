"""PNG and TIFF files of any depth and kind, and small ICC profiles, written by hand: what Pillow cannot save."""

from __future__ import annotations

import struct
import zlib

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# sRGB's primaries adapted to D50, as its profile has them (columns red, green, blue of XYZ).
SRGB_XYZ = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142))


def icc(space: str, gamma: float) -> bytes:
    """A display profile of version 2: GRAY, or RGB with sRGB's primaries; light = value ** gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": _xyz(*D50)}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, values in zip(b"rgb", SRGB_XYZ, strict=True):
            tags[bytes([letter]) + b"XYZ"] = _xyz(*values)
            tags[bytes([letter]) + b"TRC"] = curve
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", space.ljust(4).encode(), b"XYZ ")
    head += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + struct.pack(">3i", *(round(v * 65536) for v in D50))
    )
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def packed(values: np.ndarray, bits: int, big: bool = True) -> bytes:
    """[H, W, C] of integers as rows of `bits` each, padded to bytes."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        return rows.astype(">u2" if big else "<u2").tobytes()
    places = rows[..., None].astype(np.uint16) >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(places.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def png(values: np.ndarray, bits: int, color_type: int, chunks: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """PNG of [H, W, C] integers; color_type 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    raw = packed(values, bits)
    stride = len(raw) // height
    lines = b"".join(b"\0" + raw[row * stride : (row + 1) * stride] for row in range(height))
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    for name, data in chunks or []:
        out += chunk(name, data)
    return out + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"icc\0\0" + zlib.compress(profile)


def tiff(
    values: np.ndarray, bits: int, photometric: int, *, big: bool, extra: int | None = None, profile: bytes | None = None,
    deflate: bool = False,
) -> bytes:  # fmt: skip
    """One strip; photometric 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK; `extra`: what the last sample is."""
    order = ">" if big else "<"
    height, width, samples = values.shape
    data = packed(values, bits, big)
    data = zlib.compress(data) if deflate else data
    entries: list[tuple[int, int, tuple[int, ...] | bytes]] = [
        (256, 3, (width,)), (257, 3, (height,)), (258, 3, (bits,) * samples), (259, 3, (8 if deflate else 1,)),
        (262, 3, (photometric,)), (273, 4, (0,)), (277, 3, (samples,)), (278, 3, (height,)), (279, 4, (len(data),)),
    ]  # fmt: skip
    if extra is not None:
        entries.append((338, 3, (extra,)))
    if profile:
        entries.append((34675, 7, profile))
    start = 8 + 2 + 12 * len(entries) + 4
    table, far = b"", b""
    for tag, kind, content in entries:
        if isinstance(content, bytes):
            body, count = content, len(content)
        else:
            content = (-1,) if tag == 273 else content
            count = len(content)
            if tag == 273:
                table += struct.pack(order + "HHI", tag, kind, 1) + b"DATA"
                continue
            body = struct.pack(order + {3: "H", 4: "I"}[kind] * count, *content)
        if len(body) <= 4:
            place = body.ljust(4, b"\0")
        else:
            place = struct.pack(order + "I", start + len(far))
            far += body + b"\0" * (len(body) % 2)
        table += struct.pack(order + "HHI", tag, kind, count) + place
    table = table.replace(b"DATA", struct.pack(order + "I", start + len(far)))
    head = (b"MM" if big else b"II") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(entries))
    return head + table + bytes(4) + far + data
