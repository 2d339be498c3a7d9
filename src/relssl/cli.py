"""The command line: what each command of verbs.yaml does, and what becomes of errors. torch is imported only once a command is worth it."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import relssl
from relssl.errors import ConfigError, DataError, NumericError, RelsslError, StorageError
from relssl.files import plain
from relssl.options import Overrides, parse
from relssl.settings import recipes
from relssl.settings.evaluation import Tuning, read_settings
from relssl.settings.launcher import rank, with_launch
from relssl.settings.parts import is_part
from relssl.settings.reading import build, flat, leaves, spell
from relssl.settings.run import Config, differences, resolve, to_yaml
from relssl.settings.small import adjustments, give_way
from relssl.train.signals import StopRequest
from relssl.weights.formats import find_format


class Outcome(NamedTuple):
    """The outcome of a command."""

    facts: Any  # for --json
    show: str | Callable[[], Any]  # the text for people, or what prints it
    error: BaseException | None = None  # raised once all that was finished before is shown


Run = Callable[[argparse.Namespace, Overrides], Outcome | None]  # which returns no outcome in processes that have none
_COMMANDS: dict[str, Run] = {}


def command(run: Run) -> Run:
    """Make a function of its arguments and settings the command of its name."""
    _COMMANDS[run.__name__.removesuffix("_").replace("_", "-")] = run
    return run


@command
def pretrain(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(None if args.resume else config)
    return _trained(relssl.pretrain(settings=config, resume=args.resume))


@command
def estimate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(config)
    from relssl.report.tables import show_estimate

    figures = relssl.estimate(settings=config, steps=args.steps)
    return None if figures.rank else Outcome(dataclasses.asdict(figures), lambda: show_estimate(figures))


@command
def views(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    config = _run_settings(args, overrides)
    _prepare(config)
    return _written(relssl.write_views(settings=config, **_pick(args, "out", "images")))


@command
def resume(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    _prepare()
    return _trained(relssl.resume(args.run_folder, **_pick(args, "checkpoint", "time_limit", "epochs", "data"), **overrides))


@command
def checkpoint(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    from relssl.weights import inspection

    facts = getattr(inspection, args.action)(args.run_folder, args.other)
    return Outcome(facts, _lines(facts))


@command
def verify_resume(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    _prepare(_run_settings(args, overrides))
    from relssl.train.proof import prove

    facts = prove(_pick(args, "data", "config") | spell(overrides), _say)
    return Outcome(facts, facts["result"], None if facts["exact"] else NumericError(f"resume: {facts['result']}"))


@command
def scan(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    from relssl.data.survey import survey

    facts = survey(args.data, args.data_root, _say)
    return Outcome(facts, _lines(facts))


@command
def evaluate(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    settings = read_settings(overrides, typed=True)
    _prepare()
    from relssl.report.tables import show_evaluation

    records, error = list[dict[str, Any]](), None
    options: Any = {"settings": settings, "reading": _reading(args), "out": args.out, "say": None if args.json else _say}
    try:
        records.append(relssl.evaluate(args.source, args.data, done=records.append, **options))
    except (RelsslError, KeyboardInterrupt) as stopped:
        if not records:  # else protocols that were finished before are not lost
            raise
        error = stopped
    return Outcome(records[-1], lambda: show_evaluation(records[-1]), error)


@command
def compare(args: argparse.Namespace, _: Overrides) -> Outcome:
    from relssl.report.tables import show_comparison

    names = (args.network or "").split(",")
    pair = (names[0], names[-1]) if args.network else None
    rows = relssl.compare(args.first, args.second, network=pair, allow=args.allow)
    return Outcome({"comparisons": rows}, lambda: show_comparison(rows))


@command
def report(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    return _written(relssl.write_report(*args.runs, out=args.out, say=None if args.json else _say))


@command
def advise(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    from relssl.report.tables import show_advice

    facts = relssl.advise(args.run_folder)
    return Outcome(facts, lambda: show_advice(facts))


@command
def doctor(args: argparse.Namespace, _: Overrides) -> Outcome:
    findings = relssl.doctor(args.run_folder)
    lines = [f"{each['what']}: {each['evidence']}; {each['remedy']}" for each in findings]
    return Outcome({"findings": findings}, "\n".join(lines or ["nothing found that is slow, missing or broken"]))


@command
def embed(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    options = _pick(args, "network", "split", "data_root", "device", "precision")
    facts = relssl.embed(args.source, args.data, args.out, reading=_reading(args, size=args.size), **options)
    written = f"{facts['images']} features of dimension {facts['dim']} in {facts['out']}"
    return Outcome(facts, "\n".join([f"{written}; images that could not be read: {len(facts['bad'])}", *facts["notes"]]))


@command
def finetune(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    settings = build(Tuning, spell(overrides, leaves(Tuning)))
    _prepare()
    say = None if args.json else _say
    facts = relssl.finetune(args.source, args.data, args.out, settings=settings, reading=_reading(args), say=say)
    low, high = facts["interval"]
    figure = f"top-1 {facts['top1']:.2f} % [{low:.2f}, {high:.2f}] on {facts['tested']} test images"
    use = f"classify images: relssl predict {quote(facts['out'])} DATA --out FILE.csv"
    return Outcome(facts, "\n".join([f"{facts['out']}: {len(facts['classes'])} classes, {figure}", *facts["notes"], use]))


@command
def predict(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    facts = relssl.predict(args.model, args.data, args.out, **_pick(args, "split", "data_root", "device", "precision"))
    left_out = f"; {len(facts['bad'])} could not be read" if facts["bad"] else ""
    written = f"{facts['images']} images of {args.data} classified in {facts['out']}, split {args.split}{left_out}"
    return Outcome(facts, "\n".join([written, *facts["notes"]]))


@command
def export(args: argparse.Namespace, _: Overrides) -> Outcome:
    find_format(args.format or "safetensors")  # before torch is imported
    _prepare()
    result = relssl.export(args.source, **_pick(args, "format", "network", "out", "push", "dry_run"))
    parity, files = result.parity, [str(file) for file in result.files]
    facts = {"out": str(result.path), "files": files, **_pick(result, "format", "network")} | dataclasses.asdict(parity)
    how = f"features differ by {parity.difference:.2g} at most, {parity.relative:.2g} of the largest"
    code = "\n".join("    " + line for line in result.lines)
    where = result.address or str(result.path)
    if args.dry_run:
        each = (f"    {file.name:20} {count:12,} bytes" for file, count in zip(result.files, result.sizes, strict=True))
        where = "\n".join([f"would be uploaded as {args.push}, and was not:\n", *each, ""])
    facts |= {"push": args.push, "address": result.address, "sizes": list(result.sizes)} if args.push else {}
    return Outcome(facts, f"{where}\nchecked on {parity.images}: {how}\n\nLoad it:\n\n{code}")


@command
def import_(args: argparse.Namespace, _: Overrides) -> Outcome:
    _prepare()
    result = relssl.import_weights(args.file, out=args.out, **vars(_reading(args, network=args.network, size=args.size)))
    return Outcome(dataclasses.asdict(result), "\n".join([*result.lines(), f"written to {result.out}"]))


@command
def recipes_(args: argparse.Namespace, _: Overrides) -> Outcome:
    if args.recipe is None:
        listed = [recipes.find(name) for name in recipes.NAMES]
        groups = itertools.groupby(listed, lambda recipe: recipe["name"].rpartition("/")[0])
        text = ["\n".join(f"{recipe['name']:22} {recipe['about']}" for recipe in group) for _, group in groups]
        return Outcome(listed, "\n\n".join([*text, "`relssl recipes NAME` shows the settings of one and where they come from"]))
    recipe = recipes.find(args.recipe)
    settings = {name: value for name, value in differences(resolve({"recipe": args.recipe})).items() if name != "recipe"}
    head = f"{args.recipe}: {recipe['about']}\n\n{textwrap.fill(recipe['source'], 120)}\n\nwhat differs from the defaults:"
    rows = (f"  {name:30} {json.dumps(value)}" for name, value in settings.items())
    return Outcome(recipe | {"settings": settings}, "\n".join([head, *rows]))


@command
def list_(args: argparse.Namespace, _: Overrides) -> Outcome:
    from relssl.data.folder import list_lines
    from relssl.data.named import read_voc

    folder = os.path.abspath(os.path.expanduser(args.folder))
    lines, images = list_lines(folder, read_voc(folder, "train"))
    for note in images.notes:
        _say(f"relssl: {note}")
    write = sys.stdout.buffer.writelines
    return Outcome({"images": len(lines), "bad": images.bad}, lambda: write(line + b"\n" for line in lines))


@command
def backbones(args: argparse.Namespace, _: Overrides) -> Outcome:
    if args.size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {args.size}")
    from relssl.method.backbones import find, within
    from relssl.report.tables import show

    networks = within(find(args.pattern, args.family, args.all), args.size, args.max_params * 1e6, args.max_gflops)
    shown = networks if args.json else show(networks, args.size)  # each as it comes
    return Outcome([dataclasses.asdict(each) for each in shown], lambda: None)


@command
def validate(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    typed = config = _run_settings(args, overrides)
    if args.show:
        return Outcome({"valid": True, "recipe": config.recipe}, to_yaml(config).rstrip())
    from relssl.data.named import at_hand, exists, load  # after --help, for which this is slow

    at_once = typed.data == "digits" or is_part(typed.data)  # which are read without a download
    if exists(typed.data, typed.data_root) is None and not at_once:
        data: dict[str, Any] = {"here": at_hand(typed.data, typed.data_root)}
        name = "a set of the Hugging Face Hub, not looked up" if typed.data.startswith("hf:") else "a known data set"
        lines = [f"{typed.data}: {name}, {'here' if data['here'] else 'to be downloaded'}"]
    else:
        images, test = load(typed.data, typed.data_root, "train"), None
        with contextlib.suppress(DataError):  # there is none
            test = load(typed.data, typed.data_root, "test")
        config = give_way(typed, used := min(len(images), typed.max_images or len(images)))
        data = {"images": len(images), "test": len(test or ()), "classes": images.class_count, "notes": list(images.notes)}
        classes = f" of {images.class_count} classes" * bool(images.class_count)
        lines = [f"{images.name}: {len(images)} images{classes} to pretrain on, {data['test']} to test on", *images.notes]
        lines += adjustments(typed, config, used)
    run = f"recipe {config.recipe}, {config.backbone} on {config.data}, {config.length} of batch {config.batch_size}"
    return Outcome({"valid": True, "recipe": config.recipe, "data": data}, "\n".join([f"valid: {run}", *lines]))


@command
def reproduce(args: argparse.Namespace, overrides: Overrides) -> Outcome:
    from relssl.reproduction.plan import plan
    from relssl.reproduction.tables import offered, read_table

    if args.list or args.table is None:
        listed = [read_table(args.table, args.scale)] if args.table else offered(args.scale)
        facts = [{"table": table.name, "title": table.title, "rows": [row.name for row in table.rows]} for table in listed]
        lines = [f"{table.name:18} {table.title}" for table in listed]
        return Outcome(facts, "\n".join(lines + [f"  {row.name:24} {row.label}" for row in listed[0].rows if args.table]))
    rows = _pick(args, "seeds", "runs") | {"only": args.only.split(",") if args.only else []}
    # Faults come to light before torch is imported.
    planned = plan(read_table(args.table, args.scale), overrides=overrides, **rows)
    _prepare()
    options = {"plan_only": args.plan, "out": args.results, "time_limit": args.minutes, **rows}
    results = relssl.reproduce(args.table, args.scale, say=_say, **options, **overrides)
    if args.plan:
        return Outcome(results, lambda: None)
    # A run outside of this request, which failed before or in another process, is not this command's failure.
    chosen = {(run.row.name, run.seed) for run in planned.chosen}
    failed = [run for run in results["missing"] if run["exit_code"] and (run["row"], run["seed"]) in chosen]
    error = RelsslError(f"{len(failed)} runs failed, the first is {failed[0]['row']}: {failed[0]['why']}") if failed else None
    if error:
        error.exit_code = failed[0]["exit_code"]
    return Outcome(results, str(Path(args.results) / f"{results['name']}.md"), error)


def _run_settings(args: argparse.Namespace, overrides: Overrides) -> Config:
    return with_launch(resolve(overrides if args.data is None else overrides | {"data": args.data}, args.config))


def _prepare(config: Config | None = None) -> None:
    """Check that the data of a run exists, then import torch and tune this process for computing, without what libraries have to say."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if config is not None:
        from relssl.data.named import exists

        exists(config.data, config.data_root)
    from relssl.engine import prepare_process

    prepare_process()


