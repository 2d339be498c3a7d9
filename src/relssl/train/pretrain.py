"""The two ways into a run: start it, or go on with it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from relssl.data.cache import shrunken
from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, DistributedError, Interrupted, RelsslError, StorageError
from relssl.evaluation.pairs import LabelledPair, choose
from relssl.settings.run import METHODS, Config, derive, resolve
from relssl.train.loop import Trainer
from relssl.train.online import OnlineKnn
from relssl.train.run_folder import Display, RunFolder, default_folder, read_rows, refuse_used
from relssl.train.signals import REASONS, StopRequest
from relssl.weights import store
from relssl.weights.export import default_target, export
from relssl.weights.opening import load_run

Made = TypeVar("Made")


def complete_settings(config: Config, images: Images) -> Config:
    """The configuration with what only the data can say.

    Raises:
        ConfigError: if a view is larger than the images of a set in memory.
    """
    views = config.views
    if isinstance(images.source, Pixels) and not views.enlarge:
        _refuse_enlarging(config, min(images.source.tensor.shape[-2:]), images)
    views = dataclasses.replace(
        views,
        mean=views.mean or images.mean,
        std=views.std or images.std,
        margin=views.margin or (1.0 if images.in_memory else 256 / 224),
    )
    return dataclasses.replace(config, views=views)


def _refuse_enlarging(config: Config, side: int, images: Images) -> None:
    views = config.views
    sizes = [("views.weak.size", views.weak.size)]
    sizes += [("views.crops", size) for size, _, _ in views.crops] or [
        ("views.strong.size", view.size) for view in derive(config).strong
    ]
    faults = [
        f"{name}: {size} is larger than the images of {images.name} ({side} x {side} pixels), which would only be blown up; "
        "views.enlarge true does so all the same"
        for name, size in sizes
        if size > side
    ]
    if faults:
        raise ConfigError(*faults)


def build(config: Config, engine: Engine) -> Trainer:
    """A run that is ready for its first step and has no folder.

    Raises:
        ConfigError, DataError: if settings and data do not make a run.
    """
    labelled = METHODS[config.method.name].labels
    images = load(config.data, config.data_root, "bank" if labelled else "train")
    if config.max_images is not None:
        images = choose(images, config.max_images, config.seed)
    config = complete_settings(config, images)
    if labelled and images.class_count < 2:
        raise DataError(
            f"{images.name}: {config.method.name} needs a label for each image, of two classes or more; take a labelled set, lay the "
            "images out as train/CLASS/ and val/CLASS/, or take a method without labels"
        )
    return Trainer(config, engine, images, _online(config) if engine.is_first else None)


def shrink(trainer: Trainer, display: Display, stop: StopRequest) -> None:
    """Let the trainer read shrunk images, if they are asked for; the first rank finds or makes them while the others wait.

    Raises:
        Interrupted: on a signal or at the time limit; what is shrunk by then stays.
    """
    config, images, engine = trainer.config, trainer.images, trainer.engine
    if config.loader.cache is None:
        return
    teller = _Stoppable(display, stop, config)
    made = on_first(engine, lambda: shrunken(images, config.loader, teller, config.engine.devices))
    if made is None:
        made = shrunken(
            images, config.loader, teller, config.engine.devices
        )  # made once more by machines that have a disk of their own
    engine.wait()
    trainer.read(dataclasses.replace(images, source=made))


class _Stoppable:
    """A display whose chores end when the run is asked to stop."""

    def __init__(self, display: Display, stop: StopRequest, config: Config) -> None:
        self.say, self.display, self.stop, self.config = display.say, display, stop, config

    @contextmanager
    def chore(self, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
        """As the display's."""
        with self.display.chore(what, done, total) as advance:

            def step(count: int) -> None:
                advance(count)
                if asked := self.stop.asked():
                    where = f"stopped {REASONS[asked]} while images were shrunk"
                    raise Interrupted(f"{where}; go on with `relssl resume {self.config.out}`", asked)

            yield step


