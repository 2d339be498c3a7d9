"""One image file to RGB pixels, or the reason why not: what a folder of unknown files may hold must never stop or slow a run."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

# What files that no decoder knows begin with: the reason is then something to act on.
_BEGINNINGS = (
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the image with `git lfs pull`"),
    (b"\xff\xd8", "has a broken JPEG header"),
    (b"\x89PNG", "has a broken PNG header"),
    (b"GIF8", "has a broken GIF header"),
    (b"RIFF", "has a broken WebP header"),
    (b"BM", "has a broken BMP header"),
    (b"II*\0", "has a broken TIFF header"),
    (b"MM\0*", "has a broken TIFF header"),
    (b"<", "holds HTML, SVG or XML, not pixels"),
    (b"%PDF", "is a PDF"),
    (b"%!PS", "is PostScript"),
    (b"8BPS", "is a Photoshop file"),
    (b"PK", "is a ZIP archive"),
)
# What says more about the machine or the network at this moment than about the file.
_PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN)


class BadImage(Exception):
    """A file that cannot be read as an image; the message is one short line that fits behind the file's name.

    Attributes:
        lasting: whether it is the file's own fault; otherwise another try may well succeed.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


def open_regular(path: str) -> IO[bytes]:
    """Open a file only if it is one; not blocking, for to open a named pipe would wait until somebody writes."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0))
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage("is not a regular file")
        if facts.st_size == 0:
            raise BadImage("is empty")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def guess(path: str, known: Sequence[str]) -> str:
    """Why no decoder of the `known` formats knows the file, by its first bytes."""
    try:
        with open_regular(path) as opened:
            beginning = opened.read(64).lstrip()
    except (OSError, BadImage):
        beginning = b""
    reason = next((reason for magic, reason in _BEGINNINGS if beginning.startswith(magic)), None)
    return reason or f"is none of {', '.join(known)}"


def fault(error: Exception) -> BadImage:
    """An error of a decoder or the system as a refusal in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    clean = "".join(letter if letter.isprintable() else " " for letter in text)[:160].strip()
    passing = isinstance(error, OSError) and error.errno in _PASSING
    return BadImage(f"cannot be read: {clean or type(error).__name__}", lasting=not passing)


# Only formats in which photographs lie about. Left out are those that start other programs (EPS), are documents (PDF, PSD),
# measurements (FITS) or icons, and each whose decoder few people read.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
REDUCTIONS: tuple[int, ...] = (1, 2, 4, 8)


