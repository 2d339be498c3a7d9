"""The two ways into a run: start it, or go on with it."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist

import relssl
from relssl.data.cache import shrunken
from relssl.data.loader import Batch
from relssl.data.named import SETS, exists
from relssl.engine import ONE_NUMBER, Engine
from relssl.errors import CheckpointError, ConfigError, DataError, DistributedError, Interrupted, RelsslError, StorageError
from relssl.files import read_json, read_rows, write_file, write_json
from relssl.settings import parts, recipes
from relssl.settings.launcher import MARK, rank, with_launch
from relssl.settings.reading import changes
from relssl.settings.resuming import DATAS, going_on, lasting
from relssl.settings.run import Config, derive, handed_over, to_yaml
from relssl.train import checkpoint
from relssl.train.console import Display
from relssl.train.loggers import refuse_missing
from relssl.train.loop import forward, origin, scheduled, train
from relssl.train.run import Run, build, load_images
from relssl.train.run_folder import Hooks, RunFolder, default_folder, environment, refuse_used
from relssl.train.signals import StopRequest
from relssl.train.start import open_sources
from relssl.weights import store
from relssl.weights.export import default_target, export, unexported
from relssl.weights.opening import Run as Loaded
from relssl.weights.opening import load_run

# To compile takes a minute or two; a run of fewer steps would not earn it back.
WORTH_COMPILING = 2000


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        backbone: the exported student.
        rows: what metrics.jsonl holds; with labels its first row has the kNN of the untrained networks and of raw pixels.
        rank: of this process; the first one wrote all that.
    """

    folder: Path
    backbone: Path
    rows: list[dict[str, Any]]
    rank: int = 0


def pretrain(
    data: Any = None,
    *,
    config: str | Path | None = None,
    settings: Config | None = None,
    quiet: bool = False,
    resume: str | None = None,
    hooks: Sequence[Any] = (),
    **overrides: Any,
) -> Result:
    """Pretrain a backbone, with ReSSL or the method that `method` names.

    Args:
        data: name of a data set, folder of images or list file, or a data set, array or tensor; default: what `config` or the recipe names,
            else digits.
        config: a YAML file of settings.
        settings: a resolved Config, instead of all the others.
        quiet: print nothing.
        resume: "auto": go on with the run in `out` if there is one, or return it if it is complete.
        hooks: objects with any of the methods `on_start`, `on_row`, `on_evaluation`, `on_checkpoint`, `on_end` (see docs/own-parts.md).
        overrides: settings by name; sections as mappings (`optimizer={"lr": 0.03}`), dotted names through `**`, short names (`lr=0.03`).
            `backbone` may be a module, `method` a class, `views` {"weak": callable, "strong": callable}.

    Returns:
        The finished run, on every rank.

    Raises:
        ConfigError, DataError, StorageError, NumericError, LockedError, HookError: each with what to do about it.
        Interrupted: on a signal or at the time limit, after saving.
    """
    with handed_over(data, config, settings, overrides) as given:
        return _start(with_launch(given), quiet, resume, Hooks(hooks))


def _start(config: Config, quiet: bool, mode: str | None, hooks: Hooks) -> Result:
    """Start a run in a new folder, or go on with the one in it in `mode` auto; arguments as of `pretrain`."""
    sources = {name: getattr(config, name) for name in ("start", "teacher")}  # files, from the root on, or names
    config = dataclasses.replace(config, **{k: os.path.abspath(v) for k, v in sources.items() if v and os.path.exists(v)})
    folder = Path(config.out or default_folder(config))
    if mode not in (None, "auto"):
        raise ConfigError(f"resume: must be auto, got {mode}; to go on with a run: relssl resume RUN")
    if mode and (folder / "config.yaml").exists():
        # The run has the batch that fits, and the arguments of given weights.
        own = ["out", "fit_batch"]
        own += ["batch_size", "optimizer.lr"] if config.fit_batch else []
        own += ["backbone_args"] if config.start else []
        typed = {*(config.typed or ())}
        # Whole settings, of which the data may have filled in some.
        if config.typed is None and config.start is None and config.teacher is None:
            stored = load_run(folder).config
            typed = {name for name in changes(stored, config) if not (name in DATAS and attrgetter(name)(config) is None)}
        typed = {name for name in typed if not name.startswith("backbone_args.")} - {*own}
        return resume(folder, quiet=quiet, hooks=hooks.hooks, **{each: attrgetter(each)(config) for each in typed})
    config = _whole_folders(dataclasses.replace(config, out=str(folder), data=_whole_path(config.data, config.data_root)))
    refuse_missing(config.log.to)
    engine = _engine(config)
    folder = engine.gather_items([folder])[0]  # of the first rank, whatever a script makes of its name on the others
    engine.on_first(lambda: refuse_used(folder))
    return _run(config, folder, engine, quiet, hooks, None, None)


