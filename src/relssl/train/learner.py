"""What makes a step: networks, memory, optimizer and schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from relssl.config import Config
from relssl.data.batch import Batch
from relssl.data.plan import Plan
from relssl.data.transfer import send
from relssl.engine import Engine
from relssl.method import create_method, health, schedules, shuffled
from relssl.method.base import Step, unwrapped
from relssl.method.health import spread
from relssl.optim import create_optimizer
from relssl.train.choices import compile_networks, pick_loss_form
from relssl.train.guard import PATIENCE, Guard


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
        self.loss_form = pick_loss_form(config, engine, self.plan.share)
        torch.manual_seed(config.seed)
        memory_source = torch.Generator().manual_seed(config.seed)
        self.model = create_method(config, memory_source, self.loss_form, classes)
        encoder = unwrapped(self.model.student)
        self.model.student = engine.setup(encoder)
        self.model.gather = engine.gather_with_gradients
        for part in (self.model.teacher, self.model.memory):
            if part is not None:
                engine.place(part)
        self.model.train()
        self.labels = None if labels is None else torch.from_numpy(labels).to(engine.device)
        self.parameters = list(encoder.parameters())
        self.optimizer = create_optimizer(encoder, config.optimizer)
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
            self.shuffle(number)
            with self.engine.part(self.model.student, last):
                with self.engine.autocast():
                    made = self.look(part, now)
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
        told = {"loss": loss, "grad_norm": norm, "keys": keys} if logged else {}
        if logged:
            queries = self._joined([made.queries.transpose(0, 1) for made in done]).transpose(0, 1)
            told = self.health(queries, keys, now) | told
        self._commit(keys, self._joined([part.ids for part in parts]), now, self.guard.judge(loss, norm))
        if not logged and self.step % PATIENCE:
            return None
        return Figures(self.step, now if logged else None, self.engine.fetch(told | {"streak": self.guard.longest()}))

    def look(self, part: Batch, now: dict[str, float]) -> Step:
        """The method's step up to the loss, on one part of a batch."""
        labels = {} if self.labels is None else {"labels": self.labels[part.ids.to(self.labels.device)]}
        strong = [self.engine.place(view) for view in part.strong]
        return self.model.step(self.engine.place(part.weak), strong, **self.step_settings(now), **labels)

    def shuffle(self, number: int) -> None:
        """Let the teacher see the part `number` of this step shuffled over all ranks, if the settings say so."""
        if not self.config.method.shuffle:
            return
        order = send(torch.from_numpy(self.plan.shuffle(self.step, number)), self.engine.device)
        gather = partial(self.engine.gather, share=self.plan.share)

        def asked(teacher: torch.nn.Module, view: torch.Tensor) -> torch.Tensor:
            return shuffled(lambda images: teacher([images])[0], view, order, self.engine.rank, gather)

        self.model.shuffle = asked

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
