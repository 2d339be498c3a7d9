"""MoCo v2 (He et al. 2020; Chen et al., arXiv 2003.04297): each query picks its own key out of itself and the memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World


class MoCo(Method):
    """Momentum contrast. If symmetric, the first view's keys are kept (as those who symmetrise MoCo v2 for small images do)."""

    constants = ("info_nce_temperature",)

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, *, info_nce_temperature: float) -> Step:
        """The InfoNCE loss of V queries, or the mean of both views' against each other; MoCo v2 has 0.2, and two views alike strong."""
        matched = self.matched(weak, strong, world, self.symmetric)
        # InfoNCE is ReSSL's objective with nothing but its InfoNCE part, so that the relation's temperatures play no role.
        settings = dict.fromkeys(("student_temperature", "teacher_temperature", "info_nce_temperature"), info_nce_temperature)
        losses = [self.objective(queries, keys, self.past, warmup_mix=1.0, **settings) for queries, keys in matched]
        return Step(torch.stack(losses).mean(), matched[0][0].detach(), matched[0][1])
