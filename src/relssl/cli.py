"""The command line: what each command does, and what becomes of errors. torch is imported only once a command is worth it."""

from __future__ import annotations

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import relssl
from relssl.errors import ConfigError, DataError, NumericError, RelsslError
from relssl.files import plain
from relssl.options import Outcome, Overrides, option, parse, verb
from relssl.settings import recipes
from relssl.settings.evaluation import Evaluation, Tuning, read_settings
from relssl.settings.launcher import rank, with_launch
from relssl.settings.names import MAIN, spell
from relssl.settings.reading import build, flat, leaves
from relssl.settings.run import Config, differences, resolve, to_yaml
from relssl.settings.small import adjustments, give_way
from relssl.train.signals import StopRequest
from relssl.weights.formats import FORMATS, find_format

_RUN = (
    option(
        "data",
        "name of a data set, folder of images, list file, hf:NAME, hf:FOLDER or shards:PATTERN (default: digits)",
        metavar="DATA",
        nargs="?",
    ),
    option("--config", "YAML file of settings", metavar="FILE"),
)
_SOURCE = option("source", "run folder, file of weights, or timm name", metavar="SOURCE")
_NETWORK = option("--network", "of a run; default: student", choices=("student", "teacher"))
# How features of images are computed.
_EXTRACTION = (
    option("--split", default="train", choices=("train", "bank", "test")),
    option("--data_root", "where named data sets lie"),
    option("--device", "auto, cpu, mps, cuda, or one of several such as cuda:1", default="auto"),
    option("--precision", "of the network's arithmetic", default="fp32", choices=("auto", "fp32", "bf16")),
)
# How files of other programs are read.
_FOREIGN = (
    option("--from", "official, solo, moco, dino, torchvision or timm; default: by its names", dest="layout", metavar="LAYOUT"),
    option("--backbone", "timm's name of the network; default: ResNets are recognised", metavar="NAME"),
    option("--stem", "standard, small, small-pool or small-wide; default: by the first convolution"),
    option("--prefix", "what stands before the network's names in the file; default: recognised", metavar="P"),
    option("--allow", "names that may be missing or unexpected (abc.* for many)", nargs="+", default=[], metavar="NAME"),
)


