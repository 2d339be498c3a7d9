"""A run's own images as its networks see them: views, nearest neighbours, a map, and their relations to the memory.

Legend: N images of the run, n that are shown, E that are explored, K keys in the memory.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relssl.data.images import Images
from relssl.data.loader import Batch, Plan, worker_count
from relssl.data.plain import PlainView, Reader
from relssl.engine import Engine
from relssl.errors import CheckpointError, DataError
from relssl.evaluation.embed import escaped
from relssl.evaluation.features import evaluating, unit
from relssl.method.base import Method, unwrapped
from relssl.method.encoder import Encoder
from relssl.method.health import effective_rank
from relssl.report.pictures import Sheet, visible
from relssl.report.relations import relations
from relssl.settings.run import derive
from relssl.train.loop import scheduled
from relssl.train.run import Run, create_run, load_images, open_loader
from relssl.train.start import open_sources
from relssl.weights import store
from relssl.weights.opening import Run as Opened

SHOWN = 2000  # images at most
_EXPLORED = 160  # images at most whose relations are shown
_PER_IMAGE = 16  # of its most probable keys whose pictures are shown, as long as there is room
_NEIGHBOURS = 8
_VIEWS = 3  # of an image that are shown, the weak one first
_PIXELS = 32  # side to which images are scaled before their pixels are compared
_SIDE = 64  # of a picture at most, in pixels
_SPACES = ("pixels", "untrained", "student")


@dataclass
class Gallery:
    """Facts as plain JSON, and two sheets of pictures: the n images, and the views of the first E of them, view by view."""

    facts: dict[str, Any]
    images: Sheet
    views: Sheet


def newest(opened: Opened) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Return the newest checkpoint that is whole, its tensors and what else it holds; CheckpointError if there is none."""
    for path in reversed(store.checkpoints(opened.folder / "checkpoints")):
        with suppress(CheckpointError):  # a run that goes on lets go of its older ones, this one perhaps meanwhile
            if store.is_whole(path):
                return path, *store.load(path)
    path = opened.checkpoint()  # whose error says why, or one that has come meanwhile
    return path, *store.load(path)


def gallery(opened: Opened, say: Callable[[str], None] = lambda line: None) -> Gallery:
    """Compute all that is shown of a run's images, from its newest good checkpoint.

    Raises:
        RelsslError: if checkpoint or images are missing or damaged.
    """
    with ready(opened) as (run, start, reset):
        say("report: views and relations")
        explored, pictures, facts = explore(run, copy.deepcopy(start))
        reset()  # without the batch-norm statistics of those passes
        rows = choose_shown(explored, facts, run.state.model, len(run.images), run.config.seed)
        say("report: features")
        return describe(run, rows, explored, pictures, facts, start)


@contextmanager
def ready(opened: Opened) -> Iterator[tuple[Run, Encoder, Callable[[], None]]]:
    """Yield a run as its newest good checkpoint has it, its untrained student, and what brings networks and memory back to that state.

    Raises:
        RelsslError: if checkpoint or images are missing or damaged.
    """
    (path, tensors, meta), config = newest(opened), opened.config
    images = load_images(config)
    if opened.data and opened.data["fingerprint"] != images.fingerprint():
        raise DataError(f"{images.name}: holds other images now than those that the run was trained on")
    config, given = open_sources(config, begun=True)
    engine = Engine.local("cpu" if config.engine.device == "cpu" else "auto", config.engine.precision)
    with engine.running(), torch.no_grad():
        run = create_run(config, engine, images, given=given)
        start = copy.deepcopy(unwrapped(run.state.model.student))
        run.state.step = int(meta["step"])
        reset = partial(restore, run.state.model, tensors, path)
        reset()
        yield run, start, reset


def restore(model: Method, tensors: dict[str, Tensor], path: Any) -> None:
    """Load student, teacher and memory."""
    parts = {"student": unwrapped(model.student), "teacher": model.teacher, "memory": model.memory}
    try:
        for name, part in parts.items():
            if part is not None:
                mine = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
                part.load_state_dict(mine)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the run's settings: {store.one_line(error)}") from error


