"""A run before its first step: its images, the settings that only these can complete, its networks, memory and optimizer."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relssl.data.batched import left_out
from relssl.data.images import Images, Pixels
from relssl.data.loader import Loader, Plan, fitting, in_device_memory, worker_count
from relssl.data.named import load
from relssl.data.own import measured
from relssl.data.subsets import check_variety
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.pairs import LabelledPair, choose
from relssl.method import create_method
from relssl.method.base import unwrapped
from relssl.method.create import create_run_optimizer
from relssl.method.encoder import Encoder
from relssl.settings.parts import is_part, title
from relssl.settings.run import Config, derive
from relssl.settings.small import adjustments, give_way
from relssl.train.checkpoint import Guard, State, whole_state
from relssl.train.memory import fit
from relssl.train.online import Online
from relssl.train.run_folder import RunFolder
from relssl.train.start import Given, open_sources, teacher_features
from relssl.weights import store

Say = Callable[[str], object]


@dataclass
class Run:
    """The parts of a run, which stay, and its state, which changes."""

    config: Config  # with the data's means and deviations filled in
    engine: Engine
    images: Images
    fingerprint: str  # 16 hex digits that change with the images
    plan: Plan  # the samples of each step, part and rank
    loader: Loader  # makes the views of these samples
    labels: Tensor | None  # int64 [N] on the device, for methods that train on them
    loss_form: str  # plain or tiled, two ways to the same number
    state: State
    online: Online | None = None  # what is measured while training
    given: Given = field(default_factory=Given)  # weights from elsewhere
    known: Tensor | None = None  # [N, D] on the device, a frozen teacher's features of all images, where these never change
    folder: RunFolder | None = None  # where the run is written; None on ranks that do not write
    graphs: bool = False  # the networks' passes are CUDA graphs, see `pretrain.compile_networks`
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=3))  # the last rows, on which alarms are judged
    warned: set[str] = field(default_factory=set)  # alarms that were raised

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.steps(self.plan.count)

    @property
    def networks(self) -> list[Encoder]:
        """The student, without the engine's wrapper, and the teacher if there is one."""
        model = self.state.model
        return [unwrapped(model.student)] + ([] if model.teacher is None else [model.teacher])

    def read(self, images: Images) -> None:
        """Train on the same images from another source."""
        assert images.fingerprint() == self.fingerprint
        self.images, self.loader = images, open_loader(self.config, self.engine, self.plan, images)


def build(config: Config, engine: Engine, say: Say = id, given: Given | None = None) -> Run:
    """Load a run's images and create the run, ready for its first step and without a folder; `say` gets a line for what takes a while."""
    if given is None:
        config, given = open_sources(config)
    say(f"reading the images of {config.data}")
    images = load_images(config)
    check_variety(images, config.loader.max_pixels)
    if derive(config).traits.labels and images.class_count < 2:
        raise DataError(
            f"{images.name}: {config.method.name} needs a label for each image, of two classes or more; take a labelled set, lay the "
            "images out as train/CLASS/ and val/CLASS/, or take a method without labels"
        )
    settings = complete_settings(config, images)
    for line in (*_remarks(config, settings, images), *adjustments(config, settings, len(images))):
        say(line)
    workers = 0 if images.in_memory else worker_count(config.loader.workers, config.engine.devices)
    enough = len(images) >= settings.batch_size  # too few are refused by the loader
    source, ours = images.source, not any(is_part(view.name) for view in derive(settings).views)
    on_gpu = isinstance(source, Pixels) and engine.device.type == "cuda" and in_device_memory(images, settings.loader, ours)
    resident = source.tensor.nbytes if isinstance(source, Pixels) and on_gpu else 0
    teacher = given.frozen_teacher(settings)
    config = fit(settings, engine, workers, images.class_count, teacher, resident=resident) if enough else settings
    if config.batch_size != settings.batch_size:
        say(f"batch_size is {config.batch_size}, which fits in memory, with optimizer.lr {config.optimizer.lr:g}")
    online = None
    if config.log.knn_every and engine.is_first:
        online = Online(images, config, _labelled_pair(config, images, say))
    say(f"building {title(config.backbone)}")
    return create_run(config, engine, images, online, given)


def load_images(config: Config) -> Images:
    """Return the images that a run trains on."""
    images = load(config.data, config.data_root, "bank" if derive(config).traits.labels else "train")
    return images if config.max_images is None else choose(images, config.max_images, config.seed)


