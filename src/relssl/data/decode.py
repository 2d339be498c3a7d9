"""One image file to RGB pixels, or the reason why not: nothing that lies in a folder of unknown files may stop or slow a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from relssl.errors import RelsslError

# Only formats in which photographs lie about. Left out are those that start other programs (EPS), are documents (PDF, PSD),
# measurements (FITS) or icons, and each whose decoder few people read.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Errors that say more about the machine or the network at this moment than about the file.
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EINTR, errno.ECONNRESET, errno.EHOSTDOWN),
}
# What sets an image upright, of EXIF's orientations from 2 on.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


class BadImage(Exception):
    """A file that cannot be read as an image; the message is one short line that fits behind the file's name.

    It is `lasting` if it is the file's own fault; otherwise another try may well succeed.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Opened:
    """An image whose size is known, and whose pixels may still be read at a reduced size.

    Attributes:
        size: (height, width) in pixels, upright.
        rgb: reads the pixels, 8-bit RGB and upright, once, given one of `reductions`: each pixel then stands for a square of so
            many a side, from the top left on, and the sides are rounded up. BadImage if they cannot be read.
        reductions: what the sides may be divided by while they are decoded, rising; 1 alone for all but JPEG.
        bands: uint8 [C,H,W] of an image that is not of 3 channels; `rgb` then shows it to people.
    """

    size: tuple[int, int]
    rgb: Callable[[int], Image.Image]
    reductions: tuple[int, ...] = (1,)
    bands: np.ndarray | None = None

    @staticmethod
    def of(image: Image.Image) -> Opened:
        """Wrap an RGB image whose pixels are at hand."""
        return Opened((image.height, image.width), lambda reduction: image)

    @staticmethod
    def of_bands(bands: np.ndarray) -> Opened:
        """Wrap uint8 [C,H,W]; of other than 3 channels, `rgb` shows the first 3, or the first alone in grey."""
        shown = bands[[0, 1, 2] if len(bands) > 2 else [0, 0, 0]]
        opened = Opened.of(Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0))))
        return opened if len(bands) == 3 else replace(opened, bands=bands)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return 3 if self.bands is None else len(self.bands)

    def whole(self) -> Image.Image | np.ndarray:
        """Read the whole image: RGB, or uint8 [C,H,W] of other channels."""
        return self.rgb(1) if self.bands is None else self.bands


@contextlib.contextmanager
def open_image(image: str | Callable[[], bytes], max_pixels: int) -> Iterator[Opened]:
    """Open an image file, given its path or what returns its bytes; BadImage for each that cannot be read, whatever it holds.

    A JPEG is decoded by `rgb`; any other file at once, as its header need not say how it lies. Transparent pixels are laid on white.
    Palettes, grey, 1-bit, CMYK and YCbCr are converted; 16-bit grey is scaled by 255/65535; of an animation the first frame is taken;
    the EXIF orientation is applied. Refused are floating-point and 32-bit images, which have no defined white, cut-off files, images
    of more than `max_pixels`, before they are decoded (above 178,956,970 Pillow's own limit rules), and without reading it anything
    but a regular file.
    """
    with contextlib.ExitStack() as files:
        with _refusals():
            file = io.BytesIO(image()) if callable(image) else files.enter_context(open(image, "rb", opener=open_regular))
            header = _read_header(file, max_pixels)
            if header.format in ("JPEG", "MPO"):
                turn, sides = _orientation(header), header.size
                # A turned image's far side becomes its top or left: it must hold whole squares of pixels.
                whole = (r for r in (1, 2, 4, 8) if r <= min(sides) and (turn == 1 or not any(side % r for side in sides)))
                opened = Opened(sides if turn >= 5 else sides[::-1], partial(_read_pixels, header), tuple(whole))
            else:
                opened = Opened.of(_read_pixels(header))
        yield opened


def decode(path: str, max_pixels: int) -> Image.Image:
    """Read an image file whole, as `open_image` does."""
    with open_image(path, max_pixels) as opened:
        return opened.rgb(1)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever goes wrong inside into a BadImage."""
    try:
        # Pillow warns about odd EXIF data, palettes and sizes; none of that is news in a folder of a million images. The
        # filter is process-wide while this runs, so threads that decode side by side may let one through.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadImage, RelsslError):  # a request to stop is none of the image's
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("has far more than max_pixels pixels") from error
    except MemoryError as error:
        raise BadImage("needs more memory than there is", lasting=False) from error
    except Exception as error:  # Decoders of foreign bytes raise nearly everything, from struct.error to KeyError.
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = "".join(letter if letter.isprintable() else " " for letter in text)[:160].strip()
        passing = isinstance(error, OSError) and error.errno in _PASSING
        raise BadImage(f"cannot be read: {line or type(error).__name__}", lasting=not passing) from error


def open_regular(path: str, flags: int) -> int:
    """Open a file only if it is one; not blocking, for to open a named pipe would wait until somebody writes."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return handle
    os.close(handle)
    raise BadImage("is empty" if stat.S_ISREG(status.st_mode) else "is not a regular file")


def _read_header(file: IO[bytes], max_pixels: int) -> ImageFile.ImageFile:
    """Return the image with nothing but its header read."""
    # A file beyond all pixels at 16 bits in four channels is no image, and some decoders would read it whole first.
    if file.seek(0, os.SEEK_END) > 8 * max_pixels + (64 << 20):
        raise BadImage(f"is larger than any image of max_pixels ({max_pixels})")
    file.seek(0)
    try:
        Image.init()
        # Older versions of Pillow have no AVIF, and asking for it would fail every file.
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(64).lstrip().startswith(b"version https://git-lfs"):
            raise BadImage("is a Git LFS pointer; fetch the image with `git lfs pull`") from error
        raise BadImage(f"is broken, or none of {', '.join(FORMATS)}") from error
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise BadImage(f"has {width} x {height} pixels, none or more than max_pixels ({max_pixels})")
    return image


def _read_pixels(header: ImageFile.ImageFile, reduction: int = 1) -> Image.Image:
    """Read the pixels of a file of ours, as `upright_rgb` returns them."""
    with _refusals():
        if reduction > 1:
            header.draft(None, (header.width // reduction, header.height // reduction))
        rgb = upright_rgb(header)
        header.fp = None  # Pillow closes only files that it opened itself
        rgb.info.clear()  # or a colour key or orientation that is already applied could be applied again
        return rgb


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any kind, turned as its EXIF orientation says, as RGB; itself if it is that. BadImage as `open_image` says."""
    with _refusals():
        image.load()
        turn = _orientation(image)
        if image.mode.startswith(("F", "I")):  # grey of 16 bits has mode I;16, or I where the decoder gives it so
            image = Image.fromarray(from_16_bits(np.asarray(image)))
        if image.has_transparency_data:
            layers, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
            image.paste(layers, mask=layers.getchannel("A"))
        elif image.mode != "RGB":
            image = image.convert("RGB")
        return image.transpose(Image.Transpose[_TURNS[turn - 2]]) if turn > 1 else image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1 if there is none or the data is broken, which says nothing about the pixels."""
    turn = 1
    with contextlib.suppress(Exception):
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in range(2, 9) else 1


def from_16_bits(values: np.ndarray) -> np.ndarray:
    """Scale whole numbers 0..65535 to uint8; BadImage for others, and for floats."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage("has floating-point or 32-bit pixels, which have no defined white; save it with 8 or 16 bits")
    return ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)
