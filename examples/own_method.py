"""Pretrain by a method of your own: the student's similarities to the memory follow the teacher's, with no softmax in between.

    python examples/own_method.py [RUN]

From a command line, in this folder:

    relssl pretrain digits --method own_method:Similarities --out runs/own-method
"""

import sys
from collections.abc import Sequence

from torch import Tensor

import relssl
from relssl.method.base import ALONE, Method, Step, World


class Similarities(Method):
    """Squared differences of cosine similarities to the memory."""

    scheduled = ("warmup_mix",)  # InfoNCE's share falls from 1 to 0 by method.warmup; here its complement weighs the loss

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, *, warmup_mix: float) -> Step:
        keys = self.keys([weak], world)[0]  # [B, D], of the teacher
        queries = self.student(strong)  # [V, B, D]
        memory = self.past  # [K, D], the teacher's keys from before this step
        loss = (queries @ memory.T - keys @ memory.T).square().mean()
        return Step((1 - warmup_mix) * loss, queries.detach(), keys)


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own-method"
    run = relssl.pretrain("digits", method=Similarities, backbone="resnet10t", max_images=512, epochs=1, out=folder)
    print(f"loss {run.rows[-1]['loss']:.5f}")
