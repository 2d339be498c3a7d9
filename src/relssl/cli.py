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
from relssl.config import Config
from relssl.errors import ConfigError, RelsslError
from relssl.schema import leaves, nearest_word
from relssl.views import VIEWS

# The commands that take every setting as an option.
_WITH_SETTINGS = ("pretrain", "estimate", "validate")


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
        if overrides and args.verb not in _WITH_SETTINGS:
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
    made = verb("resume", verbs.resume, "go on with a run exactly where it was saved")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("--checkpoint", help="name of an older checkpoint to go on from")
    made = verb("evaluate", verbs.evaluate, "measure what a backbone learned")
    made.add_argument("source", metavar="RUN|WEIGHTS", help="run folder or exported .safetensors")
    made.add_argument("data", metavar="DATA", nargs="?", help="labelled data; default: the run's own")
    made.add_argument("--protocol", default="knn", help="knn: weighted, k=200 T=0.1 and k=20 T=0.07")
    made.add_argument("--images", type=int, nargs=2, metavar=("BANK", "TEST"), help="at most this many images on each side")
    made = verb("embed", verbs.embed, "write the features of images to a file")
    made.add_argument("source", metavar="RUN|WEIGHTS", help="run folder or exported .safetensors")
    made.add_argument("data", metavar="DATA")
    made.add_argument("--out", required=True, help="target .npz or .csv")
    made.add_argument("--network", choices=("student", "teacher"), help="of a run; default: student")
    made.add_argument("--split", default="train", choices=("train", "bank", "test"))
    for made in (commands.choices["evaluate"], commands.choices["embed"]):
        made.add_argument("--data_root", help="where named data sets lie")
        made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    made = verb("export", verbs.export, "write a run's backbone for other programs")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("--format", default="safetensors", help="safetensors, with timm's names")
    made.add_argument("--network", default="student", choices=("student", "teacher"))
    made.add_argument("--out", help="target file; default: in RUN/export")
    made = verb("import", verbs.import_weights, "turn another program's checkpoint into a backbone file")
    made.add_argument("file", metavar="FILE", help="what it saved: .pth, .pth.tar, .ckpt, .safetensors")
    made.add_argument(
        "--from", dest="layout", metavar="LAYOUT", help="official, solo, moco, dino, torchvision or timm; default: by its names"
    )
    made.add_argument("--backbone", metavar="NAME", help="timm's name of the network; default: ResNets are recognised")
    made.add_argument("--stem", help="standard, small, small-pool or small-wide; default: by the first convolution")
    made.add_argument("--network", choices=("student", "teacher"), help="default: the one its authors evaluate")
    made.add_argument(
        "--allow",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that may be missing or unexpected (abc.* for many); untrained",
    )
    made.add_argument("--size", type=int, help="pixels of its images; default: 224, or 32 and 64 for small stems")
    made.add_argument("--out", help="target .safetensors; default: beside FILE")
    verb("recipes", verbs.recipes, "list the recipes and where their settings come from")
    made = verb("validate", verbs.validate, "check settings without running anything")
    made.add_argument("--show", action="store_true", help="print all settings as YAML")
    _add_settings(made, "[--show] ")
    return parser, list(commands.choices)


def _add_settings(parser: argparse.ArgumentParser, own: str = "") -> None:
    """Every setting as an option; values are read and checked later, together, so that all faults are told at once."""
    parser.add_argument(
        "data", metavar="DATA", nargs="?", help="name of a data set, folder of images or list file (default: digits)"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    # argparse's own would name each of the settings, over two screens.
    parser.usage = f"{parser.prog} [DATA] [--config FILE] [--SETTING VALUE ...] {own}[--json] [--debug]"
    groups: dict[str, Any] = {}
    shorthand = {"views.weak": None, "views.strong": None}
    for name, (_, field) in leaves(Config).items():
        section = name.rpartition(".")[0]
        group = groups.setdefault(section, parser.add_argument_group(section or "run"))
        if section in shorthand and shorthand.pop(section, "") is None:
            group.add_argument(f"--{section}", metavar="NAME", help=f"view recipe: {', '.join(VIEWS)}")
        if name != "data":
            default = f"(default: {field.default})" if not callable(field.default_factory) else ""
            choices = f" (one of {', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            text = f"{field.metadata['help']}{choices} {default}".replace("%", "%%")
            group.add_argument(f"--{name}", metavar="VALUE", help=text)


def _overrides(args: argparse.Namespace, unknown: list[str]) -> dict[str, Any]:
    """The settings given on the command line as {dotted name: text}, unknown ones among them."""
    known = set(leaves(Config)) | {"views.weak", "views.strong"}
    given = {}
    if args.verb in _WITH_SETTINGS:
        given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    words = iter(unknown)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: not expected here; settings are given as --name value")
        given[name[2:]] = value if equals else next(words, "")
    # `--views.strong NAME` beside `--views.strong.blur 0`: both speak of one section.
    for section in ("views.weak", "views.strong"):
        if section in given:
            given[f"{section}.name"] = given.pop(section)
    return given
