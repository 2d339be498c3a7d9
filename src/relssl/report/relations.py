"""The relations of some images to a run's memory, with all that a page needs to recompute them at another temperature.

Legend: E images, K keys in the memory, G temperatures.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

TOP = 32  # keys of either network's relation that are listed for an image
_SHARPEST, _FLATTEST, _STEPS = 0.005, 0.5, 48  # the teacher's temperatures that a page can set, beside the run's own


@torch.no_grad()
def relations(teacher: Tensor, student: Tensor, teacher_temperature: float, student_temperature: float) -> dict[str, Any]:
    """Return the relations of E images to the memory, as plain JSON.

    A page can show a key's probability at any of the temperatures t, exp(similarity / t - log_sum), exactly, though it holds the
    similarities of few keys: the sums over all K keys are computed here.

    Args:
        teacher, student: [E, K] fp32, cosine similarities to all keys.

    Returns:
        {"keys": K, "teacher_temperature", "student_temperature", "temperatures": [G], "images": E times {
        "slots": the keys that are largest for either network, the teacher's largest first; "teacher", "student": their similarities;
        "log_sum", "entropy", "cross": [G], of the teacher's relation at each temperature the log of the sum, the entropy and the
        cross-entropy with the student's relation, in nats; "student_log_sum"}}. Divergence is cross - entropy.
    """
    own, most = teacher_temperature, min(TOP, teacher.shape[1])
    scale = sorted({own, *(float(f"{t:.3g}") for t in np.geomspace(min(_SHARPEST, own), max(_FLATTEST, own), _STEPS))})
    target = (student / student_temperature).log_softmax(dim=1)
    sums = []
    for temperature in scale:
        logs = (teacher / temperature).log_softmax(dim=1)
        log_sum = (teacher / temperature).logsumexp(dim=1)
        sums.append(torch.stack([log_sum, -(logs.exp() * logs).sum(dim=1), -(logs.exp() * target).sum(dim=1)]))
    table = torch.stack(sums).permute(2, 1, 0)  # [E, 3, G]
    student_sums = (student / student_temperature).logsumexp(dim=1)
    images = []
    for row, (mine, other) in enumerate(zip(teacher, student, strict=True)):
        slots = torch.unique(torch.cat([mine.topk(most).indices, other.topk(most).indices]))
        slots = slots[mine[slots].argsort(descending=True)]
        facts = {"teacher": mine[slots], "student": other[slots], "student_log_sum": student_sums[row]}
        facts |= dict(zip(("log_sum", "entropy", "cross"), table[row], strict=True))
        rounded = {name: values.double().numpy().round(5).tolist() for name, values in facts.items()}
        images.append({"slots": slots.tolist(), **rounded})
    temperatures = {"teacher_temperature": own, "student_temperature": student_temperature, "temperatures": scale}
    return {"keys": teacher.shape[1], "images": images, **temperatures}
