"""SCE, similarity contrastive estimation (Denize et al., WACV 2023, arXiv 2111.14585): InfoNCE whose target is soft."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World
from relssl.method.relation import log_choice, relation


class SCE(Method):
    """A student's choice among its own key and the memory, matched to a mixture of that key and the teacher's relation."""

    constants = ("student_temperature", "positive_share")
    scheduled = ("teacher_temperature",)

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, **settings: float) -> Step:
        """The loss of V queries, or the mean of both views' against each other; `settings` as for `similarity_contrast`."""
        matched = self.matched(weak, strong, world, self.symmetric)
        losses = [similarity_contrast(queries, keys, self.past, **settings) for queries, keys in matched]
        return Step(torch.stack(losses).mean(), matched[0][0].detach(), matched[0][1])


def similarity_contrast(
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    positive_share: float = 0.5,
) -> Tensor:
    """Compute SCE's loss (its eq. 4 to 7): cross-entropy to positive_share x [own key] + (1 - positive_share) x [teacher's relation].

    The relation is taken to the memory alone, as the paper writes it. The authors' code gives the own key a similarity of 0 there
    and so a part of the relation, which is next to nothing once some keys are near.

    Args:
        queries: [V, B, D]. keys: [B, D], the positives. memory: [K, D].
        positive_share: lambda, 0 to 1.

    Returns:
        A scalar, the mean over views and samples. Gradient flows through `queries` alone.
    """
    log_choices = log_choice(queries, keys, memory, student_temperature)  # [V, B, 1 + K]
    target = relation(keys.detach(), memory.detach(), teacher_temperature)  # [B, K]
    related = (target * log_choices[..., 1:]).sum(dim=-1)
    return -(positive_share * log_choices[..., 0] + (1 - positive_share) * related).mean()
