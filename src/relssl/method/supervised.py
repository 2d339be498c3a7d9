"""Supervised learning: what labels would have given the same network, as an upper mark."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.method.base import ALONE, Method, Step, World
from relssl.method.encoder import Encoder


class Classifier(Encoder):
    """Images to the logits of `classes`: an encoder whose projector is one linear layer, and whose output is not normalised.

    Args:
        backbone, num_features: as for Encoder.
        classes: C, at least 2.
    """

    def __init__(self, backbone: nn.Module, num_features: int, classes: int) -> None:
        super().__init__(backbone, num_features, dim=classes, projector_layers=1)

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, H, W] -> logits [N, C], at least fp32, twice the same tensor, and the backbone's features [N, F]."""
        features = self.backbone(images)
        logits = self.projector(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, logits, features


class Supervised(Method):
    """Cross-entropy to the labels; the student is a Classifier."""

    has_teacher = False

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, *, labels: Tensor) -> Step:
        """The mean cross-entropy of the only view, `weak`. Queries and keys are the logits at unit length, whose spread tells of health."""
        assert not strong
        logits = self.student([weak])  # [1, B, C]
        directions = F.normalize(logits.detach(), dim=-1)
        return Step(F.cross_entropy(logits[0], labels), directions, directions[0])
