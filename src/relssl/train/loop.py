"""Training, from top to bottom: the loop over the steps, one optimizer step from views to weights, and what is told and saved of it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from relssl.data.loader import Batch, Unreadable
from relssl.engine import send
from relssl.errors import DataError, Interrupted, NumericError
from relssl.method import health, schedules
from relssl.method.base import ALONE, Step, World, unwrapped
from relssl.method.create import step_settings
from relssl.method.health import effective_rank, spread
from relssl.settings.resuming import fixed
from relssl.settings.run import derive
from relssl.train import checkpoint
from relssl.train.console import Display
from relssl.train.figures import alarms, in_words
from relssl.train.loggers import show_end, show_relations, show_views
from relssl.train.run import Run
from relssl.train.signals import StopRequest
from relssl.weights import store

# Non-finite steps in a row after which a run cannot be expected to recover; they are counted on the device, which is asked as often.
PATIENCE = 10
# The figure by which a checkpoint is the best, for each choice of `checkpoint.best`; see docs/health.md for how well it tracked kNN.
BEST = {"knn": "knn_top1", "label-free": "positive_margin", "off": ""}


def train(run: Run, display: Display, stop: StopRequest) -> None:
    """Train to the end, or until asked to stop: Interrupted after saving, NumericError after too many non-finite steps in a row, DataError
    when too many images cannot be read."""
    engine, state, folder, pending = run.engine, run.state, run.folder, None
    if folder is not None:
        folder.open_rows(state.step - (state.unmeasured is not None), run.config, display.say)
        if state.step == 0 and run.online is not None:
            display.say(f"measuring {'the given weights' if run.config.start else 'the untrained network'}")
            folder.write_row({"step": 0, "epoch": 0, "samples": 0} | run.online.baselines(state, engine))
    engine.wait()
    engine.step = state.step
    display.begin(state.step, run.total_steps, run.plan.steps_per_epoch, run.config.batch_size)
    if (row := state.unmeasured) is not None:
        measure(run, row)
        state.unmeasured = None
        write(run, row, display, stop)
        engine.wait()
    watch = Stopwatch(run.loader.stream(state.step, run.total_steps), run.config.batch_size)
    try:
        for parts in watch:
            figures = train_step(run, parts)
            display.step(state.step)
            engine.step, stop.at_once = state.step, None
            if state.step == 1 and folder is not None:
                folder.draw(show_views, [parts[0].weak, *parts[0].strong], 0)
            note_unreadable(run, [fault for part in parts for fault in part.bad])
            # Figures are read once the next step is on its way, so that the device never waits for the host.
            report(run, pending, display, stop)
            if figures is not None and figures.logged:
                figures.speed = watch.split()
            pending = figures
            if engine.largest(stop.pending()) or save_due(run):
                # The row first, so that rows up to a checkpoint are on disk before it is.
                report(run, pending, display, stop)
                save(run)
                pending, _ = None, watch.split()  # evaluating and saving is not training
                code = engine.largest(stop.pending())
                if code and (state.step < run.total_steps or state.unmeasured):
                    raise stop.interruption(code, f"after step {state.step} of {run.total_steps}, saved")
    except Unreadable as error:
        if folder is not None:
            folder.bad_samples(error.faults)
        raise
    if folder is not None and run.recent:
        folder.draw(show_end, run.config, run.recent[-1], run.online and partial(run.online.projected, state, engine))


class Stopwatch:
    """Passes batches on; counts them, and the seconds spent waiting for them out of all."""

    def __init__(self, batches: Iterator[list[Batch]], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def __iter__(self) -> Iterator[list[Batch]]:
        start = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - start
            self.steps += 1
            yield batch
            start = time.perf_counter()

    def split(self) -> dict[str, float]:
        """Return the figures of speed since the last split."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        speed, waiting = self.steps * self.batch_size / seconds, self.waited / seconds
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        return {"images_per_second": round(speed, 1), "data_wait": round(waiting, 4)}


