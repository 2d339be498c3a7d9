"""What pays on this machine, found out where a setting says `auto`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relssl.config import Config
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.method.encoder import Encoder
from relssl.method.ressl import OBJECTIVES, unwrapped

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
    if asked == "triton":
        try:
            if kind != "cuda":
                raise ImportError("it needs a CUDA device")
            import relssl.method.fused  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"method.loss_form: triton cannot run here ({error}); use tiled or auto") from error
    if asked != "auto" or kind != "cuda":
        return {"auto": "tiled" if kind == "cpu" else "plain"}.get(asked, asked)
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

    try:
        return min(("tiled", "triton"), key=lambda form: _seconds(step(form), engine))
    except Exception:  # whatever a compiler for this machine's GPU runs into
        return "tiled"


def compile_networks(learner: Learner) -> str | None:
    """Compile both networks' forward and backward passes, with CUDA graphs where these are possible, if `compile` says so.

    `auto` compiles on CUDA alone, for runs long enough, and keeps what turns out faster. The learner's state stays as it was.

    Returns:
        A line for the user if there is something to tell.
    """
    config, engine = learner.config, learner.engine
    worth = engine.device.type == "cuda" and learner.total_steps >= WORTH_COMPILING
    if config.compile == "off" or (config.compile == "auto" and not worth):
        return None
    networks = [unwrapped(learner.model.student), learner.model.teacher]
    run = _trial(learner)
    try:
        with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
            learner.guard.watch()
            before = _seconds(run, engine)
            for network in networks:
                # Graphs are replayed on fixed memory; gradients of accumulated parts and DDP's buckets outlive a replay.
                _compile(network, graphs=engine.world == 1 and config.accumulate == 1)
            after = _seconds(run, engine)
    except Exception as error:  # whatever a compiler runs into: the run goes on without
        _undo(networks)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"compile: not possible here ({reason[:160]}); going on without"
    finally:
        learner.guard.take_back()
        learner.optimizer.zero_grad(set_to_none=True)
    if config.compile == "auto" and engine.largest(int(after > before)):
        _undo(networks)
        return f"compile: does not pay here ({after / before:.2f} times the time of a step without); going on without"
    return f"compile: networks' passes take {after / before:.2f} of the time without"


def _compile(network: Encoder, graphs: bool) -> None:
    made = torch.compile(network.embed, dynamic=False, mode="reduce-overhead" if graphs else None)
    # The embeddings leave the memory that the next replay writes to. Evaluation calls the backbone, which stays as it is.
    network.__dict__["embed"] = lambda images: made(images).clone()


def _undo(networks: list[Encoder]) -> None:
    for network in networks:
        network.__dict__.pop("embed", None)


def _trial(learner: Learner) -> Callable[[], None]:
    """A forward and backward pass on views of noise, of the run's own shapes."""
    config, engine, share = learner.config, learner.engine, learner.plan.share

    def noise(size: int) -> Tensor:
        views: Tensor = engine.place(torch.rand(share, 3, size, size))
        return views

    weak, strong = noise(config.views.weak.size), [noise(view.size) for view in config.strong_views]

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with engine.autocast():
            made = learner.model.step(weak, strong, student_temperature=0.1, teacher_temperature=0.04)
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
