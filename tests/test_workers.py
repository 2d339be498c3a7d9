"""Loader processes that cannot go on: one line, and never a wait without end."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bad_images import jpeg
from relssl.data import cache, loader, plain
from relssl.data.images import Images
from relssl.data.loader import FromFiles, Plan
from relssl.data.named import load
from relssl.data.plain import PlainView, Reader
from relssl.errors import DataError
from test_shrunk import Told, settings_for


@pytest.fixture
def images(tmp_path: Path) -> Images:
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg())
    return load(str(tmp_path / "images"), None, "train")


@pytest.fixture(autouse=True)
def _no_wait_without_end() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def no_room(worker: int) -> None:
    """Shared memory is a file: a worker may then make none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


USES: dict[str, Callable[[Images, Path, str], object]] = {
    "train": lambda images, root, decoder: list(
        FromFiles(
            images, settings_for(root, **{"loader.workers": 1, "loader.cache": None, "loader.decoder": decoder}), Plan(8, 4), CPU
        ).stream(0, 2)
    ),
    "evaluate": lambda images, root, _: list(Reader(PlainView.of(settings_for(root).views), 1).batches(images)),
    "shrink": lambda images, root, _: cache.shrunken(images, settings_for(root, **{"loader.workers": 1}), Told()),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("use", "decoder"), [("train", "pillow"), ("train", "torchvision"), ("evaluate", "pillow"), ("shrink", "pillow")]
)
def test_full_shared_memory_is_one_line(
    use: str, decoder: str, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loader, plain, cache):
        monkeypatch.setattr(module, "reset_signals", no_room)
    with pytest.raises(DataError, match=r"no memory left \(.*unable to.*\); try loader.workers 0, .* more shared memory"):
        USES[use](images, tmp_path, decoder)