@dataclass
class Figures:
    """The figures of one step: what the schedules say of it, and a way to get those that the device computes."""

    step: int  # optimizer steps so far, this one included
    schedule: dict[str, float]
    read: Callable[[], dict[str, Tensor]]  # waits for the figures of the device
    logged: bool  # all of them; else the count of bad steps alone
    speed: dict[str, float] = field(default_factory=dict)  # which the loop adds


def train_step(run: Run, parts: list[Batch]) -> Figures | None:
    """Make one optimizer step: views -> loss -> gradient -> student, memory and teacher.

    All of it is queued on the device, and nothing here waits for it. A step whose loss or gradient is not finite changes nothing.
    `parts` are this rank's shares of the accumulated parts of the batch. Returns the step's figures, if they are to be read.
    """
    config, engine, state = run.config, run.engine, run.state
    model, optimizer, guard, student = state.model, state.optimizer, state.guard, unwrapped(state.model.student)
    now = scheduled(run, state.step)
    if run.graphs:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    # Loss and gradient, part by part.
    guard.watch()
    steps = []
    for number, part in enumerate(parts):
        with engine.part(model.student, last=number == len(parts) - 1):
            with engine.autocast():
                step = forward(run, part, now, world(run, number))
            # Outside autocast, which would round the loss's fp32 products to bf16 on the way back.
            (step.loss / len(parts)).backward()  # type: ignore[no-untyped-call]
        steps.append(step)
    if state.step < config.optimizer.heads_first * run.plan.steps_per_epoch:
        for parameter in student.backbone.parameters():
            parameter.grad = None  # which every optimizer passes over, and momentum with it
    # Each rank has its own buffers: by way of the loss all hear of one's doubt.
    loss = engine.gather((torch.stack([step.loss.detach() for step in steps]).mean() + guard.doubt()).reshape(1), 1).mean()
    norm = get_total_norm([parameter.grad for parameter in student.parameters() if parameter.grad is not None])
    if config.optimizer.clip is not None:
        clip_grads_with_norm_(student.parameters(), config.optimizer.clip, norm)

    # Before the memory moves: figures are those of the relations that the loss has seen.
    state.step += 1
    keys, figures = joined(run, [step.keys for step in steps]), dict[str, Tensor]()
    features = joined(run, [step.features for step in steps if step.features is not None]) if model.features else None
    logged = state.step % config.log.every == 0 or state.step % run.plan.steps_per_epoch == 0 or state.step == run.total_steps
    if logged:
        queries = joined(run, [step.queries.transpose(0, 1) for step in steps]).transpose(0, 1)
        figures = {"loss": loss, "grad_norm": norm, "keys": keys} | relations(run, queries, keys, features, now)

    # Student, memory and teacher move, unless the step is bad; the verdict is read on the device.
    good = guard.judge(loss, norm)
    for group in optimizer.param_groups:
        group["lr"] = group["times"] * (config.optimizer.lr if group["constant"] else now["lr"])
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(good):  # other forms cannot read it there
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.push(keys, joined(run, [part.ids for part in parts]), good, features)
    model.follow(now["teacher_momentum"], good)
    if not logged and state.step % PATIENCE:
        return None
    return Figures(state.step, now, engine.fetch(figures | {"streak": guard.streak}), logged)


def scheduled(run: Run, step: int) -> dict[str, float]:
    """Compute what the schedules say of a step: learning rate, teacher's momentum and temperature, and InfoNCE's part of the loss."""
    method, optimizer, total, epoch = run.config.method, run.config.optimizer, run.total_steps, run.plan.steps_per_epoch
    momentum, rise = (method.teacher_momentum, method.teacher_momentum_end), optimizer.warmup_epochs * epoch
    start, end, length = method.teacher_temperature_start, method.teacher_temperature, method.teacher_temperature_epochs * epoch
    return {
        "lr": schedules.learning_rate(step, start=optimizer.lr_start, peak=optimizer.lr, warmup_steps=rise, total_steps=total),
        "teacher_momentum": schedules.teacher_momentum(step, start=momentum[0], end=momentum[1], total_steps=total),
        "warmup_mix": schedules.warmup_mix(step, shape=method.warmup, length=method.warmup_share * total),
        "teacher_temperature": schedules.temperature(step, start=start, end=end, length=length),
    }