def _whole_folders(config: Config) -> Config:
    """Return the settings with the folders of named sets and of the cache from the root on, as `_whole_path` has DATA."""
    loader = dataclasses.replace(
        config.loader, cache_folder=config.loader.cache_folder and os.path.abspath(config.loader.cache_folder)
    )
    return dataclasses.replace(config, data_root=config.data_root and os.path.abspath(config.data_root), loader=loader)


def _whole_path(data: str, root: str | None) -> str:
    """Return DATA that is a path from the root on, so that the run goes on, and is evaluated, from any working folder."""
    path = exists(data, root)
    return data if data in SETS or path is None else path


def resume(
    run: str | Path,
    *,
    checkpoint: str | None = None,
    quiet: bool = False,
    time_limit: float | None = None,
    epochs: int | None = None,
    data: Any = None,
    backbone: Any = None,
    method: Any = None,
    views: Mapping[str, Any] | None = None,
    hooks: Sequence[Any] = (),
    **overrides: Any,
) -> Result:
    """Go on with a run exactly where it was saved.

    Args:
        run: a run folder.
        checkpoint: name of an older checkpoint to go on from, such as `step-00001200`; default the newest.
        quiet: print nothing.
        time_limit: minutes after which it saves and stops, infinite for never; default: the run's own setting.
        epochs: how many the run has in all from now on; from the saved step on, its schedules are theirs.
        data: where the run's images are now, or the data set that was handed over.
        backbone, method, views: the objects that were handed over, again; the module's weights do not matter.
        hooks: as for `pretrain`.
        overrides: other settings by name; `settings/resuming.py` says which may change, and what that costs.

    Returns:
        The finished run, at once if it had finished already.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the good one before it is named.
        ConfigError: if the run has made more steps than `epochs` have, or settings have changed that may not.
        DataError: if the run's images are not there, or `data` holds others.
    """
    given = {"data": data, "backbone": backbone, "method": method, "views": views, "epochs": epochs, "time_limit": time_limit}
    given = {name: value for name, value in given.items() if value is not None}
    over = recipes.spell_out({name: value for name, value in given.items() if name != "data"} | overrides)
    over, objects = parts.named(over if data is None else over | {"data": data})
    if over.get("time_limit") == math.inf:
        over["time_limit"] = None
    with parts.at_hand(objects):
        return _go_on(load_run(run), checkpoint, quiet, over, Hooks(hooks))


def _go_on(loaded: Loaded, name: str | None, quiet: bool, over: dict[str, Any], hooks: Hooks) -> Result:
    """Go on with a run from the checkpoint of that `name`; its parts are at hand, other arguments as of `resume`."""
    folder, stored, moved = loaded.folder, loaded.config, over.pop("data", None)
    config = going_on(stored, over, folder)
    as_long = (config.epochs, config.max_steps) == (stored.epochs, stored.max_steps)
    if name is None and as_long and _complete(folder, config):
        if moved is not None and (parts.is_handed(str(moved)) or os.path.abspath(moved) != os.path.abspath(stored.data)):
            there = dataclasses.replace(config, data=_whole_path(os.fspath(moved), config.data_root))
            images = load_images(there)
            _refuse_others(loaded, there, images.name, {"images": len(images), "fingerprint": images.fingerprint()})
            if rank() == 0 and (changed := lasting(stored, there)) != stored:
                write_file(folder / "config.yaml", to_yaml(changed).encode())
        if not default_target(folder, "student").exists():
            raise unexported(folder, "its file is missing")
        return _result(folder, rank())
    try:
        config = dataclasses.replace(config, data=_whole_path(os.fspath(moved or config.data), config.data_root))
    except DataError as error:
        raise DataError(f"{error}; if the run's images have moved: relssl resume {quote(str(folder))} --data PATH") from error
    refuse_missing(config.log.to)
    config = with_launch(_whole_folders(config), resumed=True)
    begun = any((folder / "checkpoints").glob("step-*"))
    choose = partial(loaded.checkpoint, name) if name is not None or begun else None
    if choose:
        choose()  # before anything is read
    return _run(config, folder, _engine(config), quiet, hooks, loaded, choose)