def _trained(result: Any) -> Outcome | None:
    from relssl.report.tables import facts, show_summary

    if result.rank:
        return None
    config = relssl.load_run(result.folder).config
    known = facts(result, config)
    return Outcome(known, lambda: show_summary(known, config))


def _written(path: Path) -> Outcome:
    return Outcome({"out": str(path)}, str(path))


def _reading(args: argparse.Namespace, **more: Any) -> Any:
    from relssl.weights.foreign import Reading

    return Reading(args.layout, args.backbone, args.stem, prefix=args.prefix, allow=args.allow, **more)


def _lines(facts: dict[str, Any], most: int = 30) -> str:
    """Return facts for people, a line each, without empty lists."""
    lines = [
        f"{name}: {', '.join(map(str, fact[:5])) if isinstance(fact, list) else fact}"
        for name, fact in flat(facts).items()
        if fact != []
    ]
    return "\n".join([*lines[:most], *([f"and {len(lines) - most} more, which --json lists"] if len(lines) > most else [])])


def _pick(args: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # its reader has left
        print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv, outcome = sys.argv[1:] if argv is None else argv, None
    for name in ("stdout", "stderr"):  # Python has none where the shell has closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process is
    for stream in (sys.stdout, sys.stderr):  # names that the console has no characters for end no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args, overrides = parse(argv)
        with StopRequest(heeding=args.verb == "reproduce"):
            outcome = _COMMANDS[args.verb](args, overrides)
        if outcome is not None:
            if args.json:
                print(json.dumps(outcome.facts))
            else:
                print(outcome.show) if isinstance(outcome.show, str) else outcome.show()
            sys.stdout.flush()
            if outcome.error:
                raise outcome.error
        return 0
    except BrokenPipeError:  # the reader of our output has left, and no message would reach it; what is done is done
        return 141 if outcome is None else getattr(outcome.error, "exit_code", 0)
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, debug="--debug" in argv)
    finally:
        for stream in (sys.stdout, sys.stderr):  # Python would flush them once more, and fail
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failed(error: BaseException, debug: bool) -> int:
    """Tell why a command failed, and return its exit code; of several processes one speaks of what all of them have met."""
    if debug:
        traceback.print_exc()
    code, lines = 1, f"a bug: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; --debug shows where"
    if isinstance(error, RelsslError):
        code, lines = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, lines = 130, "interrupted"
    elif isinstance(error, OSError) and error.strerror:
        code, lines = StorageError.exit_code, f"{error.filename or 'output'}: cannot be read or written ({error.strerror})"
    number, torch = rank(), sys.modules.get("torch")
    kind, met = getattr(error, "kind", "bug"), torch and torch.distributed.is_initialized()
    if number == 0 or kind == "distributed" or (met and kind not in ("checkpoint", "locked", "numeric", "interrupted")):
        for line in lines.splitlines():
            _say(f"relssl: {f'rank {number}: ' if number else ''}{plain(line)}")
    return code