def on_first(engine: Engine, make: Callable[[], Made]) -> Made | None:
    """What `make` gives on the first rank, None on the others; its failure is raised on all, so that none waits in vain."""
    made, fault = None, None
    if engine.is_first:
        try:
            made = make()
        except RelsslError as error:
            fault = error
    engine.wait()  # patiently: to shrink a million images takes hours
    fault = engine.broadcast(fault)
    if fault is not None:
        raise fault
    return made


def _online(config: Config) -> OnlineKnn | None:
    """The kNN evaluation, if it is wanted and the data has labels and a test part."""
    if config.log.knn_every == 0:
        return None
    try:
        pair = LabelledPair.load(config.data, config.data_root, config.log.knn_images, config.seed)
    except DataError:
        return None
    if pair.bank.labels is None or pair.bank.labels.min() == pair.bank.labels.max():
        return None  # several labels an image, or a single one for all: nothing to vote about
    return OnlineKnn(pair, config)


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        backbone: the exported student.
        rows: what metrics.jsonl holds; with labels its first row has the kNN of the untrained networks and of raw pixels.
    """

    folder: Path
    backbone: Path
    rows: list[dict[str, Any]]


def pretrain(
    data: str | None = None,
    *,
    config: str | Path | None = None,
    settings: Config | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Result | None:
    """Pretrain a backbone, with ReSSL or the method that `method` names.

    Args:
        data: name of a data set, folder of images or list file; default: what `config` or the recipe names, else digits.
        config: a YAML file of settings.
        settings: a resolved Config, instead of all the others.
        quiet: print nothing.
        overrides: settings by name; sections as mappings (`optimizer={"lr": 0.03}`) or dotted names through `**`.

    Returns:
        The finished run; None on ranks other than the first.

    Raises:
        ConfigError, DataError, StorageError, NumericError, LockedError: each with what to do about it.
        Interrupted: on a signal or at the time limit, after saving.
    """
    made = settings or resolve(({} if data is None else {"data": data}) | overrides, config)
    folder = Path(made.out or default_folder(made))
    engine = Engine(made.engine)
    on_first(engine, lambda: refuse_used(folder))
    with engine.running():
        return _run(dataclasses.replace(made, out=str(folder)), folder, engine, quiet, None, fresh=True)


def resume(
    run: str | Path, *, checkpoint: str | None = None, quiet: bool = False, time_limit: float | None = None
) -> Result | None:
    """Go on with a run exactly where it was saved.

    Args:
        run: a run folder.
        checkpoint: name of an older checkpoint to go on from, such as `step-00001200`; default the newest.
        quiet: print nothing.
        time_limit: minutes after which it saves and stops, infinite for never; default: the run's own setting.

    Returns:
        The finished run; at once if it had finished already.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the good one before it is named.
    """
    loaded = load_run(run)
    folder = loaded.folder
    if checkpoint is None and _state(folder) == "complete":
        return _result(folder)
    saved = any((folder / "checkpoints").glob("step-*"))
    path = loaded.named(checkpoint) if checkpoint is not None else loaded.checkpoint() if saved else None
    config = (
        loaded.config
        if time_limit is None
        else dataclasses.replace(loaded.config, time_limit=None if math.isinf(time_limit) else time_limit)
    )
    engine = Engine(config.engine)
    with engine.running():
        return _run(config, folder, engine, quiet, path, fresh=False)


def _run(config: Config, path: Path, engine: Engine, quiet: bool, saved: Path | None, *, fresh: bool) -> Result | None:
    try:
        trainer = build(config, engine)
    except torch.OutOfMemoryError as error:
        raise _too_large(config) from error
    config = trainer.config
    folder = trainer.folder = on_first(engine, lambda: RunFolder(path))
    try:
        if folder is not None:
            if fresh:
                refuse_used(path)  # again, now that nobody else can write it
            if not (path / "config.yaml").exists():
                facts = {"images": len(trainer.images), "fingerprint": trainer.fingerprint}
                folder.describe(config, {"data": facts, "engine": engine.describe()})
            folder.bad_samples(trainer.images.bad)
        inexact = trainer.restore(saved) if saved is not None else []
        if folder is not None:
            folder.give_up_after(trainer.step)
        trainer.compile()
        inexact += trainer.redecided()
        with Display(trainer.total_steps, trainer.step, show=engine.is_first and not quiet) as display:
            _introduce(trainer, display, inexact)
            _fit(trainer, folder, display)
        return _finish(trainer, folder) if folder is not None else None
    finally:
        if folder is not None:
            folder.close()


def _introduce(trainer: Trainer, display: Display, inexact: list[str]) -> None:
    """Say what is about to run."""
    config, images, memory = trainer.config, trainer.images, trainer.config.method.memory_size
    what = f"{config.backbone} on {len(images)} images of {images.name}"
    display.say(f"{config.method.name}: {what}, recipe {config.recipe}, {trainer.total_steps} steps, {trainer.engine.describe()}")
    if trainer.model.memory is not None and memory > 0.5 * len(images):
        display.say(f"note: the memory ({memory}) is over half of the data: samples meet old copies of themselves")
    if trainer.compiled:
        display.say(trainer.compiled)
    if trainer.step:
        how = f"not bit for bit ({'; '.join(inexact)})" if inexact else "exactly"
        display.say(f"going on {how} from step {trainer.step}")


def _fit(trainer: Trainer, folder: RunFolder | None, display: Display) -> None:
    """Train, and note in status.json how that went."""
    try:
        if folder is not None:
            folder.status("running", trainer.step)
        with StopRequest(trainer.config.time_limit) as stop:
            shrink(trainer, display, stop)
            trainer.fit(display, stop)
    except BaseException as error:
        known = named(error, trainer)
        if folder is not None:
            # A full disk must not hide the error that there is to tell.
            with suppress(StorageError):
                _note_failure(folder, trainer, known)
        if known is error:
            raise
        raise known from error


def named(error: BaseException, trainer: Trainer) -> BaseException:
    """An error of the libraries below as one of ours, where it is known what to do about it."""
    if isinstance(error, RelsslError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return _too_large(trainer.config)
    if isinstance(error, OSError):
        # Whatever is written besides checkpoints (metrics, TensorBoard): the checkpoints before it are whole.
        where = error.filename or trainer.config.out
        return StorageError(f"{where}: cannot be written ({error.strerror or error}); free some space, then resume")
    if isinstance(error, RuntimeError) and trainer.engine.world > 1:
        what = " ".join(str(error).split())[:200]
        return DistributedError(f"rank {trainer.engine.rank} failed at step {trainer.step}, another may have been lost: {what}")
    return error


def _too_large(config: Config) -> ConfigError:
    parts = "" if METHODS[config.method.name].whole_batch else "raise accumulate to compute it in parts, "
    return ConfigError(
        f"batch_size: {config.batch_size} does not fit the device's memory; lower it, {parts}"
        "or set loader.path files to keep the images out of it"
    )


def _note_failure(folder: RunFolder, trainer: Trainer, error: BaseException) -> None:
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
    details = {
        "kind": getattr(error, "kind", "interrupted" if state == "interrupted" else "bug"),
        "field": None,
        "message": str(error),
    }
    saved = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    folder.status(state, trainer.step, exit_code=code, error=details, last_checkpoint=saved[-1] if saved else None)


def _finish(trainer: Trainer, folder: RunFolder) -> Result:
    few = trainer.images.subset(range(min(4, len(trainer.images))))  # enough to tell a wrong file, and quick
    for network in derive(trainer.config).networks:
        export(folder.path, network=network, images=few)
    folder.status("complete", trainer.step, exit_code=0, last_checkpoint=store.step_folder(Path(), trainer.step).name)
    return _result(folder.path)


def _result(folder: Path) -> Result:
    return Result(folder, default_target(folder, "student"), read_rows(folder / "metrics.jsonl"))


def _state(folder: Path) -> str | None:
    """The state that status.json names."""
    try:
        state: str = json.loads((folder / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        return None
    return state