class Opened:
    """An image file whose size is known, and whose pixels may still be read at a reduced size.

    A JPEG is decoded by `rgb`; any other file at once, as its header need not say how it lies. A context manager, which closes
    the file.

    Args:
        path: the file; anything but a regular file is refused without reading it.
        max_pixels: refuse images with more pixels than this, before decoding them. Above 178,956,970 Pillow's own limit rules.

    Attributes:
        size: (height, width) in pixels, upright.
        turn: the EXIF orientation 1..8 of the JPEG's own pixels, which `rgb` applies; 1 for other files.
        reductions: what the sides may be divided by while they are decoded, rising; 1 alone for all but JPEG.

    Raises:
        BadImage: for every file that cannot be read, whatever it holds; `rgb` and `jpeg` raise it too.
    """

    def __init__(self, path: str, max_pixels: int) -> None:
        self._path, self._max_pixels = path, max_pixels
        self.turn, self.reductions = 1, REDUCTIONS[:1]
        self._decoded: Image.Image | None = None
        with self._named_faults(), contextlib.ExitStack() as unless_whole:
            self._file = unless_whole.enter_context(open_regular(path))
            self._image = _header(self._file, max_pixels)
            if self._image.format in ("JPEG", "MPO"):
                self.turn = _orientation(self._image)
                self.reductions = _reductions(self._image.size, self.turn)
            else:
                self._decoded = _upright_rgb(self._image)
            unless_whole.pop_all()
        width, height = (self._decoded or self._image).size
        self.size = (width, height) if self.turn in _SIDEWAYS else (height, width)

    def rgb(self, reduction: int = 1) -> Image.Image:
        """The pixels, upright 8-bit RGB; to be asked for once.

        Args:
            reduction: one of `reductions`: each pixel then stands for a square of so many a side, from the top left on, and the
                sides are rounded up.
        """
        assert reduction in self.reductions
        if self._decoded is not None:
            return self._decoded
        with self._named_faults():
            if reduction > 1:
                self._image.draft(None, (self._image.width // reduction, self._image.height // reduction))
            return _upright_rgb(self._image)

    def jpeg(self) -> bytes | None:
        """The file as it is, to be asked for instead of `rgb`; None unless it is a JPEG that every decoder reads alike.

        Which is a picture alone, grey or in the usual colours, that ends as it should: cut-off files are for `rgb` to refuse.
        """
        usual = self._image.mode in ("L", "RGB") and self._image.info.get("adobe_transform", 1) != 0
        if self._image.format != "JPEG" or not usual:
            return None
        with self._named_faults():
            self._file.seek(0)
            found = self._file.read()
        return found if found.endswith(b"\xff\xd9") else None

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _named_faults(self) -> Iterator[None]:
        """Whatever goes wrong inside as a BadImage."""
        try:
            # Pillow warns about odd EXIF data, palettes and sizes; none of that is news in a folder of a million images. The
            # filter is process-wide while this runs, so threads that decode side by side may let one through.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage(guess(self._path, FORMATS)) from error
        except Image.DecompressionBombError as error:
            raise BadImage(f"has far more than max_pixels ({self._max_pixels}) pixels") from error
        except MemoryError as error:
            raise BadImage("needs more memory than there is", lasting=False) from error
        except Exception as error:  # Decoders of foreign bytes raise nearly everything, from struct.error to KeyError.
            raise fault(error) from error


class Decoded:
    """An image whose pixels are at hand, in the place of `Opened`."""

    turn, reductions = 1, REDUCTIONS[:1]

    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, (image.height, image.width)

    def rgb(self, reduction: int = 1) -> Image.Image:
        """The image."""
        return self.image

    def jpeg(self) -> bytes | None:
        """None: it is no file."""
        return None

    def __enter__(self) -> Decoded:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def decode(path: str, max_pixels: int) -> Image.Image:
    """Read an image as 8-bit RGB, upright; see `Opened`.

    Transparent pixels are laid on white. Palettes, grey, 1-bit, CMYK and YCbCr are converted; 16-bit grey is scaled by
    255/65535; of an animation the first frame is taken; the EXIF orientation is applied. Floating-point and 32-bit
    images have no defined white and are refused, as are cut-off files.

    Raises:
        BadImage: for every file that cannot be read, whatever it holds.
    """
    with Opened(path, max_pixels) as opened:
        return opened.rgb()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows; older ones have no AVIF, and asking for it would fail every file."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _header(opened: IO[bytes], max_pixels: int) -> ImageFile.ImageFile:
    """The image with nothing but its header read."""
    # A file beyond all pixels at 16 bits in four channels is no image, and some decoders would read it whole first.
    if os.fstat(opened.fileno()).st_size > 8 * max_pixels + (64 << 20):
        raise BadImage(f"is larger than any image of max_pixels ({max_pixels})")
    image = Image.open(opened, formats=_formats())
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise BadImage(f"has {width} x {height} pixels, more than max_pixels ({max_pixels})")
    return image


def _reductions(size: tuple[int, int], turn: int) -> tuple[int, ...]:
    """Those of REDUCTIONS that leave a pixel. A turned image's far side becomes its top or left: it must hold whole squares."""
    return tuple(r for r in REDUCTIONS if r <= min(size) and (turn == 1 or (size[0] % r == 0 and size[1] % r == 0)))


def _upright_rgb(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    image.fp = None  # Pillow lets go only of files that it opened itself
    turn = _TURNS.get(_orientation(image))
    rgb = to_rgb(image)
    rgb.info.clear()  # or a colour key or orientation that is already applied could be applied again
    return rgb.transpose(turn) if turn is not None else rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 if there is none or the data is broken, which says nothing about the pixels."""
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
        return found if found in _TURNS else 1
    except Exception:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB of the same size; itself, not copied, if it is that already.

    Raises:
        BadImage: for modes whose white is not defined.
    """
    if image.mode.startswith("I"):
        image = _scale_grey(image)
    elif image.mode == "F":
        raise BadImage("has floating-point pixels, which have no defined white; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layers = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(layers, mask=layers.getchannel("A"))
    return paper


def _scale_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (mode I;16, or I as some decoders give it) to 8 bits."""
    values = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadImage("has 32-bit pixels, which have no defined white; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
