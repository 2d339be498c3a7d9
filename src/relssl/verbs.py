"""What each command does, given its arguments and the settings among them. torch is imported within, once it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from relssl.errors import ConfigError, RelsslError
from relssl.settings.run import differences, resolve, to_yaml


def _launched(overrides: dict[str, Any]) -> dict[str, Any]:
    """Under torchrun the launcher has already decided how many processes there are."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local and world:
        overrides.setdefault("engine.devices", local)
        overrides.setdefault("engine.nodes", str(int(world) // int(local)))
    return overrides


def pretrain(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.data.named import exists
    from relssl.train.run_folder import default_folder, refuse_used

    settings = resolve(_launched(overrides), args.config)
    exists(settings.data, settings.data_root)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        refuse_used(Path(settings.out or default_folder(settings)))
    from relssl.engine import prepare_process
    from relssl.train.pretrain import pretrain

    prepare_process()
    return _tell(pretrain(settings=settings), args.json)


def estimate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.data.named import exists

    settings = resolve(_launched(overrides), args.config)
    exists(settings.data, settings.data_root)
    from relssl.engine import prepare_process
    from relssl.report.tables import show_estimate
    from relssl.train.estimate import estimate

    prepare_process()
    found = estimate(settings=settings, steps=args.steps)
    if found is None:
        return None
    if not args.json:
        show_estimate(found)
    return dataclasses.asdict(found)


def list_images(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.data.folder import list_lines, shown

    lines, bad = list_lines(args.folder)
    if not args.json:
        sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines))
        sys.stdout.flush()
    if bad:
        print(f"relssl: {len(bad)} files are left out, the first: {shown(bad[0][0])} {bad[0][1]}", file=sys.stderr)
    return {"images": len(lines), "bad": bad}


def resume(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.engine import prepare_process
    from relssl.train.pretrain import resume

    prepare_process()
    return _tell(resume(args.run_folder, checkpoint=args.checkpoint), args.json)


def _tell(result: Any, as_json: bool) -> Any:
    from relssl.report.tables import facts, show_summary
    from relssl.weights.opening import load_run

    if result is None:
        return None
    if not as_json:
        show_summary(result, load_run(result.folder).config)
    return facts(result)


def evaluate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.settings.evaluation import read_settings

    settings = read_settings(overrides)
    from relssl.engine import prepare_process
    from relssl.evaluation.evaluate import evaluate
    from relssl.report.tables import show_evaluation
    from relssl.weights.opening import Reading

    prepare_process()
    reading = Reading(args.layout, args.backbone, args.stem, allow=args.allow)
    say = None if args.json else lambda line: print(line, file=sys.stderr, flush=True)
    so_far: list[dict[str, Any]] = []
    try:
        found = evaluate(
            args.source, args.data, settings=settings, reading=reading, out=args.out, say=say, done=so_far.append
        )  # fmt: skip
    except (RelsslError, KeyboardInterrupt):
        if so_far:  # what was found before is not lost
            print(json.dumps(so_far[-1])) if args.json else show_evaluation(so_far[-1])
        raise
    if not args.json:
        show_evaluation(found)
    return found


def compare(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.evaluation.result import compare
    from relssl.report.tables import show_comparison

    names = tuple(args.network.split(",")) if args.network else None
    if names is not None and len(names) > 2:
        raise ConfigError(f"network: one name or two are needed, got {args.network}")
    found = compare(args.first, args.second, network=names and (names[0], names[-1]), allow=args.allow)
    if not args.json:
        show_comparison(found)
    return {"comparisons": found}


def embed(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    from relssl.engine import prepare_process
    from relssl.evaluation.embed import embed
    from relssl.weights.opening import Reading

    prepare_process()
    reading = Reading(args.layout, args.backbone, args.stem, allow=args.allow, size=args.size)
    options = {name: getattr(args, name) for name in ("network", "split", "data_root", "device", "precision")}
    found = embed(args.source, args.data, args.out, reading=reading, **options)
    if not args.json:
        written = f"{found['images']} features of dimension {found['dim']} in {found['out']}"
        print("\n".join([f"{written}; {len(found['bad'])} images could not be read", *found["notes"]]))
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
    from relssl.weights.export import import_weights

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
    from relssl.settings.recipes import find, listing

    if args.name is None:
        found = listing()
        if not args.json:
            folder = ""
            for recipe in found:
                if folder != (folder := recipe.name.rpartition("/")[0]):
                    print()
                print(f"{recipe.name:22} {recipe.about}")
            print("\n`relssl recipes NAME` shows the settings of one and where they come from")
        return [vars(recipe) for recipe in found]
    one = find(args.name)
    settings = {name: value for name, value in differences(resolve({"recipe": one.name})).items() if name != "recipe"}
    if not args.json:
        print(f"{one.name}: {one.about}\n\n{textwrap.fill(one.source, 120)}\n\nwhat differs from the defaults:")
        for name, value in settings.items():
            print(f"  {name:30} {json.dumps(value)}")
    return vars(one) | {"settings": settings}


def backbones(args: argparse.Namespace, _: dict[str, Any]) -> Any:
    if args.size < 4:
        raise ConfigError(f"size: must be 4 pixels or more, got {args.size}")
    from relssl.method.backbones import find, within
    from relssl.report.tables import show as show_backbones

    kept = within(find(args.pattern, args.family, args.all), args.size, args.max_params * 1e6, args.max_gflops)
    return [dataclasses.asdict(each) for each in (kept if args.json else show_backbones(kept, args.size))]


def validate(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    settings = resolve(overrides, args.config)
    if args.show and not args.json:
        print(to_yaml(settings), end="")
    elif not args.json:
        print(
            f"valid: recipe {settings.recipe}, {settings.backbone} on {settings.data}, {settings.epochs} epochs of batch {settings.batch_size}"
        )
    return {"valid": True, "recipe": settings.recipe}


def reproduce(args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    from relssl.errors import FailedRuns
    from relssl.reproduction import tables
    from relssl.reproduction.plan import plan
    from relssl.reproduction.reproduce import reproduce

    if args.list or args.table is None:
        return _list_tables([tables.read_table(args.table)] if args.table else list(map(tables.read_table, tables.names())), args)
    only = [] if args.only is None else args.only.split(",")
    # Faults come to light before torch is imported.
    table, scale = tables.read_table(args.table), tables.read_scale(args.scale)
    plan(table, scale, seeds=args.seeds, only=only, runs=args.runs, overrides=overrides)
    from relssl.engine import prepare_process

    prepare_process()
    found = reproduce(
        args.table,
        args.scale,
        seeds=args.seeds,
        only=only,
        runs=args.runs,
        out=args.results,
        time_limit=args.minutes,
        plan_only=args.plan,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **overrides,
    )
    # A run that was not asked for now, and failed before or in another process, is not this command's failure.
    failed = [
        each
        for each in found.get("missing", ())
        if each["exit_code"] and (not only or each["row"] in only) and (args.seeds is None or each["seed"] < args.seeds)
    ]
    if not args.plan and not args.json:
        print(Path(args.results) / f"{found['name']}.md")
    if failed:
        if args.json:
            print(json.dumps(found))
        raise FailedRuns(
            f"{len(failed)} runs failed, the first is {failed[0]['row']}: {failed[0]['why']}", failed[0]["exit_code"]
        )
    return found


def _list_tables(found: list[Any], args: argparse.Namespace) -> Any:
    """Tables by name; of a single one its rows, too."""
    for table in [] if args.json else found:
        print(f"{table.name:18} {table.title}")
        for row in table.rows if args.table else ():
            print(f"  {row.name:24} {row.label}  ({', '.join(row.scales)})")
    return [{"table": table.name, "title": table.title, "rows": [row.name for row in table.rows]} for table in found]
