"""How long a run waits for its data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.data.images import Images
from relssl.data.loader import Batch, FromFiles, Plan, Resident, Unreadable, create_loader
from relssl.engine import Engine, send
from relssl.errors import CheckpointError, DataError, Interrupted, NumericError
from relssl.method import create_method, health, schedules
from relssl.method.base import ALONE, Step, World, unwrapped
from relssl.method.create import create_run_optimizer
from relssl.method.health import effective_rank, spread, verdict
from relssl.settings.run import METHODS, Config, derive
from relssl.train import checkpoint
from relssl.train.online import OnlineKnn
from relssl.train.run_folder import Display, Journal, RunFolder
from relssl.train.signals import REASONS, StopRequest
from relssl.weights import store


class Stopwatch:
    """Counts steps, and the seconds spent waiting for their data out of all."""

    def __init__(self) -> None:
        self.begun, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same batches, with the time to get each one counted."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.steps += 1
            yield batch

    def split(self, batch_size: int) -> tuple[float, float]:
        """(images per second, share of the time spent waiting) since the last split."""
        now = time.perf_counter()
        seconds = max(now - self.begun, 1e-9)
        speed, share = self.steps * batch_size / seconds, self.waited / seconds
        self.begun, self.waited, self.steps = now, 0.0, 0
        return speed, share


# Non-finite steps in a row after which a run cannot be expected to recover.
PATIENCE = 10


class Guard:
    """Judges each step on the device and takes back what its forward passes have changed: the batch norms' statistics.

    Optimizer, memory and teacher are given the verdict and stay as they were.

    Args:
        networks: those whose buffers a forward pass changes, already on their device. The buffers are joined into one block
            of memory for each type, so that saving and taking back costs a few kernels and not a few hundred.

    Attributes:
        streak: scalar int64 on the device, the non-finite steps in a row until now.
        worst: the longest streak since `longest` was last called, likewise.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self._blocks = _join(networks)
        self._before = [block.clone() for block in self._blocks]
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        self.worst = self.streak.clone()

    def watch(self) -> None:
        """Note the statistics before a step's forward passes."""
        for before, block in zip(self._before, self._blocks, strict=True):
            before.copy_(block)

    def take_back(self) -> None:
        """Put the statistics back."""
        for before, block in zip(self._before, self._blocks, strict=True):
            block.copy_(before)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step counts, [] on the device; if not, the statistics are put back."""
        good = torch.isfinite(loss) & torch.isfinite(norm)
        for before, block in zip(self._before, self._blocks, strict=True):
            torch.where(good, block, before, out=block)
        self.streak += 1
        self.streak *= ~good
        torch.maximum(self.worst, self.streak, out=self.worst)
        return good

    def longest(self) -> Tensor:
        """The longest streak since the last call, [] on the device."""
        found = self.worst.clone()
        self.worst.copy_(self.streak)
        return found


def _join(networks: Sequence[nn.Module]) -> list[Tensor]:
    """Lay the networks' buffers side by side, a block for each type; each buffer becomes a view of its block."""
    owners: dict[torch.dtype, list[tuple[nn.Module, str, Tensor]]] = {}
    for network in networks:
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                owners.setdefault(buffer.dtype, []).append((module, name, buffer))
    blocks = []
    for found in owners.values():
        block = torch.cat([buffer.reshape(-1) for _, _, buffer in found])
        views = torch.split(block, [buffer.numel() for _, _, buffer in found])
        for (module, name, buffer), view in zip(found, views, strict=True):
            module._buffers[name] = view.view(buffer.shape)
        blocks.append(block)
    return blocks


# To compile takes a minute or two; a run of fewer steps would not earn it back.
WORTH_COMPILING = 2000


def pick_loss_form(config: Config, engine: Engine) -> str:
    """Pick the form of the loss: the one that is asked for, else tiled, but plain on MPS."""
    if config.method.loss_form in ("plain", "tiled"):
        return config.method.loss_form
    return "plain" if engine.device.type == "mps" else "tiled"