def complete_settings(config: Config, images: Images) -> Config:
    """Return the settings with what only the data can say, small data's included; DataError if there are fewer than four images, ConfigError
    if a view is larger than the images of a set in memory, or settings do not fit so few images."""
    config = give_way(config, len(images))
    views = config.views
    if isinstance(images.source, Pixels) and not views.enlarge:
        side, strong = min(images.source.tensor.shape[-2:]), "views.crops" if views.crops else "views.strong.size"
        sizes = {"views.weak.size": [views.weak.size], strong: [view.size for view in derive(config).strong]}
        faults = [
            f"{name}: {size} is larger than the images of {images.name} ({side} x {side} pixels), which would only be blown up; "
            "views.enlarge true does so all the same"
            for name, each in sizes.items()
            for size in each
            if size > side
        ]
        if faults:
            raise ConfigError(*faults)
    margin, channels, mean, std = views.margin or (1.0 if images.in_memory else 256 / 224), views.channels, views.mean, views.std
    if images.channels != 3 and config.start is None and "views.channels" not in (config.typed or {"views.channels"}):
        channels = images.channels
    fitting(channels, images)
    if mean is None or std is None:
        usual = (images.mean, images.std) if images.channels == 3 else measured(images)
        mean, std = (given or values * (channels // len(values) or 1) for given, values in zip((mean, std), usual, strict=True))
    views = dataclasses.replace(views, channels=channels, mean=mean, std=std, margin=margin)
    views.statistics()  # refuses another number of them
    return dataclasses.replace(config, views=views)


def _remarks(config: Config, settings: Config, images: Images) -> Iterator[str]:
    """Yield what there is to say of completed `settings` and their views of images of other channels than three."""
    if settings.views.channels != 3 and (config.views.mean is None or config.views.std is None):
        yield "views: {} channels of means {} and deviations {}".format(settings.views.channels, *settings.views.statistics())
    if operations := left_out(derive(settings).views, images.channels):
        yield f"views: without {', '.join(operations)}, which mean nothing on {images.channels} channels"


def _labelled_pair(config: Config, images: Images, say: Say) -> LabelledPair | None:
    """Return the labelled images of kNN while training; None for data without a test part, or without labels to vote about."""
    try:
        pair = LabelledPair.load(config.data, config.data_root, config.log.knn_images, config.seed)
    except DataError as error:
        if images.labels is not None:
            say(f"no kNN while training: {error}")
        return None
    return None if pair.bank.labels is None or pair.bank.labels.min() == pair.bank.labels.max() else pair


def create_run(config: Config, engine: Engine, images: Images, online: Online | None = None, given: Given | None = None) -> Run:
    """Create a run that is ready for its first step: on every rank from the same seed; networks and memory stay equal by moving alike."""
    given, traits, labels = given or Given(), derive(config).traits, None
    plan = Plan(len(images), config.batch_size, config.accumulate, engine.rank, engine.world, config.seed)
    loader = open_loader(config, engine, plan, images)
    if traits.labels and images.labels is not None:
        labels = torch.from_numpy(images.labels).to(engine.device)
    best = "tiled" if traits.tiled and engine.device.type != "mps" else "plain"
    form = best if config.method.loss_form == "auto" else config.method.loss_form

    torch.manual_seed(config.seed)
    teacher = given.frozen_teacher(config)
    model = create_method(config, torch.Generator().manual_seed(config.seed), form, images.class_count, teacher)
    student = unwrapped(model.student)
    networks = [student] if model.teacher is None else [student, model.teacher]
    for network in networks:
        given.load(network)
    engine.place(model)
    model.student = engine.setup(student)
    if is_part(config.backbone):
        model.follow(0.0)  # ranks may have brought their own weights, of which the engine has given the student the first rank's
    model.train()
    state = State(model, create_run_optimizer(config, student), Guard(networks, engine.device))
    state.infinite = store.non_finite(store.flatten(whole_state(state, engine))[0])
    known = teacher_features(teacher, config, loader, engine)
    # From here on randomness inside the networks (dropout, stochastic depth) differs between ranks.
    engine.seed(config.seed + 1 + engine.rank)
    return Run(config, engine, images, images.fingerprint(), plan, loader, labels, form, state, online, given, known)


def open_loader(config: Config, engine: Engine, plan: Plan, images: Images) -> Loader:
    """Create what makes a run's views on its device."""
    views, statistics = derive(config).views, config.views.statistics()
    return Loader(images, views, plan, engine.device, statistics, config.loader, config.engine.devices)
