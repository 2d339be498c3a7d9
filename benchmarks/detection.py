"""How detection learns: mean average precision on a small synthetic set, in COCO's layout, at several points of a training.

    python benchmarks/detection.py [--run RUN [--fresh]] [--masks] [--out FILE]

Without a run, the backbone is a resnet18 of random weights; --fresh takes the run's network with random weights, to compare with.
The images, 96 pixels a side, hold squares, discs and triangles of any colour on noise (`shapes.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import relssl
import shapes
from relssl.data.boxes import load
from relssl.data.images import IMAGENET_MEAN, IMAGENET_STD
from relssl.data.loader import worker_count
from relssl.data.plain import PlainView
from relssl.engine import Engine
from relssl.evaluation.detection import Plan, create_detector, curve, measure, pyramid_levels, train
from relssl.method.backbones import create_backbone
from relssl.settings.evaluation import DetectionConfig
from relssl.settings.run import EngineConfig, LoaderConfig
from relssl.train.run_folder import environment
from relssl.weights.spec import BackboneSpec

SIDE = 96
POINTS = 4


def main() -> None:
    """Train once, and measure before, at each quarter and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder or exported file whose backbone is taken")
    parser.add_argument("--fresh", action="store_true", help="take the run's network with random weights")
    parser.add_argument("--masks", action="store_true", help="Mask R-CNN instead of Faster R-CNN, at twice the time")
    parser.add_argument("--train", type=int, default=240, help="training images (default: 240)")
    parser.add_argument("--test", type=int, default=60, help="test images (default: 60)")
    parser.add_argument("--epochs", type=float, default=6.0, help="passes over the training images (default: 6)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at its peak (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and training (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("results/detection.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    backbone, spec = backbone_of(args.run, args.fresh)
    settings = DetectionConfig(
        epochs=args.epochs, batch_size=4, lr=args.lr, min_size=SIDE, max_size=SIDE, regions=32, frozen_stages=0, norm="train"
    )
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_coco(Path(folder, "shapes"), train=args.train, test=args.test, side=SIDE, seed=args.seed)
        found = learn(backbone, spec, str(Path(folder, "shapes")), settings, masks=args.masks, seed=args.seed)
    source = "random weights" if args.run is None or args.fresh else args.run.name
    record = {"machine": environment(), "backbone": spec.name, "weights": source, "settings": vars(settings), **found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.out}")


def backbone_of(run: Path | None, fresh: bool) -> tuple[nn.Module, BackboneSpec]:
    """The network to start from, and what it is."""
    if run is None:
        view = PlainView(224, 256 / 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
        return create_backbone("resnet18"), BackboneSpec("resnet18", {}, "standard", view)
    backbone = relssl.load_backbone(run)
    spec = backbone.spec
    assert isinstance(spec, BackboneSpec)
    return (spec.create() if fresh else backbone), spec


def learn(
    backbone: nn.Module, spec: BackboneSpec, folder: str, settings: DetectionConfig, *, masks: bool, seed: int
) -> dict[str, Any]:
    """The figures at each point, printed as they come; seconds are those of training alone."""
    engine = Engine(EngineConfig(device="auto", precision="fp32"))
    workers = worker_count(None)
    train_set, test_set = load(folder, masks=masks, max_pixels=LoaderConfig().max_pixels)
    plan = Plan.of(len(train_set), settings)
    strides = [stride for _, _, stride in pyramid_levels(backbone, spec.name)]
    model = create_detector(backbone, spec, settings, len(train_set.classes), masks=masks, autocast=engine.autocast)
    model = engine.place(model)
    print(f"{spec.name}, strides {strides}, {plan.steps} steps on {engine.describe()}", flush=True)
    stops = {round(plan.steps * point / POINTS) for point in range(1, POINTS + 1)}
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    seconds = 0.0

    def note() -> None:
        figures = {
            f"{of} {name}": round(value, 2)
            for of, (some, _) in measure(model, test_set, workers, engine).items()
            for name, value in some.items()
        }
        rows.append({"step": len(losses), "seconds": round(seconds, 1), **figures})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)

    note()
    begun = time.perf_counter()
    for loss in train(model, train_set, workers, engine, settings=settings, plan=plan, seed=seed):
        losses.append(loss)
        if len(losses) in stops:
            seconds += time.perf_counter() - begun
            note()
            begun = time.perf_counter()
    return {
        "strides": strides,
        "images": {"training": len(train_set), "test": len(test_set)},
        "points": rows,
        "loss": curve(losses),
    }


if __name__ == "__main__":
    main()
