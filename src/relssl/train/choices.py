"""What pays on this machine, found out where a setting says `auto`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.config import Config
from relssl.data.batch import Batch
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.method.encoder import Encoder
from relssl.method.ressl import OBJECTIVES
from relssl.methods import METHODS

if TYPE_CHECKING:
    from relssl.train.learner import Learner

# To compile takes a minute or two; a run of fewer steps would not earn it back.
WORTH_COMPILING = 2000


def pick_loss_form(config: Config, engine: Engine, share: int) -> str:
    """The form of the loss: the one asked for, tiled on CPUs, plain on MPS, the faster of tiled and triton on CUDA.

    Args:
        share: samples of one part on one device.

    Raises:
        ConfigError: if triton is asked for where it cannot run.
    """
    asked, kind = config.method.loss_form, engine.device.type
    if not METHODS[config.method.name].tiled:
        return "plain"
    if kind != "cuda" and asked == "triton":
        raise ConfigError("method.loss_form: triton needs a CUDA device; use tiled or auto")
    if asked in ("plain", "tiled") or kind != "cuda":
        return {"auto": "tiled" if kind == "cpu" else "plain"}.get(asked, asked)
    if asked == "auto" and config.engine.deterministic:
        return "tiled"
    dim, views = config.encoder.dim, len(config.strong_views)
    queries, keys = _directions(engine, views, share, dim), _directions(engine, share, dim)
    memory = _directions(engine, config.method.memory_size, dim)

    def step(form: str) -> Callable[[], None]:
        def run() -> None:
            loss = OBJECTIVES[form](
                queries.detach().requires_grad_(), keys, memory, student_temperature=0.1, teacher_temperature=0.04
            )
            engine.backward(loss)

        return run

    fused, fault = _tried(lambda: _seconds(step("triton"), engine), engine)
    if asked == "triton" and fault is not None:
        raise ConfigError(f"method.loss_form: triton cannot run here ({fault}); use tiled or auto")
    tiled = _seconds(step("tiled"), engine)
    slower = engine.largest(int(fault is not None or fused > tiled))  # one form for all ranks
    return "tiled" if slower and asked == "auto" else "triton"


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
            _compile(network, graphs)
        return _seconds(run, engine)

    gather, learner.model.gather = learner.model.gather, lambda rows: rows
    learner.guard.watch()
    try:
        with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
            run = _trial(learner)
            before, fault = _tried(lambda: _seconds(run, engine), engine)
            if fault is None:
                after, fault = _tried(compiled, engine)
    finally:
        learner.guard.take_back()
        learner.model.gather = gather
        learner.optimizer.zero_grad(set_to_none=True)
    if fault is not None:
        _undo(networks, engine)
        return f"compile: not possible here ({fault}); going on without"
    if config.compile == "auto" and engine.largest(int(after > before)):
        _undo(networks, engine)
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


def _compile(network: Encoder, graphs: bool) -> None:
    made = torch.compile(network.heads, dynamic=False, mode="reduce-overhead" if graphs else None)
    # The embeddings leave the memory that the next replay writes to. Evaluation calls the backbone, which stays as it is.
    network.__dict__["heads"] = lambda images: tuple(part.clone() for part in made(images))


def _undo(networks: list[Encoder], engine: Engine) -> None:
    for network in networks:
        network.__dict__.pop("heads", None)
    torch.compiler.reset()  # type: ignore[no-untyped-call]  # with it goes the memory that graphs hold
    engine.release()


def _trial(learner: Learner) -> Callable[[], None]:
    """A forward and backward pass on views of noise, of the run's own shapes."""
    config, engine, share = learner.config, learner.engine, learner.plan.share

    def noise(size: int) -> Tensor:
        views: Tensor = engine.place(torch.rand(share, config.views.channels, size, size))
        return views

    part = Batch(torch.arange(share), noise(config.views.weak.size), [noise(view.size) for view in config.strong_views])
    now = learner.settings_at(learner.total_steps - 1)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # As a part that others follow: ranks exchange nothing, so that one that fails leaves none waiting.
        with engine.part(learner.model.student, last=False):
            with engine.autocast():
                made = learner.look(part, now)
            engine.backward(made.loss)
        learner.optimizer.zero_grad(set_to_none=True)

    return run


def _directions(engine: Engine, *shape: int) -> Any:
    return F.normalize(torch.rand(*shape, device=engine.device) - 0.5, dim=-1)


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
