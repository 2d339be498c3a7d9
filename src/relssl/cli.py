"""The command line: the verbs with their options, and what becomes of errors. torch is imported only once a command is worth it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import relssl
from relssl.errors import ConfigError, RelsslError
from relssl.settings import recipes
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.settings.reading import choices, leaves, nearest_word
from relssl.settings.run import Config, differences, resolve, to_yaml
from relssl.weights.formats import FORMATS, find_format

Overrides = dict[str, Any]
Option = tuple[str, dict[str, Any]]


class Outcome(NamedTuple):
    """The outcome of a command."""

    facts: Any  # for --json
    show: str | Callable[[], Any]  # the text for people, or what prints it
    error: BaseException | None = None  # raised once all that was finished before is shown


_ABOUT = "Pretrain image backbones on unlabelled images with ReSSL."
PARSER = argparse.ArgumentParser(prog="relssl", description=_ABOUT, allow_abbrev=False)
PARSER.add_argument("--version", action="version", version=f"relssl {relssl.__version__}")
_COMMANDS = PARSER.add_subparsers(dest="verb", required=True, metavar="COMMAND")
VERBS: dict[str, set[str]] = {}  # the names of each command's own options, which are not settings


def verb(about: str, *options: Option, settings: Any = None) -> Callable[[Any], Any]:
    """Make a command of a function of its arguments and settings, which returns no outcome in processes that have none.

    The fields of `settings`, a dataclass, are options too. argparse knows them for the help alone.
    """

    def add(run: Callable[[argparse.Namespace, Overrides], Outcome | None]) -> Any:
        name = run.__name__.removesuffix("_")
        command = _COMMANDS.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=run, settings=settings)
        for at, more in (*options, *_COMMON):
            command.add_argument(at, **more)
        own = VERBS[name] = {"--help", *(at for at, _ in (*options, *_COMMON))}
        if settings:
            command.usage = f"{command.format_usage().removeprefix('usage: ').rstrip()} [--SETTING VALUE ...]"
        for setting, field in leaves(settings).items() if settings else ():
            short = setting.removesuffix(".name")
            flags = [f"--{each}" for each in dict.fromkeys((short if short in recipes.BY_NAME else setting, setting))]
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
            words = f" (one of {', '.join(choices(field))})" if choices(field) else ""
            text = f"{field.description}{words} (default: {default})".replace("%", "%%")
            if not {setting, f"--{setting}"} & own:
                command.add_argument(*flags, metavar="VALUE", help=text)
        return run

    return add


def option(name: str, about: str | None = None, **more: Any) -> Option:
    """Return an argument for argparse."""
    return name, {"help": about, **more}


_COMMON = (
    option("--json", "end standard output with one JSON object of the results", action="store_true"),
    option("--debug", "show a traceback with an error", action="store_true"),
)
_RUN = (
    option("data", "name of a data set, folder of images or list file (default: digits)", metavar="DATA", nargs="?"),
    option("--config", "YAML file of settings", metavar="FILE"),
)
_SOURCE = option("source", "run folder, file of weights, or timm name", metavar="SOURCE")
_NETWORK = option("--network", "of a run; default: student", choices=("student", "teacher"))
# How files of other programs are read.
_FOREIGN = (
    option("--from", "official, solo, moco, dino, torchvision or timm; default: by its names", dest="layout", metavar="LAYOUT"),
    option("--backbone", "timm's name of the network; default: ResNets are recognised", metavar="NAME"),
    option("--stem", "standard, small, small-pool or small-wide; default: by the first convolution"),
    option("--prefix", "what stands before the network's names in the file; default: recognised", metavar="P"),
    option("--allow", "names that may be missing or unexpected (abc.* for many)", nargs="+", default=[], metavar="NAME"),
)


@verb("pretrain a backbone on images", *_RUN, settings=Config)
def pretrain(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(config)
    return _trained(relssl.pretrain(settings=config))


@verb(
    "time a few steps of a run: what the whole would take, and what to change",
    *_RUN,
    option("--steps", "steps that are timed (default: 20)", type=int, default=20),
    settings=Config,
)
def estimate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(config)
    from relssl.report.tables import show_estimate

    figures = relssl.estimate(settings=config, steps=args.steps)
    return None if figures is None else Outcome(dataclasses.asdict(figures), lambda: show_estimate(figures))


@verb(
    "go on with a run exactly where it was saved",
    option("run_folder", metavar="RUN"),
    option("--checkpoint", "name of an older checkpoint to go on from"),
)
def resume(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    return _trained(relssl.resume(args.run_folder, checkpoint=args.checkpoint))


@verb(
    "measure what a backbone learned",
    _SOURCE,
    option("data", "labelled data; default: the run's own; transfer: several, A,B,C", metavar="DATA", nargs="?"),
    option("--out", "JSON file for all results; those of a run are kept in RUN/evaluations too", metavar="FILE"),
    *_FOREIGN,
    settings=Evaluation,
)
def evaluate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    settings = read_settings(overrides)
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


@verb(
    "compare two evaluations, if they were made alike",
    option("first", "of RUN/evaluations, or of evaluate --out", metavar="A.json"),
    option("second", metavar="B.json"),
    option("--network", "network of both, or of each: student,backbone; default: of equal names"),
    option("--allow", "fields of the card that may differ", nargs="+", default=[], metavar="FIELD"),
)
def compare(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    from relssl.report.tables import show_comparison

    names = (args.network or "").split(",")
    pair = (names[0], names[-1]) if args.network else None
    rows = relssl.compare(args.first, args.second, network=pair, allow=args.allow)
    return Outcome({"comparisons": rows}, lambda: show_comparison(rows))


@verb(
    "write the features of images to a file",
    _SOURCE,
    option("data", metavar="DATA"),
    option("--out", "target .npz, .csv or .parquet", required=True),
    option("--size", "side of the view in pixels; default: the one pretraining used", type=int),
    _NETWORK,
    option("--split", default="train", choices=("train", "bank", "test")),
    option("--data_root", "where named data sets lie"),
    option("--device", default="auto", choices=("auto", "cpu", "cuda", "mps")),
    option("--precision", "of the network's arithmetic", default="fp32", choices=("auto", "fp32", "bf16")),
    *_FOREIGN,
)
def embed(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    options = _pick(args, "network", "split", "data_root", "device", "precision")
    facts = relssl.embed(args.source, args.data, args.out, reading=_reading(args, size=args.size), **options)
    written = f"{facts['images']} features of dimension {facts['dim']} in {facts['out']}"
    return Outcome(facts, "\n".join([f"{written}; {len(facts['bad'])} images could not be read", *facts["notes"]]))


@verb(
    "write a backbone for other programs, and check what they will read",
    option("source", "run folder, or exported or imported .safetensors", metavar="RUN|WEIGHTS"),
    option("--format", "; ".join(f"{name}: {each.about}" for name, each in FORMATS.items()), default="safetensors"),
    _NETWORK,
    option("--out", "target file, or folder for hf; default: in RUN/export, or beside the file"),
)
def export(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    find_format(args.format)  # before torch is imported
    _prepare()
    result = relssl.export(args.source, **_pick(args, "format", "network", "out"))
    parity, files = result.parity, [str(file) for file in result.files]
    facts = {"out": str(result.path), "files": files, **_pick(result, "format", "network")} | dataclasses.asdict(parity)
    how = f"features differ by {parity.difference:.2g} at most, {parity.relative:.2g} of the largest"
    code = "\n".join("    " + line for line in result.lines)
    return Outcome(facts, f"{result.path}\nchecked on {parity.images}: {how}\n\nLoad it:\n\n{code}")


@verb(
    "turn another program's checkpoint into a backbone file",
    option("file", "what it saved: .pth, .pth.tar, .ckpt, .safetensors", metavar="FILE"),
    option("--network", "default: the one its authors evaluate", choices=("student", "teacher")),
    option("--size", "pixels of its images; default: 224, or 32 and 64 for small stems", type=int),
    option("--out", "target .safetensors; default: beside FILE"),
    *_FOREIGN,
)
def import_(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    report = relssl.import_weights(args.file, out=args.out, **vars(_reading(args, network=args.network, size=args.size)))
    return Outcome(dataclasses.asdict(report), "\n".join([*report.lines(), f"written to {report.out}"]))


@verb(
    "list the recipes, or show the settings of one and where they come from",
    option("recipe", "a recipe, to see its settings", metavar="NAME", nargs="?"),
)
def recipes_(args: argparse.Namespace, _: Overrides) -> Outcome | None:
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


@verb(
    "print the images of a folder as a list file, which is read at once: relssl list FOLDER > FILE",
    option("folder", metavar="FOLDER"),
)
def list_(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    from relssl.data.folder import list_lines, shown

    lines, bad = list_lines(args.folder)
    if bad:
        _say(f"relssl: {len(bad)} files are left out, the first: {shown(bad[0][0])} {bad[0][1]}")
    return Outcome({"images": len(lines), "bad": bad}, lambda: sys.stdout.buffer.writelines(line + b"\n" for line in lines))


@verb(
    "list networks with their parameters and GFLOPs",
    option("pattern", "part of the name, or all of it with * and ?; searches them all", metavar="PATTERN", nargs="?"),
    option("--family", "what the name begins with, such as mobilenetv3"),
    option("--max_params", "at most this many million parameters", type=float, default=float("inf"), metavar="M"),
    option("--max_gflops", "at most this many GFLOPs", type=float, default=float("inf"), metavar="G"),
    option("--size", "side of the images in pixels (default: 224)", type=int, default=224),
    option("--all", "all networks of timm and torchvision, not those named here alone", action="store_true"),
)
def backbones(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    if args.size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {args.size}")
    from relssl.method.backbones import find, within
    from relssl.report.tables import show

    networks = within(find(args.pattern, args.family, args.all), args.size, args.max_params * 1e6, args.max_gflops)
    shown = networks if args.json else show(networks, args.size)  # each as it comes
    return Outcome([dataclasses.asdict(each) for each in shown], lambda: None)


@verb(
    "check settings without running anything",
    *_RUN,
    option("--show", "print all settings as YAML", action="store_true"),
    settings=Config,
)
def validate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    run = f"recipe {config.recipe}, {config.backbone} on {config.data}, {config.epochs} epochs of batch {config.batch_size}"
    return Outcome({"valid": True, "recipe": config.recipe}, to_yaml(config).rstrip() if args.show else f"valid: {run}")


@verb(
    "rerun one of the paper's comparisons, with --epochs N as a rehearsal; without TABLE: list them",
    option("table", "which comparison", metavar="TABLE", nargs="?"),
    option("--list", "list the rows that TABLE has at the scale", action="store_true"),
    option("--scale", "smoke: shows that it runs; small: for two CPU cores; paper: its own (default: small)", default="small"),
    option("--seeds", "runs of each row (default: 1, at the small scale 3)", type=int, metavar="N"),
    option("--only", "run these rows alone", metavar="ROW,...", type=lambda rows: rows.split(","), default=[]),
    option("--plan", "show what would run and what it would take, and stop", action="store_true"),
    option("--runs", "folder of the run folders (default: runs/reproduce/TABLE-SCALE)", metavar="DIR"),
    option("--out", "folder of TABLE-SCALE.json and .md (default: results)", dest="results", default="results", metavar="DIR"),
    option("--time_limit", "minutes for all runs together; then exit code 75, to go on later", dest="minutes", type=float),
    settings=Config,
)
def reproduce(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    from relssl.reproduction.plan import plan
    from relssl.reproduction.tables import NAMES, read_table

    if args.list or args.table is None:
        listed = [read_table(name, args.scale) for name in ([args.table] if args.table else NAMES)]
        facts = [{"table": table.name, "title": table.title, "rows": [row.name for row in table.rows]} for table in listed]
        lines = [f"{table.name:18} {table.title}" for table in listed]
        return Outcome(facts, "\n".join(lines + [f"  {row.name:24} {row.label}" for row in listed[0].rows if args.table]))
    rows = _pick(args, "seeds", "only", "runs")
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
    """The settings of a run; under torchrun the launcher has already decided how many processes there are."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local and world:
        overrides = {"engine.devices": local, "engine.nodes": str(int(world) // int(local))} | overrides
    return resolve(overrides if args.data is None else overrides | {"data": args.data}, args.config)


def _prepare(config: Config | None = None) -> None:
    """Check that the data of a run exists, then import torch and tune this process for computing."""
    from relssl.data.named import exists

    if config is not None:
        exists(config.data, config.data_root)
    from relssl.engine import prepare_process

    prepare_process()


def _trained(result: Any) -> Outcome | None:
    from relssl.report.tables import facts, show_summary

    return None if result.rank else Outcome(facts(result), lambda: show_summary(result, relssl.load_run(result.folder).config))


def _reading(args: argparse.Namespace, **more: Any) -> Any:
    from relssl.weights.foreign import Reading

    return Reading(args.layout, args.backbone, args.stem, prefix=args.prefix, allow=args.allow, **more)


def _pick(args: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Return the arguments, and the settings as {dotted name: text}: all options that are not the verb's own. They are read and
    checked later, together, so that all faults are reported at once."""
    if argv and argv[0] not in VERBS and not argv[0].startswith("-"):
        raise ConfigError(f"unknown command {argv[0]!r}; the nearest is {nearest_word(argv[0], VERBS)}")
    own = VERBS.get(argv[0]) if argv else None
    words, overrides, rest = list[str](), dict[str, Any](), iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if own is None or name in own or not name.startswith("--"):
            words.append(word)
        elif not equals and (value := next(rest, "--")).startswith("--"):
            raise ConfigError(f"{name}: needs a value")
        else:
            overrides[name[2:]] = value
    args, extra = PARSER.parse_known_args(words)
    if extra:
        raise ConfigError(f"{extra[0]!r}: not expected here; settings are given as --name value")
    if overrides and not args.settings:
        raise ConfigError(*(f"--{name}: unknown option of relssl {args.verb}" for name in overrides))
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, overrides = _parse(argv)
        outcome = args.run(args, overrides)
        if outcome is not None:
            if args.json:
                print(json.dumps(outcome.facts))
            else:
                print(outcome.show) if isinstance(outcome.show, str) else outcome.show()
            if outcome.error:
                raise outcome.error
        return 0
    except BrokenPipeError:
        # The reader of our output has left, and no message would reach it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        code, lines = 1, f"a bug: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; --debug shows where"
        if isinstance(error, RelsslError):
            code, lines = error.exit_code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, lines = 130, "interrupted"
        for line in lines.splitlines():
            _say(f"relssl: {line}")
        return code