def compile_networks(learner: Learner) -> str | None:
    """Compile both networks' forward and backward passes, with CUDA graphs where these are possible, if `compile` says so.

    `auto` compiles on CUDA alone, where enough steps are left and results need not repeat bit for bit, and keeps what turns out
    faster on every rank. The learner's state stays as it was.

    Returns:
        A line for the user if there is something to tell.
    """
    config, engine, left = learner.config, learner.engine, learner.total_steps - learner.step
    worth = engine.device.type == "cuda" and left >= WORTH_COMPILING and not config.engine.deterministic
    if config.compile == "off" or (config.compile == "auto" and not worth):
        return None
    # Graphs are replayed on fixed memory; gradients of accumulated parts and DDP's buckets outlive a replay.
    graphs = engine.world == 1 and config.accumulate == 1
    networks = learner.networks

    def compiled() -> float:
        torch.compiler.reset()  # type: ignore[no-untyped-call]  # one cache serves all networks of a process
        for network in networks:
            network.compile_heads(graphs)
        return _seconds(run, engine)

    learner.guard.watch()
    try:
        with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
            run = _trial(learner)
            before, fault = _tried(lambda: _seconds(run, engine), engine)
            if fault is None:
                after, fault = _tried(compiled, engine)
    finally:
        learner.guard.take_back()
        learner.optimizer.zero_grad(set_to_none=True)
    if fault is not None:
        _undo(networks)
        return f"compile: not possible here ({fault}); going on without"
    if config.compile == "auto" and engine.largest(int(after > before)):
        _undo(networks)
        return f"compile: does not pay here ({after / before:.2f} times the time of a step without); going on without"
    learner.replays = graphs
    return f"compile: networks' passes take {after / before:.2f} of the time without"


def _tried(work: Callable[[], float], engine: Engine) -> tuple[float, str | None]:
    """(what `work` gives, None), or (0, why it failed): on all ranks if on one."""
    found, fault = 0.0, None
    try:
        found = work()
    except Exception as error:  # whatever a compiler runs into
        fault = next(iter(str(error).splitlines()), type(error).__name__)[:160]
    if engine.largest(int(fault is not None)):
        return 0.0, fault or "another rank could not"
    return found, None


def _undo(networks: list[Any]) -> None:
    for network in networks:
        network.compiled_heads = None
    torch.compiler.reset()  # type: ignore[no-untyped-call]  # with it goes the memory that graphs hold


def _trial(learner: Learner) -> Callable[[], None]:
    """A forward and backward pass on views of noise, of the run's own shapes."""
    config, engine, share = learner.config, learner.engine, learner.plan.share

    def noise(size: int) -> Tensor:
        views: Tensor = engine.place(torch.rand(share, config.views.channels, size, size))
        return views

    part = Batch(torch.arange(share), noise(config.views.weak.size), [noise(view.size) for view in derive(config).strong])
    now = learner.settings_at(learner.total_steps - 1)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # As a part that others follow: ranks exchange nothing, so that one that fails leaves none waiting.
        with engine.part(learner.model.student, last=False):
            with engine.autocast():
                made = learner.look(part, now)
            made.loss.backward()  # type: ignore[no-untyped-call]
        learner.optimizer.zero_grad(set_to_none=True)

    return run


