"""Every kind of pixel against one float reference: formats × modes × profiles × alpha × bit depth."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data_prep.images import convert
from data_prep.images.buckets import BucketOptions
from data_prep.images.header import ImageOptions, read_header
from data_prep.images.skip_reasons import BadImage
from tests.helpers.photos import opened
from tests.helpers.raw_images import icc, iccp, png, tiff

WIDTH, HEIGHT = 64, 48
BACKGROUND = (10, 200, 90)
OPTIONS = ImageOptions(BucketOptions(fixed=(WIDTH, HEIGHT)), format="png", resize="pillow", background=BACKGROUND)
GRAY, RGB = icc("GRAY", 1.3), icc("RGB", 1.3)
# name, bytes, expected float [H, W, 3], tolerance
Case = tuple[str, bytes, np.ndarray, float]


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255


def reference(values: np.ndarray, top: int, gamma: float | None = None, alpha: np.ndarray | None = None) -> np.ndarray:
    """THE reference: code values [H, W, 1 or 3] -> 0..1 -> a profile's gamma, or sRGB's own -> over the background."""
    share = np.broadcast_to(values / top, (*values.shape[:2], 3))
    color = share * 255 if gamma is None else srgb(share**gamma)
    if alpha is None:
        return color
    return color * alpha + np.array(BACKGROUND) * (1 - alpha)


def patches(channels: int, top: int, seed: int = 0) -> np.ndarray:
    """[H, W, C] integers from 0 to top in patches of 8 x 8, with both ends among them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, top + 1, (HEIGHT // 8, WIDTH // 8, channels))
    values[0, 0], values[0, 1] = 0, top
    return values.repeat(8, axis=0).repeat(8, axis=1)


def pngs() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        top = 2**bits - 1
        grey, slack = patches(1, top), 2.1 if bits == 16 else 1.6
        for name, profile, gamma in (("", [], None), ("grey icc ", [iccp(GRAY)], 1.3), ("rgb icc ", [iccp(RGB)], 1.3)):
            yield f"png grey {bits} {name}", png(grey, bits, 0, profile), reference(grey, top, gamma), slack
        key = int(grey[20, 20, 0])
        alpha = (grey != key).astype(float)
        clear = [(b"tRNS", struct.pack(">H", key))]
        yield f"png grey {bits} tRNS", png(grey, bits, 0, clear), reference(grey, top, None, alpha), 1.1
        clear = [iccp(GRAY), *clear]
        yield f"png grey {bits} tRNS icc", png(grey, bits, 0, clear), reference(grey, top, 1.3, alpha), slack
    linear = [(b"gAMA", struct.pack(">I", 100_000))]
    grey = patches(1, 255)
    yield "png grey gAMA 1", png(grey, 8, 0, linear), reference(grey, 255, 1.0), 1.1
    palette = patches(3, 255)[::8, ::8].reshape(-1, 3)
    index = np.arange(48).reshape(6, 8, 1).repeat(8, axis=0).repeat(8, axis=1)
    clear = np.linspace(0, 255, 48).astype(np.uint8)
    plte, rgb = (b"PLTE", palette.astype(np.uint8).tobytes()), palette[index[..., 0]]
    for name, profile, gamma in (("", [], None), ("icc ", [iccp(RGB)], 1.3), ("grey icc ", [iccp(GRAY)], None)):
        yield f"png palette {name}", png(index, 8, 3, [*profile, plte]), reference(rgb, 255, gamma), 1.6
        alpha = clear[index] / 255
        data = png(index, 8, 3, [*profile, plte, (b"tRNS", clear.tobytes())])
        yield f"png palette {name}tRNS", data, reference(rgb, 255, gamma, alpha), 1.6
    for bits in (8, 16):
        top = 2**bits - 1
        rgb, clear = patches(3, top), patches(1, top, seed=3)
        key = rgb[20, 20]
        for name, profile, gamma in (("", [], None), ("icc ", [iccp(RGB)], 1.3), ("gAMA ", linear, 1.0),
                                     ("grey icc ", [iccp(GRAY)], None)):  # fmt: skip
            slack = 2.6 if gamma and bits == 16 else 1.6  # Pillow keeps the upper 8 of 16 bits
            slack = 13 if gamma == 1.0 and bits == 16 else slack
            yield f"png rgb {bits} {name}", png(rgb, bits, 2, profile), reference(rgb, top, gamma), slack
            both = np.concatenate([rgb, clear], axis=2)
            yield f"png rgba {bits} {name}", png(both, bits, 6, profile), reference(rgb, top, gamma, clear / top), slack
            data = png(rgb, bits, 2, [*profile, (b"tRNS", struct.pack(">3H", *(int(value) for value in key)))])
            alpha = (rgb != key).any(axis=2, keepdims=True).astype(float)
            yield f"png rgb {bits} tRNS {name}", data, reference(rgb, top, gamma, alpha), slack
        grey, slack = patches(1, top), 2.1 if bits == 16 else 1.6
        for name, profile, gamma in (("", [], None), ("grey icc ", [iccp(GRAY)], 1.3), ("rgb icc ", [iccp(RGB)], 1.3)):
            both = np.concatenate([grey, clear], axis=2)
            yield f"png la {bits} {name}", png(both, bits, 4, profile), reference(grey, top, gamma, clear / top), slack


def tiffs() -> Iterator[Case]:
    for big in (False, True):
        end = "MM" if big else "II"
        for bits in (1, 2, 4, 8, 12, 16):
            if bits == 12 and big:
                continue  # Pillow doesn't read it: a failed row
            top = 2**bits - 1
            grey = patches(1, top)
            for white in (False, True):
                if white and (bits == 12 or (bits == 16 and big)):
                    continue  # nor these
                value = top - grey if white else grey
                for name, profile, gamma in (("", None, None), ("icc ", GRAY, 1.3)):
                    data = tiff(grey, bits, 0 if white else 1, big=big, profile=profile)
                    kind = f"tiff {end} grey {bits} {'white is 0 ' * white}{name}"
                    yield kind, data, reference(value, top, gamma), 2.1 if bits > 8 else 1.6
        for bits in (8, 16):
            top = 2**bits - 1
            rgb, clear = patches(3, top), patches(1, top, seed=3)
            yield f"tiff {end} rgb {bits}", tiff(rgb, bits, 2, big=big), reference(rgb, top), 1.1
            yield f"tiff {end} rgb {bits} icc", tiff(rgb, bits, 2, big=big, profile=RGB), reference(rgb, top, 1.3), 2.6
            both = np.concatenate([rgb, clear], axis=2)
            expected = reference(rgb, top, None, clear / top)
            yield f"tiff {end} rgba {bits}", tiff(both, bits, 2, big=big, extra=2), expected, 1.6
            clear = np.maximum(clear, top // 4)  # what is nearly transparent has too few bits left when multiplied
            both = np.concatenate([rgb * clear // top, clear], axis=2)
            expected = reference(rgb, top, None, clear / top)
            yield f"tiff {end} premultiplied {bits}", tiff(both, bits, 2, big=big, extra=1), expected, 5
            unused = np.concatenate([rgb, clear], axis=2)
            yield f"tiff {end} rgbx {bits}", tiff(unused, bits, 2, big=big, extra=0), reference(rgb, top), 1.1
        ink = patches(4, 255)
        rgb = 255 - np.minimum(255, ink[..., :3] + ink[..., 3:])
        for name, profile in (("", None), ("rgb icc", RGB)):
            yield f"tiff {end} cmyk {name}", tiff(ink, 8, 5, big=big, profile=profile), CMYK(ink), 1.1
    grey = patches(1, 65535)
    yield "tiff deflate 16", tiff(grey, 16, 1, big=False, deflate=True), reference(grey, 65535), 1.1


def CMYK(ink: np.ndarray) -> np.ndarray:
    """Without a profile: each color's light through its ink, then through the black."""
    share = ink / 255
    return (1 - share[..., :3]) * (1 - share[..., 3:]) * 255


def saved() -> Iterator[Case]:
    def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8).squeeze(), mode).save(out, kind, **options)
        return out.getvalue()

    grey, rgb, clear = patches(1, 255), patches(3, 255), patches(1, 255, seed=3)
    fine = {"quality": 100, "subsampling": 0}
    for name, extra, gamma in (
        ("", {}, None),
        ("grey icc", {"icc_profile": GRAY}, 1.3),
        ("rgb icc", {"icc_profile": RGB}, 1.3),
    ):
        yield f"jpeg grey {name}", encoded(grey, "JPEG", **fine, **extra), reference(grey, 255, gamma), 3.5
        color = None if name == "grey icc" else gamma
        yield f"jpeg rgb {name}", encoded(rgb, "JPEG", **fine, **extra), reference(rgb, 255, color), 6
        yield f"webp rgb {name}", encoded(rgb, "WEBP", lossless=True, **extra), reference(rgb, 255, color), 1.6
        both = np.concatenate([rgb, clear], axis=2)
        data = encoded(both, "WEBP", lossless=True, exact=True, **extra)
        yield f"webp rgba {name}", data, reference(rgb, 255, color, clear / 255), 1.6
    ink = patches(4, 255)
    yield "jpeg cmyk", encoded(ink, "JPEG", "CMYK", quality=100), CMYK(ink), 8
    yield "bmp", encoded(rgb, "BMP"), reference(rgb, 255), 0.6
    yield "avif", encoded(rgb, "AVIF", quality=100, subsampling="4:4:4"), reference(rgb, 255), 8


@pytest.mark.parametrize("kind", [pngs, tiffs, saved])
def test_every_kind_of_pixel_against_the_float_reference(kind) -> None:
    wrong, count = [], 0
    for name, data, expected, tolerance in kind():
        count += 1
        try:
            found = opened(convert.store(data, OPTIONS).data).astype(float)
        except Exception as error:
            wrong.append(f"{name}: {error}")
            continue
        inside = np.abs(found - expected)[2:-2, 2:-2]
        inside = (
            inside.reshape(-1, 3) if tolerance < 3 else inside[2::8, 2::8].reshape(-1, 3)
        )  # JPEG: within the patches
        if inside.max() > tolerance:
            wrong.append(f"{name}: off by {inside.max():.1f}, on average {inside.mean():.1f} (allowed {tolerance})")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert count >= 15


def tiff_of(planes: np.ndarray, *, signed: bool = False, separate: bool = False) -> bytes:
    """Uncompressed little-endian TIFF of [C, H, W] samples; `separate`: each color in a strip of its own."""
    count, height, width = planes.shape
    bits, size = planes.dtype.itemsize * 8, planes[0].nbytes
    body = planes.tobytes() if separate else np.ascontiguousarray(planes.transpose(1, 2, 0)).tobytes()
    strips = count if separate else 1
    at = 8 + 2 + 12 * 11 + 4
    tables: list[bytes] = []

    def several(kind: int, values: list[int]) -> tuple[int, int, bytes]:
        nonlocal at
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) <= 4:
            return kind, len(values), packed.ljust(4, b"\0")
        tables.append(packed)
        at += len(packed)
        return kind, len(values), struct.pack("<I", at - len(packed))

    start = at + 2 * count * 2 + 4 * strips * 2
    entries = {256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * count), 259: (3, [1])}
    entries |= {
        262: (3, [2 if count >= 3 else 1]),
        273: (4, [start + n * size for n in range(strips)]),
        277: (3, [count]),
    }
    entries |= {278: (4, [height]), 279: (4, [len(body) // strips] * strips), 284: (3, [2 if separate else 1])}
    entries |= {339: (3, [2 if signed else 1] * count)}
    fields = b""
    for tag, entry in entries.items():
        kind, number, value = several(*entry)
        fields += struct.pack("<HHI", tag, kind, number) + value
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + b"".join(tables)
    return head.ljust(start, b"\0") + body


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_colors_in_separate_planes_are_right_or_refused(channels: int, bits: int) -> None:
    """Pillow took planes of 16 bits for planes of 8: 83 of 255 wrong, without a word."""
    planes = patches(channels, 2**bits - 1).transpose(2, 0, 1).astype(f"<u{bits // 8}")
    data = tiff_of(planes, separate=True)
    if bits == 16:
        with pytest.raises(BadImage, match=f"cannot decode: unsupported pixels: 16 bits in {channels} separate planes"):
            convert.store(data, OPTIONS)
    elif channels == 3:
        found = np.asarray(opened(convert.store(data, OPTIONS).data))
        assert np.array_equal(found, planes.transpose(1, 2, 0))
    beside = convert.store(tiff_of(planes[:3]), OPTIONS)
    expected = planes[:3].transpose(1, 2, 0) / (2**bits - 1) * 255
    assert np.abs(np.asarray(opened(beside.data)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["<i1", "<i2"])
def test_signed_pixels_are_refused(kind: str) -> None:
    """They came out half as bright: 67 of 255 wrong, without a word."""
    top = np.iinfo(kind).max
    data = tiff_of(patches(1, top).transpose(2, 0, 1).astype(kind), signed=True)
    with pytest.raises(
        BadImage, match=f"cannot decode: unsupported pixels: signed integers of {8 * int(kind[-1])} bits"
    ):
        convert.store(data, OPTIONS)
    with pytest.raises(BadImage, match="signed integers"):
        read_header(io.BytesIO(data), OPTIONS)
