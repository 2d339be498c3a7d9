"""What each command does, given its arguments and the settings among them. torch is imported within, once it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from relssl.config import resolve, to_yaml


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


def evaluate(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.evaluation.protocol import evaluate

    found = evaluate(
        args.source,
        args.data,
        protocol=args.protocol,
        data_root=args.data_root,
        images=args.images and tuple(args.images),
        device=args.device,
    )
    for network, scores in found["results"].items():
        for setting, figures in scores.items():
            if setting != "card" and not args.json:
                print(f"{network:8} {setting:12} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return found


def embed(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.evaluation.protocol import embed

    found = embed(
        args.source, args.data, args.out, network=args.network, split=args.split, data_root=args.data_root, device=args.device
    )
    if not args.json:
        print(
            f"{found['images']} features of dimension {found['dim']} in {found['out']}; {len(found['bad'])} images could not be read"
        )
    return found


def export(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.weights.export import export, timm_lines
    from relssl.weights.runs import load_run

    target = export(args.run_folder, format=args.format, network=args.network, out=args.out)
    if not args.json:
        print(f"{target}\n\nLoad it with timm:\n")
        print("\n".join("    " + line for line in timm_lines(load_run(args.run_folder).config, str(target))))
    return {"out": str(target), "format": args.format, "network": args.network}


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