def _seconds(run: Callable[[], None], engine: Engine) -> float:
    """The least time of a few runs, after some that compile and warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(3):
        engine.synchronise()
        begun = time.perf_counter()
        run()
        engine.synchronise()
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclass
class Figures:
    """What is to be told of one step: what the host knows of it, and a way to get what the device does.

    Attributes:
        step: optimizer steps made with it.
        known: settings of the step; None if it is not logged, and only to be looked at for non-finite steps.
        read: waits for the figures.
    """

    step: int
    known: dict[str, float] | None
    read: Callable[[], dict[str, torch.Tensor]]


class Learner:
    """Makes optimizer steps, whatever the batches are of.

    Args:
        config: the resolved settings, with the data's means and deviations filled in.
        engine: devices and ranks.
        plan: how steps, parts and ranks share the samples.
        labels: int64 [N] of the samples, for methods that train on them; `classes` is how many there are.

    Attributes:
        step: optimizer steps made.
        classes: of the labels, for methods that train on them; else 0.
        model: the method, with its student and what belongs to it.
        guard: what keeps a non-finite step from leaving a trace.
        loss_form: how the loss is computed.
        compiled: what there is to tell of compiling the networks; None: nothing.
        replays: whether the networks' passes are CUDA graphs.
    """

    def __init__(self, config: Config, engine: Engine, plan: Plan, labels: np.ndarray | None = None, classes: int = 0) -> None:
        self.config, self.engine, self.plan, self.step = config, engine, plan, 0
        self.classes = classes
        self.compiled: str | None = None
        self.replays = False
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        # Every rank builds the same networks and memory from the same seed; they stay equal by moving alike.
        self.loss_form = pick_loss_form(config, engine)
        torch.manual_seed(config.seed)
        memory_source = torch.Generator().manual_seed(config.seed)
        self.model = create_method(config, memory_source, self.loss_form, classes)
        encoder = unwrapped(self.model.student)
        self.model.student = engine.setup(encoder)
        for part in (self.model.teacher, self.model.memory):
            if part is not None:
                engine.place(part)
        self.model.train()
        self.labels = None if labels is None else torch.from_numpy(labels).to(engine.device)
        self.parameters = list(encoder.parameters())
        self.optimizer = create_run_optimizer(config, encoder)
        self.networks = [encoder] if self.model.teacher is None else [encoder, self.model.teacher]
        self.guard = Guard(self.networks, engine.device)
        # From here on randomness inside the networks (dropout, stochastic depth) differs between ranks.
        engine.seed(config.seed + 1 + engine.rank)

    def compile(self) -> None:
        """Compile the networks, if the settings want it and it pays. What it takes to find out leaves no trace."""
        self.compiled = compile_networks(self)

    def train_step(self, parts: list[Batch]) -> Figures | None:
        """One optimizer step, asked of the device and not waited for; its figures if they are to be looked at."""
        now = self.settings_at(self.step)
        self.guard.watch()
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        losses, done = [], []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self.engine.part(self.model.student, last):
                with self.engine.autocast():
                    made = self.look(part, now, self.world(number))
                # Outside autocast, which would round the loss's fp32 products to bf16 on the way back.
                (made.loss / len(parts)).backward()  # type: ignore[no-untyped-call]
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
        told = {"loss": loss, "grad_norm": norm, "keys": keys} if logged else {}
        if logged:
            queries = self._joined([made.queries.transpose(0, 1) for made in done]).transpose(0, 1)
            told = self.health(queries, keys, now) | told
        self._commit(keys, self._joined([part.ids for part in parts]), now, self.guard.judge(loss, norm))
        if not logged and self.step % PATIENCE:
            return None
        return Figures(self.step, now if logged else None, self.engine.fetch(told | {"streak": self.guard.longest()}))

    def look(self, part: Batch, now: dict[str, float], world: World = ALONE) -> Step:
        """The method's step up to the loss, on one part of a batch."""
        labels = {} if self.labels is None else {"labels": self.labels[part.ids.to(self.labels.device)]}
        strong = [self.engine.place(view) for view in part.strong]
        return self.model.step(self.engine.place(part.weak), strong, world, **self.step_settings(now), **labels)

    def world(self, number: int) -> World:
        """The ranks, and the order in which the teacher sees part `number` of this step, shuffled over all of them or as it is."""
        order = None
        if self.config.method.shuffle:
            order = send(torch.from_numpy(self.plan.shuffle(self.step, number)), self.engine.device)
        return World(self.engine.rank, partial(self.engine.gather, share=self.plan.share), order)

    def health(self, queries: torch.Tensor, keys: torch.Tensor, now: dict[str, float]) -> dict[str, torch.Tensor]:
        """The figures of the relations of queries [V, B, D] and keys [B, D], at the settings of the step; without a memory there
        are no relations, and only the keys' spread is told."""
        if self.model.memory is None:
            return {"embedding_std": spread(keys)}
        student, teacher = self.config.method.student_temperature, now["teacher_temperature"]
        return health(queries, keys, self.model.memory.keys, student_temperature=student, teacher_temperature=teacher)

    def _commit(self, keys: torch.Tensor, ids: torch.Tensor, now: dict[str, float], good: torch.Tensor) -> None:
        """Let optimizer, memory and teacher move, unless the step is not finite."""
        for group in self.optimizer.param_groups:
            base = self.config.optimizer.lr if group["constant"] else now["lr"]
            group["lr"] = base * group["times"]
        self.move_student(good)
        self.model.push(keys, ids, good)
        self.model.follow(now["teacher_momentum"], good)

    def move_student(self, good: torch.Tensor) -> None:
        """An optimizer step, if `good` [] says so, and the gradients are gone."""
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]  # read on the device
            self.optimizer.step()
        elif bool(good):  # other forms cannot be told there
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """All ranks' and parts' rows in the order of the batch."""
        return torch.cat([self.engine.gather(part, self.plan.share) for part in parts])

    def step_settings(self, now: dict[str, float]) -> dict[str, float]:
        """What the method's step is given, some of which the schedules say."""
        constants = {name: getattr(self.config.method, name) for name in self.model.constants}
        return constants | {name: now[name] for name in self.model.scheduled}

    def settings_at(self, step: int) -> dict[str, float]:
        """What the schedules say of a step."""
        method, optimizer, epoch = self.config.method, self.config.optimizer, self.steps_per_epoch
        return {
            "lr": schedules.learning_rate(
                step,
                start=optimizer.lr_start,
                peak=optimizer.lr,
                warmup_steps=optimizer.warmup_epochs * epoch,
                total_steps=self.total_steps,
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


def _loader(images: Images, config: Config, plan: Plan, engine: Engine) -> Resident | FromFiles:
    statistics, views = config.views.statistics(), derive(config).views
    return create_loader(images, views, plan, engine.device, statistics, config.loader, config.engine.devices)


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
        self.loader = _loader(images, config, plan, engine)
        labels, classes = (images.labels, images.class_count) if METHODS[config.method.name].labels else (None, 0)
        super().__init__(config, engine, plan, labels, classes)
        self.folder: RunFolder | None = None
        self.online, self.warned = online, False
        self.best: dict[str, Any] | None = None
        self.images, self.fingerprint, self.unreadable = images, images.fingerprint(), set[str]()
        self._decided: dict[str, Any] = {}

    def read(self, images: Images) -> None:
        """Train on the same images, read another way."""
        assert images.fingerprint() == self.fingerprint
        self.images = images
        self.loader = _loader(images, self.config, self.plan, self.engine)

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
            display.row(row, epoch_ended=within == 0)
            warms = "warmup_mix" in self.model.scheduled
            fault = verdict(row, self.config.method.memory_size, keys.shape[1], warms=warms)
            if fault and not self.warned and epoch >= 1:
                self.warned = True
                display.say(f"warning: step {figures.step}: {fault}")

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
        return {"loss form": self.loss_form, "compiled": unwrapped(self.model.student).compiled_heads is not None}

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
        if self.images.in_memory:
            return
        found = self.engine.gather_items([fault for part in parts for fault in part.bad])
        self.unreadable |= {name for name, _ in found}
        if self.folder is not None:
            self.folder.bad_samples(found)
        limit = self.config.loader.max_bad_fraction
        if len(self.unreadable) > limit * len(self.images):
            raise DataError(
                f"{self.images.name}: {len(self.unreadable)} of {len(self.images)} images cannot be read, more than "
                f"loader.max_bad_fraction ({limit:g}); see bad_samples.jsonl"
            )
