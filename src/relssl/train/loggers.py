"""Loggers that the rows of metrics.jsonl go to besides, through Lightning's own; those that nobody asked for are not imported."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from relssl.errors import ConfigError
from relssl.files import read_json, write_json
from relssl.settings.reading import flat
from relssl.settings.run import Config, to_mapping
from relssl.train.figures import describe


def tag(name: str) -> str:
    """Return a figure's name with its group, by which loggers sort: relation/kl, eval/knn_top1."""
    group = next((each.get("group") for each in describe() if name in each["columns"]), None)
    return f"{'eval' if name.startswith(('knn_', 'feature_')) else group or 'train'}/{name}"


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ConfigError if a logger's package is not installed, which imports none of them."""
    if missing := [name for name in names if name != "csv" and importlib.util.find_spec(name) is None]:
        raise ConfigError(*(f"log.to: {name} is not installed; pip install 'relssl[{name}]' or leave it out" for name in missing))


class Loggers:
    """The loggers that `log.to` names. One that fails is left out from then on, in a line to `say`; the run goes on.

    `rows` are those of metrics.jsonl so far, if the run is resumed after step `start`.
    """

    def __init__(self, config: Config, folder: Path, rows: list[dict[str, Any]], start: int, say: Callable[[str], None]) -> None:
        self._say, self._loggers = say, dict[str, Any]()
        ids = read_json(folder / "loggers.json")
        for name in dict.fromkeys(config.log.to):
            with self._surviving(name):
                self._loggers[name] = logger = _open(name, folder, start, ids.get(name))
                if name == "csv":  # begun anew, as rows after the checkpoint do not count
                    for row in rows:
                        _log(logger, row)
                elif name != "tensorboard" and name not in ids:
                    logger.log_hyperparams(to_mapping(config))
                    ids[name] = logger.version if name == "wandb" else logger.run_id
        if ids:
            write_json(folder / "loggers.json", ids)

    def write(self, row: dict[str, Any]) -> None:
        """Pass a row on."""
        self._each(lambda name, logger: _log(logger, row))

    def draw(self, show: Callable[..., None], *subjects: Any) -> None:
        """Let `show` draw its subjects with TensorBoard's writer, if rows go there."""
        if "tensorboard" in self._loggers:
            with self._surviving("tensorboard"):
                show(self._loggers["tensorboard"].experiment, *subjects)

    def close(self) -> None:
        """Let all loggers write what they have."""
        self._each(_close)

    def _each(self, call: Callable[[str, Any], None]) -> None:
        for name, logger in list(self._loggers.items()):
            with self._surviving(name):
                call(name, logger)

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Any:
        from lightning.fabric.utilities import rank_zero_only

        # Loggers write in the process that Lightning takes for the first, by whatever variables are about.
        rank, rank_zero_only.rank = rank_zero_only.rank, 0
        try:
            yield
        except Exception as error:  # whatever others' services run into
            self._loggers.pop(name, None)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._say(f"log.to: {name} gets no more figures ({reason}); metrics.jsonl has them all")
        finally:
            rank_zero_only.rank = rank


def _open(name: str, folder: Path, start: int, known: str | None) -> Any:
    """Open a logger; `known` is the name that a service gave to this run when it began."""
    from lightning.fabric.loggers import CSVLogger, TensorBoardLogger

    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version="", purge_step=start + 1)
    if name == "csv":
        (folder / "csv" / "metrics.csv").unlink(missing_ok=True)
        return CSVLogger(folder, name="csv", version="", flush_logs_every_n_steps=1)
    from lightning.pytorch import loggers  # seconds of imports that files need not wait for

    if name == "wandb":
        return loggers.WandbLogger(name=folder.name, save_dir=folder, project="relssl", id=known, resume="allow")
    server = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute()}/mlflow.db")
    return loggers.MLFlowLogger(experiment_name="relssl", run_name=folder.name, tracking_uri=server, run_id=known)


def _log(logger: Any, row: dict[str, Any]) -> None:
    logger.log_metrics({tag(name): row[name] for name in sorted(row.keys() - {"step"})}, row["step"])


def _close(name: str, logger: Any) -> None:
    logger.save()
    logger.finalize("success")
    if name == "wandb":
        logger.experiment.finish()


def show_views(writer: Any, views: Sequence[Tensor], step: int) -> None:
    """Show eight images of each view [B,C,H,W], the weak one first."""
    for number, view in enumerate(views):
        writer.add_images(f"views/{f'strong-{number}' if number else 'weak'}", pictures(view[:8]), step)


def show_relations(writer: Any, vectors: Mapping[str, Tensor], step: int) -> None:
    """Show how figures of single samples, each [B], are spread."""
    for name, values in vectors.items():
        writer.add_histogram(f"relation/{name}", values[values.isfinite()], step)


def show_end(writer: Any, config: Config, row: Mapping[str, Any], projected: Callable[[], Mapping[str, Any]] | None) -> None:
    """Show the settings beside the last figures, and features for the projector, where these `projected` can be: `add_embedding`'s
    arguments."""
    from torch.utils.tensorboard.summary import hparams

    settings = {k: v if isinstance(v, str | int | float) else str(v) for k, v in flat(to_mapping(config)).items()}
    figures = {tag(name): value for name, value in row.items() if name != "step"}  # which have their values in rows
    for summary in hparams(settings, figures):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)
    if projected is not None:
        writer.add_embedding(**projected(), global_step=row["step"], tag="features")


def pictures(views: Tensor, side: int = 64) -> Tensor:
    """Return normalised views [N,C,H,W], as [N,3 or 1,h,w] in 0..1 with `side` pixels at most."""
    views = views[:, : 3 if views.shape[1] >= 3 else 1].float().cpu()
    views = F.interpolate(views, size=min(side, views.shape[-1]), mode="area")
    low, high = views.amin(dim=(1, 2, 3), keepdim=True), views.amax(dim=(1, 2, 3), keepdim=True)
    return (views - low) / (high - low).clamp_min(1e-6)
