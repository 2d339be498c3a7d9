"""lightly beside us, with its transforms, projection head, memory bank and teacher update, and the same backbone.

It has no ReSSL loss, so the conventional one is written out here. `make bench-peers` installs it apart from everything else.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import conventional
import files
import ours
import small
from conventional import Step, Transform
from options import Options
from pictures import Noise, write_folder
from relssl.method.backbones import create_backbone, feature_width
from relssl.settings.run import Config
from rounds import Contender, Record, compare, peak, show, spread, times


def views(size: int, mean: Any, std: Any) -> tuple[Transform, Transform]:
    """lightly's weak and MoCo v2 view of a Pillow image."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    normal = {"mean": list(mean), "std": list(std)}
    start = {"input_size": size, "min_scale": 0.2, "normalize": normal, "rr_prob": 0.0, "vf_prob": 0.0}
    weak = SimCLRViewTransform(**start, cj_prob=0.0, random_gray_scale=0.0, gaussian_blur=0.0)
    strong = SimCLRViewTransform(
        **start, cj_prob=0.8, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4, cj_hue=0.1, sigmas=(0.1, 2)
    )
    return weak, strong


def lightly_step(config: Config, device: torch.device, precision: str) -> Step:
    """A function that makes one step as lightly's MoCo examples do."""
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.modules.memory_bank import MemoryBankModule
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    method, optimizer, dim = config.method, config.optimizer, config.encoder.dim
    backbone = create_backbone(config.backbone, config.encoder.stem, config.backbone_args)
    width = feature_width(backbone, config.views.weak.size)
    student = nn.Sequential(backbone, MoCoProjectionHead(width, config.encoder.projector_hidden, dim)).to(device)
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    memory = MemoryBankModule(size=(method.memory_size, dim)).to(device)
    sgd = torch.optim.SGD(student.parameters(), lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")

    def step(weak: Tensor, strong: Tensor) -> None:
        update_momentum(student, teacher, m=method.teacher_momentum)
        with autocast():
            with torch.no_grad():
                keys = teacher(weak)
            queries = student(strong)
        keys, queries = (F.normalize(made.float(), dim=1) for made in (keys, queries))
        keys, bank = memory(keys, update=True)  # the bank [D, K] as it was before
        target = F.softmax(keys @ bank / method.teacher_temperature, dim=1)
        loss = -(target * F.log_softmax(queries @ bank / method.student_temperature, dim=1)).sum(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        sgd.zero_grad()

    return step


def measure(options: Options) -> dict[str, Any]:
    """Compare small images' steps and files' views, print and return the records."""
    if importlib.util.find_spec("lightly") is None:
        raise ImportError("lightly is not installed here; `make bench-peers` does that")
    with tempfile.TemporaryDirectory() as folder:
        size = (100, 75) if options.tiny else (500, 375)
        photos = write_folder(Path(folder, "photos"), options.pick(512, 16), *size)
        return {"steps": _steps(options), "views": _views(options, photos)}


def _steps(options: Options) -> dict[str, Record]:
    base, source = small.settings(options), Noise(options.pick(20 * 256, 64), 32)
    more = {"workers": options.workers, "threads": options.threads, "style": views, "create_step": lightly_step}
    contenders = []
    for precision in small.PRECISIONS:
        lightly = {"settings": base, "source": source, "precision": precision} | more
        mine = {"settings": base | {"engine.precision": precision}, "source": source}
        contenders += [
            Contender(f"lightly {precision}", conventional.training, lightly),
            Contender(f"relssl {precision}", ours.training, mine),
        ]
    records = compare(contenders, options.rounds, units=options.pick(4, 1))
    _table("Small images: training steps beside lightly", records, "images_per_second")
    return records


def _views(options: Options, photos: str) -> dict[str, Record]:
    base = {"settings": files.settings(options, options.pick(32, 8)), "source": photos}
    contenders = [
        Contender("lightly", conventional.loading, base | {"style": views, "workers": options.workers}),
        Contender("relssl", ours.loading, base),
    ]
    records = compare(contenders, options.rounds, units=options.pick(8, 1))
    _table("Files: both views of an image beside lightly, a core", records, "images_per_core_second")
    return records


def _table(title: str, records: dict[str, Record], figure: str) -> None:
    bases, rows = [name for name in records if name.startswith("lightly")], []
    for name, record in records.items():
        record["times"] = {base: times(records, name, base, figure) for base in bases}
        cells = [spread(record["times"][base]) for base in bases]
        rows.append([name, spread(record.get(figure), 1), *cells, peak(record)])
    show(title, ["pipeline", "images/s", *(f"times {base}" for base in bases), "peak MiB"], rows)
