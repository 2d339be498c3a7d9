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
from torchvision.transforms.functional import pil_to_tensor

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

    setting: str
    call: Callable[[Any], Any]
    size: int
    statistics: tuple[Sequence[float], Sequence[float]]

    @staticmethod
    def of(view: ViewConfig, slot: int, statistics: tuple[Sequence[float], Sequence[float]]) -> Transform | None:
        """Return the callable of a view; None for a view of ours."""
        setting = f"views.{'strong' if slot else 'weak'}.name"
        if not parts.is_part(view.name):
            return None
        call = parts.find(setting, view.name)
        if not callable(call):
            raise ConfigError(
                f"{setting}: {view.name} is a {type(call).__name__}; needs something that can be called with an image"
            )
        return Transform(setting, call, view.size, statistics)

    def __call__(self, image: Image.Image | Tensor, name: str) -> Tensor:
        """Return the normalised view, fp32 [C,S,S]; ConfigError, with the image's name, if the callable raises or returns another."""
        channels, size = len(self.statistics[0]), self.size
        try:
            view = self.call(image)
        except Exception as error:  # whatever a user's code raises
            raise ConfigError(f"{self.setting}: raises {repr(error)[:200]} on {name}") from error
        pixels = pil_to_tensor(view) if isinstance(view, Image.Image) else view
        tensor = isinstance(pixels, Tensor) and (pixels.dtype == torch.uint8 or pixels.is_floating_point())
        as_it_is = tensor and pixels.is_floating_point()
        allowed = {channels} if as_it_is or channels not in (1, 3) else {1, 3}
        if not tensor or pixels.dim() != 3 or pixels.shape[0] not in allowed or pixels.shape[1:] != (size, size):
            kind = (
                f"{str(view.dtype).removeprefix('torch.')} {tuple(view.shape)}"
                if isinstance(view, Tensor)
                else type(view).__name__
            )
            kind += f" of {view.width} x {view.height} pixels, mode {view.mode}" if isinstance(view, Image.Image) else ""
            needs = f"needs a PIL image of {size} x {size} pixels, or a uint8 or float tensor [{channels}, {size}, {size}]"
            raise ConfigError(f"{self.setting}: returns {kind} for {name}; {needs} ({self.setting.removesuffix('name')}size)")
        pixels = pixels.as_subclass(Tensor)
        return pixels.float() if as_it_is else batched.normalise(pixels[None], *self.statistics)[0]
