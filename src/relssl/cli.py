"""The command line. torch is imported only once a command is known to be worth it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from relssl import __version__, verbs
from relssl.errors import ConfigError, RelsslError
from relssl.settings.evaluation import Evaluation
from relssl.settings.reading import leaves, nearest_word
from relssl.settings.run import METHODS, VIEWS, Config
from relssl.weights.formats import FORMATS

# The settings that each command takes as options.
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("pretrain", "estimate", "validate", "reproduce"), Config),
    "evaluate": Evaluation,
}
# Sections that may be given by the name they start from.
_NAMED = ("method", "views.weak", "views.strong")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser, names = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        print(f"relssl: unknown command {argv[0]!r}; the nearest is {nearest_word(argv[0], names)}", file=sys.stderr)
        return 2
    args, unknown = parser.parse_known_args(argv)
    try:
        overrides = _overrides(args, unknown)
        if overrides and args.verb not in _SETTINGS:
            raise ConfigError(*(f"--{name}: unknown option of relssl {args.verb}" for name in overrides))
        answer = args.run(args, overrides)
    except RelsslError as error:
        if args.debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"relssl: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("relssl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        print(
            f"relssl: a bug: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; --debug shows where",
            file=sys.stderr,
        )
        return 1
    if args.json and answer is not None:
        print(json.dumps(answer))
    return 0


def build_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser and the names of its commands."""
    parser = argparse.ArgumentParser(
        prog="relssl", description="Pretrain image backbones on unlabelled images with ReSSL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"relssl {__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="end standard output with one JSON object of the results")
        made.add_argument("--debug", action="store_true", help="show a traceback with an error")
        return made

    made = verb("pretrain", verbs.pretrain, "pretrain a backbone on images")
    _add_settings(made)
    made = verb("estimate", verbs.estimate, "time a few steps of a run: what the whole would take, and what to change")
    made.add_argument("--steps", type=int, default=20, help="steps that are timed (default: 20)")
    _add_settings(made, "[--steps N] ")
    made = verb(
        "list", verbs.list_images, "print the images of a folder as a list file, which is read at once: relssl list FOLDER > FILE"
    )
    made.add_argument("folder", metavar="FOLDER")
    made = verb("resume", verbs.resume, "go on with a run exactly where it was saved")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("--checkpoint", help="name of an older checkpoint to go on from")
    made = verb("evaluate", verbs.evaluate, "measure what a backbone learned")
    made.add_argument("source", metavar="SOURCE", help="run folder, file of weights, or timm name")
    made.add_argument("data", metavar="DATA", nargs="?", help="labelled data; default: the run's own; transfer: several, A,B,C")
    made.add_argument("--out", metavar="FILE", help="JSON file for all results; those of a run are kept in RUN/evaluations too")
    _add_reading(made)
    _add_options(made, Evaluation, "SOURCE [DATA] [--out FILE] [--from LAYOUT ...]")
    made = verb("compare", verbs.compare, "compare two evaluations, if they were made alike")
    made.add_argument("first", metavar="A.json", help="of RUN/evaluations, or of evaluate --out")
    made.add_argument("second", metavar="B.json")
    made.add_argument("--network", help="network of both, or of each: student,backbone; default: of equal names")
    made.add_argument("--allow", nargs="+", default=[], metavar="FIELD", help="fields of the card that may differ")
    made = verb("embed", verbs.embed, "write the features of images to a file")
    made.add_argument("source", metavar="SOURCE", help="run folder, file of weights, or timm name")
    made.add_argument("data", metavar="DATA")
    made.add_argument("--out", required=True, help="target .npz, .csv or .parquet")
    made.add_argument("--size", type=int, help="side of the view in pixels; default: the one pretraining used")
    made.add_argument("--network", choices=("student", "teacher"), help="of a run; default: student")
    made.add_argument("--split", default="train", choices=("train", "bank", "test"))
    made.add_argument("--data_root", help="where named data sets lie")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    made.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"), help="of the network's arithmetic")
    _add_reading(made)
    made = verb("export", verbs.export, "write a backbone for other programs, and check what they will read")
    made.add_argument("source", metavar="RUN|WEIGHTS", help="run folder, or exported or imported .safetensors")
    formats = "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items())
    made.add_argument("--format", default="safetensors", metavar="FORMAT", help=f"{formats} (default: safetensors)")
    made.add_argument("--network", choices=("student", "teacher"), help="of a run; default: student")
    made.add_argument("--out", help="target file, or folder for hf; default: in RUN/export, or beside the file")
    made = verb("import", verbs.import_weights, "turn another program's checkpoint into a backbone file")
    made.add_argument("file", metavar="FILE", help="what it saved: .pth, .pth.tar, .ckpt, .safetensors")
    made.add_argument("--network", choices=("student", "teacher"), help="default: the one its authors evaluate")
    made.add_argument("--size", type=int, help="pixels of its images; default: 224, or 32 and 64 for small stems")
    made.add_argument("--out", help="target .safetensors; default: beside FILE")
    _add_reading(made)
    made = verb("recipes", verbs.recipes, "list the recipes, or show the settings of one and where they come from")
    made.add_argument("name", metavar="NAME", nargs="?", help="a recipe, to see its settings")
    made = verb("backbones", verbs.backbones, "list networks with their parameters and GFLOPs")
    made.add_argument(
        "pattern", metavar="PATTERN", nargs="?", help="part of the name, or all of it with * and ?; searches them all"
    )
    made.add_argument("--family", help="what the name begins with, such as mobilenetv3")
    made.add_argument("--max_params", type=float, default=float("inf"), metavar="M", help="at most this many million parameters")
    made.add_argument("--max_gflops", type=float, default=float("inf"), metavar="G", help="at most this many GFLOPs")
    made.add_argument("--size", type=int, default=224, help="side of the images in pixels (default: 224)")
    made.add_argument("--all", action="store_true", help="all networks of timm and torchvision, not those named here alone")
    made = verb("validate", verbs.validate, "check settings without running anything")
    made.add_argument("--show", action="store_true", help="print all settings as YAML")
    _add_settings(made, "[--show] ")
    _add_reproduce(verb("reproduce", verbs.reproduce, "rerun one of the paper's comparisons; without TABLE: list them"))
    return parser, list(commands.choices)


def _add_settings(parser: argparse.ArgumentParser, own: str = "") -> None:
    """The options of a run."""
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help="name of a data set, folder of images or list file (default: digits)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    for name in _NAMED:
        what, names = ("method", METHODS) if name == "method" else ("view recipe", VIEWS)
        parser.add_argument(f"--{name}", metavar="NAME", help=f"{what}: {', '.join(names)}")
    _add_options(parser, Config, f"[DATA] [--config FILE] {own}")


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison; any setting may be given besides, for all of its runs."""
    parser.usage = f"{parser.prog} [TABLE] [--scale SCALE] [--plan] [...] [--SETTING VALUE ...] [--json] [--debug]"
    add = parser.add_argument
    add("table", metavar="TABLE", nargs="?", help="which comparison")
    add("--list", action="store_true", help="list the comparisons and their rows")
    add("--scale", default="small", help="smoke: shows that it runs; small: for two CPU cores; paper: its own (default: small)")
    add("--seeds", type=int, metavar="N", help="runs of each row (default: 1, at the small scale 3)")
    add("--only", metavar="ROW,...", help="run these rows alone")
    add("--plan", action="store_true", help="tell what would run and what it would take, and stop")
    add("--runs", metavar="DIR", help="folder of the run folders (default: runs/reproduce/TABLE-SCALE)")
    add("--out", dest="results", default="results", metavar="DIR", help="folder of TABLE-SCALE.json and .md (default: results)")
    add(
        "--time_limit",
        dest="minutes",
        type=float,
        metavar="MINUTES",
        help="for all runs together; then exit code 75, to go on later",
    )
    add("--epochs", metavar="N", help="a rehearsal of so many epochs, whose results say so")
    add("--data_root", metavar="DIR", help="where named data sets lie")


def _add_options(parser: argparse.ArgumentParser, settings: Any, usage: str) -> None:
    """Every setting as an option; values are read and checked later, together, so that all faults are told at once."""
    # argparse's own would name each of the settings, over two screens.
    parser.usage = f"{parser.prog} {usage} [--SETTING VALUE ...] [--json] [--debug]"
    groups: dict[str, Any] = {}
    for name, (_, field) in leaves(settings).items():
        section = name.rpartition(".")[0]
        group = groups.setdefault(section, parser.add_argument_group(section or "settings"))
        if name != "data":
            default = f"(default: {_shown(field.default)})" if not callable(field.default_factory) else ""
            choices = f" (one of {', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            text = f"{field.metadata['help']}{choices} {default}".replace("%", "%%")
            group.add_argument(f"--{name}", metavar="VALUE", help=text)


def _shown(value: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How to read another program's file."""
    add = parser.add_argument_group("files of other programs").add_argument
    add("--from", dest="layout", metavar="LAYOUT", help="official, solo, moco, dino, torchvision or timm; default: by its names")
    add("--backbone", metavar="NAME", help="timm's name of the network; default: ResNets are recognised")
    add("--stem", help="standard, small, small-pool or small-wide; default: by the first convolution")
    add(
        "--allow",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that may be missing or unexpected (abc.* for many); untrained",
    )


def _overrides(args: argparse.Namespace, unknown: list[str]) -> dict[str, Any]:
    """The settings given on the command line as {dotted name: text}, unknown ones among them."""
    given = {}
    if args.verb in _SETTINGS:
        known = {*leaves(_SETTINGS[args.verb]), *_NAMED}
        given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    words = iter(unknown)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: not expected here; settings are given as --name value")
        given[name[2:]] = value if equals else next(words, "")
    # `--views.strong NAME` beside `--views.strong.blur 0`: both speak of one section.
    for section in _NAMED:
        if section in given:
            given[f"{section}.name"] = given.pop(section)
    return given
