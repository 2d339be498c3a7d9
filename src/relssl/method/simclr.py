"""SimCLR (Chen et al., ICML 2020, arXiv 2002.05709): each view picks the other one of its image out of the whole batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World
from relssl.method.relation import logits


class SimCLR(Method):
    """Contrast within the batch of all ranks; no teacher, no memory."""

    has_teacher = False
    constants = ("info_nce_temperature",)

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, *, info_nce_temperature: float) -> Step:
        """The NT-Xent loss of both views, of all ranks' embeddings, whose gradients `world.gather` sends back to where they are from."""
        embeddings = self.student([weak, *strong])  # [2, B, D]
        everyone = world.gather(embeddings.transpose(0, 1)).transpose(0, 1)  # [2, N, D]
        loss = nt_xent(everyone, info_nce_temperature)
        return Step(loss, embeddings.detach(), embeddings[0].detach())


def nt_xent(embeddings: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent (their eq. 1): cross-entropy of each embedding's choice of its partner among all others of the batch.

    Args:
        embeddings: [2, N, D], unit norm, of two views of N samples.

    Returns:
        A scalar, the mean over all 2 N embeddings.
    """
    count = embeddings.shape[1]
    rows = embeddings.flatten(end_dim=1)  # [2 N, D]
    itself = torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    scores = logits(rows, rows, temperature).masked_fill(itself, -torch.inf)
    partner = torch.arange(2 * count, device=rows.device).roll(count)
    return F.cross_entropy(scores, partner)
