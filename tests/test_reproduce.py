from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import relssl
from relssl import cli
from relssl.errors import CheckpointError, ConfigError, Interrupted
from relssl.reproduction import plan as planning
from relssl.reproduction import results as outcomes
from relssl.reproduction import tables
from relssl.reproduction.results import page
from relssl.reproduction.study import Study
from relssl.reproduction.tables import Expectation, Number, Row
from relssl.settings.run import resolve
from relssl.train import pretrain as pretraining
from relssl.train.loop import Trainer
from relssl.train.run_folder import TIMINGS, read_rows

TINY = """
title: A tiny table
shows: nothing but the machinery
source: made up
reference: k96
scales:
  smoke: {encoder: {batch_norm_splits: 1}, engine: {threads: 1, device: cpu, precision: fp32}}
rows:
  - {name: k96, label: "96", settings: {method.memory_size: 96}, paper: [{data: digits, knn: 50, sure: read}]}
  - {name: k64, label: "64", settings: {method.memory_size: 64}}
  - {name: broken, label: no network, settings: {backbone: resnet_no_such}}
expected:
  - {says: 96 above 64, above: [k96, k64]}
"""
RESSL_ONLY = {"k96", "k64"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the table `tiny` in; the shipped scales stay as they are."""
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "scales").symlink_to(tables._FOLDER / "scales")
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(tables, "_FOLDER", folder)
    monkeypatch.setattr("relssl.reproduction.reproduce.cost", _no_cost)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _no_cost(runs: Any, *_: Any) -> Any:
    """What is measured is tested apart; here it would only take time."""
    from relssl.reproduction.reproduce import Cost

    return Cost({run.row.name: 60.0 for run in runs}, "made up")


def run_tiny(**options: Any) -> dict[str, Any]:
    return relssl.reproduce("tiny", "smoke", **({"only": RESSL_ONLY} | options))


@pytest.mark.parametrize("scale", tables.SCALES)
@pytest.mark.parametrize("name", tables.names())
def test_shipped_tables_make_plans_whose_commands_say_the_same(
    name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a plan knows the runs that are there
    table = tables.read_table(name)
    rows = {row.name for row in table.rows}
    assert len(rows) == len(table.rows) and table.reference in rows and table.at(scale)
    assert all(set(each.rows) <= rows and each.kind in ("above", "collapse", "sound") for each in table.expected)
    assert all(number.sure in tables.SURE and 0 <= number.value <= 100 for row in table.rows for number in row.paper)
    for run in planning.plan(table, tables.read_scale(scale), seeds=2)[:: max(1, len(rows) // 3)]:
        first, second = (shlex.split(line)[1:] for line in run.commands())
        parser, _ = cli.build_parser()
        assert resolve(cli._overrides(*parser.parse_known_args(first))) == run.config
        asked = cli._overrides(*parser.parse_known_args(second))
        assert planning.read_settings(asked) == run.evaluation


def test_a_plan_runs_all_rows_on_one_seed_before_the_next(tiny: Path) -> None:
    runs = planning.plan(tables.read_table("tiny"), tables.read_scale("smoke"), seeds=2)
    assert [(run.row.name, run.seed) for run in runs] == [(r, s) for s in (0, 1) for r in ("k96", "k64", "broken")]
    assert {run.config.seed for run in runs[3:]} == {1}
    assert runs[0].folder == Path("runs/reproduce/tiny-smoke/k96-0") and runs[0].config.out == str(runs[0].folder)
    assert [planning.state(run) for run in runs] == ["new"] * 6
    assert "backbone_args" not in runs[2].commands()[0]  # they were meant for the scale's own network


def test_a_rehearsal_keeps_the_warm_ups_share_and_has_a_name_of_its_own() -> None:
    table, scale = tables.read_table("temperature"), tables.read_scale("paper")
    (run, *_) = planning.plan(table, scale, overrides={"epochs": "2"})
    assert run.config.epochs == 2 and run.config.optimizer.warmup_epochs == pytest.approx(5 / 200 * 2)
    assert run.evaluation.linear.epochs == 2 and run.folder.parent.name == "temperature-paper-rehearsal"
    assert run.evaluation.images is None
    (run, *_) = planning.plan(table, scale, overrides={"epochs": 2, "max_images": 512})
    assert run.config.max_images == 512 and run.evaluation.images == run.config.log.knn_images == (512, 512)
    (run, *_) = planning.plan(table, scale, overrides={"epochs": 2, "optimizer.warmup_epochs": 1})
    assert run.config.optimizer.warmup_epochs == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method.memory_size": 32}, "method.memory_size: is what the rows of tiny differ in"),
        ({"method": {"memory_size": 32}}, "method.memory_size: is what the rows of tiny differ in"),
        ({"seed": 3}, "seed: cannot be given for all runs; use --seeds N"),
        ({"optimizer.lrr": 1}, "optimizer.lrr: unknown key; the nearest is optimizer.lr"),
        ({"optimizer.lr": -1}, "tiny, k96: optimizer.lr: must be > 0"),
        ({"seeds": 0}, "seeds: must be at least 1, got 0"),
        ({"only": ["k95"]}, "only: 'k95' is unknown; the nearest is k96 (all: k96, k64, broken)"),
        ({"time_limit": 0}, "time_limit: must be above 0 minutes"),
    ],
)
def test_what_cannot_be_used_is_refused(tiny: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_tiny(**options)
    assert str(refused.value).startswith(told) and not (tiny / "runs").exists()


@pytest.mark.parametrize("words", [["memry"], ["memory", "--scale", "smal"], ["memory", "--only", "k1"], ["memory", "--lr", "1"]])
def test_unknown_names_end_with_2_before_torch_is_imported(words: list[str]) -> None:
    code = f"import sys; from relssl.cli import main; code = main({['reproduce', *words]!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "nearest" in ended.stderr


def test_runs_that_are_done_are_skipped_and_others_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = run_tiny(say=said.append)
    assert [line.split(":")[0] for line in said[-2:]] == ["k96 seed 0", "k64 seed 0"]
    assert found == json.loads((tiny / "results/tiny-smoke.json").read_text())
    assert (tiny / "results/tiny-smoke.md").read_text() == page(found)
    assert found["missing"] == [{"row": "broken", "seed": 0, "why": "not asked for", "exit_code": None}]
    ours = {row["row"]: row["ours"] for row in found["rows"]}
    kept = json.loads((tiny / "runs/reproduce/tiny-smoke/k96-0/evaluations/knn-digits-200-100.json").read_text())["results"]
    assert ours["k96"]["knn student"]["mean"] == kept[0]["figures"]["top1"]
    assert set(ours["k64"]) == {"knn student", "probe student"}
    assert found["rows"][0]["paper"][0]["difference"] is None  # this is not the paper's setting

    monkeypatch.setattr(pretraining, "_run", _never)
    monkeypatch.setattr("relssl.evaluation.evaluate.evaluate", _never)
    assert run_tiny() == found
    again = tiny / "runs/reproduce/tiny-smoke/k64-1"  # another seed's run, of which this command is not asked
    shutil.copytree(again.with_name("k64-0"), again)
    (again / "config.yaml").write_text((again / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    shutil.copy(again.with_name("k64-0.json"), again.with_name("k64-1.json"))
    assert [(run["row"], run["seed"]) for run in run_tiny()["runs"]] == [("k96", 0), ("k64", 0), ("k64", 1)]
    (again / "environment.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"k64-1: what this finished run left .* is damaged"):
        run_tiny()
    (again / "config.yaml").write_text("seed: [")
    with pytest.raises(ConfigError, match=r"k64-1: its config.yaml cannot be used .*; move the folder away"):
        run_tiny()
    shutil.rmtree(again)
    again.with_name("k64-1.json").unlink()
    with pytest.raises(ConfigError, match=r"k96-0: holds a run of other settings .optimizer.lr: 0.1 there, 0.05 now"):
        run_tiny(**{"optimizer.lr": 0.05})
    with pytest.raises(
        ConfigError, match=r"tiny-smoke.json: holds results of other settings .none there, --optimizer.lr 0.05 now"
    ):
        run_tiny(runs=tiny / "other", **{"optimizer.lr": 0.05})


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("there was nothing to do")


def test_a_run_stopped_on_its_way_goes_on_exactly(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer, parts: Any) -> Any:
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, parts)

    run_tiny(only=["k64"], runs=tiny / "whole", out=tiny / "whole-results")
    step = Trainer.train_step
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(Interrupted, match="tiny-smoke: stopped with 1 of 1 runs to do") as stopped:
            run_tiny(only=["k64"])
    assert stopped.value.exit_code == 143
    missing = json.loads((tiny / "results/tiny-smoke.json").read_text())["missing"]
    assert {each["row"]: each["why"] for each in missing}["k64"] == "stopped on the way"
    run_tiny(only=["k64"])
    once, twice = (_rows(tiny / folder / "k64-0") for folder in ("whole", "runs/reproduce/tiny-smoke"))
    assert once == twice and len(once) == 4


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]


def test_a_stop_outside_of_training_loses_no_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr("relssl.evaluation.evaluate.evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            run_tiny(only=["k64"])
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted) as late:
        run_tiny(only=["k96"], time_limit=1e-9)
    assert late.value.exit_code == 75 and not (tiny / "runs/reproduce/tiny-smoke/k96-0").exists()
    missing = json.loads((tiny / "results/tiny-smoke.json").read_text())["missing"]
    assert {each["row"]: each["why"] for each in missing} == {
        "k96": "not run yet",
        "k64": "not asked for",
        "broken": "not asked for",
    }
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", _never)  # it is trained already
        found = run_tiny(only=["k64"])
    assert [run["row"] for run in found["runs"]] == ["k64"]


def test_a_row_that_fails_is_noted_and_the_next_one_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "tiny", "--scale", "smoke", "--only", "broken,k64", "--json"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert [run["row"] for run in found["runs"]] == ["k64"]
    missing = {each["row"]: each for each in found["missing"]}
    assert missing["broken"]["why"].startswith("failed: ") and "resnet_no_such" in missing["broken"]["why"]
    assert missing["broken"]["exit_code"] == 2 and missing["k96"]["exit_code"] is None
    assert "1 runs failed, the first is broken" in told.err.splitlines()[-1]
    assert "- broken, seed 0: failed: " in (tiny / "results/tiny-smoke.md").read_text()
    # Which is no failure of a command that is asked for another row.
    assert cli.main(["reproduce", "tiny", "--scale", "smoke", "--only", "k64"]) == 0
    assert cli.main(["reproduce", "tiny", "--scale", "smoke", "--only", ""]) == 2


def test_a_row_that_cannot_be_planned_stops_only_those_who_ask_for_it(tiny: Path) -> None:
    path = tables._FOLDER / "tiny.yaml"
    path.write_text(path.read_text().replace("backbone: resnet_no_such", "recipe: no/such"))
    table, scale = tables.read_table("tiny"), tables.read_scale("smoke")
    with pytest.raises(ConfigError, match="tiny, broken: recipe: 'no/such' is unknown"):
        planning.plan(table, scale)
    study = Study(table, scale, 2, ["k64"], None, tiny, {})
    assert [run.row.name for run in study.runs] == ["k96", "k64"] * 2
    found = study.results()
    assert [row["row"] for row in found["rows"]] == ["k96", "k64"] and "broken, seed 0, 1: not asked for" in page(found)


def test_the_papers_other_sets_are_its_own_setting_too(tmp_path: Path) -> None:
    def row(**overrides: str) -> Any:
        study = Study(tables.read_table("temperature"), tables.read_scale("paper"), 1, [], tmp_path, tmp_path, overrides)
        assert study._as_published() == (overrides["recipe"].startswith("nips/") and "epochs" not in overrides)
        return next(each for each in study.results()["rows"] if each["row"] == "t.03")

    (number,) = row(recipe="nips/cifar100")["paper"]
    assert (number["value"], number["sure"]) == (63.79, "third party")
    row(recipe="cifar100")
    row(recipe="nips/cifar100", epochs="2")


def test_a_plan_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relssl.reproduction.reproduce import cost

    monkeypatch.setattr("relssl.data.named.load", _never)
    over = {"data_root": str(tmp_path / "none")}
    runs = planning.plan(tables.read_table("temperature"), tables.read_scale("small"), seeds=1, runs=tmp_path, overrides=over)
    said: list[str] = []
    assert cost(runs[:1], {}, said.append).seconds == {"t.01": None}
    assert said == ["t.01: time unknown: cifar10 is not under data_root, and no plan downloads it; its runs do"]


def made(*values: float, collapsed: tuple[bool, ...] | None = None, figure: str = "knn student") -> dict[int, dict[str, Any]]:
    """Outcomes of seeds 0, 1, ..."""
    fallen = collapsed or (False,) * len(values)
    return {seed: {"figures": {figure: value}, "ends": {}, "collapsed": fallen[seed]} for seed, value in enumerate(values)}


def test_means_spreads_and_differences_by_hand() -> None:
    assert outcomes.spread({0: 1.0, 1: 2.0, 2: 6.0}) == {
        "mean": 3.0,
        "std": pytest.approx(math.sqrt((4 + 1 + 9) / 2)),
        "min": 1.0,
        "max": 6.0,
        "seeds": {"0": 1.0, "1": 2.0, "2": 6.0},
    }
    assert outcomes.spread({4: 2.5})["std"] is None
    pair = outcomes.paired({"a": {0: 5.0, 1: 7.0, 2: 1.0}, "b": {0: 1.0}}, {"a": {0: 4.0, 1: 4.0}})
    assert list(pair) == ["a"] and pair["a"]["mean"] == 2.0 and pair["a"]["seeds"] == {"0": 1.0, "1": 3.0}
    numbers = (
        Number("c", "knn", 50.0, "read", "the paper"),
        Number("c", "linear", 60.0, "recalled", "x"),
        Number("d", "knn", 9.0, "read", "x"),
    )
    row = Row("r", "r", {}, ("paper",), numbers)
    own = outcomes.against_paper(row, "c", {"knn student": {0: 48.0, 1: 51.0}}, own_setting=True)
    assert [(each["figure"], each["value"], each["difference"]) for each in own] == [("knn", 50.0, -0.5), ("linear", 60.0, None)]
    assert outcomes.against_paper(row, "c", {"knn student": {0: 48.0}}, own_setting=False)[0]["difference"] is None


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ((10.0, 12.0), (6.0, 8.0), "holds"),  # differ by 4, both deviate by sqrt 2: noise 2
        ((6.0, 8.0), (10.0, 12.0), "does not hold"),
        ((10.0, 12.0), (8.0, 10.0), "within noise"),  # exactly the noise
        ((10.0,), (9.0, 9.1), "as expected, one seed"),
        ((9.0,), (9.0,), "not as expected, one seed"),
    ],
)
def test_a_direction_counts_beyond_the_spread_alone(better: tuple[float, ...], worse: tuple[float, ...], word: str) -> None:
    said = outcomes.verdict(Expectation("a above b", "above", ("a", "b")), {"a": made(*better), "b": made(*worse)})
    told = said["verdicts"]["knn student"]
    assert told["verdict"] == word
    assert told["noise"] == (None if "one seed" in word else pytest.approx(2.0))
    assert outcomes.verdict(Expectation("a above b", "above", ("a", "b")), {"a": made(1.0)})["verdicts"] == {}


def test_collapse_is_judged_seed_by_seed() -> None:
    rows = {"a": made(1.0, 1.0, collapsed=(True, True)), "b": made(1.0, 1.0, collapsed=(True, False))}

    def word(kind: str, row: str) -> str:
        return str(outcomes.verdict(Expectation("", kind, (row,)), rows)["verdicts"]["collapsed"]["verdict"])

    assert word("collapse", "a") == "holds" and word("sound", "a") == "does not hold"
    assert word("collapse", "b") == word("sound", "b") == "holds for some seeds"


def test_what_ended_in_one_point_or_a_uniform_relation_has_collapsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run, *_) = planning.plan(tables.read_table("memory"), tables.read_scale("smoke"), runs=tmp_path)  # a memory of 64
    assert outcomes.outcome(run) is None
    run.folder.mkdir()
    (run.folder / "config.yaml").touch()
    (run.folder / "status.json").write_text('{"state": "complete"}')
    (run.folder / "environment.json").write_text("{}")
    results = [{"protocol": "knn", "network": "student", "main": "top1", "figures": {"top1": 12.5}, "seconds": 2.0}]
    run.note.write_text(json.dumps({"evaluation": planning.plain(run.evaluation), "results": results}))

    def came_to(**ends: float | None) -> dict[str, Any]:
        rows = [{"step": i, "samples": 64 * i, "loss": 1.0, "images_per_second": 32.0 * i} | ends for i in (1, 2)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = outcomes.outcome(run)
        assert found is not None
        return found

    healthy = came_to(teacher_neighbours=20.0, embedding_std=0.9)
    assert healthy["figures"] == {"knn student": 12.5} and not healthy["collapsed"]
    assert healthy["training_seconds"] == 64 / 32 + 64 / 64 and healthy["evaluation_seconds"] == 2.0
    assert came_to(teacher_neighbours=60.0, embedding_std=0.9)["collapsed"]
    assert came_to(teacher_neighbours=20.0, embedding_std=0.05)["collapsed"]
    assert came_to(teacher_neighbours=None, embedding_std=0.9)["ends"] == {"embedding_std": 0.9}  # no memory
    run.note.write_text(json.dumps({"evaluation": {}, "results": results}))
    assert planning.state(run) == "trained"  # it was evaluated otherwise


def test_a_shipped_table_from_its_cost_to_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "memory", "--scale", "smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--plan", "--json", "--engine.threads", "1"]) == 0
    told = capsys.readouterr()
    costs = json.loads(told.out)
    assert costs["seconds"] == pytest.approx(sum(row["seconds"] for row in costs["rows"])) and costs["seconds"] > 0
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
    assert cli.main([*words, "--engine.threads", "1"]) == 0
    text = (tmp_path / "out/memory-smoke.md").read_text()
    assert text.startswith("# The memory's size, at the smoke scale") and "**These numbers mean nothing.**" in text
    assert "All runs with `--engine.threads 1`." in text and "relssl pretrain digits --recipe" in text
    found = json.loads((tmp_path / "out/memory-smoke.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["k64", "k128"] and found["missing"] == []
    assert all(0 < row["ends"]["teacher_neighbours"]["mean"] <= 128 for row in found["rows"])
    capsys.readouterr()
    assert cli.main([*words, "--engine.threads", "1"]) == 0
    assert capsys.readouterr().err.splitlines() == ["memory-smoke: 2 rows, 2 runs, 2 of them done", *told.err.splitlines()[1:2]]


def test_tables_are_listed_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == tables.names()
    assert cli.main(["reproduce", "temperature", "--list"]) == 0
    assert "  t.04" in capsys.readouterr().out
