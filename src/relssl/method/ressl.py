"""ReSSL: the student's relation to a memory is matched to the one its teacher sees in a weak view."""

from collections.abc import Sequence

from torch import Tensor

from relssl.method.base import ALONE, Method, Step, World


class ReSSL(Method):
    """Weak-augmentation-guided relational self-supervised learning (NIPS, TPAMI).

    Two options are not the papers' but later methods': the teacher's relation may be that of its backbone's features, and may be
    balanced over the memory ("Clustering Properties of Self-Supervised Learning", ReSA, 2025, has both).
    """

    constants = ("student_temperature", "info_nce_temperature")
    scheduled = ("teacher_temperature", "warmup_mix")

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, **settings: float) -> Step:
        """Algorithm 1 of the paper, up to the loss; `settings` as for `relation.objective`: temperatures, and InfoNCE's share of the loss."""
        keys, features = self.keys([weak], world)[0], None  # [B, D]
        if self.features:
            keys, features = keys.tensor_split((-self.features,), dim=1)  # and [B, F]
        queries = self.student(strong)  # [V, B, D]
        memory = self.past  # [K, D], from before this step: no sample meets itself
        target = self.target(keys, features, settings["teacher_temperature"], world)
        return Step(self.objective(queries, keys, memory, target=target, **settings), queries.detach(), keys, features)
