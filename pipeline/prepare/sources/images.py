"""One picture file → (C, H, W) uint8: PNG, JPEG, WebP, BMP and TIFF of 8 bits, grey or colour.

Turned upright by its EXIF tag; transparency laid over white; palette, CMYK and YCbCr become RGB.
Refused, with the reason: more than 8 bits a channel, several pages or frames, more pixels than
`LARGEST_PIXELS` (known from the header, before any is decoded), and all that is damaged.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_PIXELS = 2**26  # 8192 by 8192
_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_UPRIGHT, _EXIF_ORIENTATION = (1, 2, 3, 4), 0x0112


class PictureError(ValueError):
    """Why a file is no picture that can be used, without the file's name."""


class Header(NamedTuple):
    """What a picture would decode to."""

    channels: int
    height: int
    width: int


def read_header(source: Path | bytes) -> Header:
    """Channels (1 grey, 3 colour), height and width, upright; raises PictureError."""
    with _opened(source) as image:
        width, height = image.size
        if _turned(image):
            width, height = height, width
        return Header(1 if image.mode in _GREY_MODES else 3, height, width)


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says that height and width are to be exchanged."""
    if image.format == "TIFF":
        return False  # its size is told as it is once turned
    if image.format == "PNG" and "exif" not in image.info:
        return False  # pillow would decode all of it to look for one at its end
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) not in _UPRIGHT
    except Exception as error:
        raise PictureError(_reason(error)) from None


def decode_picture(
    source: Path | bytes, *, channels: int | None = None, size: tuple[int, ...] | None = None
) -> np.ndarray:
    """A picture as (C, H, W) uint8.

    Args:
        source: a file, or its content.
        channels: 1 (grey) or 3 (RGB); None: as the picture is.
        size: (height, width) to scale it to, its longer side cropped evenly; None: as it is.

    Raises PictureError.
    """
    with _opened(source) as image:
        try:
            return pixels_of(ImageOps.exif_transpose(image), channels=channels, size=size)
        except Exception as error:  # pillow's decoders raise whatever they stumble over
            raise PictureError(_reason(error)) from None


def pixels_of(
    image: Image.Image, *, channels: int | None = None, size: tuple[int, ...] | None = None
) -> np.ndarray:
    """A loaded picture as (C, H, W) uint8: grey stays grey, all else becomes RGB."""
    if image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise PictureError(f"its pixels are of kind {image.mode}, not of 8 bits a channel")
    image = _over_white(image)
    if channels is None:
        channels = 1 if image.mode in _GREY_MODES else 3
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and (image.height, image.width) != tuple(size):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    grey = image.mode in _GREY_MODES
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("L" if grey else "RGB")


def _opened(source: Path | bytes) -> Image.Image:
    """The picture with its header read and checked, its pixels not yet."""
    try:
        # Pillow 13 maps an uncompressed TIFF into memory and scrambles one that is turned.
        if isinstance(source, Path) and source.suffix.lower() in (".tif", ".tiff"):
            source = source.read_bytes()
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = Image.open(file, formats=FORMATS)
    except Exception as error:
        raise PictureError(_reason(error)) from None
    fault = _fault(image)
    if fault:
        image.close()
        raise PictureError(fault)
    return image


def _fault(image: Image.Image) -> str | None:
    width, height = image.size
    if width * height > LARGEST_PIXELS:
        return f"{width} by {height} pixels; at most {LARGEST_PIXELS:,} are decoded"
    layouts = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode not in _GREY_MODES + _COLOUR_MODES or "16" in layouts:
        bits = "16 bits" if "16" in image.mode + layouts else f"pixels of kind {image.mode}"
        return f"{bits} a channel; save it with 8 bits, 256 levels, which the models are of"
    try:
        pages = getattr(image, "n_frames", 1)
    except Exception as error:
        return _reason(error)
    if pages > 1:
        return f"{pages} pages or frames; save each as a file of its own"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, PictureError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "no PNG, JPEG, WebP, BMP or TIFF picture, or a damaged one"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {LARGEST_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged ({error or type(error).__name__})".replace("\n", " ")