def explore(run: Run, start: Encoder) -> tuple[list[int], list[np.ndarray], dict[str, Any]]:
    """Return the positions of E images, their views view by view, and their relations to the memory; `start` is the untrained student."""
    config, model, batches = run.config, run.state.model, next_batches(run, _EXPLORED)
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    mean, std = config.views.statistics()
    all_views = [[batch.weak, *batch.strong] for batch in batches]
    side = min(_SIDE, max(view.size for view in derive(config).views))
    pictures = [p for views in zip(*all_views, strict=True) for view in views for p in visible(view, mean, std, side)]
    pictures = pictures[: _VIEWS * len(ids)]
    facts: dict[str, Any] = {"views": len(pictures) // len(ids), "relations": None, "matched": None}
    teacher = model.given if model.teacher is None else model.teacher
    if model.memory is None or teacher is None or not batches[0].strong:
        return ids, pictures, facts
    student = unwrapped(model.student)
    weak, strong = [batch.weak for batch in batches], [batch.strong[0] for batch in batches]
    keys, queries = embed(run, teacher, weak), embed(run, student, strong)
    now = scheduled(run, max(0, run.state.step - 1))
    memory = model.memory.keys.float()
    warm = {"teacher_temperature": now["teacher_temperature"], "student_temperature": config.method.student_temperature}
    facts["relations"] = relations((keys @ memory.T).cpu(), (queries @ memory.T).cpu(), **warm)
    pairs = {"untrained": (embed(run, start, strong), embed(run, start, weak)), "student": (queries, keys)}
    facts["matched"] = {name: share_matched(*pair) for name, pair in pairs.items()}
    return ids, pictures, facts


def next_batches(run: Run, most: int) -> list[Batch]:
    """Return the first images of a run's next epoch, `most` or a few less, in views as it draws them.

    They come in parts as large as the run's, for networks in training mode: so relations are those that the next step would learn from.
    """
    share = max(2, min(run.plan.share, most, len(run.images)))
    parts = max(1, min(most, len(run.images)) // share)
    plan = Plan(len(run.images), share * parts, parts, 0, 1, run.config.seed)
    first = math.ceil(run.state.step / run.plan.steps_per_epoch) * plan.steps_per_epoch
    return next(iter(open_loader(run.config, run.engine, plan, run.images).stream(first, first + 1)))


def embed(run: Run, network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return a network's embeddings [E,D] of parts of views, as a step computes them."""
    with run.engine.autocast():
        return torch.cat([network([run.engine.place(view)])[0] for view in views]).float()


def share_matched(queries: Tensor, keys: Tensor) -> float:
    """Return the share of queries [E,D] whose own key, of keys [E,D], is the nearest."""
    return float(((queries @ keys.T).argmax(dim=1).cpu() == torch.arange(len(keys))).float().mean())


def choose_shown(explored: list[int], facts: dict[str, Any], model: Method, count: int, seed: int) -> np.ndarray:
    """Return the positions of the images that are shown: the explored ones, those that their relations fall on, others by the seed."""
    rows = dict.fromkeys(explored)
    if facts["relations"]:
        assert model.memory is not None
        ids = model.memory.ids.tolist()
        for rank in range(_PER_IMAGE):
            slots = (each["slots"][rank] for each in facts["relations"]["images"] if rank < len(each["slots"]))
            rows |= dict.fromkeys(row for slot in slots if (row := ids[slot]) >= 0)
    others = np.random.default_rng(seed).choice(count, min(count, SHOWN), replace=False)
    rows |= dict.fromkeys(others.tolist())
    return np.array(list(rows)[:SHOWN], np.int64)


def describe(
    run: Run, rows: np.ndarray, explored: list[int], pictures: list[np.ndarray], facts: dict[str, Any], start: Encoder
) -> Gallery:
    """Compute features, neighbours and map of the images at `rows`, the first of them the explored ones."""
    config, engine, model = run.config, run.engine, run.state.model
    view = PlainView.of(config.views)
    reader = Reader(view, worker_count(config.loader.workers), config.loader.max_pixels)
    shown, backbones = run.images.subset(rows), {"untrained": start.backbone, "student": unwrapped(model.student).backbone}
    parts: dict[str, list[Tensor]] = {name: [] for name in _SPACES}
    thumbs, read = list[np.ndarray](), list[int]()
    with evaluating(backbones["untrained"]), evaluating(backbones["student"]):
        for some, views, _ in reader.batches(shown):
            if len(some):
                read += some.tolist()
                thumbs += list(visible(views, view.mean, view.std, min(_SIDE, view.size)))
                parts["pixels"].append(
                    F.interpolate(views, (min(_PIXELS, view.size),) * 2, mode="bilinear", antialias=True).flatten(1)
                )
                with engine.autocast():
                    for name, backbone in backbones.items():
                        parts[name].append(backbone(engine.place(views)).float().cpu())
    features = {name: unit(torch.cat(each)) for name, each in parts.items()}
    facts |= names_and_labels(run.images, rows[read])
    facts |= {
        "images": len(run.images),
        "step": run.state.step,
        "explored": [read.index(i) if i in read else -1 for i in range(len(explored))],
    }
    if facts["relations"]:
        assert model.memory is not None
        place = {row: number for number, row in enumerate(rows[read].tolist())}
        ids = model.memory.ids.tolist()
        used = {slot for each in facts["relations"]["images"] for slot in each["slots"]}
        # Of each key that is listed: the picture it stands for; -1 of an image that is not shown, -2: a random direction of the start.
        facts["relations"]["pictures"] = {slot: -2 if ids[slot] < 0 else place.get(ids[slot], -1) for slot in sorted(used)}
    facts["neighbours"] = neighbours(features, facts.get("labels"))
    facts["maps"] = maps(features["student"], config.seed)
    facts["ranks"] = {name: round(float(effective_rank(features[name])), 1) for name in ("untrained", "student")}
    return Gallery(facts, Sheet(thumbs), Sheet(pictures))


def names_and_labels(images: Images, rows: np.ndarray) -> dict[str, Any]:
    """Return the images' names, of files below the folder that holds all of them, and their labels where there are any."""
    names = [images.source.name(row) for row in rows.tolist()]
    above = os.path.commonpath({os.path.dirname(name) for name in names}) + "/" if all(map(os.path.isabs, names)) else ""
    facts: dict[str, Any] = {"names": [escaped(name.removeprefix(above)) for name in names]}
    if images.labels is not None and (labels := images.labels[rows]).max() >= 0:
        classes = images.classes or [str(label) for label in range(int(labels.max()) + 1)]
        facts |= {"labels": labels.tolist(), "classes": [escaped(name) for name in classes]}
    return facts


def neighbours(features: dict[str, Tensor], labels: list[int] | None) -> dict[str, Any]:
    """Return each image's nearest others by cosine in each space, nearest first, and what they say of the space."""
    facts: dict[str, Any] = {}
    for name, vectors in features.items():
        similar = (vectors @ vectors.T).fill_diagonal_(-2)
        nearest = similar.topk(min(_NEIGHBOURS, len(vectors) - 1), dim=1).indices
        facts[name] = {"nearest": nearest.tolist()}
        if labels is not None:
            known = torch.tensor(labels)
            facts[name]["same_class"] = round(float((known[nearest] == known[:, None]).float().mean()), 4)
        if name == "student":
            counts = torch.bincount(nearest.flatten(), minlength=len(vectors))
            hubs = counts.topk(min(24, len(vectors)))
            pairs = similar.triu(1).flatten().topk(min(12, len(vectors)))
            facts["hubs"] = list(zip(hubs.indices.tolist(), hubs.values.tolist(), strict=True))
            facts["pairs"] = [
                [*divmod(place, len(vectors)), round(value, 4)]
                for place, value in zip(pairs.indices.tolist(), pairs.values.tolist(), strict=True)
            ]
    return facts


def maps(vectors: Tensor, seed: int) -> dict[str, list[list[int]]]:
    """Return the images' places [n,2] in 0..1000 on maps of their features: PCA, t-SNE and, where it is installed, UMAP."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = vectors.double().numpy()
    few = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    flat = {"PCA": few[:, :2] if few.shape[1] > 1 else np.c_[few, 0 * few]}
    if len(x) > 10:
        tsne = TSNE(init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=seed, n_jobs=torch.get_num_threads())
        flat["t-SNE"] = tsne.fit_transform(few)
        if importlib.util.find_spec("umap") is not None:
            with warnings.catch_warnings(action="ignore"):  # that it could do more with TensorFlow
                import umap

            flat["UMAP"] = umap.UMAP(random_state=seed, n_jobs=1).fit_transform(few)
    return {name: _scaled(places) for name, places in flat.items()}


def _scaled(places: np.ndarray) -> list[list[int]]:
    low, high = places.min(axis=0), places.max(axis=0)
    scaled: list[list[int]] = ((places - low) / max(float((high - low).max()), 1e-12) * 1000).round().astype(int).tolist()
    return scaled
