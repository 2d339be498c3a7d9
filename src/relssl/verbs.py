"""What each command does, given its arguments and the settings among them. torch is imported within, once it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from relssl.config import resolve, to_yaml
from relssl.errors import ConfigError, RelsslError


def _launched(overrides: dict[str, Any]) -> dict[str, Any]:
    """Under torchrun the launcher has already decided how many processes there are."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local and world:
        overrides.setdefault("engine.devices", local)
        overrides.setdefault("engine.nodes", str(int(world) // int(local)))
    return overrides


def pretrain(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.data.files import exists
    from relssl.train.folder import default_folder, refuse_used

    settings = resolve(_launched(overrides), args.config)
    exists(settings.data, settings.data_root)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        refuse_used(Path(settings.out or default_folder(settings)))
    from relssl.train.pretrain import pretrain

    return _tell(pretrain(settings=settings), args.json)


def estimate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.data.files import exists

    settings = resolve(_launched(overrides), args.config)
    exists(settings.data, settings.data_root)
    from relssl.report.estimate import show
    from relssl.train.estimate import estimate

    found = estimate(settings=settings, steps=args.steps)
    if found is None:
        return None
    if not args.json:
        show(found)
    return dataclasses.asdict(found)


def resume(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.train.pretrain import resume

    return _tell(resume(args.run_folder, checkpoint=args.checkpoint), args.json)


def _tell(result: Any, as_json: bool) -> Any:
    from relssl.report.summary import facts, show
    from relssl.weights.runs import load_run

    if result is None:
        return None
    if not as_json:
        config = load_run(result.folder).config
        show(result, config.method.memory_size, config.encoder.dim)
    return facts(result)


def evaluate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.protocols import read_settings

    settings = read_settings(overrides)
    from relssl.evaluation.protocol import evaluate
    from relssl.report.evaluation import show
    from relssl.weights.opening import Reading

    reading = Reading(args.layout, args.backbone, args.stem, allow=args.allow)
    say = None if args.json else lambda line: print(line, file=sys.stderr, flush=True)
    so_far: list[dict[str, Any]] = []
    try:
        found = evaluate(
            args.source, args.data, settings=settings, reading=reading, out=args.out, say=say, done=so_far.append
        )  # fmt: skip
    except (RelsslError, KeyboardInterrupt):
        if so_far:  # what was found before is not lost
            print(json.dumps(so_far[-1])) if args.json else show(so_far[-1])
        raise
    if not args.json:
        show(found)
    return found


def compare(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.evaluation.compare import compare
    from relssl.report.evaluation import show_comparison

    names = tuple(args.network.split(",")) if args.network else None
    if names is not None and len(names) > 2:
        raise ConfigError(f"network: one name or two are needed, got {args.network}")
    found = compare(args.first, args.second, network=names and (names[0], names[-1]), allow=args.allow)
    if not args.json:
        show_comparison(found)
    return {"comparisons": found}


def embed(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.evaluation.embed import embed
    from relssl.weights.opening import Reading

    reading = Reading(args.layout, args.backbone, args.stem, allow=args.allow, size=args.size)
    options = {name: getattr(args, name) for name in ("network", "split", "data_root", "device", "precision")}
    found = embed(args.source, args.data, args.out, reading=reading, **options)
    if not args.json:
        print(
            f"{found['images']} features of dimension {found['dim']} in {found['out']}; {len(found['bad'])} images could not be read"
        )
    return found


def export(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.weights.formats import find_format

    find_format(args.format)  # before torch is imported
    from relssl.weights.export import export

    made = export(args.source, format=args.format, network=args.network, out=args.out)
    parity = made.parity
    if not args.json:
        how = f"features differ by {parity.difference:.2g} at most, {parity.relative:.2g} of the largest"
        print(f"{made.path}\nchecked on {parity.images}: {how}\n\nLoad it:\n")
        print("\n".join("    " + line for line in made.lines))
    facts = {"out": str(made.path), "files": [str(file) for file in made.files], "format": made.format, "network": made.network}
    return facts | dataclasses.asdict(parity)


def import_weights(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.weights.importing import import_weights

    report = import_weights(
        args.file,
        out=args.out,
        layout=args.layout,
        backbone=args.backbone,
        stem=args.stem,
        network=args.network,
        allow=args.allow,
        size=args.size,
    )
    if not args.json:
        print("\n".join([*report.lines(), f"written to {report.out}"]))
    return report.facts()


def recipes(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.recipes import listing

    found = listing()
    if not args.json:
        for recipe in found:
            print(f"{recipe.name:14} {recipe.about}\n{'':14} source: {recipe.source}")
    return [vars(recipe) for recipe in found]


def validate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    settings = resolve(overrides, args.config)
    if args.show and not args.json:
        print(to_yaml(settings), end="")
    elif not args.json:
        print(
            f"valid: recipe {settings.recipe}, {settings.backbone} on {settings.data}, {settings.epochs} epochs of batch {settings.batch_size}"
        )
    return {"valid": True, "recipe": settings.recipe}