@verb(
    "pretrain a backbone on images",
    *_RUN,
    option("--resume", "auto: go on with the run in --out, if there is one", metavar="auto"),
    settings=Config,
    main=MAIN,
)
def pretrain(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(None if args.resume else config)
    return _trained(relssl.pretrain(settings=config, resume=args.resume))


@verb(
    "time a few steps of a run: what the whole would take, and what to change",
    *_RUN,
    option("--steps", "steps that are timed (default: 20)", type=int, default=20),
    settings=Config,
    main=MAIN,
)
def estimate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(config)
    from relssl.report.tables import show_estimate

    figures = relssl.estimate(settings=config, steps=args.steps)
    return None if figures.rank else Outcome(dataclasses.asdict(figures), lambda: show_estimate(figures))


@verb(
    "draw images beside their views, as a run with these settings would draw them, into a PNG file",
    *_RUN,
    option("--images", "rows (default: 8)", type=int, default=8),
    option("--out", "target .png (default: views.png)", default="views.png", metavar="FILE"),
    settings=Config,
    main=MAIN,
)
def views(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    config = _run_settings(args, overrides)
    _prepare(config)
    path = relssl.write_views(settings=config, **_pick(args, "out", "images"))
    return Outcome({"out": str(path)}, str(path))


@verb(
    "go on with a run exactly where it was saved",
    option("run_folder", metavar="RUN"),
    option("data", "where the run's images are now, if they have moved", metavar="DATA", nargs="?"),
    option("--epochs", "how many the run has in all from now on, its schedules included", type=int, metavar="N"),
    option("--time_limit", "minutes after which it saves and stops with exit code 75", type=float, metavar="M"),
    option("--checkpoint", "name of an older checkpoint to go on from"),
    settings=Config,
    main=(),
)
def resume(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    _prepare()
    return _trained(relssl.resume(args.run_folder, **_pick(args, "checkpoint", "time_limit", "epochs", "data"), **overrides))


@verb(
    "verify a run's checkpoints, inspect one, or tell the diff of two",
    option("action", "what to do", choices=("verify", "inspect", "diff")),
    option("run_folder", metavar="RUN"),
    option("other", "a step, or of diff another run (default: all, the newest, the one before)", metavar="STEP|RUN", nargs="?"),
)
def checkpoint(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    from relssl.weights import inspection

    facts = getattr(inspection, args.action)(args.run_folder, args.other)
    return Outcome(facts, _lines(facts))


@verb(
    "prove that runs on this machine resume bit for bit: a short run of these settings, against the same cut and resumed",
    *_RUN,
    settings=Config,
    main=MAIN,
)
def verify_resume(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    _prepare(_run_settings(args, overrides))
    from relssl.train.proof import prove

    facts = prove(_pick(args, "data", "config") | spell(overrides), _say)
    return Outcome(facts, facts["result"], None if facts["exact"] else NumericError(f"resume: {facts['result']}"))


@verb(
    "look through the images of DATA: unreadable and doubled ones, test images among the training images, sizes",
    option("data", metavar="DATA"),
    option("--data_root", "where named data sets lie"),
)
def scan(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    from relssl.data.survey import survey

    facts = survey(args.data, args.data_root, _say)
    return Outcome(facts, _lines(facts))


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
    "write a page that shows what runs have learned, finished or not: curves, neighbours, map, relations",
    option("runs", "run folders; several are compared, with pictures of the first", metavar="RUN", nargs="+"),
    option("--out", "target .html; default: report.html in the folder of a single run, else here", metavar="FILE"),
)
def report(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    path = relssl.write_report(*args.runs, out=args.out, say=None if args.json else _say)
    return Outcome({"out": str(path)}, str(path))


@verb(
    "suggest a teacher's temperature, memory and warm-up from the relations of a run, without training",
    option("run_folder", metavar="RUN"),
)
def advise(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    from relssl.report.tables import show_advice

    facts = relssl.advise(args.run_folder)
    return Outcome(facts, lambda: show_advice(facts))


@verb(
    "say what of this machine, or of a run, is slow, missing or known to be broken, and what to do",
    option("run_folder", metavar="RUN", nargs="?"),
)
def doctor(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    findings = relssl.doctor(args.run_folder)
    lines = [f"{each['what']}: {each['evidence']}; {each['remedy']}" for each in findings]
    return Outcome({"findings": findings}, "\n".join(lines or ["nothing found that is slow, missing or broken"]))


@verb(
    "write the features of images to a file",
    _SOURCE,
    option("data", metavar="DATA"),
    option("--out", "target .npz, .csv or .parquet", required=True),
    option("--size", "side of the view in pixels; default: the one pretraining used", type=int),
    _NETWORK,
    *_EXTRACTION,
    *_FOREIGN,
)
def embed(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    options = _pick(args, "network", "split", "data_root", "device", "precision")
    facts = relssl.embed(args.source, args.data, args.out, reading=_reading(args, size=args.size), **options)
    written = f"{facts['images']} features of dimension {facts['dim']} in {facts['out']}"
    return Outcome(facts, "\n".join([f"{written}; images that could not be read: {len(facts['bad'])}", *facts["notes"]]))


@verb(
    "train a backbone and a classifier on labelled images, and write both to a file that timm loads",
    _SOURCE,
    option("data", "labelled images with a test part: train/CLASS/ and val/CLASS/, or a named set", metavar="DATA"),
    option("--out", "target .safetensors", required=True, metavar="MODEL"),
    *_FOREIGN,
    settings=Tuning,
)
def finetune(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    settings = build(Tuning, spell(overrides, leaves(Tuning)))
    _prepare()
    say = None if args.json else _say
    facts = relssl.finetune(args.source, args.data, args.out, settings=settings, reading=_reading(args), say=say)
    low, high = facts["interval"]
    figure = f"top-1 {facts['top1']:.2f} % [{low:.2f}, {high:.2f}] on {facts['tested']} test images"
    use = f"classify images: relssl predict {facts['out']} DATA --out FILE.csv"
    return Outcome(facts, "\n".join([f"{facts['out']}: {len(facts['classes'])} classes, {figure}", *facts["notes"], use]))


@verb(
    "classify images by a file that finetune wrote",
    option("model", "the .safetensors file, with its .yaml beside it", metavar="MODEL"),
    option("data", metavar="DATA"),
    option("--out", "target .csv, or .parquet or .npz with the scores of all classes", required=True, metavar="FILE"),
    *_EXTRACTION,
)
def predict(args: argparse.Namespace, _: Overrides) -> Outcome | None:
    _prepare()
    facts = relssl.predict(args.model, args.data, args.out, **_pick(args, "split", "data_root", "device", "precision"))
    left_out = f"; {len(facts['bad'])} could not be read" if facts["bad"] else ""
    written = f"{facts['images']} images of {args.data} classified in {facts['out']}, split {args.split}{left_out}"
    return Outcome(facts, "\n".join([written, *facts["notes"]]))


@verb(
    "write a backbone for other programs, and check what they will read",
    option("source", "run folder, or exported or imported .safetensors", metavar="RUN|WEIGHTS"),
    option("--format", "; ".join(f"{name}: {each.about}" for name, each in FORMATS.items()) + "; default: safetensors, or hf"),
    _NETWORK,
    option("--out", "target file, or folder for hf; default: in RUN/export, or beside the file"),
    option("--push", "upload it to the Hugging Face Hub, as a private repository if there is none yet", metavar="ORG/NAME"),
    option("--dry_run", "with --push: say what would be uploaded, and leave everything as it is", action="store_true"),
)
def export(args: argparse.Namespace, _: Overrides) -> Outcome | None:
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
    from relssl.data.folder import list_lines

    lines, images = list_lines(args.folder)
    for note in images.notes:
        _say(f"relssl: {note}")
    write = sys.stdout.buffer.writelines
    return Outcome({"images": len(lines), "bad": images.bad}, lambda: write(line + b"\n" for line in lines))


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
    "check settings and data without running anything",
    *_RUN,
    option("--show", "print all settings as YAML, without a look at the data", action="store_true"),
    settings=Config,
    main=MAIN,
)
def validate(args: argparse.Namespace, overrides: Overrides) -> Outcome | None:
    typed = config = _run_settings(args, overrides)
    if args.show:
        return Outcome({"valid": True, "recipe": config.recipe}, to_yaml(config).rstrip())
    from relssl.data.named import at_hand, exists, load  # after --help, for which this is slow

    if exists(typed.data, typed.data_root) is None:
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
    run = f"recipe {config.recipe}, {config.backbone} on {config.data}, {config.epochs} epochs of batch {config.batch_size}"
    return Outcome({"valid": True, "recipe": config.recipe, "data": data}, "\n".join([f"valid: {run}", *lines]))


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
    main=(),
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
    return Outcome(facts(result, config), lambda: show_summary(result, config))


def _reading(args: argparse.Namespace, **more: Any) -> Any:
    from relssl.weights.foreign import Reading

    return Reading(args.layout, args.backbone, args.stem, prefix=args.prefix, allow=args.allow, **more)


def _lines(facts: dict[str, Any], most: int = 30) -> str:
    """Return facts for people, a line each, without empty lists."""
    shown = {
        name: ", ".join(map(str, fact[:5])) if isinstance(fact, list) else fact
        for name, fact in flat(facts).items()
        if fact != []
    }
    lines = [f"{name}: {fact}" for name, fact in shown.items()]
    return "\n".join([*lines[:most], *([f"and {len(lines) - most} more, which --json lists"] if len(lines) > most else [])])


def _pick(args: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # its reader has left
        print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv, outcome = sys.argv[1:] if argv is None else argv, None
    for stream in (sys.stdout, sys.stderr):  # names that the console has no characters for end no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args, overrides = parse(argv)
        with StopRequest():
            outcome = args.run(args, overrides)
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
    number, torch = rank(), sys.modules.get("torch")
    kind, met = getattr(error, "kind", "bug"), torch and torch.distributed.is_initialized()
    if number == 0 or kind == "distributed" or (met and kind not in ("checkpoint", "locked", "numeric", "interrupted")):
        for line in lines.splitlines():
            _say(f"relssl: {f'rank {number}: ' if number else ''}{plain(line)}")
    return code
