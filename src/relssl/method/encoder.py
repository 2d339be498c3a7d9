"""The encoder: a timm backbone, a projector and, on the student alone, a predictor."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.config import Config
from relssl.errors import ConfigError


class Encoder(nn.Module):
    """Views to unit-norm embeddings.

    Args:
        backbone: images [N, C, H, W] to features [N, F].
        num_features: F.
        projector_hidden, dim, projector_norm: the projector F -> hidden -> D; the papers' has no norm (NIPS, section 4).
        predictor: none (NIPS), mlp, or residual: q(z) = z + mlp(z) with the last layer at zero, so that it starts as
            the identity and the student's first relations are those of its projector. TPAMI names an asymmetric
            predictor and not its layout: both forms are reconstructions.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        *,
        projector_hidden: int = 2048,
        dim: int = 128,
        projector_norm: str = "none",
        predictor: str = "none",
        predictor_hidden: int = 512,
        predictor_norm: str = "batch",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(num_features, projector_hidden, dim, projector_norm)
        self.predictor: nn.Module | None = None
        if predictor != "none":
            self.predictor = mlp(dim, predictor_hidden, dim, predictor_norm)
        self.residual = predictor == "residual"
        if self.residual:
            for parameter in self.predictor[-1].parameters():  # type: ignore[index, union-attr, operator]
                nn.init.zeros_(parameter)

    def embed(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D], unit norm, fp32."""
        z = self.projector(self.backbone(images))
        if self.predictor is not None:
            z = z + self.predictor(z) if self.residual else self.predictor(z)
        # Under bf16 the networks return bf16; norms and similarities are taken in fp32 (fp64 stays fp64).
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """V views [B, C, H, W], of one size or several -> [V, B, D]; views of one size share a forward pass."""
        sizes = [view.shape[-2:] for view in views]
        queries: list[Tensor | None] = [None] * len(views)
        for size in dict.fromkeys(sizes):
            members = [i for i, other in enumerate(sizes) if other == size]
            images = torch.cat([views[i] for i in members]) if len(members) > 1 else views[members[0]]
            for i, part in zip(members, self.embed(images).chunk(len(members)), strict=True):
                queries[i] = part
        return torch.stack([query for query in queries if query is not None])

    def teacher(self) -> Encoder:
        """A frozen copy without the predictor."""
        twin = copy.deepcopy(self)
        twin.predictor = None
        return twin.requires_grad_(False)


def mlp(inputs: int, hidden: int, outputs: int, norm: str) -> nn.Sequential:
    """Linear, norm or none, ReLU, Linear."""
    norms: list[nn.Module] = [nn.BatchNorm1d(hidden)] if norm == "batch" else []
    # A norm's own shift makes the first bias redundant.
    return nn.Sequential(nn.Linear(inputs, hidden, bias=not norms), *norms, nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def create_backbone(name: str, stem: str = "standard", args: Mapping[str, Any] | None = None) -> nn.Module:
    """A randomly initialised timm network without its classifier.

    Args:
        name: timm's name, such as `resnet18` or `mobilenetv3_large_100`.
        stem: `standard`, or for small images `small` (first convolution 3x3 with stride 1, no max-pool: the papers'
            CIFAR networks), `small-pool` (max-pool kept: their STL-10 and Tiny-ImageNet networks) or `small-wide` (as
            `small` but padded by 2, which makes maps of 34x34 of 32x32 pixels: solo-learn's CIFAR networks).
        args: further arguments of `timm.create_model`.

    Raises:
        ConfigError: if timm does not know the name or the arguments, or the network has no stem that can be made small.
    """
    if not timm.is_model(name):
        guess = next(iter(timm.list_models(f"*{name[:6]}*")), None)
        raise ConfigError(f"backbone: timm knows no {name!r}" + (f"; close to it: {guess}" if guess else ""))
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **dict(args or {}))
    except Exception as error:  # whatever a network raises over arguments that do not suit it
        raise ConfigError(f"backbone_args: timm refuses {dict(args or {})} for {name}: {error}") from error
    if stem != "standard":
        _shrink_stem(network, name, keep_pool=stem == "small-pool", padding=2 if stem == "small-wide" else 1)
    return network


def _shrink_stem(network: nn.Module, name: str, keep_pool: bool, padding: int) -> None:
    path, first = next(((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)), ("", None))
    if first is None or first.stride[0] < 2 or first.kernel_size[0] < 3 or first.kernel_size[0] == first.stride[0]:
        raise ConfigError(f"encoder.stem: {name} does not start with a strided convolution; use stem: standard")
    small = nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=padding, bias=first.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, small)
    if not keep_pool and hasattr(network, "maxpool"):
        network.maxpool = nn.Identity()


@torch.no_grad()
def feature_width(backbone: nn.Module, size: int) -> int:
    """The number of features the backbone gives for images of side `size`, by trying it.

    Raises:
        ConfigError: if images of that size do not pass, or the output is not one vector an image.
    """
    training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever a network raises, the user needs to hear that this size does not fit
        raise ConfigError(f"backbone: images of {size} pixels do not pass through it: {str(error).splitlines()[0]}") from error
    finally:
        backbone.train(training)
    if features.ndim != 2:
        raise ConfigError(f"backbone: gives {list(features.shape)} for 2 images, needs one vector an image")
    return int(features.shape[1])


def create_encoder(config: Config) -> Encoder:
    """The student of a run, drawn from torch's global random state."""
    backbone = create_backbone(config.backbone, config.encoder.stem, config.backbone_args)
    for size in {view.size for view in config.strong_views} - {config.views.weak.size}:
        feature_width(backbone, size)  # every size has to pass
    heads = {key: value for key, value in vars(config.encoder).items() if key != "stem"}
    return Encoder(backbone, feature_width(backbone, config.views.weak.size), **heads)
