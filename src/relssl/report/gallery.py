"""A run's own images as its networks see them: views, nearest neighbours, a map, and their relations to the memory.

Legend: N images of the run, n that are shown, E that are explored, K keys in the memory.
"""

import copy
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from relssl.method.frozen import FrozenTeacher
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
Facts = dict[str, Any]  # plain JSON


def gallery(opened: Opened, say: Callable[[str], None] = lambda line: None) -> tuple[Facts, dict[str, Sheet]]:
    """Compute all that is shown of a run's images, from its newest good checkpoint.

    Returns:
        Facts, and two sheets of pictures: "thumb", of the n images, and "view", the views of the first E of them, view by view.

    Raises:
        RelsslError: if checkpoint or images are missing or damaged.
    """
    with ready(opened) as (run, start):
        say("report: views and relations")
        explored, views, facts = explore(run, start)
        say("report: features")
        shown, thumbs, features = look(run, choose_shown(run, explored, facts["relations"]), start.backbone)
        places = {row: number for number, row in enumerate(shown)}
        facts |= names_and_labels(run.images, shown) | {"images": len(run.images), "step": run.state.step}
        facts["explored"] = [places.get(row, -1) for row in explored]
        if facts["relations"]:
            ids = memory_ids(run.state.model)
            used = sorted({slot for each in facts["relations"]["images"] for slot in each["slots"]})
            # Of each key that is listed: the picture it stands for; -1 of an image that is not shown, -2: a random direction of the start.
            facts["relations"]["pictures"] = {slot: -2 if ids[slot] < 0 else places.get(ids[slot], -1) for slot in used}
        facts["neighbours"] = neighbours(features, facts.get("labels"))
        facts["maps"] = maps(features["student"], run.config.seed)
        facts["ranks"] = {name: round(float(effective_rank(features[name])), 1) for name in ("untrained", "student")}
    return facts, {"thumb": Sheet(thumbs), "view": Sheet(views)}


@contextmanager
def ready(opened: Opened) -> Iterator[tuple[Run, Encoder]]:
    """Yield a run as its newest good checkpoint has it, and its untrained student.

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
        model, start = run.state.model, copy.deepcopy(unwrapped(run.state.model.student))
        run.state.step = int(meta["step"])
        for name, part in {"student": unwrapped(model.student), "teacher": model.teacher, "memory": model.memory}.items():
            mine = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            try:
                _ = part is None or part.load_state_dict(mine)
            except RuntimeError as error:
                raise CheckpointError(f"{path}: does not fit the run's settings: {store.one_line(error)}") from error
        yield run, start


def newest(opened: Opened) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Return the newest checkpoint that is whole, its tensors and what else it holds; CheckpointError if there is none."""
    for path in reversed(store.checkpoints(opened.folder / "checkpoints")):
        with suppress(CheckpointError):  # a run that goes on lets go of its older ones, this one perhaps meanwhile
            if store.is_whole(path):
                return path, *store.load(path)
    path = opened.checkpoint()  # whose error says why, or one that has come meanwhile
    return path, *store.load(path)


def memory_ids(model: Method) -> list[int]:
    """Return the samples [K] whose keys are in the memory, -1 for a random direction of the start."""
    assert model.memory is not None
    ids: list[int] = model.memory.ids.tolist()
    return ids


