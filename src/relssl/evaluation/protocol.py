"""Evaluations, each number with the card that says how it was made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.atomic import storing, write_json
from relssl.config import Config
from relssl.data.plain import describe
from relssl.data.sources import Images, load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.features import extract
from relssl.evaluation.knn import SETTINGS, knn_accuracy
from relssl.schema import nearest_word
from relssl.sections import EngineConfig
from relssl.weights.runs import NETWORKS, from_checkpoint, load_backbone, load_run

PROTOCOLS = ("knn",)


@dataclass(frozen=True)
class LabelledPair:
    """The two sides of an evaluation: images whose labels are known, and images to be labelled."""

    bank: Images
    test: Images

    @staticmethod
    def load(
        data: str, root: str | None, at_most: tuple[int, int] | None = None, seed: int = 0, *, index: bool = True
    ) -> LabelledPair:
        """Both sides of a data set, cut to `at_most` (bank, test) images chosen by the seed; `index` as for `load`.

        Raises:
            DataError: if the data set has no labels or no test part.
        """
        sides = [load(data, root, split, index=index) for split in ("bank", "test")]
        if at_most is not None and min(at_most) < 1:
            raise ConfigError(f"images: must be at least 1 on each side, got {at_most[0]} and {at_most[1]}")
        for side in sides:
            if side.labels is None or (side.labels >= 0).sum() == 0:
                raise DataError(f"{data}: has no labels to evaluate with; lay folders out as train/CLASS/ and val/CLASS/")
        if at_most is not None:
            sides = [choose(side, most, seed) for side, most in zip(sides, at_most, strict=True)]
        return LabelledPair(*sides)


def choose(images: Images, at_most: int, seed: int) -> Images:
    """At most that many images, drawn without replacement by the seed and kept in their order."""
    if len(images) <= at_most:
        return images
    rows = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(images))[:at_most])
    return images.subset(rows)


def knn(
    backbone: nn.Module,
    pair: LabelledPair,
    config: Config,
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
    settings: Sequence[tuple[int, float]] = SETTINGS,
) -> dict[str, Any]:
    """Weighted kNN of the test images among the bank, on backbone features in eval mode, for each (k, temperature).

    Returns:
        {"k200-t0.1": {"top1": percent, ...}, "k20-t0.07": ...}; a k beyond the bank is cut to it and named so.
    """
    sides = []
    for images in (pair.bank, pair.test):
        found = extract(backbone, images, config, device, autocast)
        assert images.labels is not None
        sides.append((found.vectors, torch.from_numpy(images.labels[found.rows])))
    return _score(sides, settings)


def raw_pixel_knn(pair: LabelledPair, settings: Sequence[tuple[int, float]] = SETTINGS) -> dict[str, Any] | None:
    """The same on the pixels themselves, for sets in memory: what no network at all would reach."""
    sides = []
    for images in (pair.bank, pair.test):
        if images.pixels is None or images.labels is None:
            return None
        sides.append((images.pixels.flatten(1).float(), torch.from_numpy(images.labels)))
    return _score(sides, settings)


def _score(sides: list[tuple[Tensor, Tensor]], settings: Sequence[tuple[int, float]]) -> dict[str, Any]:
    (bank, bank_labels), (test, test_labels) = sides
    classes = int(max(bank_labels.max(), test_labels.max())) + 1
    found = knn_accuracy(bank, bank_labels, test, test_labels, classes=classes, settings=settings, cap=True)
    shares = ("top1", "top5", "mean_per_class")
    return {
        f"k{result['k']}-t{result['temperature']:g}": {name: round(100 * result[name], 4) for name in shares}
        for result in found["results"]
    }


def card(pair: LabelledPair, config: Config, network: str, precision: str) -> dict[str, Any]:
    """How a number was made: two numbers compare only if their cards match."""
    return {
        "protocol": "knn",
        "network": network,
        "layer": "backbone",
        "batch_norm": "eval, the network's own running statistics",
        "distance": "cosine, votes weighted by exp(similarity / T)",
        "view": describe(config.views),
        "precision": precision,
        "bank": {"images": len(pair.bank), "fingerprint": pair.bank.fingerprint()},
        "test": {"images": len(pair.test), "fingerprint": pair.test.fingerprint()},
    }


def evaluate(
    source: str | Path,
    data: str | None = None,
    *,
    protocol: str = "knn",
    data_root: str | None = None,
    images: tuple[int, int] | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """What a run's student and teacher learned.

    Args:
        source: a run folder, or an exported backbone.
        data: data set with labels, default the run's own.
        protocol: `knn`.
        images: at most this many images (bank, test), chosen by seed 0; the card says how many.

    Returns:
        {"results": {network: {"card": ..., setting: figures}}}; of a run also written to RUN/evaluations/.

    Raises:
        ConfigError, DataError, CheckpointError: for an unknown protocol, data without labels, damaged weights.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol: {protocol!r} is unknown; the nearest is {nearest_word(protocol, PROTOCOLS)}")
    networks, config, folder = networks_of(source)
    if folder is not None:
        with storing(folder / "evaluations"):  # before the work, not after it
            (folder / "evaluations").mkdir(exist_ok=True)
    engine = Engine(EngineConfig(device=device, precision=precision))
    data = data or config.data
    pair = LabelledPair.load(data, data_root or config.data_root, images, index=config.loader.index)
    results: dict[str, Any] = {"source": str(source), "data": data, "results": {}}
    for name, backbone in networks.items():
        scores = knn(engine.place(backbone), pair, config, engine.device, engine.autocast())
        results["results"][name] = {"card": card(pair, config, name, engine.precision), **scores}
    if folder is not None:
        write_json(folder / "evaluations" / f"{protocol}-{Path(data).name}.json", results | {"time": time.time()})
    return results


def networks_of(source: str | Path) -> tuple[dict[str, nn.Module], Config, Path | None]:
    """The backbones behind a run or an exported file, with the settings of their views."""
    path = Path(source)
    if path.suffix == ".safetensors":
        backbone = load_backbone(path)
        return {"backbone": backbone}, backbone.config, None  # type: ignore[return-value]
    run = load_run(path)
    checkpoint = run.checkpoint()
    return {name: from_checkpoint(run.config, checkpoint, name) for name in NETWORKS}, run.config, run.folder
