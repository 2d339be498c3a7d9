"""Odd, broken and hostile image files of every kind met in real folders, made on the spot.

LOAD and SKIP map a kind to (extension, maker of the bytes): of files that are decoded, and of those refused with a reason. CONTENTS
has both, and which first. NAMES maps a kind to the bytes of a file name that must be usable.
"""

import functools
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 48, 32
MAX_PIXELS = 89_000_000


@functools.cache
def picture() -> Image.Image:
    """A smooth colourful picture without symmetry, 48 x 32."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 2 - y * 3], -1).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((3, 3, 12, 9), fill="white")
    return image


def alpha_picture() -> Image.Image:
    """The picture, transparent in its left half."""
    image = picture().convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, WIDTH // 2, HEIGHT))
    return image


def save(image: Image.Image | None, kind: str, turn: int | None = None, **options: object) -> bytes:
    """The bytes of an image, or the picture, with an EXIF orientation."""
    stream = io.BytesIO()
    if turn is not None:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    (image or picture()).save(stream, kind, **options)
    return stream.getvalue()


def jpeg(image: Image.Image | None = None, turn: int | None = None, **options: object) -> bytes:
    return save(image, "JPEG", turn, **{"quality": 95, "subsampling": 0, **options})


def png(image: Image.Image | None = None, **options: object) -> bytes:
    return save(image, "PNG", **options)


def frames(kind: str) -> bytes:
    return save(picture(), kind, save_all=True, append_images=[picture().rotate(180)] * 2)


def grey(kind: str, values: np.ndarray) -> bytes:
    return save(Image.fromarray(values), kind)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes | None, *more: bytes) -> bytes:
    """A PNG of given header and uncompressed rows; None leaves the pixels out."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND", b"")


def png_16bit(channels: int) -> bytes:
    values = np.linspace(0, 65535, 16 * 16 * channels).astype(">u2").reshape(16, -1)
    return raw_png(16, 16, 16, 0 if channels == 1 else 2, b"".join(b"\0" + row.tobytes() for row in values))


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    return stream.getvalue()


def noise(count: int) -> bytes:
    return np.random.Generator(np.random.PCG64(0)).bytes(count)


