"""The command line: the verbs with their options, and what becomes of errors. torch is imported only once a command is known to be
worth it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import relssl
from relssl.errors import ConfigError, RelsslError
from relssl.settings import recipes
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.settings.reading import choices, leaves, nearest_word
from relssl.settings.run import METHODS, VIEWS, Config, differences, resolve, to_yaml
from relssl.weights.formats import FORMATS, find_format

Overrides = dict[str, Any]
Option = tuple[str, dict[str, Any]]


class Outcome(NamedTuple):
    """The outcome of a command."""

    facts: Any  # for --json
    show: str | Callable[[], Any]  # the text for people, or what prints it
    error: BaseException | None = None  # raised once all that was finished before is shown


class Verb(NamedTuple):
    """A command."""

    run: Callable[[argparse.Namespace, Overrides], Outcome | None]  # None in processes that have no result
    about: str
    options: tuple[Option, ...]
    settings: Any  # whose fields are options, too


VERBS: dict[str, Verb] = {}


def verb(about: str, *options: Option, settings: Any = None) -> Callable[[Any], Any]:
    """Make a command of a function."""

    def add(run: Any) -> Any:
        VERBS[run.__name__.removesuffix("_")] = Verb(run, about, options, settings)
        return run

    return add


def option(name: str, about: str | None = None, **more: Any) -> Option:
    """Return an argument for argparse."""
    return name, {"help": about, **more}


# Sections that may be given by the name they start from.
_NAMED: dict[str, Iterable[str]] = {"method": METHODS, "views.weak": VIEWS, "views.strong": VIEWS}
_RUN = (
    option("data", "name of a data set, folder of images or list file (default: digits)", metavar="DATA", nargs="?"),
    option("--config", "YAML file of settings", metavar="FILE"),
    *(option(f"--{name}", f"one of {', '.join(names)}", metavar="NAME") for name, names in _NAMED.items()),
)
_SOURCE = option("source", "run folder, file of weights, or timm name", metavar="SOURCE")
_NETWORK = option("--network", "of a run; default: student", choices=("student", "teacher"))
_FORMATS = "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items())
# How files of other programs are read.
_FOREIGN = (
    option("--from", "official, solo, moco, dino, torchvision or timm; default: by its names", dest="layout", metavar="LAYOUT"),
    option("--backbone", "timm's name of the network; default: ResNets are recognised", metavar="NAME"),
    option("--stem", "standard, small, small-pool or small-wide; default: by the first convolution"),
    option("--allow", "names that may be missing or unexpected (abc.* for many)", nargs="+", default=[], metavar="NAME"),
)


@verb("pretrain a backbone on images", *_RUN, settings=Config)
def pretrain(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    from relssl.train.run_folder import default_folder, refuse_used

    config = _run_settings(args, overrides)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        refuse_used(Path(config.out or default_folder(config)))
    _prepare()
    return _trained(relssl.pretrain(settings=config))


@verb(
    "time a few steps of a run: what the whole would take, and what to change",
    *_RUN,
    option("--steps", "steps that are timed (default: 20)", type=int, default=20),
    settings=Config,
)
def estimate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare()
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

    records: list[dict[str, Any]] = []
    options: Any = {"settings": settings, "reading": _reading(args), "out": args.out, "done": records.append}
    error: BaseException | None = None
    try:
        records.append(relssl.evaluate(args.source, args.data, say=None if args.json else _say, **options))
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

    names = args.network.split(",") if args.network else []
    if len(names) > 2:
        raise ConfigError(f"network: one name or two are needed, got {args.network}")
    rows = relssl.compare(args.first, args.second, network=(names[0], names[-1]) if names else None, allow=args.allow)
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
    option("--format", f"{_FORMATS} (default: safetensors)", default="safetensors", metavar="FORMAT"),
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
    report = relssl.import_weights(args.file, **_pick(args, "out", "layout", "backbone", "stem", "network", "allow", "size"))
    return Outcome(dataclasses.asdict(report), "\n".join([*report.lines(), f"written to {report.out}"]))


@verb(
    "list the recipes, or show the settings of one and where they come from",
    option("recipe", "a recipe, to see its settings", metavar="NAME", nargs="?"),
)
def recipes_(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    if args.recipe is None:
        listed = [recipes.find(name) for name in recipes.names()]
        groups = itertools.groupby(listed, lambda recipe: recipe.name.rpartition("/")[0])
        text = ["\n".join(f"{recipe.name:22} {recipe.about}" for recipe in group) for _, group in groups]
        hint = "`relssl recipes NAME` shows the settings of one and where they come from"
        return Outcome([vars(recipe) for recipe in listed], "\n\n".join([*text, hint]))
    recipe = recipes.find(args.recipe)
    settings = {name: value for name, value in differences(resolve({"recipe": recipe.name})).items() if name != "recipe"}
    head = f"{recipe.name}: {recipe.about}\n\n{textwrap.fill(recipe.source, 120)}\n\nwhat differs from the defaults:"
    rows = (f"  {name:30} {json.dumps(value)}" for name, value in settings.items())
    return Outcome(vars(recipe) | {"settings": settings}, "\n".join([head, *rows]))


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
    config = resolve(overrides, args.config)
    run = f"recipe {config.recipe}, {config.backbone} on {config.data}, {config.epochs} epochs of batch {config.batch_size}"
    return Outcome({"valid": True, "recipe": config.recipe}, to_yaml(config).rstrip() if args.show else f"valid: {run}")


@verb(
    "rerun one of the paper's comparisons; without TABLE: list them",
    option("table", "which comparison", metavar="TABLE", nargs="?"),
    option("--list", "list the comparisons and their rows", action="store_true"),
    option("--scale", "smoke: shows that it runs; small: for two CPU cores; paper: its own (default: small)", default="small"),
    option("--seeds", "runs of each row (default: 1, at the small scale 3)", type=int, metavar="N"),
    option("--only", "run these rows alone", metavar="ROW,...", type=lambda rows: rows.split(","), default=[]),
    option("--plan", "show what would run and what it would take, and stop", action="store_true"),
    option("--runs", "folder of the run folders (default: runs/reproduce/TABLE-SCALE)", metavar="DIR"),
    option("--out", "folder of TABLE-SCALE.json and .md (default: results)", dest="results", default="results", metavar="DIR"),
    option("--time_limit", "minutes for all runs together; then exit code 75, to go on later", dest="minutes", type=float),
    option("--epochs", "a rehearsal of so many epochs, whose results say so", metavar="N"),
    option("--data_root", "where named data sets lie", metavar="DIR"),
    settings=Config,
)
def reproduce(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    from relssl.reproduction import tables
    from relssl.reproduction.plan import plan

    if args.list or args.table is None:
        listed = [tables.read_table(name) for name in ([args.table] if args.table else tables.names())]
        lines = []
        for table in listed:
            lines.append(f"{table.name:18} {table.title}")
            lines += [f"  {row.name:24} {row.label}  ({', '.join(row.scales)})" for row in table.rows if args.table]
        facts = [{"table": table.name, "title": table.title, "rows": [row.name for row in table.rows]} for table in listed]
        return Outcome(facts, "\n".join(lines))
    rows = _pick(args, "seeds", "only", "runs")
    # Faults come to light before torch is imported.
    plan(tables.read_table(args.table), tables.read_scale(args.scale), overrides=overrides, **rows)
    _prepare()
    options = {"plan_only": args.plan, "out": args.results, "time_limit": args.minutes, **rows}
    results = relssl.reproduce(args.table, args.scale, say=_say, **options, **overrides)
    if args.plan:
        return Outcome(results, lambda: None)
    # A run outside of this request, which failed before or in another process, is not this command's failure.
    failed = [
        run
        for run in results["missing"]
        if run["exit_code"] and run["row"] in (args.only or [run["row"]]) and (args.seeds is None or run["seed"] < args.seeds)
    ]
    error = RelsslError(f"{len(failed)} runs failed, the first is {failed[0]['row']}: {failed[0]['why']}") if failed else None
    if error:
        error.exit_code = failed[0]["exit_code"]
    return Outcome(results, str(Path(args.results) / f"{results['name']}.md"), error)


def _run_settings(args: argparse.Namespace, overrides: Overrides) -> Config:
    """The settings of a run whose data exists; under torchrun the launcher has already decided how many processes there are."""
    from relssl.data.named import exists

    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local and world:
        overrides = {"engine.devices": local, "engine.nodes": str(int(world) // int(local))} | overrides
    config = resolve(overrides, args.config)
    exists(config.data, config.data_root)
    return config


def _prepare() -> None:
    """Import torch and tune this process for computing."""
    from relssl.engine import prepare_process

    prepare_process()


def _trained(result: Any) -> Outcome | None:
    from relssl.report.tables import facts, show_summary

    return result and Outcome(facts(result), lambda: show_summary(result, relssl.load_run(result.folder).config))


def _reading(args: argparse.Namespace, **more: Any) -> Any:
    from relssl.weights.foreign import Reading

    return Reading(args.layout, args.backbone, args.stem, allow=args.allow, **more)


def _pick(args: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="relssl", description="Pretrain image backbones on unlabelled images with ReSSL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"relssl {relssl.__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, verb in VERBS.items():
        command = commands.add_parser(name, help=verb.about, description=verb.about, allow_abbrev=False)
        foreign = command.add_argument_group("files of other programs") if _FOREIGN[0] in verb.options else command
        for each in verb.options:
            (foreign if each in _FOREIGN else command).add_argument(each[0], **each[1])
        command.add_argument("--json", action="store_true", help="end standard output with one JSON object of the results")
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")
        if verb.settings:
            # argparse's own usage would name each of the settings, over two screens.
            places = [("[{}]" if "nargs" in more else "{}").format(more["metavar"]) for at, more in verb.options if at[0] != "-"]
            command.usage = f"{command.prog} {' '.join(places)} [...] [--SETTING VALUE ...] [--json] [--debug]"
        if verb.settings and name != "reproduce":
            _add_settings(command, verb.settings)
    return parser


def _add_settings(command: argparse.ArgumentParser, settings: Any) -> None:
    """Add every setting as an option; values are read and checked later, together, so that all faults are reported at once."""
    fields = [(name, field) for name, field in leaves(settings).items() if name != "data"]
    for section, group in itertools.groupby(fields, lambda each: each[0].rpartition(".")[0]):
        options = command.add_argument_group(section or "settings")
        for name, field in group:
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
            words = f" (one of {', '.join(choices(field))})" if choices(field) else ""
            text = f"{field.description}{words} (default: {default})".replace("%", "%%")
            options.add_argument(f"--{name}", metavar="VALUE", help=text)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Return the arguments, and of them the settings as {dotted name: text}, unknown ones among these."""
    words, verb = [*argv[:1]], VERBS.get(argv[0]) if argv else None
    if verb is None and argv and not argv[0].startswith("-"):
        raise ConfigError(f"unknown command {argv[0]!r}; the nearest is {nearest_word(argv[0], VERBS)}")
    own = {"--json", "--debug", "--help", *(name for name, _ in (verb.options if verb else ()))}
    for word in argv[1:]:  # argparse would take the value of an option that it does not know for DATA
        if words[-1].startswith("--") and "=" not in words[-1] and words[-1] not in own and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    args, unknown = build_parser().parse_known_args(words)
    settings = VERBS[args.verb].settings
    known = {*leaves(settings), *_NAMED} if settings else set()
    overrides = {name: value for name, value in vars(args).items() if name in known and value is not None}
    for word in unknown:
        name, _, value = word.partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: not expected here; settings are given as --name value")
        overrides[name[2:]] = value
    if overrides and not settings:
        raise ConfigError(*(f"--{name}: unknown option of relssl {args.verb}" for name in overrides))
    # `--views.strong NAME` beside `--views.strong.blur 0`: both speak of one section.
    return args, {f"{name}.name" if name in _NAMED else name: value for name, value in overrides.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, overrides = _parse(argv)
        outcome = VERBS[args.verb].run(args, overrides)
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