def world(run: Run, number: int) -> World:
    """Return the ranks, and the order in which the teacher sees part `number` of the present step's batch."""
    engine, plan, order = run.engine, run.plan, None
    if run.config.method.shuffle:
        order = send(torch.from_numpy(plan.shuffle(run.state.step, number)), engine.device)
    return World(engine.rank, partial(engine.gather, share=plan.share), order)


def forward(run: Run, part: Batch, now: dict[str, float], world: World = ALONE) -> Step:
    """Compute the method's loss on one part of a batch, at what the schedules say `now`."""
    model, place = run.state.model, run.engine.place
    settings = step_settings(run.config, model, now)
    if run.labels is not None:
        settings["labels"] = run.labels[part.ids]
    weak = place(part.weak) if run.known is None else run.known[part.ids]
    step: Step = model(weak, [place(view) for view in part.strong], world, **settings)
    return step


def joined(run: Run, parts: list[Tensor]) -> Tensor:
    """Join all ranks' and parts' rows in the order of the batch."""
    return torch.cat([run.engine.gather(part, run.plan.share) for part in parts])


def relations(run: Run, queries: Tensor, keys: Tensor, features: Tensor | None, now: dict[str, float]) -> dict[str, Tensor]:
    """Compute the figures of the relations of queries [V, B, D] and keys [B, D], or of features [B, F]; without a memory there is
    only the keys' spread."""
    model, memory = run.state.model, run.state.model.memory
    if memory is None:
        return spread(keys)
    student, teacher = run.config.method.student_temperature, now["teacher_temperature"]
    ages, target = memory.ages(len(keys)), model.target(keys, features, teacher)
    return health(queries, keys, memory.keys, student_temperature=student, teacher_temperature=teacher, ages=ages, target=target)


