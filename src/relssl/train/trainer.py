"""One run: everything it is made of, and the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relssl.config import Config
from relssl.data.batch import Batch
from relssl.data.from_files import Unreadable
from relssl.data.loaders import create_loader
from relssl.data.plan import Plan
from relssl.data.sources import Images
from relssl.engine import Engine
from relssl.errors import CheckpointError, DataError, Interrupted, NumericError
from relssl.method import ReSSL, Step, create_encoder, health, schedules
from relssl.method.health import effective_rank, verdict
from relssl.train import checkpoint
from relssl.train.choices import compile_networks, pick_loss_form
from relssl.train.folder import RunFolder
from relssl.train.guard import PATIENCE, Guard
from relssl.train.journal import Display, Journal
from relssl.train.online import OnlineKnn
from relssl.train.optim import create_optimizer
from relssl.train.signals import REASONS, StopRequest
from relssl.train.stopwatch import Stopwatch
from relssl.weights import store


@dataclass
class Figures:
    """What is to be told of one step: what the host knows of it, and a way to get what the device does."""

    step: int
    known: dict[str, float]
    read: Callable[[], dict[str, torch.Tensor]]


class Trainer:
    """Pretrains one student.

    Args:
        config: the resolved settings, with the data's means and deviations filled in.
        engine: devices and ranks.
        images: what to train on.
        online: the kNN evaluation while training; None when the data has no labels.

    Attributes:
        folder: where the run is written; None on ranks that do not write.
    """

    def __init__(self, config: Config, engine: Engine, images: Images, online: OnlineKnn | None) -> None:
        self.config, self.engine, self.online = config, engine, online
        self.folder: RunFolder | None = None
        self.plan = Plan(len(images), config.batch_size, config.accumulate, engine.rank, engine.world, config.seed)
        self.loader = create_loader(images, config, self.plan, engine.device)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        # Every rank builds the same networks and memory from the same seed; they stay equal by moving alike.
        torch.manual_seed(config.seed)
        encoder = create_encoder(config)
        memory_source = torch.Generator().manual_seed(config.seed)
        loss_form = pick_loss_form(config, engine, self.plan.share)
        self.model = ReSSL(encoder, config.method.memory_size, config.encoder.dim, memory_source, loss_form)
        self.model.student = engine.setup(encoder)
        engine.place(self.model.teacher)
        self.model.memory.to(engine.device)
        self.model.train()
        self.parameters = list(encoder.parameters())
        self.optimizer = create_optimizer(encoder, config.optimizer)
        self.guard = Guard([encoder, self.model.teacher], engine.device)
        self.compiled = compile_networks(self)
        # From here on randomness inside the networks (dropout, stochastic depth) differs between ranks.
        engine.seed(config.seed + 1 + engine.rank)
        self.step, self.warned = 0, False
        self.best: dict[str, Any] | None = None
        self.images, self.fingerprint, self.unreadable = images, images.fingerprint(), set[str]()

    def restore(self, path: Path) -> list[str]:
        """Go on from a checkpoint; returns why the run will not repeat bit for bit, if so."""
        facts, inexact = checkpoint.restore(path, self.model, self.optimizer, self.engine)
        if facts["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: was saved at {facts['steps_per_epoch']} steps an epoch, the data now gives {self.steps_per_epoch}"
            )
        self.step, self.best = facts["step"], facts["best"]
        self.guard.streak.fill_(facts["non_finite"])
        self.unreadable = set(facts["unreadable"])
        return inexact if facts["data"] == self.fingerprint else [*inexact, "the data has changed"]

    def fit(self, display: Display) -> None:
        """Train to the end, or until asked to stop.

        Raises:
            Interrupted: after saving, on a signal or at the time limit.
            NumericError: after too many non-finite steps in a row.
            DataError: when too many images cannot be read.
        """
        journal = Journal(self.folder.path, self.step, self.config.log.tensorboard) if self.folder else None
        try:
            with StopRequest(self.config.time_limit) as stop:
                if self.step == 0 and journal is not None and self.online is not None:
                    journal.write({"step": 0, "epoch": 0, "samples": 0} | self.online.baselines(self.model, self.engine))
                self.engine.wait()
                watch = Stopwatch()
                late: Figures | None = None
                for parts in watch.timed(self.loader.stream(self.step, self.total_steps)):
                    figures = self.train_step(parts)
                    self._note_bad(parts)
                    # A row is read once the next step is on its way, so that the device never waits for the host.
                    if late is not None:
                        self._report(late, watch, journal, display)
                    late = figures
                    asked = self.engine.largest(stop.asked())
                    due = asked or self._due()
                    if late is not None and (due or self._knn_due()):
                        self._report(late, watch, journal, display)
                        late = None
                    # After the row, so that rows up to a checkpoint are on disk before it is.
                    if due:
                        self.save()
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

    def train_step(self, parts: list[Batch]) -> Figures | None:
        """One optimizer step; its figures if it is one that is logged. It is only asked of the device, not waited for."""
        method, now = self.config.method, self._settings(self.step)
        self.guard.watch()
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        losses, done = [], []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self.engine.part(self.model.student, last):
                with self.engine.autocast():
                    made = self.model.step(
                        self.engine.place(part.weak),
                        [self.engine.place(view) for view in part.strong],
                        student_temperature=method.student_temperature,
                        teacher_temperature=now["teacher_temperature"],
                        warmup_mix=now["warmup_mix"],
                        info_nce_temperature=method.info_nce_temperature,
                    )
                # Outside autocast, which would round the loss's fp32 products to bf16 on the way back.
                self.engine.backward(made.loss / len(parts))
            losses.append(made.loss.detach())
            done.append(made)
        loss = self.engine.mean(torch.stack(losses).mean())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.optimizer.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optimizer.clip, norm)
        self.step += 1
        keys = self._joined([made.keys for made in done])
        logged = self.step % self.config.log.every == 0 or self.step % self.steps_per_epoch == 0
        # Before the memory moves: the figures are those of the relations that the loss has seen.
        told = self._health(done, keys, now) | {"loss": loss, "grad_norm": norm, "keys": keys} if logged else {}
        self._commit(keys, self._joined([part.ids for part in parts]), now, self.guard.judge(loss, norm))
        if not logged:
            return None
        return Figures(self.step, now, self.engine.fetch(told | {"streak": self.guard.longest()}))

    def _health(self, done: list[Step], keys: torch.Tensor, now: dict[str, float]) -> dict[str, torch.Tensor]:
        return health(
            self._joined([made.queries.transpose(0, 1) for made in done]).transpose(0, 1),
            keys,
            self.model.memory.keys,
            student_temperature=self.config.method.student_temperature,
            teacher_temperature=now["teacher_temperature"],
        )

    def _commit(self, keys: torch.Tensor, ids: torch.Tensor, now: dict[str, float], good: torch.Tensor) -> None:
        """Let optimizer, memory and teacher move, unless the step is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = now["lr"]
        self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # read by fused optimizers
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.push(keys, ids, good)
        self.model.follow(now["teacher_momentum"], good)

    def _report(self, figures: Figures, watch: Stopwatch, journal: Journal | None, display: Display) -> None:
        """Make a row of a step's figures, with kNN where it is due, and tell it."""
        epoch, within = divmod(figures.step, self.steps_per_epoch)
        found = figures.read()
        if found.pop("streak") >= PATIENCE:
            raise NumericError(
                f"step {figures.step}: loss or gradient was not finite {PATIENCE} steps in a row; "
                "lower optimizer.lr, or set optimizer.clip or engine.precision fp32; the last checkpoint is good"
            )
        rank = effective_rank(found.pop("keys"))
        speed, wait = watch.split(self.config.batch_size)
        row: dict[str, Any] = {"step": figures.step, "epoch": epoch, "samples": figures.step * self.config.batch_size}
        row |= figures.known | {name: float(value) for name, value in found.items()} | {"effective_rank": float(rank)}
        row |= {"images_per_second": round(speed, 1), "data_wait": round(wait, 4)}
        if self._knn_due() and figures.step == self.step:
            if self.online is not None:
                row |= self.online.measure(self.model, self.engine)
                if self.best is None or row["knn_top1"] > self.best["knn_top1"]:
                    self.best = {"knn_top1": row["knn_top1"], "checkpoint": store.step_folder(Path(), self.step).name}
            self.engine.wait()
            watch.split(self.config.batch_size)  # the evaluation's time is not the training's
        if journal is not None:
            journal.write(row)
            display.row(row, epoch_ended=within == 0)
            fault = verdict(row, self.config.method.memory_size, self.config.encoder.dim)
            if fault and not self.warned and epoch >= 1:
                self.warned = True
                display.say(f"warning: step {self.step}: {fault}")

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

    def save(self) -> None:
        """Save the whole state and let go of the oldest checkpoints."""
        facts = {
            "steps_per_epoch": self.steps_per_epoch,
            "data": self.fingerprint,
            "best": self.best,
            "unreadable": sorted(self.unreadable),
            "non_finite": int(self.guard.streak),
        }
        where = self.folder.checkpoints if self.folder else Path()
        target = checkpoint.save(where, self.step, self.model, self.optimizer, self.engine, facts)
        if self.folder is not None and target is not None:
            protect = (self.best["checkpoint"],) if self.best else ()
            store.prune(self.folder.checkpoints, self.config.checkpoint.keep, protect)
            self.folder.status("running", self.step, last_checkpoint=target.name)
        self.engine.wait()

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """All ranks' and parts' rows in the order of the batch."""
        return torch.cat([self.engine.gather(part, self.plan.share) for part in parts])

    def _settings(self, step: int) -> dict[str, float]:
        """What the schedules say of a step."""
        method, optimizer, epoch = self.config.method, self.config.optimizer, self.steps_per_epoch
        return {
            "lr": schedules.learning_rate(
                step, peak=optimizer.lr, warmup_steps=optimizer.warmup_epochs * epoch, total_steps=self.total_steps
            ),
            "teacher_momentum": schedules.teacher_momentum(
                step, start=method.teacher_momentum, end=method.teacher_momentum_end, total_steps=self.total_steps
            ),
            "warmup_mix": schedules.warmup_mix(step, shape=method.warmup, length=method.warmup_share * self.total_steps),
            "teacher_temperature": schedules.temperature(
                step,
                start=method.teacher_temperature_start,
                end=method.teacher_temperature,
                length=method.teacher_temperature_epochs * epoch,
            ),
        }

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