def _engine(config: Config) -> Engine:
    """Create the engine of a run; a network or method of the user's may have parameters that the loss does not reach."""
    return Engine(config.engine, spare=parts.is_part(config.backbone) or parts.is_part(config.method.name))


def _complete(folder: Path, config: Config) -> bool:
    """Return whether a run has made all steps that its settings, which may have changed since, ask for."""
    status = read_json(folder / "status.json")  # without one that can be read, the run goes on
    step, length = status.get("step"), 0
    if status.get("state") != "complete" or not isinstance(step, int):
        return False
    with suppress(KeyError, TypeError):  # its checkpoint may be gone
        length = read_json(store.step_folder(folder / "checkpoints", step) / store.META)["meta"]["steps_per_epoch"]
    return config.steps(length * config.batch_size) <= step


def _run(
    config: Config, path: Path, engine: Engine, quiet: bool, hooks: Hooks, loaded: Loaded | None, find: Callable[[], Path] | None
) -> Result:
    """Train in a folder, a new one or that of a `loaded` run from the checkpoint that `find` returns, then export the networks."""
    # The first rank's own children are none.
    ours = os.environ.get("LOCAL_RANK") != "0" and os.environ.get(MARK) == str(os.getppid())
    if engine.world == 1 and (ours or (dist.is_initialized() and dist.get_world_size() > 1)):
        raise ConfigError(f"engine.devices: this process is one of several, and the run asks for one; {ONE_NUMBER}")
    stop = StopRequest(config.time_limit, quote(str(path)), "before its first step; start it again")
    voice = Display(engine.is_first and not quiet, stop)
    # The folder is closed once nobody waits for the first rank any more: services take as long as they like.
    with stop, voice as display, ExitStack() as stack, engine.running(), explaining(config, engine):
        config, given = open_sources(config, find is not None, loaded.environment if loaded else {})
        run = build(config, engine, display.say, given)
        counts = engine.gather_items([(run.fingerprint, len(run.images))])
        if len({*counts}) > 1:
            numbers = ", ".join(f"{count} on rank {rank}" for rank, (_, count) in enumerate(counts))
            raise DataError(f"{run.images.name}: not all ranks have the same images ({numbers}); give each the whole data")
        run.folder = engine.on_first(lambda: stack.enter_context(closing(RunFolder(path, hooks))))
        stack.callback(stop.end)
        # Again, now that nobody else can write it: a process that was about to end may have saved since.
        saved = find and engine.gather_items([engine.on_first(find)])[0]
        if loaded is not None and saved is None and store.checkpoints(path / "checkpoints"):
            raise CheckpointError(f"{path}: another process has saved meanwhile; try again")
        engine.on_first(lambda: begin(run, display, loaded))
        stop.at_once = f"before its first step; go on with `relssl resume {quote(str(path))}`"
        for line in prepare(run, saved):
            display.say(line)
        engine.on_first(lambda: write_changes(run, loaded))
        with recording(run, display, stop), explaining(run.config, engine):
            if run.folder is not None:
                run.folder.give_up_after(run.state.step)
                run.folder.status("running", run.state.step)
            if run.config.loader.cache is not None:  # the first rank finds or writes the images while the others wait
                make = partial(shrunken, run.images, run.config.loader, display, run.config.engine.devices)
                # Once more on the other ranks, as machines may have a disk of their own.
                source = engine.on_first(make) or make()
                engine.wait()
                run.read(dataclasses.replace(run.images, source=source))
            engine.on_first(lambda: hooks.call("on_start", run))
            train(run, display, stop)
        engine.on_first(lambda: hand_over(run, display))
        if not engine.largest(stop.pending()):  # else `relssl report` can do it later
            engine.on_first(lambda: write_page(run, display))
        result = _result(path, engine.rank)
        engine.on_first(lambda: hooks.call("on_end", result))
        return result