def explore(run: Run, start: Encoder) -> tuple[list[int], list[np.ndarray], Facts]:
    """Return the positions of E images, their views view by view, and their relations to the memory; `start` is the untrained student."""
    config, model, batches = run.config, run.state.model, next_batches(run, _EXPLORED)
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    mean, std = config.views.statistics()
    by_view = zip(*([batch.weak, *batch.strong] for batch in batches), strict=True)
    side = min(_SIDE, max(view.size for view in derive(config).views))
    pictures = [picture for views in by_view for part in views for picture in visible(part, mean, std, side)]
    pictures = pictures[: _VIEWS * len(ids)]
    facts: Facts = {"views": len(pictures) // len(ids), "relations": None, "matched": None}
    teacher = model.given if model.teacher is None else model.teacher
    if model.memory is None or teacher is None or not batches[0].strong:
        return ids, pictures, facts
    weak, strong = [batch.weak for batch in batches], [batch.strong[0] for batch in batches]
    keys, queries, memory = embed(run, teacher, weak), embed(run, model.student, strong), model.memory.keys.float()
    temperature = scheduled(run, max(0, run.state.step - 1))["teacher_temperature"]
    rows, past = related(run, teacher, weak)
    if not model.sinkhorn_iterations:  # balanced ones are no function of a temperature alone
        facts["relations"] = relations(
            (rows @ past.T).cpu(), (queries @ memory.T).cpu(), temperature, config.method.student_temperature
        )
    pairs = {"untrained": (embed(run, start, strong), embed(run, start, weak)), "student": (queries, keys)}
    facts["matched"] = {  # of strong views, the share whose own weak one is the nearest
        name: float(((one @ other.T).argmax(dim=1).cpu() == torch.arange(len(ids))).float().mean())
        for name, (one, other) in pairs.items()
    }
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


def embed(run: Run, network: nn.Module, views: Sequence[Tensor], features: bool = False) -> Tensor:
    """Return a network's embeddings [E,D] of parts of views, or its `features` [E,F], as a step computes them; by a copy, as batch norm
    notes what it sees."""
    network = copy.deepcopy(network if isinstance(network, FrozenTeacher) else unwrapped(network))
    with run.engine.autocast():
        parts = (network([run.engine.place(view)], *["features"] * features) for view in views)
        return torch.cat([part[1][0] if features else part[0] for part in parts]).float()


def related(run: Run, teacher: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the teacher's relations of parts of views compare: of the images [E,D], and of the memory [K,D]."""
    memory, features = run.state.model.memory, bool(run.state.model.features)
    assert memory is not None
    past = memory.features if features else memory.keys
    assert past is not None
    return embed(run, teacher, views, features), past.float()


def choose_shown(run: Run, explored: list[int], related: Facts | None) -> np.ndarray:
    """Return the positions [n] of the images that are shown: the explored ones, those that their relations fall on, others by the seed."""
    rows, ids, count = dict.fromkeys(explored), memory_ids(run.state.model) if related else [], len(run.images)
    for rank in range(_PER_IMAGE if related else 0):
        slots = (each["slots"][rank] for each in (related or {})["images"] if rank < len(each["slots"]))
        rows |= dict.fromkeys(row for slot in slots if (row := ids[slot]) >= 0)
    others = np.random.default_rng(run.config.seed).choice(count, min(count, SHOWN), replace=False)
    return np.array(list(rows | dict.fromkeys(others.tolist()))[:SHOWN], np.int64)


def look(run: Run, rows: np.ndarray, untrained: nn.Module) -> tuple[list[int], list[np.ndarray], dict[str, Tensor]]:
    """Return the positions of the images at `rows` that can be read, their pictures, and their unit features in three spaces."""
    view, loader = PlainView.of(run.config.views), run.config.loader
    networks = {"untrained": untrained, "student": unwrapped(run.state.model.student).backbone}
    shown, thumbs, side = list[int](), list[np.ndarray](), min(_PIXELS, view.size)
    parts: dict[str, list[Tensor]] = {"pixels": [], "untrained": [], "student": []}
    with evaluating(networks["untrained"]), evaluating(networks["student"]):
        reader = Reader(view, worker_count(loader.workers), loader.max_pixels)
        for some, views, _ in reader.batches(run.images.subset(rows)):
            if len(some):
                shown += rows[some].tolist()
                thumbs += list(visible(views, view.mean, view.std, min(_SIDE, view.size)))
                small = F.interpolate(views, (side, side), mode="bilinear", antialias=True)
                parts["pixels"].append(small.flatten(1))
                with run.engine.autocast():
                    for name, network in networks.items():
                        parts[name].append(network(run.engine.place(views)).float().cpu())
    return shown, thumbs, {name: unit(torch.cat(each)) for name, each in parts.items()}


def names_and_labels(images: Images, rows: list[int]) -> Facts:
    """Return the images' names, of files below the folder that holds all of them, and their labels where there are any."""
    names = [images.source.name(row) for row in rows]
    above = os.path.commonpath({os.path.dirname(name) for name in names}) + "/" if all(map(os.path.isabs, names)) else ""
    facts: Facts = {"names": [escaped(name.removeprefix(above)) for name in names]}
    if images.labels is not None and (labels := images.labels[rows]).max() >= 0:
        classes = images.classes or [str(label) for label in range(int(labels.max()) + 1)]
        facts |= {"labels": labels.tolist(), "classes": [escaped(name) for name in classes]}
    return facts


def neighbours(features: dict[str, Tensor], labels: list[int] | None) -> Facts:
    """Return each image's nearest others by cosine in each space, nearest first, and what they say of the space."""
    facts: Facts = {}
    for name, vectors in features.items():
        count = len(vectors)
        similar = (vectors @ vectors.T).fill_diagonal_(-2)
        nearest = similar.topk(min(_NEIGHBOURS, count - 1), dim=1).indices
        facts[name] = {"nearest": nearest.tolist()}
        if labels is not None:
            known = torch.tensor(labels)
            same = (known[nearest] == known[:, None])[known >= 0]
            facts[name] |= {"same_class": round(float(same.float().mean()), 4)} if len(same) else {}
        if name == "student":
            times, images = torch.bincount(nearest.flatten(), minlength=count).topk(min(24, count))
            facts["hubs"] = list(zip(images.tolist(), times.tolist(), strict=True))
            cosines, places = similar.triu(1).flatten().topk(min(12, count))
            pairs = zip(places.tolist(), cosines.tolist(), strict=True)
            facts["pairs"] = [[*divmod(place, count), round(cosine, 4)] for place, cosine in pairs]
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
    widest = max(float(np.ptp(places, axis=0).max()), 1e-12)
    scaled: list[list[int]] = ((places - places.min(axis=0)) / widest * 1000).round().astype(int).tolist()
    return scaled
