"""The encoder: a backbone, a projector and, on the student alone, a predictor."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Views to unit-norm embeddings.

    Args:
        backbone: images [N, C, H, W] to features [N, F].
        num_features: F.
        projector_hidden, dim, projector_layers: the projector F -> hidden -> ... -> D.
        projector_norm, projector_output_norm: of its hidden layers and its output; the papers' has none (NIPS, section 4).
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
        projector_layers: int = 2,
        projector_norm: str = "none",
        projector_output_norm: str = "none",
        predictor: str = "none",
        predictor_hidden: int = 512,
        predictor_norm: str = "batch",
    ) -> None:
        super().__init__()
        self.compiled_heads: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self.backbone, self.num_features = backbone, num_features
        hidden = [projector_hidden] * (projector_layers - 1)
        self.projector = mlp([num_features, *hidden, dim], projector_norm, projector_output_norm)
        self.predictor: nn.Module | None = None
        if predictor != "none":
            self.predictor = mlp([dim, predictor_hidden, dim], predictor_norm)
        self.still: tuple[nn.Module, ...] = ()  # parts of the backbone that never leave eval mode
        self.residual = predictor == "residual"
        if self.residual:
            for parameter in self.predictor[-1].parameters():  # type: ignore[index, union-attr, operator]
                nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> Self:
        """Set training or eval mode, but for the parts that stay in eval mode."""
        super().train(mode)
        for part in self.still:
            part.eval()
        return self

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed images [N, C, H, W]: after the predictor [N, D] and before it [N, D], one tensor if there is none, both of unit norm
        and fp32; and the backbone's features [N, F] as they are."""
        features = self.backbone(images)
        projected = self.projector(features)
        projection = _unit(projected)
        if self.predictor is None:
            return projection, projection, features
        predicted = self.predictor(projected)
        return _unit(projected + predicted if self.residual else predicted), projection, features

    def compile_heads(self, graphs: bool) -> None:
        """Let `forward` go through compiled `heads`, with CUDA graphs or without. Evaluation calls the backbone, which stays as it is."""
        compiled = torch.compile(self.heads, dynamic=False, mode="reduce-overhead" if graphs else None)
        # Embeddings leave the memory that the next replay of a graph writes to.
        self.compiled_heads = lambda images: tuple(part.clone() for part in compiled(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embed images: [N, C, H, W] -> [N, D], unit norm, fp32."""
        return self.heads(images)[0]

    def forward(self, views: Sequence[Tensor], beside: Literal["", "projections", "features"] = "") -> Any:
        """Embed V views [B, C, H, W], of one size or several: [V, B, D]. Views of one size share a forward pass.

        Args:
            beside: return (embeddings, these) instead: what the predictor was given [V, B, D], or the backbone's features [V, B, F],
                both of unit norm and fp32.
        """
        sizes = [view.shape[-2:] for view in views]
        embeddings: list[Any] = [None] * len(views)
        others: list[Any] = [None] * len(views)
        for size in dict.fromkeys(sizes):
            members = [i for i, other in enumerate(sizes) if other == size]
            images = torch.cat([views[i] for i in members]) if len(members) > 1 else views[members[0]]
            after, before, features = (self.compiled_heads or self.heads)(images)
            other = _unit(features) if beside == "features" else before
            for i, embedding, row in zip(members, after.chunk(len(members)), other.chunk(len(members)), strict=True):
                embeddings[i], others[i] = embedding, row
        return (torch.stack(embeddings), torch.stack(others)) if beside else torch.stack(embeddings)

    def teacher(self) -> Encoder:
        """Copy the encoder without its predictor, frozen."""
        twin = copy.deepcopy(self)
        twin.predictor = None
        return twin.requires_grad_(False)


def _unit(embeddings: Tensor) -> Tensor:
    # Under bf16 the networks return bf16; norms and similarities are taken in fp32 (fp64 stays fp64).
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def mlp(widths: Sequence[int], norm: str, output_norm: str = "none") -> nn.Sequential:
    """Stack linear layers from width to width, with a norm or none and ReLU in between, and a norm or none after the last.

    Args:
        norm, output_norm: none, batch, or plain: batch norm without scale and shift.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        kind = output_norm if last else norm
        # A norm's own shift makes the bias before it redundant.
        layers.append(nn.Linear(inputs, outputs, bias=kind == "none"))
        if kind != "none":
            layers.append(nn.BatchNorm1d(outputs, affine=kind == "batch"))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
