"""Views that are callables of one's own: seeded by run, epoch, item and view alone; checked; resumed exactly."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from PIL import Image
from torch import Tensor

import relssl
from relssl.data.images import Images, Pixels
from relssl.data.loader import Loader, Plan
from relssl.data.own import open_dataset
from relssl.errors import ConfigError, Interrupted
from relssl.settings import parts
from relssl.settings.run import LoaderConfig, ViewConfig
from small_runs import SMALL, equal_runs

STATISTICS = (0.5, 0.4, 0.3), (0.25, 0.2, 0.2)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 20, 20), np.uint8)
OWN = open_dataset([Image.fromarray(one.transpose(1, 2, 0)) for one in PIXELS], "own")


def noisy(image: Image.Image) -> Tensor:
    """A view that draws from all three generators."""
    noise = torch.rand(1) + np.random.rand() + random.random()
    return torch.from_numpy(np.asarray(image)[:16, :16].copy()).permute(2, 0, 1) / 255 + noise.float()


def views(
    images: Images, *calls: Callable[[Any], Any], seed: int = 0, start: int = 0, statistics: Any = STATISTICS, **settings: Any
) -> list[Tensor]:
    """The ids and the views of each step from `start` to the sixth."""
    names = ["views.weak.name", *["views.strong.name"] * (len(calls) - 1)]
    with parts.at_hand(dict(zip(names, calls, strict=True))):
        configs, plan = [ViewConfig(name=parts.name_of(call), size=16) for call in calls], Plan(12, 4, seed=seed)
        loader = Loader(images, configs, plan, torch.device("cpu"), statistics, LoaderConfig(**settings))
        return [each for (batch,) in loader.stream(start, 6) for each in (batch.ids, batch.weak, *batch.strong)]


def test_views_depend_on_seed_epoch_item_and_view_alone_and_leave_the_generators_as_they_were() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index,union-attr]

    before, calls = states(), [noisy, noisy, noisy]
    one = views(OWN, *calls, workers=0)
    assert states() == before
    assert all(map(torch.equal, one, views(OWN, *calls, workers=3)))
    assert all(map(torch.equal, one[12:], views(OWN, *calls, workers=1, start=3)))
    _, weak, strong, other = one[:4]
    assert not torch.equal(weak, strong) and not torch.equal(strong, other)
    assert not torch.equal(weak, views(OWN, *calls, seed=1)[1])
    resident = Images("own", Pixels(torch.from_numpy(PIXELS)))
    assert all(map(torch.equal, one, views(resident, *calls)))


def test_pictures_and_uint8_are_scaled_and_normalised_and_floats_taken_as_they_are() -> None:
    cut = v2.CenterCrop(16)
    floats = v2.Compose([v2.ToImage(), cut, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS)])
    _, picture, pixels, _, _, done = views(OWN, cut, v2.Compose([v2.PILToTensor(), cut]))[:3] + views(OWN, cut, floats)[:3]
    assert torch.equal(picture, pixels)
    torch.testing.assert_close(picture, done)


def test_images_of_other_channels_are_handed_over_as_tensors() -> None:
    def cut(image: Any) -> Tensor:
        assert isinstance(image, Tensor) and image.dtype == torch.uint8
        return image[:, :16, :16]

    four = PIXELS.repeat(2, axis=1)[:, :4]
    ids, weak = views(open_dataset(four, "own"), cut, statistics=((0.5,) * 4, (0.25,) * 4), workers=0)[:2]
    torch.testing.assert_close(weak, (torch.from_numpy(four)[ids][:, :, :16, :16] / 255 - 0.5) / 0.25)


def broken(image: Image.Image) -> Any:
    raise KeyError("lost")


WRONG = [broken, v2.CenterCrop(12), np.asarray, v2.RGB(), v2.Compose([v2.ToImage(), v2.CenterCrop(16), v2.ToDtype(torch.int32)])]


@pytest.mark.parametrize(("call", "workers"), [*((call, 0) for call in WRONG), (broken, 1)])
def test_a_wrong_result_is_one_line_with_the_setting_and_the_item(call: Callable[[Any], Any], workers: int) -> None:
    with pytest.raises(ConfigError, match=r"^views.strong.name: .*own/0000") as caught:
        views(OWN, v2.CenterCrop(16), call, workers=workers)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.exit_code == 2


def test_a_run_with_them_goes_on_exactly(tmp_path: Path) -> None:
    base = SMALL | {
        "views": {"weak": v2.RandomCrop(16), "strong": noisy},
        **{"views.weak.size": 16, "views.strong.size": 16, "backbone_args": {**SMALL["backbone_args"], "channels": [4, 4, 8, 8]}},
        "log": {"every": 1, "knn_every": 0, "to": [], "report": False},
        "quiet": True,
        "max_images": 64,
        "loader": {"workers": 1},
    }
    relssl.pretrain(out=str(tmp_path / "whole"), **base)
    with pytest.raises(Interrupted):
        relssl.pretrain(out=str(tmp_path / "cut"), **base, time_limit=1e-9)
    relssl.resume(tmp_path / "cut", views=base["views"], quiet=True, time_limit=float("inf"))
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_view_that_changes_its_image_in_place_leaves_the_next_view_and_the_data_as_they_were() -> None:
    def darken(image: Tensor) -> Tensor:
        image[0] = 0
        return image[:, :16, :16]

    pixels = np.random.default_rng(1).integers(1, 256, (12, 4, 20, 20), np.uint8)
    before = pixels.copy()
    _, weak, strong = views(
        open_dataset(pixels, "own"), darken, lambda image: image[:, :16, :16], statistics=([0.0] * 4, [1.0] * 4)
    )[:3]
    assert np.array_equal(pixels, before) and not weak[:, 0].any() and strong[:, 0].all()
