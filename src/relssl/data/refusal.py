"""Files that are no images: told apart before they can stop or slow a run, each with a reason to act on."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import IO

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
