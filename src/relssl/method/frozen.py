"""A teacher that is given instead of followed: any trained backbone, whose relations the student is to have (SEED, arXiv 2101.04731)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Statistics = tuple[Sequence[float], Sequence[float]]


class FrozenTeacher(nn.Module):
    """Views as the student gets them to unit-norm features; always in eval mode and without gradients.

    Args:
        backbone: images [N, C, S, S] to features [N, D].
        size, interpolation: S, and bilinear or bicubic, to which views of another size are scaled, antialiased.
        statistics: means and deviations of the C channels, in 0..1, by which the backbone's images are normalised.
        views: those by which the student's views are.
    """

    def __init__(self, backbone: nn.Module, size: int, interpolation: str, statistics: Statistics, views: Statistics) -> None:
        super().__init__()
        self.backbone, self.size, self.interpolation = backbone.requires_grad_(False), size, interpolation
        for name, values in (("mean", statistics[0]), ("std", statistics[1]), ("view_mean", views[0]), ("view_std", views[1])):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Embed T views, each [B, C, h, w], or its embeddings [B, D] of before, which pass: [T, B, D]."""
        return torch.stack([view if view.ndim == 2 else self.embed(view) for view in views])

    def embed(self, view: Tensor) -> Tensor:
        """Embed a view [B, C, h, w]: [B, D], unit norm, fp32."""
        images = torch.addcmul(self.view_mean, view, self.view_std)  # type: ignore[arg-type]
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode=self.interpolation, antialias=True).clamp(0, 1)
        features = self.backbone((images - self.mean) / self.std)  # type: ignore[operator]
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
