"""Which image formats are read: an explicit list, and optional plugins for those that Pillow lacks.

Pillow opens whatever it has a plugin for, by content: PostScript named photo.jpg would reach Ghostscript. So every image
is opened with the list of READ formats, here and wherever the project opens one.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

from data_prep.images.skip_reasons import CANNOT_DECODE, FAILED, FILTERED, NO_READER, NOT_AN_IMAGE, BadImage

BUILT_IN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # Pillow's names; MPO is opened as JPEG
EXTENSIONS = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
RAW_EXTENSIONS = frozenset(
    ["3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "iiq", "kdc", "mef", "mos", "mrw", "nef", "nrw", "orf"]
    + ["pef", "raf", "raw", "rw2", "rwl", "sr2", "srf", "srw", "x3f"]
)
RAW_ADVICE = "camera raw: export it as TIFF or JPEG first"


@dataclass(frozen=True)
class Plugin:
    """A Pillow plugin that is an optional dependency."""

    name: str  # of the extra: pip install '.[name]'
    module: str
    format: str  # Pillow's name
    extensions: frozenset[str]

    @property
    def advice(self) -> str:
        return f"pip install '.[{self.name}]' reads it"


PLUGINS = (
    Plugin("heic", "pillow_heif", "HEIF", frozenset(["heic", "heif", "hif"])),
    Plugin("jxl", "pillow_jxl", "JXL", frozenset(["jxl"])),
)
# Every extension that is an image to people: what can't be read is counted, not passed over.
IMAGE_EXTENSIONS = EXTENSIONS | RAW_EXTENSIONS | frozenset().union(*(plugin.extensions for plugin in PLUGINS))


@functools.cache
def installed_plugins() -> tuple[str, ...]:
    """Names of the optional plugins that work here, registered with Pillow. They stand in the plan of a set."""
    return tuple(plugin.name for plugin in PLUGINS if _register(plugin))


def _register(plugin: Plugin) -> bool:
    try:
        module = importlib.import_module(plugin.module)
        if plugin.name == "heic":  # the other one registers itself; gain maps, depth and thumbnails are not asked for
            module.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    except Exception:  # not installed, or built for other libraries: as if it were not there
        return False
    return True


@functools.cache
def read_formats() -> tuple[str, ...]:
    """The formats that images are opened with."""
    names = installed_plugins()
    return BUILT_IN + tuple(plugin.format for plugin in PLUGINS if plugin.name in names)


def unread(extension: str) -> tuple[str, str] | None:
    """(reason, what to do) of a file whose name says that it can't be read here; None when it can."""
    if extension in RAW_EXTENSIONS:
        return NO_READER, RAW_ADVICE
    for plugin in PLUGINS:
        if extension in plugin.extensions and plugin.name not in installed_plugins():
            return NO_READER, f".{extension}: {plugin.advice}"
    return None


def not_read(start: bytes) -> BadImage:
    """What to say of a file that none of the formats is, by its first bytes."""
    for name, kind in (("heic", "HEIC"), ("jxl", "JPEG XL")):
        if _IS[name](start) and name not in installed_plugins():
            plugin = next(plugin for plugin in PLUGINS if plugin.name == name)
            return BadImage(FILTERED, NO_READER, f"{kind} content: {plugin.advice}")
    if start[4:11] == b"ftypcrx" or start[:15] == b"FUJIFILMCCD-RAW" or start[:4] in (b"IIRO", b"IIU\0"):
        return BadImage(FILTERED, NO_READER, RAW_ADVICE)
    if known := next((name for mark, name in _MARKS.items() if start.startswith(mark)), None):
        return BadImage(FAILED, CANNOT_DECODE, f"damaged from the start, or a kind of {known} that Pillow doesn't read")
    return BadImage(FAILED, NOT_AN_IMAGE, f"starts with {start.lstrip()[:24]!r}")


_MARKS = {
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP",
}  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1")
_IS = {
    "heic": lambda start: start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS,
    "jxl": lambda start: start[:2] == b"\xff\x0a" or start[:12] == b"\0\0\0\x0cJXL \r\n\x87\n",
}