Maker = Callable[[], bytes]
LOAD: dict[str, tuple[str, Maker]] = {
    "jpeg_plain": ("jpg", jpeg),
    "jpeg_progressive": ("jpg", lambda: jpeg(progressive=True)),
    "jpeg_gray": ("jpg", lambda: jpeg(picture().convert("L"))),
    "jpeg_cmyk": ("jpg", lambda: jpeg(picture().convert("CMYK"))),
    **{f"jpeg_exif_orientation_{turn}": ("jpg", functools.partial(jpeg, turn=turn)) for turn in range(1, 9)},
    "jpeg_exif_orientation_bad": ("jpg", lambda: jpeg(turn=77)),
    "jpeg_exif_garbage": ("jpg", lambda: jpeg(exif=b"Exif\0\0" + noise(200))),
    "jpeg_icc_garbage": ("jpg", lambda: jpeg(icc_profile=noise(500))),
    "jpeg_trailing_garbage": ("jpg", lambda: jpeg() + noise(5000)),
    "jpeg_mpo": ("jpg", lambda: frames("MPO")),
    "jpeg_tall_1x3000": ("jpg", lambda: jpeg(Image.new("RGB", (1, 3000)))),
    "jpeg_named_png": ("png", jpeg),
    "png_plain": ("png", png),
    "png_rgba": ("png", lambda: png(alpha_picture())),
    "png_la": ("png", lambda: png(alpha_picture().convert("LA"))),
    "png_palette": ("png", lambda: png(picture().quantize(64))),
    "png_palette_transparency": ("png", lambda: png(picture().quantize(64), transparency=bytes(range(0, 256, 4)))),
    "png_1bit": ("png", lambda: png(picture().convert("1"))),
    "png_16bit_gray": ("png", lambda: png_16bit(1)),
    "png_16bit_rgb": ("png", lambda: png_16bit(3)),
    "png_trns_rgb": ("png", lambda: png(transparency=(255, 255, 255))),
    "png_animated": ("png", lambda: frames("PNG")),
    "gif_static": ("gif", lambda: save(picture(), "GIF")),
    "gif_transparent": ("gif", lambda: save(alpha_picture(), "GIF")),
    "gif_animated": ("gif", lambda: frames("GIF")),
    "webp_alpha": ("webp", lambda: save(alpha_picture(), "WEBP", lossless=True)),
    "webp_animated": ("webp", lambda: frames("WEBP")),
    "bmp_24": ("bmp", lambda: save(picture(), "BMP")),
    "tiff_rgb": ("tif", lambda: save(picture(), "TIFF")),
    "tiff_lzw_multi": ("tiff", lambda: save(picture(), "TIFF", compression="tiff_lzw", save_all=True, append_images=[picture()])),
    "tiff_cmyk": ("tif", lambda: save(picture().convert("CMYK"), "TIFF")),
    "tiff_16bit_gray": ("tif", lambda: grey("TIFF", np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))),
    "ppm_p6": ("ppm", lambda: save(picture(), "PPM")),
    "pgm_16bit": ("pgm", lambda: b"P5 2 1 65535\n\0\0\xff\xff"),
}
SKIP: dict[str, tuple[str, Maker]] = {
    "zero_byte": ("jpg", lambda: b""),
    "soi_only": ("jpg", lambda: b"\xff\xd8"),
    "jpeg_headers_only": ("jpg", lambda: jpeg()[: jpeg().index(b"\xff\xda") + 14]),
    "jpeg_cut_50": ("jpg", lambda: cut(jpeg(), 0.5)),
    "jpeg_cut_90": ("jpg", lambda: cut(jpeg(), 0.9)),
    "jpeg_progressive_cut_50": ("jpg", lambda: cut(jpeg(progressive=True), 0.5)),
    "jpeg_progressive_cut_90": ("jpg", lambda: cut(jpeg(progressive=True), 0.9)),
    "jpeg_lossless_sof3": ("jpg", lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1)),
    "random_jpg": ("jpg", lambda: b"\0" + noise(4000)),
    "html_404_jpg": ("jpg", lambda: b"\n<!DOCTYPE html><html><title>404 Not Found</title></html>"),
    "git_lfs_pointer": ("jpg", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"),
    "zip_jpg": ("jpg", zipped),
    "png_cut_50": ("png", lambda: cut(png(), 0.5)),
    "png_no_idat": ("png", lambda: raw_png(8, 8, 8, 2, None)),
    "png_bad_zlib": ("png", lambda: raw_png(8, 8, 8, 2, None, chunk(b"IDAT", noise(300)))),
    "png_zero_size": ("png", lambda: raw_png(0, 0, 8, 2, b"")),
    "gif_cut": ("gif", lambda: cut(save(picture(), "GIF"), 0.6)),
    "ppm_short": ("ppm", lambda: cut(save(picture(), "PPM"), 0.5)),
    "tiff_float32": ("tif", lambda: grey("TIFF", np.full((8, 8), 0.5, np.float32))),
    "tiff_int32": ("tif", lambda: grey("TIFF", np.full((8, 8), 1 << 20, np.int32))),
    "jpeg_claims_100mp": ("jpg", lambda: patched(jpeg(), jpeg().index(b"\xff\xc0") + 5, struct.pack(">HH", 10_000, 10_000))),
    "png_bomb_400mp": ("png", lambda: raw_png(20_000, 20_000, 1, 0, bytes(20_000 * 2501))),
    "gif_bomb_screen": ("gif", lambda: patched(save(picture(), "GIF"), 6, b"\xff\xff\xff\xff")),
    "ppm_bomb_header": ("ppm", lambda: b"P6 100000 100000 255\n" + bytes(100)),
    "bmp_bomb_header": ("bmp", lambda: patched(save(picture(), "BMP"), 18, struct.pack("<ii", 100_000, 100_000))),
    "eps_jpg": ("jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
    "svg_xxe_png": ("png", lambda: b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'),
    "pdf_jpg": ("jpg", lambda: b"%PDF-1.7\n%%EOF\n"),
    "pickle_png": ("png", lambda: pickle.dumps(["not", "an", "image"])),
}
CONTENTS: dict[str, tuple[str, str, Maker]] = {
    kind: (expected, *content) for expected, group in (("load", LOAD), ("skip", SKIP)) for kind, content in group.items()
}

NAMES: dict[str, bytes] = {
    "space": b" two  words .jpg",
    "unicode": "größe-猫.jpg".encode(),
    "nfd": "e\u0301.jpg".encode(),
    "nfc": "\u00e9.jpg".encode(),
    "newline": b"a\nb.jpg",
    "tab_cr": b"a\tb\rc.jpg",
    "escape_codes": b"\x1b[31mred\x1b[0m\x07.jpg",
    "leading_dash": b"-rf.jpg",
    "leading_dots": b"..odd.jpg",
    "quotes": b"'single' \"double\".jpg",
    "rtl": "\u202egpj.exe.jpg".encode(),
    "backslash": b"a\\b.jpg",
    "long_255": b"n" * 251 + b".jpg",
    "not_utf8": b"caf\xe9.jpg",
    "dir_not_utf8": b"d\xff\xfer/x.jpg",
    "dir_named_like_a_file": b"dir.jpg/x.jpg",
    "deep": b"d/" * 200 + b"x.jpg",
}