def report(run: Run, figures: Figures | None, display: Display, stop: StopRequest) -> None:
    """Read a step's figures, if there are any, and write their row, with kNN where it is due; NumericError after too many bad steps.

    A request to stop ends kNN at once: the row is saved with the state then, and whoever goes on with the run measures first.
    """
    if figures is None:
        return
    state, values = run.state, figures.read()
    if (streak := values.pop("streak")) >= min(PATIENCE, run.total_steps):
        raise NumericError(
            f"step {figures.step}: loss, gradient or a batch norm was not finite {int(streak)} steps in a row; "
            "lower optimizer.lr, or set optimizer.clip or engine.precision fp32; the last checkpoint is good"
        )
    if not figures.logged:
        return
    keys = values.pop("keys")
    vectors = {name: values.pop(name) for name in ("neighbours", "top_probability") if name in values}
    row: dict[str, Any] = {"step": figures.step, "epoch": figures.step // run.plan.steps_per_epoch}
    row["samples"] = figures.step * run.config.batch_size
    row |= figures.schedule | {name: float(value) for name, value in values.items()}
    row |= {"effective_rank": float(effective_rank(keys))} | figures.speed
    if knn_due(run) and figures.step == state.step:
        before, done, stop.at_once = state.neighbours, not stop.pending(), ""
        try:
            if done:
                measure(run, row)
            stop.at_once, done = None, done and not stop.code  # code that was interrupted may have made another error of it
        except Interrupted:
            done = False
        state.neighbours = state.neighbours if done else before
        state.unmeasured = None if run.engine.gather_items([done])[0] else row
    if run.folder is not None and ended(run, row):
        run.folder.draw(show_relations, vectors, figures.step)
    if state.unmeasured is None:
        write(run, row, display, stop)


def measure(run: Run, row: dict[str, Any]) -> None:
    """Add what is measured of the present networks to their row, on the first rank, and note whether they are the best so far."""
    state, figure = run.state, BEST[run.config.checkpoint.best]
    if run.online is not None:
        row |= run.online.measure(state, run.engine)
        if figure in row and row[figure] > (state.best or {}).get(figure, -math.inf):
            state.best = {figure: row[figure], "checkpoint": store.step_folder(Path(), state.step).name}


def write(run: Run, row: dict[str, Any], display: Display, stop: StopRequest) -> None:
    """Write a row, show it, and tell of alarms that the last rows all raise, each once; `log.alarms` stop lets the first end the run."""
    if run.folder is None:
        return
    rows, setting = run.recent, run.config.log.alarms
    run.folder.write_row(row)
    display.row(row, ended(run, row), in_words(row, run.config.method.memory_size))
    rows.append(row)
    full = setting != "off" and len(rows) == rows.maxlen and rows[0]["epoch"] >= 1
    for name, sentence in [*alarms(rows if full else (), run.config).items()][:1]:  # what follows it may be its consequence
        if name not in run.warned:
            run.warned.add(name)
            display.say(f"alarm: step {row['step']}: {name}: {sentence}")
            if setting == "stop" and not stop.code:
                stop.code, stop.reason = NumericError.exit_code, f"by the alarm {name} ({sentence})"


def ended(run: Run, row: dict[str, Any]) -> bool:
    """Return true if a row is that of an epoch's last step, or of the run's."""
    return row["step"] in (row["epoch"] * run.plan.steps_per_epoch, run.total_steps)


def note_unreadable(run: Run, faults: list[tuple[str, str]]) -> None:
    """List images that could not be read, (file, reason) each, on any rank; DataError if there are too many."""
    if run.images.in_memory:
        return
    faults, unreadable, limit = run.engine.gather_items(faults), run.state.unreadable, run.config.loader.max_bad_fraction
    unreadable |= {name for name, _ in faults}
    if run.folder is not None:
        run.folder.bad_samples(faults)
    if len(unreadable) > limit * len(run.images):
        raise DataError(
            f"{run.images.name}: {len(unreadable)} of {len(run.images)} images cannot be read, more than "
            f"loader.max_bad_fraction ({limit:g}); see bad_samples.jsonl"
        )


def knn_due(run: Run) -> bool:
    """Return true if kNN is measured after the present step."""
    epoch, within = divmod(run.state.step, run.plan.steps_per_epoch)
    every = run.config.log.knn_every
    return bool(every) and (run.state.step == run.total_steps or (within == 0 and epoch % every == 0))


def save_due(run: Run) -> bool:
    """Return true if a checkpoint is saved after the present step; so is what kNN measures, as it may be the best."""
    step, settings = run.state.step, run.config.checkpoint
    epoch, within = divmod(step, run.plan.steps_per_epoch)
    ended = within == 0 and epoch % settings.every == 0
    return ended or knn_due(run) or step == run.total_steps or bool(settings.every_steps and step % settings.every_steps == 0)


def origin(run: Run) -> dict[str, Any]:
    """Return what a checkpoint depends on beside its state: the epoch's length, the data, and what rounds otherwise."""
    choices: dict[str, Any] = {"loss form": run.loss_form, "compiled": run.networks[0].compiled_heads is not None}
    if any(isinstance(module, _BatchNorm) for module in run.networks[0].modules()):
        choices["images a batch norm sees (its loss depends on them)"] = run.plan.share // derive(run.config).norm_splits
    facts = {"threads": run.engine.threads, "world": run.engine.world, "precision": run.engine.precision}
    facts |= {"steps_per_epoch": run.plan.steps_per_epoch, "data": run.fingerprint, "settings": fixed(run.config)}
    return {"choices": choices, **facts}


def save(run: Run) -> None:
    """Save the state and let go of the oldest checkpoints; every rank calls it."""
    folder, state = run.folder, run.state
    target = checkpoint.save(folder.checkpoints if folder else None, state, run.engine, origin(run))
    if folder is not None and target is not None:
        store.prune(folder.checkpoints, run.config.checkpoint.keep, (state.best["checkpoint"],) if state.best else ())
        folder.status("running", state.step, last_checkpoint=target.name)
        folder.hooks.call("on_checkpoint", target)
    run.engine.wait()
