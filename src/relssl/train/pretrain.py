"""The two ways into a run: start it, or go on with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relssl.config import Config, resolve
from relssl.data.sources import Images, load
from relssl.engine import Engine
from relssl.errors import DataError, Interrupted, RelsslError
from relssl.evaluate.protocol import LabelledPair, choose
from relssl.train.folder import RunFolder, default_folder, refuse_used
from relssl.train.journal import Display, read_rows
from relssl.train.online import OnlineKnn
from relssl.train.trainer import Trainer
from relssl.weights.export import export
from relssl.weights.runs import load_run


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        backbone: the exported student.
        rows: what metrics.jsonl holds.
        raw_pixels: kNN top-1 of the pixels themselves in percent, None without labels or in-memory images.
    """

    folder: Path
    backbone: Path
    rows: list[dict[str, Any]]
    raw_pixels: float | None


def pretrain(
    data: str = "digits",
    *,
    config: str | Path | None = None,
    settings: Config | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Result | None:
    """Pretrain a backbone with ReSSL.

    Args:
        data: name of a data set, folder of images or list file.
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
    made = settings or resolve({"data": data} | overrides, config)
    if made.out is None:
        made = dataclasses.replace(made, out=default_folder(made))
    engine = Engine(made.engine)
    folder = Path(made.out or "")
    if engine.is_first:
        refuse_used(folder)
    engine.wait()
    return _run(made, folder, engine, quiet, checkpoint=None, fresh=True)


def resume(run: str | Path, *, checkpoint: str | None = None, quiet: bool = False) -> Result | None:
    """Go on with a run exactly where it was saved.

    Args:
        run: a run folder.
        checkpoint: name of an older checkpoint to go on from, such as `step-00001200`; default the newest.

    Returns:
        The finished run; at once if it had finished already.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the good one before it is named.
    """
    loaded = load_run(run)
    engine = Engine(loaded.config.engine)
    any_saved = checkpoint is not None or any((loaded.folder / "checkpoints").glob("step-*"))
    path = loaded.named(checkpoint) if checkpoint is not None else loaded.checkpoint() if any_saved else None
    return _run(loaded.config, loaded.folder, engine, quiet, checkpoint=path, fresh=False)


def complete_settings(config: Config, images: Images) -> Config:
    """The configuration with what only the data can say."""
    views = config.views
    views = dataclasses.replace(
        views,
        mean=views.mean or images.mean,
        std=views.std or images.std,
        margin=views.margin or (1.0 if images.pixels is not None else 256 / 224),
    )
    return dataclasses.replace(config, views=views)


def _run(config: Config, path: Path, engine: Engine, quiet: bool, checkpoint: Path | None, fresh: bool) -> Result | None:
    images = load(config.data, config.data_root, "train")
    if config.max_images is not None:
        images = choose(images, config.max_images, config.seed)
    config = complete_settings(config, images)
    online = _online(config)
    if (
        fresh
        and len(images) >= config.batch_size
        and config.method.memory_size > 0.5 * len(images)
        and engine.is_first
        and not quiet
    ):
        print(
            f"note: the memory ({config.method.memory_size}) is over half of the data ({len(images)}): samples meet old copies of themselves"
        )
    folder: RunFolder | None = None
    try:
        trainer = Trainer(config, None, engine, images, online if engine.is_first else None)
        if engine.is_first:
            folder = trainer.folder = RunFolder(path)
            if fresh:
                folder.describe(
                    config, {"data": {"images": len(images), "fingerprint": images.fingerprint()}, "engine": engine.describe()}
                )
            folder.bad_samples(images.bad)
        inexact = trainer.restore(checkpoint) if checkpoint is not None else []
        return _fit(trainer, folder, engine, images, quiet, inexact)
    finally:
        if folder is not None:
            folder.close()


def _fit(
    trainer: Trainer, folder: RunFolder | None, engine: Engine, images: Images, quiet: bool, inexact: list[str]
) -> Result | None:
    with Display(trainer.total_steps, trainer.step, show=engine.is_first and not quiet) as display:
        display.say(
            f"ReSSL: {trainer.config.backbone} on {len(images)} images of {images.name}, {trainer.total_steps} steps, {engine.describe()}"
        )
        if trainer.step:
            how = f"not bit for bit ({'; '.join(inexact)})" if inexact else "exactly"
            display.say(f"going on {how} from step {trainer.step}")
        try:
            if folder is not None:
                folder.status("running", trainer.step)
            trainer.fit(display)
        except (RelsslError, KeyboardInterrupt) as error:
            if folder is not None:
                _note_failure(folder, trainer, error)
            raise
    return _finish(trainer, folder) if folder is not None else None


def _note_failure(folder: RunFolder, trainer: Trainer, error: BaseException) -> None:
    code = getattr(error, "exit_code", 130)
    state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
    details = {"kind": getattr(error, "kind", "interrupted"), "field": None, "message": str(error)}
    saved = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    folder.status(state, trainer.step, exit_code=code, error=details, last_checkpoint=saved[-1] if saved else None)


def _finish(trainer: Trainer, folder: RunFolder) -> Result:
    backbone = export(folder.path)
    export(folder.path, network="teacher")
    folder.status("complete", trainer.step, exit_code=0, last_checkpoint=f"step-{trainer.step:08d}")
    raw = trainer.online.raw_pixels() if trainer.online is not None else None
    return Result(folder.path, backbone, read_rows(folder.path / "metrics.jsonl"), raw)


def _online(config: Config) -> OnlineKnn | None:
    """The kNN evaluation, if it is wanted and the data has labels and a test part."""
    if config.log.knn_every == 0:
        return None
    try:
        pair = LabelledPair.load(config.data, config.data_root, config.log.knn_images, config.seed)
    except DataError:
        return None
    return OnlineKnn(pair, config)
