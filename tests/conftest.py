import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small_runs import small_run

# No test looks into the real one; processes that tests start inherit it.
_CACHE = tempfile.TemporaryDirectory(prefix="relssl-tests-")
os.environ["RELSSL_CACHE"] = _CACHE.name


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks for the network, and no library may on its own."""
    connect = socket.socket.connect

    def local(own: socket.socket, address: Any) -> None:
        if own.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a connection to {address}")
        connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", local)


class TinyNet(nn.Module):
    """A convolutional backbone small enough for oracles: [N, 3, H, W] -> [N, 16]."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).relu().mean(dim=(2, 3))


@pytest.fixture
def tiny_net() -> type[TinyNet]:
    return TinyNet


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained small run of 20 steps with a checkpoint of each, whose tests only read."""
    return small_run(tmp_path_factory.mktemp("given") / "source", checkpoint={"every_steps": 1, "keep": 20}).folder
