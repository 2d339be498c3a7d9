"""A Triton kernel for the tiled loss: a tile's similarities become loss and gradient weights in two reads and one write.

Imported only where it is used: Triton comes with torch's CUDA builds and with no other.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def relate_(student: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies of the student's relations under the teacher's, and what their gradient needs, in place.

    Args:
        student: [V, R, K] fp32 logits, contiguous; becomes softmax(student) - softmax(target).
        target: [R, K] fp32 logits, contiguous; left as they are.

    Returns:
        [V, R].
    """
    views, rows, size = student.shape
    cross = student.new_empty(views, rows)
    _relate[(rows, views)](student, target, cross, rows, size, BLOCK=min(_BLOCK, triton.next_power_of_2(size)), num_warps=8)
    return cross


# Only what the kernel is specialised for is annotated: Triton reads annotations as its own.
def _kernel(student, target, cross, rows, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, view = tl.program_id(0), tl.program_id(1)
    student += (view * rows + row).to(tl.int64) * size
    target += row.to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    # One pass for the sums of both softmaxes and for <softmax(target), student>, each relative to the largest logit so far.
    peak_s, sum_s, peak_t, sum_t, dot = -float("inf"), 0.0, -float("inf"), 0.0, 0.0
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        s = tl.load(student + start + columns, mask=inside, other=-float("inf"))
        t = tl.load(target + start + columns, mask=inside, other=-float("inf"))
        new_s = tl.maximum(peak_s, tl.max(s, axis=0))
        sum_s = sum_s * tl.exp(peak_s - new_s) + tl.sum(tl.exp(s - new_s), axis=0)
        peak_s = new_s
        new_t = tl.maximum(peak_t, tl.max(t, axis=0))
        weight, shrink = tl.exp(t - new_t), tl.exp(peak_t - new_t)
        sum_t = sum_t * shrink + tl.sum(weight, axis=0)
        dot = dot * shrink + tl.sum(weight * tl.where(inside, s, 0.0), axis=0)
        peak_t = new_t
    tl.store(cross + view * rows + row, peak_s + tl.log(sum_s) - dot / sum_t)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        s = tl.load(student + start + columns, mask=inside, other=0.0)
        t = tl.load(target + start + columns, mask=inside, other=0.0)
        tl.store(student + start + columns, tl.exp(s - peak_s) / sum_s - tl.exp(t - peak_t) / sum_t, mask=inside)


_relate: Any = triton.jit(_kernel)
