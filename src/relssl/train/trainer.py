"""One run: everything it is made of, and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relssl.config import Config
from relssl.data.batch import Batch
from relssl.data.from_files import FromFiles, Unreadable
from relssl.data.loaders import create_loader
from relssl.data.plan import Plan
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.errors import CheckpointError, DataError, Interrupted, NumericError
from relssl.method.base import unwrapped
from relssl.method.health import effective_rank, verdict
from relssl.methods import METHODS
from relssl.train import checkpoint
from relssl.train.folder import RunFolder
from relssl.train.guard import PATIENCE
from relssl.train.journal import Display, Journal
from relssl.train.learner import Figures, Learner
from relssl.train.online import OnlineKnn
from relssl.train.signals import REASONS, StopRequest
from relssl.train.stopwatch import Stopwatch
from relssl.weights import store


class Trainer(Learner):
    """Pretrains one student: steps on a data set, with what is told and saved on the way.

    Args:
        config: the resolved settings, with the data's means and deviations filled in.
        engine: devices and ranks.
        images: what to train on.
        online: the kNN evaluation while training; None when the data has no labels.

    Attributes:
        folder: where the run is written; None on ranks that do not write.
    """

    def __init__(self, config: Config, engine: Engine, images: Images, online: OnlineKnn | None) -> None:
        plan = Plan(len(images), config.batch_size, config.accumulate, engine.rank, engine.world, config.seed)
        self.loader = create_loader(images, config, plan, engine.device)
        labels, classes = (images.labels, images.class_count) if METHODS[config.method.name].labels else (None, 0)
        super().__init__(config, engine, plan, labels, classes)
        self.folder: RunFolder | None = None
        self.online, self.warned = online, False
        self.said: set[str] = set()
        self.best: dict[str, Any] | None = None
        self.images, self.fingerprint, self.unreadable = images, images.fingerprint(), set[str]()
        self._decided: dict[str, Any] = {}

    def read(self, images: Images) -> None:
        """Train on the same images, read another way."""
        assert images.fingerprint() == self.fingerprint
        self.images = images
        self.loader = create_loader(images, self.config, self.plan, self.engine.device)

    def restore(self, path: Path) -> list[str]:
        """Go on from a checkpoint; returns why the run will not repeat bit for bit, if so."""
        facts, inexact = checkpoint.restore(path, self.model, self.optimizer, self.engine)
        if facts["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: was saved at {facts['steps_per_epoch']} steps an epoch, the data now gives {self.steps_per_epoch}"
            )
        self.step, self.best = facts["step"], facts["best"]
        self.guard.streak.fill_(facts["non_finite"])
        self.guard.worst.fill_(facts["non_finite_worst"])
        self._decided = facts["choices"]
        self.unreadable = set(facts["unreadable"])
        return inexact if facts["data"] == self.fingerprint else [*inexact, "the data has changed"]

    def fit(self, display: Display, stop: StopRequest) -> None:
        """Train to the end, or until asked to stop.

        Raises:
            Interrupted: after saving, on a signal or at the time limit.
            NumericError: after too many non-finite steps in a row.
            DataError: when too many images cannot be read.
        """
        journal = Journal(self.folder.path, self.step, self.config.log.tensorboard) if self.folder else None
        try:
            if self.step == 0 and journal is not None and self.online is not None:
                journal.write({"step": 0, "epoch": 0, "samples": 0} | self.online.baselines(self.model, self.engine))
            self.engine.wait()
            watch, late = Stopwatch(), None
            for parts in watch.timed(self.loader.stream(self.step, self.total_steps)):
                figures = self.train_step(parts)
                self._note_bad(parts)
                # A row is read once the next step is on its way, so that the device never waits for the host.
                if late is not None:
                    self._report(*late, journal, display)
                pace = watch.split(self.config.batch_size) if figures is not None and figures.known is not None else None
                late = (figures, pace) if figures is not None else None
                asked = self.engine.largest(stop.asked())
                if late is not None and (asked or self._due()):
                    self._report(*late, journal, display)
                    late = None
                # After the row, so that rows up to a checkpoint are on disk before it is.
                if asked or self._due():
                    self.save()
                    watch.split(self.config.batch_size)  # evaluating and saving is not training
                if asked and self.step < self.total_steps:
                    done = f"stopped {REASONS[asked]} after step {self.step} of {self.total_steps}, saved"
                    raise Interrupted(f"{done}; go on with `relssl resume {self.config.out}`", asked)
        except Unreadable as error:
            if self.folder is not None:
                self.folder.bad_samples(error.faults)
            raise
        finally:
            if journal is not None:
                journal.close()

    def _report(self, figures: Figures, pace: tuple[float, float] | None, journal: Journal | None, display: Display) -> None:
        """Make a row of a step's figures, with kNN where it is due, and tell it; a step that is not logged is only judged.

        Args:
            pace: images per second and share of waiting, up to the step.
        """
        epoch, within = divmod(figures.step, self.steps_per_epoch)
        found = figures.read()
        if found.pop("streak") >= PATIENCE:
            raise NumericError(
                f"step {figures.step}: loss or gradient was not finite {PATIENCE} steps in a row; "
                "lower optimizer.lr, or set optimizer.clip or engine.precision fp32; the last checkpoint is good"
            )
        if figures.known is None or pace is None:
            return
        keys, (speed, wait) = found.pop("keys"), pace
        row: dict[str, Any] = {"step": figures.step, "epoch": epoch, "samples": figures.step * self.config.batch_size}
        row |= (
            figures.known
            | {name: float(value) for name, value in found.items()}
            | {"effective_rank": float(effective_rank(keys))}
        )
        row |= {"images_per_second": round(speed, 1), "data_wait": round(wait, 4)}
        if self._knn_due() and figures.step == self.step:
            if self.online is not None:
                row |= self.online.measure(self.model, self.engine)
                if self.best is None or row["knn_top1"] > self.best["knn_top1"]:
                    self.best = {"knn_top1": row["knn_top1"], "checkpoint": store.step_folder(Path(), self.step).name}
            self.engine.wait()
        if journal is not None:
            journal.write(row)
            self._tell_of_loader(display)
            display.row(row, epoch_ended=within == 0)
            warms = "warmup_mix" in self.model.scheduled
            fault = verdict(row, self.config.method.memory_size, keys.shape[1], warms=warms)
            if fault and not self.warned and epoch >= 1:
                self.warned = True
                display.say(f"warning: step {figures.step}: {fault}")

    def _tell_of_loader(self, display: Display) -> None:
        """Say, once each, how many workers were chosen and what the loader has noticed."""
        if not isinstance(self.loader, FromFiles):
            return
        choice = f"loader: {self.loader.choice}" if self.loader.choice is not None else None
        for line in (choice, self.loader.notice):
            if line is not None and line not in self.said:
                self.said.add(line)
                display.say(line)

    def _knn_due(self) -> bool:
        epoch, within = divmod(self.step, self.steps_per_epoch)
        every = self.config.log.knn_every
        return bool(every) and within == 0 and (epoch % every == 0 or self.step == self.total_steps)

    def _due(self) -> bool:
        """Whether a checkpoint is; what kNN measures is saved, as it may be the best."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        steps = self.config.checkpoint.every_steps
        ended = within == 0 and epoch % self.config.checkpoint.every == 0
        return ended or self._knn_due() or self.step == self.total_steps or bool(steps and self.step % steps == 0)

    def choices(self) -> dict[str, Any]:
        """What a stopwatch may have decided; another decision rounds otherwise."""
        return {"loss form": self.loss_form, "compiled": "heads" in vars(unwrapped(self.model.student))}

    def redecided(self) -> list[str]:
        """What has been decided otherwise than when the checkpoint gone on from was saved."""
        now = self.choices()
        return [f"{name} {was} -> {now[name]}" for name, was in self._decided.items() if now[name] != was]

    def save(self) -> None:
        """Save the whole state and let go of the oldest checkpoints."""
        facts = {
            "steps_per_epoch": self.steps_per_epoch,
            "data": self.fingerprint,
            "best": self.best,
            "unreadable": sorted(self.unreadable),
            "non_finite": int(self.guard.streak),
            "non_finite_worst": int(self.guard.worst),
            "choices": self.choices(),
        }
        where = self.folder.checkpoints if self.folder else Path()
        target = checkpoint.save(where, self.step, self.model, self.optimizer, self.engine, facts)
        if self.folder is not None and target is not None:
            protect = (self.best["checkpoint"],) if self.best else ()
            store.prune(self.folder.checkpoints, self.config.checkpoint.keep, protect)
            self.folder.status("running", self.step, last_checkpoint=target.name)
        self.engine.wait()

    def _note_bad(self, parts: list[Batch]) -> None:
        """Record images that could not be read; too many of them stop the run."""
        if self.images.files is None:
            return
        found = self.engine.all_of([fault for part in parts for fault in part.bad])
        self.unreadable |= {name for name, _ in found}
        if self.folder is not None:
            self.folder.bad_samples(found)
        limit = self.config.loader.max_bad_fraction
        if len(self.unreadable) > limit * len(self.images):
            raise DataError(
                f"{self.images.name}: {len(self.unreadable)} of {len(self.images)} images cannot be read, more than "
                f"loader.max_bad_fraction ({limit:g}); see bad_samples.jsonl"
            )
