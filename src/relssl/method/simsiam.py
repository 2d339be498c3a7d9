"""SimSiam (Chen & He, CVPR 2021, arXiv 2011.10566): from one view the student predicts its own embedding of the other."""

from collections.abc import Sequence

from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World


class SimSiam(Method):
    """A simple Siamese network: BYOL without the teacher. What keeps it from collapsing is that no gradient enters what is
    predicted."""

    has_teacher = False

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE) -> Step:
        """Minus the cosine of prediction and embedding, the mean of both directions (their eq. 4), -1 to 1."""
        predictions, embeddings = self.student([weak, *strong], beside="projections")  # [2, B, D] each
        embeddings = embeddings.detach()
        loss = -(predictions * embeddings.flip(0)).sum(dim=-1).mean()
        return Step(loss, predictions.detach(), embeddings[0])
