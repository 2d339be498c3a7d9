"""Every kind of odd image file is decoded as defined, every broken one refused with a reason, and nothing else happens."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from bad_images import CONTENTS, HEIGHT, LOAD, MAX_PIXELS, WIDTH, alpha_picture, jpeg, picture, png, png_16bit, save
from relssl.data.decode import BadImage, decode, open_image

WHOLE_CORPUS = """
import json, pathlib, sys
from relssl.data.decode import BadImage, decode
for path in sys.argv[2:]:
    try:
        decode(path, int(sys.argv[1]))
    except BadImage:
        pass
status = pathlib.Path("/proc/self/status")  # getrusage counts the process that started this one, too
status = status.read_text() if status.exists() else "VmHWM: 0"
print(json.dumps([int(status.partition("VmHWM:")[2].split()[0]) * 1024, "torch" in sys.modules]))
"""


def write(folder, kind):
    expected, extension, make = CONTENTS[kind]
    path = folder / f"{kind}.{extension}"
    path.write_bytes(make())
    return expected, str(path)


def stored(folder, data: bytes, name: str = "image.bin") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def pixels(path: str) -> np.ndarray:
    return np.asarray(decode(path, MAX_PIXELS)).astype(int)


@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_is_decoded_or_refused_quietly(kind, tmp_path, capfd):
    expected, path = write(tmp_path, kind)
    try:
        image = decode(path, MAX_PIXELS)
    except BadImage as fault:
        assert expected == "skip", str(fault)
        assert str(fault).isprintable() and 5 < len(str(fault)) < 200
        assert str(tmp_path) not in str(fault)
    else:
        assert expected == "load"
        assert image.mode == "RGB" and min(image.size) > 0
        assert getattr(image, "fp", None) is None and not image.info
        image.tobytes()
    assert capfd.readouterr() == ("", "")


def test_the_whole_corpus_stays_small_and_needs_no_torch(tmp_path):
    paths = [write(tmp_path, kind)[1] for kind in CONTENTS] + [str(tmp_path / "sparse.jpg")]
    (tmp_path / "sparse.jpg").touch()
    os.truncate(tmp_path / "sparse.jpg", 256 << 20)
    words = [sys.executable, "-W", "error", "-c", WHOLE_CORPUS, str(MAX_PIXELS), *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    peak, torch_imported = json.loads(done.stdout)
    assert done.stderr == "" and not torch_imported and peak < 1 << 30
    assert len(list(tmp_path.iterdir())) == len(paths)  # nothing was written


@pytest.mark.parametrize("kind", [kind for kind in LOAD if kind.startswith(("jpeg_exif", "jpeg_icc", "jpeg_trail"))])
def test_metadata_changes_nothing_but_the_orientation(kind, tmp_path):
    _, path = write(tmp_path, kind)
    with Image.open(path if kind[-1].isdigit() else stored(tmp_path, jpeg())) as raw:
        np.testing.assert_array_equal(pixels(path), np.asarray(ImageOps.exif_transpose(raw)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_outside_jpeg(kind, tmp_path):
    path = stored(tmp_path, save(picture(), kind, 8, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(pixels(path), np.rot90(np.asarray(picture())))


LOSSLESS = ["png_plain", "bmp_24", "tiff_rgb", "tiff_lzw_multi", "ppm_p6", "png_animated"]
LOSSY = ["jpeg_plain", "jpeg_progressive", "jpeg_cmyk", "jpeg_mpo", "gif_animated", "webp_animated", "tiff_cmyk"]


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
def test_formats_keep_the_picture_and_the_first_frame(kind, tmp_path):
    assert np.abs(pixels(write(tmp_path, kind)[1]) - np.asarray(picture())).mean() < (12 if kind in LOSSY else 1e-9)


@pytest.mark.parametrize("kind", ["png_rgba", "png_la", "webp_alpha", "gif_transparent"])
def test_transparent_pixels_are_laid_on_white(kind, tmp_path):
    seen = pixels(write(tmp_path, kind)[1])
    assert (seen[:, : WIDTH // 2] == 255).all()
    expected = np.asarray(alpha_picture().convert("LA" if kind == "png_la" else "RGB").convert("RGB"))
    assert np.abs(seen - expected)[:, WIDTH // 2 :].mean() < 12
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert pixels(stored(tmp_path, save(half, "PNG"))).tolist() == [[[204, 204, 204]]]
    key = save(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixels(stored(tmp_path, key)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["png_16bit_gray", "tiff_16bit_gray", "pgm_16bit"])
def test_16_bit_grey_is_scaled_not_cut(kind, tmp_path):
    seen = pixels(write(tmp_path, kind)[1])
    grey = seen[..., 0].ravel()
    assert (seen == seen[..., :1]).all()
    np.testing.assert_array_equal(grey, np.floor(np.linspace(0, 65535, grey.size).astype(int) * 255 / 65535 + 0.5))
    colour = pixels(stored(tmp_path, png_16bit(3))).ravel()
    assert np.abs(colour - np.linspace(0, 255, colour.size)).max() <= 1


LARGE = picture().resize((961, 642))


@pytest.mark.parametrize(
    ("data", "reductions"),
    [
        (jpeg(LARGE), (1, 2, 4, 8)),
        (CONTENTS["jpeg_mpo"][2](), (1, 2, 4, 8)),
        (jpeg(picture().resize((3, 90))), (1, 2)),  # down to a pixel
        (png(), (1,)),
        (save(picture(), "WEBP"), (1,)),
        *((jpeg(picture().resize((96, 64)), turn), (1, 2, 4, 8)) for turn in range(1, 9)),
        # A square that is cut short must not come to lie at the top or left.
        *((jpeg(picture().resize((93, 62)), turn), (1,) if turn > 1 else (1, 2, 4, 8)) for turn in range(1, 9)),
    ],
)
def test_a_jpeg_may_be_decoded_smaller_and_its_upright_size_is_known_before(data, reductions, tmp_path):
    path = stored(tmp_path, data)
    whole = decode(path, MAX_PIXELS)
    for reduction in reductions:
        with open_image(path, MAX_PIXELS) as opened:
            assert (opened.size, opened.reductions) == ((whole.height, whole.width), reductions)
            small = opened.rgb(reduction)
        assert small.size == tuple(-(-side // reduction) for side in whole.size)
        assert np.abs(np.asarray(small).astype(int) - np.asarray(whole.reduce(reduction))).mean() < 8


def test_the_pixel_limit_is_read_from_the_header(tmp_path):
    path = stored(tmp_path, jpeg())
    assert decode(path, WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    with pytest.raises(BadImage, match=rf"{WIDTH} x {HEIGHT} pixels, none or more than max_pixels \({WIDTH * HEIGHT - 1}\)"):
        decode(path, WIDTH * HEIGHT - 1)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
        for path in (tmp_path / "pipe.jpg", tmp_path / "socket.jpg", tmp_path, tmp_path / "missing.jpg", "/dev/zero", "a\0b.jpg"):
            with pytest.raises(BadImage):
                decode(str(path), MAX_PIXELS)


@pytest.mark.parametrize(
    "kind", ["jpeg_plain", "jpeg_progressive", "png_palette", "gif_static", "webp_alpha", "bmp_24", "tiff_lzw_multi"]
)
def test_random_damage_never_raises_anything_else(kind, tmp_path):
    rng = np.random.Generator(np.random.PCG64(1))
    data = np.frombuffer(LOAD[kind][1](), np.uint8)
    for _ in range(30):
        damaged = data.copy()
        spots = rng.integers(0, len(data), rng.integers(1, 8))
        damaged[spots] = rng.integers(0, 256, len(spots))
        path = stored(tmp_path, damaged[: rng.integers(1, 2 * len(data))].tobytes())
        try:
            with open_image(path, 10_000_000) as opened:
                assert opened.rgb(opened.reductions[-1]).mode == "RGB"
            assert decode(path, 10_000_000).mode == "RGB"
        except BadImage as fault:
            assert str(fault).isprintable()


@pytest.mark.torture
@pytest.mark.parametrize("kind", LOAD)
def test_a_cut_off_file_is_refused_unless_every_pixel_is_there(kind, tmp_path):
    data = LOAD[kind][1]()
    whole, used = pixels(stored(tmp_path, data)), 0
    ends = {int(share * len(data)) for share in np.linspace(0.05, 0.95, 10)} | {len(data) - 1, len(data) - 2}
    for end in sorted(ends - {0}):
        try:
            seen = pixels(stored(tmp_path, data[:end]))
        except BadImage:
            assert not used, "a longer cut is refused after a shorter one was read"
        else:
            used += 1
            np.testing.assert_array_equal(seen, whole)
