"""BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733): from one view the student predicts the teacher's embedding of the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World


class BYOL(Method):
    """Bootstrap your own latent; no negatives, no memory. The student has a predictor, which the teacher is without."""

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE) -> Step:
        """|prediction - embedding|^2 = 2 - 2 cos of both directions, added up (their eq. 2 and Algorithm 1), 0 to 8."""
        matched = self.matched(weak, strong, world, symmetric=True)
        losses = [2 - 2 * (queries * keys).sum(dim=-1).mean() for queries, keys in matched]
        return Step(torch.stack(losses).sum(), matched[0][0].detach(), matched[0][1])
