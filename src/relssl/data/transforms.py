"""Code of the user's own inside the loader: views that are callables, and a seed for whatever draws at random in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from relssl.data import batched
from relssl.data.draws import uniforms
from relssl.errors import ConfigError
from relssl.settings import parts
from relssl.settings.run import ViewConfig


@contextlib.contextmanager
def seeded(seed: int, epoch: int, row: int, slot: int) -> Iterator[None]:
    """Seed torch (on the CPU), numpy and random by these numbers alone, and put their states back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    number = int(uniforms(seed, epoch, np.array([row]), slot, 1)[0, 0] * 2.0**53)
    torch.default_generator.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


@dataclass(frozen=True)
class Transform:
    """A view that a callable of the user's makes of an image, as PIL opens it (of other than 1 or 3 channels: uint8 [C,H,W]).

    It returns a PIL image or a uint8 tensor of the view's size, which are scaled and normalised here, or a float tensor, taken as it is.
    """

    setting: str  # that names it
    call: Callable[[Any], Any]
    size: int
    statistics: tuple[Sequence[float], Sequence[float]]

    @staticmethod
    def of(view: ViewConfig, slot: int, statistics: tuple[Sequence[float], Sequence[float]]) -> Transform | None:
        """Return the callable of a view; None for a view of ours."""
        setting = f"views.{'strong' if slot else 'weak'}.name"
        if not parts.is_part(view.name):
            return None
        if not callable(call := parts.find(setting, view.name)):
            raise ConfigError(f"{setting}: {view.name} is a {type(call).__name__}; needs a function of an image")
        return Transform(setting, call, view.size, statistics)

    def __call__(self, pixels: Tensor, name: str, *key: int) -> Tensor:
        """Return the normalised view, fp32 [C,S,S], of an image uint8 [C,H,W] of this name, seeded by (seed, epoch, row, slot).

        ConfigError, with the image's name, if the callable raises or returns another.
        """
        channels, size = len(self.statistics[0]), self.size
        try:
            with seeded(*key):
                view = self.call(to_pil_image(pixels) if len(pixels) in (1, 3) else pixels.clone())
        except Exception as error:  # whatever a user's code raises
            raise ConfigError(f"{self.setting}: raises {repr(error)[:200]} on {name}") from error
        x = pil_to_tensor(view) if isinstance(view, Image.Image) else view
        floats = isinstance(x, Tensor) and x.is_floating_point()
        usable = [(c, size, size) for c in ((1, 3) if channels in (1, 3) and not floats else (channels,))]
        if not isinstance(x, Tensor) or not (floats or x.dtype == torch.uint8) or tuple(x.shape) not in usable:
            got = f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}" if isinstance(x, Tensor) else type(view).__name__
            needs = f"needs a PIL image, or a uint8 or float tensor, [{channels}, {size}, {size}]"
            raise ConfigError(f"{self.setting}: returns {got} for {name}; {needs} ({self.setting.removesuffix('name')}size)")
        x = x.as_subclass(Tensor)
        return x.float() if floats else batched.normalise(x[None], *self.statistics)[0]
