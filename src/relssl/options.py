"""Commands and their options: as verbs.yaml declares them, read from the words of a command line, and explained; no torch."""

import argparse
import collections
import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import relssl
from relssl.errors import ConfigError
from relssl.settings.evaluation import Evaluation, Tuning
from relssl.settings.reading import build, choices, leaves, meant, nearest_word, path_text, read_yaml, spell, words
from relssl.settings.run import Config, resolve
from relssl.weights.formats import FORMATS

Overrides = dict[str, Any]
_ABOUT = "Pretrain image backbones on unlabelled images with ReSSL."
PARSER = argparse.ArgumentParser(prog="relssl", description=_ABOUT, allow_abbrev=False)
PARSER.add_argument("--version", action="version", version=f"relssl {relssl.__version__}")
_SETTINGS = {"run": Config, "evaluation": Evaluation, "tuning": Tuning}
_TYPES = {"int": int, "float": float}


class Verb(NamedTuple):
    """A command, as it is read and shown."""

    parser: argparse.ArgumentParser  # of its own options, and not of the settings
    options: dict[str, dict[str, Any]]  # its own, with their arguments for argparse
    settings: Any  # the dataclass whose fields are options, too
    shows: list[str] | None  # the settings that `--help` shows; None: those outside of sections


def _verbs() -> Iterator[tuple[str, Verb]]:
    """Yield the commands of verbs.yaml by name, each with a parser below `PARSER`."""
    commands = PARSER.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    file = read_yaml(Path(__file__).with_name("verbs.yaml"))
    formats = "; ".join(f"{name}: {each.about}" for name, each in FORMATS.items())
    for name, declared in file["verbs"].items():
        parser = commands.add_parser(name, help=declared["about"], description=declared["about"], allow_abbrev=False)
        takes = [file["groups"][each] if isinstance(each, str) else each for each in (*declared["takes"], "common")]
        options = {option: dict(how) for each in takes for option, how in each.items()}
        for option, how in options.items():
            if "type" in how:
                how["type"] = _TYPES[how["type"]]
            if "help" in how:
                how["help"] = how["help"].replace("{formats}", formats)
            parser.add_argument(option, **how)
        if "settings" in declared:
            parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [--SETTING VALUE ...]"
        shows = file["groups"]["main"] if declared.get("shows") == "main" else declared.get("shows")
        yield name, Verb(parser, options, _SETTINGS.get(declared.get("settings")), shows)


VERBS = dict(_verbs())


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Return the arguments, and the settings as {dotted name: text}: all options that are not the verb's own. They are read and
    checked later, together, so that all faults are reported at once."""
    if not argv or argv[0].startswith("-"):
        return PARSER.parse_args(argv), {}
    if argv[0] not in VERBS:
        raise ConfigError(f"unknown command {argv[0]!r}; the nearest is {nearest_word(argv[0], VERBS)}")
    verb = VERBS[argv[0]]
    words, options, overrides = _sort(verb, argv[1:])
    if verb.settings and {"-h", "--help", "--help_all"} & {*options}:
        given = dict(zip((name for name in verb.options if name[0] != "-"), words, strict=False)) | overrides
        _help(verb, given, "--help_all" in options).print_help()
        raise SystemExit(0)
    if overrides and not verb.settings:
        raise ConfigError(*(f"--{name}: unknown option of relssl {argv[0]}; {_nearest_option(name, verb)}" for name in overrides))
    args, extra = PARSER.parse_known_args([argv[0], *words, *options])
    if extra:
        raise ConfigError(f"{extra[0]!r}: not expected here; settings are given as --name value, and DATA once")
    for name, value in vars(args).items():
        if isinstance(value, str) and name != "only":  # the names of rows may be a long list
            try:
                setattr(args, name, path_text(value))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    return args, overrides


def _sort(verb: Verb, argv: Sequence[str]) -> tuple[list[str], list[str], Overrides]:
    """Return the words of a command that stand alone, those given as an option (`--data DIR`) last, its own options, and settings."""
    words, options, given, rest = list[str](), list[str](), Overrides(), collections.deque(argv)
    known = leaves(verb.settings) if verb.settings else {}
    while rest:
        word = rest.popleft()
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")  # which are the same
        how = verb.options.get(f"--{key}", {})
        if not word.startswith("-"):
            if equals and set(meant(key, known)) & known.keys() and not os.path.exists(word):
                raise ConfigError(f"{word!r}: settings are given as --{key} {value}")
            words.append(word)
        elif word[:2] != "--" or key in ("help", "help_all") or how.get("action") == "store_true":
            options.append(f"--{key}" if word[:2] == "--" else word)
        elif not equals and (not rest or rest[0].startswith("--")):
            about = how.get("help") or next((known[each].description for each in meant(key, known) if each in known), "")
            raise ConfigError(f"{name}: needs a value" + (f" ({about})" if about else ""))
        elif how.get("nargs") == "+":
            options += [f"--{key}", value if equals else rest.popleft()]
            while rest and not rest[0].startswith("--"):
                options.append(rest.popleft())
        else:
            value = value if equals else rest.popleft()
            if given.setdefault(key, value) != value:
                raise ConfigError(f"{key}: is given twice, as {given[key]} and as {value}; give it once")
            options += [f"--{key}={value}"] if how else []
    settings = {name: value for name, value in given.items() if not {name, f"--{name}"} & verb.options.keys()}
    return [*words, *(given[name] for name in verb.options if name in given)], options, settings


def _help(verb: Verb, given: Overrides, every: bool) -> argparse.ArgumentParser:
    """Return a verb's parser with the settings that matter, or all section by section, as they would be with those that are given."""

    def read(over: Overrides) -> Any:
        return resolve(over) if verb.settings is Config else build(verb.settings, spell(over, fields))

    fields = leaves(verb.settings)
    try:
        settings = read({name: value for name, value in given.items() if name == "data" or name not in verb.options})
    except ConfigError:
        settings = read({})
    shown = fields if every else [name for name in fields if "." not in name] if verb.shows is None else verb.shows
    parser = copy.deepcopy(verb.parser)
    parser.add_argument("--help-all", action="store_true", help=f"show all {len(fields)} settings, too")
    whole = f"settings, as recipe {settings.recipe} has them" if hasattr(settings, "recipe") else "settings and their defaults"
    groups: dict[str, Any] = {"": parser.add_argument_group(whole)} if shown else {}
    for name in (name for name in shown if name != "data" and f"--{name}" not in verb.options):
        section, value, one_of = name.rpartition(".")[0] * every, attrgetter(name)(settings), ", ".join(choices(fields[name]))
        if section not in groups:
            groups[section] = parser.add_argument_group(section, attrgetter(section)(settings).__doc__)
        flag, text = name, f"{fields[name].description}{f' (one of {one_of})' if one_of else ''}"
        if not every:
            flag = next(iter(words(name)), name.removesuffix(".name")) if "." in name else name
            text = one_of or re.split("; | [(]", text)[0]
        typed = value if isinstance(value, str) else json.dumps(value).strip("[]").replace(", ", ",").replace('"', "")
        groups[section].add_argument(f"--{flag}", metavar=typed or '""', help=text.replace("%", "%%"))
    return parser


def _nearest_option(name: str, verb: Verb) -> str:
    options = [each[2:] for each in verb.options if each.startswith("--")]
    return f"the nearest is --{next((each for each in meant(name, options) if each in options), nearest_word(name, options))}"
