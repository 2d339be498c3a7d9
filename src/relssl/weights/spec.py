"""The description of a network: enough to build it and to make the images it sees; of a classifier, its classes besides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor, nn

from relssl.data.plain import PlainView
from relssl.errors import CheckpointError
from relssl.method.backbones import TORCHVISION, arguments, create_backbone, feature_width, weightless
from relssl.settings import parts
from relssl.settings.run import Config

# What the settings of weights that no run of ours trained name as their data.
NO_DATA = "imported"
# What is known of a classifier: the names of its classes, its layer's in the network, and how it came about, in words and figures.
CLASSIFIER = {"classes", "layer", "data", "source", "training", "images", "tested", "top1"}


class Backbone(nn.Module):
    """A network as `BackboneSpec.load` returns it, for type checkers: a module of timm's or torchvision's with these attributes.

    It gives features [N, F] of images [N, C, S, S]. Like these libraries' own it can be pickled, and copied to other processes.
    """

    num_features: int  # F
    transform: PlainView  # an image as PIL opens it to the normalised [C, S, S] that evaluations make of its file
    spec: BackboneSpec

    def __call__(self, images: Tensor) -> Tensor: ...  # type: ignore[empty-body]


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone, or one with a classifier, and what it sees."""

    name: str  # timm's name, or `torchvision/` and torchvision's
    arguments: Mapping[str, Any]  # what the user passes to timm.create_model or to torchvision's function
    stem: str  # as `encoder.stem`
    view: PlainView  # the images it sees when it is evaluated
    classifier: Mapping[str, Any] = field(default_factory=dict)  # all of `CLASSIFIER`, or nothing

    @staticmethod
    def of(config: Config) -> BackboneSpec:
        """Return the backbone of a run or exported file, by its settings; ConfigError if they leave a part of the view open."""
        return BackboneSpec(config.backbone, config.backbone_args, config.encoder.stem, PlainView.of(config.views))

    @property
    def library(self) -> str | None:
        """The library whose network it is, timm or torchvision; None for one of the user's own."""
        if parts.is_part(self.name):
            return None
        return "torchvision" if self.name.startswith(TORCHVISION) else "timm"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the network's scores; none of a backbone alone."""
        return tuple(self.classifier.get("classes", ()))

    def all_arguments(self) -> dict[str, Any]:
        """Return the arguments it is created with: its own, and those that its image size and channels ask for."""
        channels = {} if self.view.channels == 3 else {"in_chans": self.view.channels}
        return arguments(self.name, channels | dict(self.arguments), self.view.size)

    def create(self, create: Callable[..., nn.Module] = create_backbone) -> nn.Module:
        """Build the network with random weights, or `weightless`; raises as `create_backbone`."""
        return create(self.name, self.stem, self.all_arguments(), self.view.size, len(self.classes))

    def load(self, weights: Mapping[str, Tensor], origin: Path) -> Backbone:
        """Build the network with these weights, all of them and nothing else, in eval mode.

        Nothing larger than the weights is built: settings beside a stranger's file may ask for any network.

        Raises:
            CheckpointError: as `mismatch` says, or if an argument is a larger number than any network of such weights has.
        """
        # 2048 is the largest size of a view.
        largest = max([2048, len(weights), *(side for value in weights.values() for side in value.shape)])

        def bounded(number: str) -> None:
            if float(number) > largest:
                raise CheckpointError(f"{origin}: is no {self.name} of backbone_args with {number[:20]}: its weights are smaller")

        json.loads(json.dumps(self.all_arguments(), default=str), parse_int=bounded, parse_float=bounded)
        shapes = self.create(weightless)
        if fault := mismatch(shapes.state_dict(), weights):
            raise CheckpointError(f"{origin}: is no {self.name}: {fault}")
        network = cast(Backbone, self.create())
        state = network.state_dict()  # the network's own, as torchvision's MNASNet asks for the version in it
        state.update(weights)
        network.load_state_dict(state)
        network.transform, network.spec = self.view, self
        # timm's own figure is that before the layer which its MobileNetV3 ends with.
        network.num_features = feature_width(shapes, self.view.size)
        return network.eval()

    def to_yaml(self) -> str:
        """Write it under the names that a run's settings have, for the file beside imported weights."""
        view = self.view
        views = {"weak": {"name": "weak", "size": view.size}, "strong": {"name": "contrastive", "size": view.size}}
        pixels = {"channels": view.channels, "mean": [*view.mean], "std": [*view.std]}
        scaling = {"margin": view.margin, "interpolation": view.interpolation}
        network = {"backbone": self.name, "backbone_args": dict(self.arguments), "encoder": {"stem": self.stem}}
        described = {"data": NO_DATA, "recipe": "imported", **network, "views": {**views, **pixels, **scaling}}
        described |= {"classifier": dict(self.classifier)} if self.classifier else {}
        return yaml.safe_dump(described, sort_keys=False, width=120, default_flow_style=None)


def mismatch(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """Say how many weights match and which are missing, unexpected or of another shape; None if all match."""
    both = sorted(expected.keys() & weights.keys())
    shapes = {name: (list(weights[name].shape), list(expected[name].shape)) for name in both}
    kinds = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "other shape": [f"{name} {one} for {other}" for name, (one, other) in shapes.items() if one != other],
    }
    lists = [
        f"{kind} ({len(names)}): {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for kind, names in kinds.items() if names
    ]
    matched = len(both) - len(kinds["other shape"])
    return f"{matched} of {len(expected)} weights match; {'; '.join(lists)}" if lists else None