def begin(run: Run, display: Display, loaded: Loaded | None) -> None:
    """Write what the run is, or check what has changed of the `loaded` one; ConfigError if the folder was used in the meantime, DataError if
    the data moved and holds other images than those that the run was started with."""
    assert run.folder is not None
    folder, config, facts = run.folder, run.config, {"images": len(run.images), "fingerprint": run.fingerprint}
    if loaded is None:
        refuse_used(folder.path)  # again, now that nobody else can write it
        write_file(folder.path / "config.yaml", to_yaml(config).encode())
        about = {"data": facts, "engine": run.engine.describe(), **run.given.facts}
        write_json(folder.path / "environment.json", environment() | about)
    else:
        _refuse_others(loaded, config, run.images.name, facts)
    display.log_to(folder.path / "run.log")
    for line in (*folder.notes, *folder.mend()):
        display.say(line)
    if loaded is not None and (before := loaded.config.epochs) != (now := config.epochs):
        display.say(f"epochs are {now} instead of {before}: from here on the schedules are those of {now} epochs")
    folder.bad_samples(run.images.bad)


def _refuse_others(loaded: Loaded, config: Config, name: str, facts: dict[str, Any]) -> None:
    """Refuse data from another place than a run's if it holds other images than those that the run was started with."""
    moved = parts.is_handed(config.data) or os.path.abspath(loaded.config.data) != os.path.abspath(config.data)
    if moved and loaded.data != facts:
        others = f"{facts['images']} images that are not the {loaded.data.get('images', '')} of the run"
        raise DataError(f"{name}: holds {others}, by their names, order and sizes; give the folder or list that does")


def write_changes(run: Run, loaded: Loaded | None) -> None:
    """Write down what has changed of a run that goes on."""
    assert run.folder is not None
    if loaded is not None and (changed := lasting(loaded.config, run.config)) != loaded.config:
        write_file(run.folder.path / "config.yaml", to_yaml(changed).encode())


def prepare(run: Run, saved: Path | None) -> Iterator[str]:
    """Compile the networks and load the checkpoint `saved`, if there is one; yield what there is to say of the run."""
    config, method, memory = run.config, run.config.method, run.config.method.memory_size
    subject = f"{parts.title(config.backbone)} on {len(run.images)} images of {run.images.name}, recipe {config.recipe}"
    yield f"{parts.title(method.name)}: {subject}, {run.total_steps} steps, {run.engine.describe()}"
    yield from run.images.notes
    yield from run.given.lines()
    if saved is None and parts.is_part(config.backbone):
        yield f"{parts.title(config.backbone)} begins with the weights that it brings"
    if run.state.model.memory is not None and memory > 0.5 * len(run.images):
        yield f"note: the memory ({memory}) is over half of the data: samples meet old copies of themselves"
    if compiled := compile_networks(run):
        yield compiled
    if saved is not None:
        with store.offering(saved):
            inexact = checkpoint.restore(saved, run.state, run.engine, origin(run))
        manner = f"not bit for bit ({'; '.join(inexact)})" if inexact else "exactly"
        yield f"going on {manner} from step {run.state.step}"
    if run.known is not None:
        yield f"teacher: its features of {len(run.known)} images are computed once, as its view of them never changes"
    if run.state.step > run.total_steps:
        setting, value = ("max_steps", config.max_steps) if config.max_steps == run.total_steps else ("epochs", config.epochs)
        raise ConfigError(f"{setting}: {value} make {run.total_steps} steps, and the run has made {run.state.step}; give more")


def hand_over(run: Run, display: Display) -> None:
    """Export the networks of a run that is done; it stays so if that fails with an ExportError, and `relssl export` can try again."""
    assert run.folder is not None
    path, few = run.folder.path, run.images.subset(range(min(4, len(run.images))))  # enough to notice a wrong file, and quick
    ending = {"exit_code": 0, "last_checkpoint": store.step_folder(path, run.state.step).name}
    # Which holds if this process dies now.
    run.folder.status("complete", run.state.step, **ending, export={"error": "it was stopped"})
    try:
        for network in derive(run.config).networks:
            export(path, network=network, images=few)
    except Exception as error:  # writers, networks and checks are others' code
        run.folder.status("complete", run.state.step, **ending, export={"error": store.one_line(error)})
        raise unexported(path, store.one_line(error)) from error
    run.folder.status("complete", run.state.step, **ending)
    display.note(f"complete: weights in {default_target(path, 'student')}")


def write_page(run: Run, display: Display) -> None:
    """Write report.html, if the settings want it; a failure costs a line, never the run."""
    assert run.folder is not None
    if run.config.log.report:
        display.say("writing report.html")
        try:
            relssl.write_report(run.folder.path)
        except Exception as error:  # networks, views and data are others' code
            display.say(f"no report ({store.one_line(error)}); try again with `relssl report {quote(str(run.folder.path))}`")


