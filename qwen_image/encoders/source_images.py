"""Source images of an edit as the encoders see them, exactly as inference prepares them (diffusers 0.42.1).

An image is stretched (not cropped) to about an area in its own ratio: for the VAE to 1024² pixels with sides that are
multiples of 32; Qwen-Image-Edit's text encoder sees the same pixels, that of -2509 and -2511 a stretch to 384² of its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.shown import one_line, shown
from qwen_image.model.family import SOURCE_AREA, Member, source_size

EXIF_ORIENTATION = 0x0112  # of its values, 5 to 8 are on their side
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")


class SourceImage(NamedTuple):
    """A source image as the VAE sees it, and the size that it had before, whose ratio says how the text encoder sees it."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB, sides multiples of 32
    width: int
    height: int


def stretched(image: Any, area: int = SOURCE_AREA) -> SourceImage:
    """A PIL image stretched to about `area` pixels, by Pillow's Lanczos filter as in diffusers' VaeImageProcessor."""
    from PIL import Image

    size = source_size(area, *image.size)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    return SourceImage(pixels, *image.size)


def size_as_source(path: Path, area: int = SOURCE_AREA) -> tuple[int, int]:
    """Width and height that a file's image is stretched to, from its header. Raises what `read_source` does."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"source image: no file at {shown(path)}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return source_size(area, *(image.size[::-1] if turned else image.size))
    except Exception as error:
        raise ValueError(f"source image {shown(path)} cannot be read: {one_line(error)}") from None


def read_source(path: Path, area: int = SOURCE_AREA) -> SourceImage:
    """A file's image, upright, its colors in sRGB, transparency laid on white, stretched: as a packed one has them.

    Raises OSError and ValueError naming the file.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"source image: no file at {shown(path)}")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = in_srgb(ImageOps.exif_transpose(opened))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(ground, image)
            return stretched(image, area)
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"source image {shown(path)} cannot be read: {one_line(error)}") from None


def in_srgb(image: Any) -> Any:
    """A PIL image with 8 bits a channel, its color profile, if it has one that can be applied, converted to sRGB.

    The alpha channel stays as it is.
    """
    import io

    from PIL import Image, ImageCms

    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):  # Pillow would cut at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    colors = image.convert("RGB") if image.mode == "RGBA" else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a profile of another kind of color, or a damaged one: as viewers do
        return image
    if image.mode == "RGBA" and converted is not None:
        converted.putalpha(image.getchannel("A"))
    return converted


def seen_by_text_encoder(source: SourceImage, member: Member) -> Any:
    """The PIL image that the text encoder's own processor is given."""
    from PIL import Image

    image = Image.fromarray(source.pixels)
    if member.text_encoder_area is None:
        return image
    size = source_size(member.text_encoder_area, source.width, source.height)
    return image.resize(size, Image.Resampling.LANCZOS)
