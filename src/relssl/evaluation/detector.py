"""A detector on a backbone: torchvision's Faster R-CNN or Mask R-CNN over a feature pyramid of the backbone's own maps.

After Ren et al. 2015 (Faster R-CNN), Lin et al. 2017 (feature pyramids) and He et al. 2017 (Mask R-CNN), in torchvision's form.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from relssl.config import Config
from relssl.errors import ConfigError
from relssl.method.backbones import channels_of
from relssl.protocols import DetectionConfig

_CHANNELS = 256  # of every level of the pyramid (Lin et al., section 3)
_LEVELS = 4
_TRIED = 128  # pixels a side of the image that strides are found with
_ANCHOR = 8  # side of an anchor in strides of its level: 32 pixels at stride 4, as in the papers

Autocast = Callable[[], AbstractContextManager[Any]]
Level = tuple[int, int, int]


class Pyramid(nn.Module):
    """Images [B, 3, H, W] to fp32 maps {"0": [B, 256, H/s0, W/s0], ..., "pool": half of the last}.

    Args:
        network: a timm network; what lies behind its last map is taken off.
        levels: (index, channels, stride) of its maps, as of `pyramid_levels`.
        autocast: the precision of the networks; boxes are always computed in fp32, as their edges need it.
    """

    def __init__(self, network: Any, levels: list[Level], autocast: Autocast) -> None:
        super().__init__()
        self.indices = network.prune_intermediate_layers([index for index, _, _ in levels], prune_norm=True)
        self.network, self.autocast = network, autocast
        self.fpn = FeaturePyramidNetwork([channels for _, channels, _ in levels], _CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = _CHANNELS

    def maps(self, images: Tensor) -> list[Tensor]:
        """The network's own, finest first."""
        found: list[Tensor] = self.network.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        return found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            levels = self.fpn({str(level): each for level, each in enumerate(self.maps(images))})
        return {name: level.float() for name, level in levels.items()}


def create_detector(
    backbone: nn.Module, config: Config, settings: DetectionConfig, classes: int, *, masks: bool, autocast: Autocast
) -> nn.Module:
    """A detector whose backbone starts as `backbone`, which itself is left as it is; the rest is drawn from torch's generator.

    Args:
        backbone: timm network without classifier.
        config: the backbone's own.
        classes: C, without the background.
        masks: Mask R-CNN instead of Faster R-CNN.
        autocast: the precision of backbone and pyramid.

    Returns:
        torchvision's model, in training mode.

    Raises:
        ConfigError: if the backbone has no maps of falling resolution, takes images of one size only, or grey ones.
    """
    network = copy.deepcopy(backbone).cpu().requires_grad_(True)
    levels = pyramid_levels(network, config.backbone)
    freeze(network, config.backbone, settings.frozen_stages, all_norms=settings.norm == "frozen")
    strides = [stride for _, _, stride in levels]
    pyramid = Pyramid(network, levels, autocast)
    names = [str(level) for level in range(len(levels))]
    arguments: dict[str, Any] = {
        "num_classes": classes + 1,
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "box_batch_size_per_image": settings.regions,
        "image_mean": list(config.views.mean or ()),
        "image_std": list(config.views.std or ()),
        # The level made by pooling has twice the stride of the last.
        "rpn_anchor_generator": AnchorGenerator(
            tuple((_ANCHOR * stride,) for stride in [*strides, 2 * strides[-1]]), ((0.5, 1.0, 2.0),) * (len(strides) + 1)
        ),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    }
    if masks:
        arguments["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    model: nn.Module = (MaskRCNN if masks else FasterRCNN)(pyramid, **arguments)
    return model.train()


@torch.no_grad()
def pyramid_levels(network: nn.Module, name: str) -> list[Level]:
    """(index, channels, stride) of the maps a pyramid is built on: the last of each stride, of the four largest strides.

    Strides are found by trying, as a small stem changes what timm says of them. A map as large as the image is left out: it
    would cost more than all others together.

    Raises:
        ConfigError: naming the network, if it has fewer than two strides or does not take colour images.
    """
    other = "; take a convolutional backbone such as resnet50, or one with stages such as convnext_tiny"
    if channels_of(network) != 3:
        raise ConfigError(f"detection: takes colour images, and {name} was made for {channels_of(network)} channels")
    if not hasattr(network, "forward_intermediates"):
        raise ConfigError(f"detection: {name} gives no feature maps{other}")
    training, device = network.training, next(network.parameters()).device
    try:
        maps = network.eval().forward_intermediates(torch.zeros(1, 3, _TRIED, _TRIED, device=device), intermediates_only=True)  # type: ignore[operator]
    except Exception as error:  # whatever a network raises over a size that it was not made for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"detection: {name} does not take images of any size ({reason}){other}") from error
    finally:
        network.train(training)
    last = {2 ** round(math.log2(_TRIED / each.shape[-1])): index for index, each in enumerate(maps)}
    strides = sorted(stride for stride in last if stride > 1)[-_LEVELS:]
    if len(strides) < 2:
        raise ConfigError(f"detection: the feature maps of {name} are all of one size, of which no pyramid is built{other}")
    return [(last[stride], int(maps[last[stride]].shape[1]), stride) for stride in strides]


def freeze(network: nn.Module, name: str, stages: int, *, all_norms: bool) -> None:
    """Fix the first stages, and batch norm in them or everywhere, which then is a constant scale and shift.

    Stage n ends with timm's last map of stride 2^n or less, by the network's usual stem; where there is none, the stem alone
    is fixed.

    Raises:
        ConfigError: if the stages of the network called `name` are no modules of their own.
    """
    first = _first(network, name, stages)
    for path in first:
        for parameter in network.get_submodule(path).parameters(recurse=False):
            parameter.requires_grad_(False)
    norms = [path for path, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for path in norms if all_norms else [path for path in norms if path in first]:
        network.set_submodule(path, freeze_batch_norm_2d(network.get_submodule(path)))


def _first(network: nn.Module, name: str, stages: int) -> list[str]:
    """The modules of the first stages, in the order in which timm's networks build and run them."""
    if stages == 0:
        return []
    known: Any = network.feature_info
    ends = [(entry["module"], entry["reduction"]) for entry in (known if isinstance(known, list) else known.info)]
    paths = [path for path, _ in network.named_modules()]
    if not {path for path, _ in ends} <= set(paths):
        raise ConfigError(f"detection.frozen_stages: the stages of {name} cannot be told apart; set it to 0")
    reached = [path for path, reduction in ends if reduction <= 2**stages]
    if not reached:
        return paths[: paths.index(ends[0][0])]
    inside = [position for position, path in enumerate(paths) if path == reached[-1] or path.startswith(f"{reached[-1]}.")]
    return paths[: inside[-1] + 1]