def _result(folder: Path, number: int) -> Result:
    return Result(folder, default_target(folder, "student"), read_rows(folder / "metrics.jsonl"), number)


@contextmanager
def recording(run: Run, display: Display, stop: StopRequest) -> Iterator[None]:
    """Write to status.json, and to the log, why the run ends before its last step."""

    def record(error: BaseException) -> None:
        display.note(str(error) or type(error).__name__)
        if run.folder is not None:
            with suppress(StorageError):  # a full disk must not hide the error that there is to report
                run.folder.failed(run.state.step, error)

    run.engine.last_words = record
    try:
        yield
    except BaseException as error:
        record(stop.cause(error))
        raise
    finally:
        run.engine.last_words = id


@contextmanager
def explaining(config: Config, engine: Engine) -> Iterator[None]:
    """Raise an error of the libraries below as one of ours, where it is known what to do about it."""
    try:
        yield
    except RelsslError:
        raise
    except OSError as error:
        # Whatever is read or written besides checkpoints (data, metrics, TensorBoard): the checkpoints before it are whole.
        reason = f"{error.filename or config.out}: cannot be read or written ({error.strerror or error})"
        raise StorageError(f"{reason}; check the disk, then go on with `relssl resume` or start again") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            pieces = "" if derive(config).traits.whole_batch else "raise accumulate to compute it in parts, "
            raise ConfigError(
                f"batch_size: {config.batch_size} does not fit the device's memory; lower it, {pieces}"
                "or set loader.path files to keep the images out of it"
            ) from error
        if "deterministic implementation" in str(error):
            reason = f"{store.one_line(error).partition(' does not have')[0]} has no kernel that repeats bit for bit"
            raise ConfigError(f"engine.deterministic: {reason}; set it to false, or take another network") from error
        if engine.watch is None:
            raise
        raise DistributedError(engine.watch.explain(store.one_line(error))) from error


def compile_networks(run: Run) -> str | None:
    """Compile the networks' passes, with CUDA graphs where these are possible, if `compile` says so; return a line for the console.

    `auto` compiles on CUDA alone, in runs that are long enough to earn it back and need not repeat bit for bit. A compiler that fails
    on any rank is done without. The run's state stays as it was.
    """
    config, engine, state, gpu = run.config, run.engine, run.state, run.engine.device.type == "cuda"
    worth = gpu and run.total_steps >= WORTH_COMPILING and not config.engine.deterministic
    if config.compile == "off" or (config.compile == "auto" and not worth):
        return None
    # Graphs are replayed on fixed memory; gradients of accumulated parts and DDP's buckets outlive a replay.
    stopped: Interrupted | None = None
    fault, graphs = "", engine.world == 1 and config.accumulate == 1
    torch.compiler.reset()  # type: ignore[no-untyped-call]  # one cache serves all networks of a process
    for network in run.networks:
        network.compile_heads(graphs)
    state.guard.watch()
    try:
        with torch.random.fork_rng([engine.device] if gpu else []):
            for _ in range(3):  # graphs are warmed up, recorded and replayed
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                pass_noise(run, run.plan.share)
                state.optimizer.zero_grad(set_to_none=True)
    except Exception as error:  # whatever a compiler runs into
        stopped = error if isinstance(error, Interrupted) else None
        fault = store.one_line(error)[:160] or type(error).__name__
    state.guard.take_back()
    state.optimizer.zero_grad(set_to_none=True)
    if engine.largest(len(fault)):
        for network in run.networks:
            network.compiled_heads = None
        torch.compiler.reset()  # type: ignore[no-untyped-call]  # with it goes the memory that graphs use
        if stopped is not None:
            raise stopped
        return f"compile: not possible here ({fault or 'another rank could not'}); going on without"
    run.graphs = graphs
    return "compile: the networks are compiled" + (", and replayed as CUDA graphs" if gpu and graphs else "")


def pass_noise(run: Run, share: int) -> None:
    """Pass noise of the run's own shapes forward and back, as `share` images of a part that others follow.

    Ranks exchange nothing, so that one that fails leaves none waiting.
    """
    config, ids = run.config, torch.arange(share)
    weak, *strong = (torch.rand(share, config.views.channels, view.size, view.size) for view in derive(config).views)
    with run.engine.part(run.state.model.student, last=False):
        with run.engine.autocast():
            step = forward(run, Batch(ids, weak, strong), scheduled(run, run.total_steps - 1))
        step.loss.backward()  # type: ignore[no-untyped-call]
