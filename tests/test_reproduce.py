"""Rerunning a comparison: plans, runs that stop and go on, and the results of runs that are done."""

import dataclasses
import json
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import relssl
from relssl.cli import main
from relssl.errors import CheckpointError, ConfigError, Interrupted
from relssl.reproduction import tables
from relssl.reproduction.plan import Plan, plain, plan
from relssl.reproduction.results import against_paper, curves, outcome, page, paired, results, spread, verdicts
from relssl.reproduction.tables import Row, read_table
from relssl.settings.evaluation import read_settings
from relssl.settings.reading import changes
from relssl.settings.run import resolve, to_yaml
from relssl.settings.small import give_way
from relssl.train.pretrain import pretrain
from small_runs import differing, final_state, repeatable_rows

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


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the table in."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the row k64."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    relssl.reproduce(str(folder / "tiny.yaml"), "smoke", only=["k64"], runs=folder / "runs", out=folder / "results")
    return folder


def run_tiny(*only: str, **options: Any) -> dict[str, Any]:
    return relssl.reproduce("tiny.yaml", "smoke", only=only, **({"runs": "runs"} | options))


def shipped(name: str, scale: str, **options: Any) -> Plan:
    return plan(read_table(name, scale), **options)


@pytest.mark.parametrize("name", tables.NAMES)
def test_the_commands_of_shipped_tables_say_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="scale: "):
        read_table(name, "large")
    for scale in tables.SCALES:
        if name not in {table.name for table in tables.offered(scale)}:
            with pytest.raises(ConfigError, match=f"scale: {name} has no {scale} scale; it has smoke, small, paper"):
                read_table(name, scale)
            continue
        table = read_table(name, scale)
        rows = {row.name for row in table.rows}
        assert len(rows) == len(table.rows) and table.reference in rows
        assert all({*each["rows"]} <= rows and each["kind"] in ("above", "collapse", "sound") for each in table.expected)
        numbers = [number for row in table.rows for number in row.paper]
        assert all(number["sure"] in tables.SURE and 0 <= number["value"] <= 100 for number in numbers)
        for run in shipped(name, scale, seeds=1, runs=tmp_path).runs[:: len(table.rows) - 1]:
            train, evaluate = (shlex.split(line) for line in run.commands())
            assert main(["validate", *train[2:], "--show"]) == 0
            assert capsys.readouterr().out == to_yaml(run.config)
            assert evaluate[:3] == ["relssl", "evaluate", str(run.folder)]
            options = dict(zip(evaluate[3::2], evaluate[4::2], strict=True))
            assert read_settings({name.removeprefix("--"): value for name, value in options.items()}) == run.evaluation


def test_a_plan_runs_all_rows_on_one_seed_before_the_next(tiny: Path) -> None:
    runs = plan(read_table("tiny.yaml", "smoke"), seeds=2).chosen
    assert [(run.row.name, run.config.seed) for run in runs] == [(r, s) for s in (0, 1) for r in ("k96", "k64", "broken")]
    assert runs[0].folder == Path("runs/reproduce/tiny-smoke/k96-0") and runs[0].config.out == str(runs[0].folder)
    assert {run.state() for run in runs} == {"new"}
    assert "backbone_args" not in runs[2].commands()[0]  # they were meant for the scale's own network


@pytest.mark.parametrize("over", [{"recipe": "solo/cifar10"}, {"epochs": 1, "max_images": 400}])
def test_commands_say_what_would_give_way_on_a_command_line(over: dict[str, Any], tmp_path: Path) -> None:
    run = shipped("temperature", "paper", overrides=over, runs=tmp_path).runs[0]
    _, _, _, *options = shlex.split(run.commands()[0])
    typed = {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    assert changes(run.config, give_way(resolve({"data": "cifar10"} | typed), 400)) == {}


def test_a_run_that_has_filled_in_its_settings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    over = {"start": "w.safetensors", "teacher": "t.safetensors", "batch_size": "auto"}
    run = shipped("temperature", "smoke", overrides=over).runs[0]
    encoder, optimizer = replace(run.config.encoder, dim=77), replace(run.config.optimizer, lr=0.01)
    filled = {"start": str(tmp_path / "w.safetensors"), "teacher": str(tmp_path / "t.safetensors"), "backbone": "resnet50"}
    filled |= {"encoder": encoder, "optimizer": optimizer, "fit_batch": False}
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(to_yaml(replace(run.config, **filled)))
    assert shipped("temperature", "smoke", overrides=over).runs[0].state() == "begun"
    with pytest.raises(ConfigError, match="holds a run of other settings"):
        shipped("temperature", "smoke", overrides=over | {"start": "other.safetensors"})


def test_a_recipe_brings_its_data_and_fewer_steps_are_a_rehearsal(tmp_path: Path) -> None:
    other = shipped("temperature", "small", overrides={"recipe": "nips/cifar100"}, runs=tmp_path)
    assert {run.config.data for run in other.runs} == {"cifar100"} and not other.rehearsal
    assert shipped("temperature", "small", overrides={"max_steps": 20}, runs=tmp_path).rehearsal
    assert curves({"rows": [], "runs": [{"row": "a", "seed": 0, "curve": [[0, 30.0], [0, 31.0]]}]}) == ""


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("title: ", "heading: ", "without title"),
        ("name: k64", "name: k96", "k96 is the name of several rows"),
        ("reference: k96", "reference: k97", "row: 'k97' is unknown"),
        ("label: ", "lable: ", "a row is without label"),
    ],
)
def test_a_table_of_ones_own_is_refused_by_what_it_lacks(old: str, new: str, fault: str, tiny: Path) -> None:
    text = Path("tiny.yaml").read_text()
    assert old in text
    Path("mine.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=fault):
        read_table("mine.yaml", "smoke")


def test_a_rehearsal_keeps_the_warm_ups_share_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    rehearsal = shipped("temperature", "paper", overrides={"epochs": "2", "max_images": "512"}, runs=tmp_path)
    config, evaluation = rehearsal.runs[0].config, rehearsal.runs[0].evaluation
    assert rehearsal.rehearsal and rehearsal.name == "temperature-paper-rehearsal"
    assert config.epochs == 2 and config.optimizer.warmup_epochs == pytest.approx(5 / 200 * 2)
    assert evaluation.linear.epochs == 2 and evaluation.images == config.log.knn_images == (512, 512)
    few = shipped("temperature", "paper", overrides={"max_steps": 10, "max_images": 512}, runs=tmp_path).runs[0]
    assert few.evaluation.images == few.config.log.knn_images == (512, 512)
    longer = shipped("temperature", "paper", overrides={"epochs": 2, "optimizer.warmup_epochs": 1}, runs=tmp_path)
    assert longer.runs[0].config.optimizer.warmup_epochs == 1 and longer.runs[0].evaluation.images is None


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"method.memory_size": 32}, "method.memory_size: "),
        ({"method": {"memory_size": 32}}, "method.memory_size: "),
        ({"seed": 3}, "seed: "),
        ({"optimizer.lrr": 1}, "tiny, k96: optimizer.lrr: unknown"),
        ({"optimizer.lr": -1}, "tiny, k96: optimizer.lr: "),
        ({"seeds": 0}, "seeds: "),
        ({"time_limit": 0}, "time_limit: "),
    ],
)
def test_what_cannot_be_used_is_refused(tiny: Path, options: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_tiny("k96", **options)
    assert str(refused.value).startswith(setting) and not (tiny / "runs").exists()


def test_the_results_are_those_of_the_evaluation_and_a_second_time_nothing_runs(finished: Path) -> None:
    content = json.loads((finished / "results/tiny-smoke.json").read_text())
    assert (finished / "results/tiny-smoke.md").read_text() == page(content)
    record = json.loads((finished / "runs/k64-0/evaluations/knn-digits-200-100.json").read_text())
    row = next(row for row in content["rows"] if row["row"] == "k64")
    assert set(row["ours"]) == {"knn student", "probe student"}
    assert row["ours"]["knn student"]["mean"] == record["results"][0]["figures"]["top1"]
    assert {(each["row"], each["why"]) for each in content["missing"]} == {("k96", "not asked for"), ("broken", "not asked for")}
    written = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}
    options = {"only": ["k64"], "runs": finished / "runs", "out": finished / "results"}
    assert relssl.reproduce(str(finished / "tiny.yaml"), "smoke", **options) == content
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")} == written


def test_other_seeds_stay_in_the_results_and_other_settings_are_refused(finished: Path, tiny: Path) -> None:
    shutil.copytree(finished / "runs", "runs")
    again = tiny / "runs/k64-1"  # another seed's run, which this command does not ask for
    shutil.copytree("runs/k64-0", again)
    (again / "config.yaml").write_text((again / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    shutil.copy("runs/k64-0.json", "runs/k64-1.json")
    assert [(run["row"], run["seed"]) for run in run_tiny("k64")["runs"]] == [("k64", 0), ("k64", 1)]
    with pytest.raises(ConfigError, match=r"k64-0: holds a run of other settings .optimizer.lr: 0.1 there, 0.05 now"):
        run_tiny("k64", **{"optimizer.lr": 0.05})
    with pytest.raises(ConfigError, match=r"tiny-smoke.json: holds results of other .* .none there, --optimizer.lr 0.05 now"):
        run_tiny("k64", runs="other", **{"optimizer.lr": 0.05})
    (again / "environment.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"k64-1: .* damaged"):
        run_tiny("k64")
    (again / "config.yaml").write_text("seed: [")
    with pytest.raises(ConfigError, match=r"k64-1: its config.yaml cannot be used"):
        run_tiny("k64")


def test_a_run_stopped_on_its_way_goes_on_exactly(finished: Path, tiny: Path) -> None:
    (run,) = plan(read_table("tiny.yaml", "smoke"), only=["k64"], runs="runs").chosen
    with pytest.raises(Interrupted):
        pretrain(settings=dataclasses.replace(run.config, time_limit=1e-9), quiet=True)
    assert run.state() == "begun"
    with pytest.raises(Interrupted) as stopped:
        run_tiny("k64", time_limit=1e-9)
    assert stopped.value.exit_code == 75
    why = {each["row"]: each["why"] for each in json.loads(Path("results/tiny-smoke.json").read_text())["missing"]}
    assert why == {"k96": "not asked for", "k64": "stopped on the way", "broken": "not asked for"}
    run_tiny("k64")
    assert differing(final_state(finished / "runs/k64-0"), final_state(run.folder)) == []
    assert repeatable_rows(finished / "runs/k64-0") == repeatable_rows(run.folder)


@pytest.mark.torture
def test_a_signal_between_runs_ends_with_its_code_and_results_are_written(tiny: Path) -> None:
    def say(line: str) -> None:
        if line.startswith("k96 seed 0"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="tiny-smoke: stopped with 1 of 2 runs to do") as stopped:
        run_tiny("k96", "k64", say=say)
    assert stopped.value.exit_code == 130
    content = json.loads(Path("results/tiny-smoke.json").read_text())
    assert [run["row"] for run in content["runs"]] == ["k96"]
    assert content["rows"][0]["paper"][0]["difference"] is None  # this is not the paper's setting


def test_a_row_that_fails_is_noted_and_the_next_one_runs(finished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "runs", "runs")
    words = ["reproduce", "tiny.yaml", "--scale", "smoke", "--runs", "runs"]
    assert main([*words, "--only", "broken,k64", "--json"]) == 2
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["row"] for run in content["runs"]] == ["k64"]
    missing = {each["row"]: each for each in content["missing"]}
    assert missing["broken"]["why"].startswith("failed: ") and "resnet_no_such" in missing["broken"]["why"]
    assert missing["broken"]["exit_code"] == 2 and missing["k96"]["exit_code"] is None
    assert "- broken, seed 0: failed: " in Path("results/tiny-smoke.md").read_text()
    # Which is no failure of a command that asks for another row.
    assert main([*words, "--only", "k64"]) == 0
    assert main([*words, "--only", ""]) == 2


def test_a_row_that_cannot_be_planned_stops_only_those_who_ask_for_it(tiny: Path) -> None:
    Path("tiny.yaml").write_text(TINY.replace("backbone: resnet_no_such", "recipe: no/such"))
    table = read_table("tiny.yaml", "smoke")
    with pytest.raises(ConfigError, match="tiny, broken: recipe: 'no/such' is unknown"):
        plan(table)
    content = results(plan(table, seeds=2, only=["k64"]))
    assert [row["row"] for row in content["rows"]] == ["k96", "k64"]
    assert "- broken, seed 0, 1: not asked for" in page(content)


def test_a_plan_downloads_nothing_and_writes_nothing(tiny: Path) -> None:
    lines: list[str] = []
    options = {"data_root": str(tiny / "none"), "only": ["t.01"], "say": lines.append}
    costs = relssl.reproduce("temperature", "small", plan_only=True, **options)
    assert costs["rows"] == [{"row": "t.01", "label": costs["rows"][0]["label"], "runs": 3, "done": 0, "seconds": None}]
    assert any(line.startswith("t.01: time unknown: cifar10 is not under data_root") for line in lines)
    assert {path.name for path in tiny.iterdir()} == {"tiny.yaml"}


def test_a_shipped_table_from_its_costs_to_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "memory", "--scale", "smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    words += ["--engine.threads", "1"]
    assert main([*words, "--plan", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["seconds"] == pytest.approx(sum(row["seconds"] for row in costs["rows"])) and costs["seconds"] > 0
    assert main(words) == 0
    text = (tmp_path / "out/memory-smoke.md").read_text()
    assert "**These numbers mean nothing.**" in text and "All runs with `--engine.threads 1`." in text
    assert "relssl pretrain digits --recipe" in text
    content = json.loads((tmp_path / "out/memory-smoke.json").read_text())
    assert [row["row"] for row in content["rows"]] == ["k64", "k128"] and content["missing"] == []
    assert all(0 < row["ends"]["teacher_neighbours"]["mean"] <= 128 for row in content["rows"])
    capsys.readouterr()
    assert main([*words, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 0


def test_the_papers_other_sets_are_its_own_setting_too(tmp_path: Path) -> None:
    """Only a run of the paper's own setting is compared with its numbers."""

    def numbers(**overrides: str) -> tuple[float, float | None]:
        planned = shipped("temperature", "paper", seeds=1, runs=tmp_path, overrides=overrides, only=["t.03"])
        (run,) = planned.chosen
        finish(run, [{"embedding_std": 1.0, "effective_rank": 50.0}], top1=64.79, protocol="linear")
        (number,) = next(row for row in results(planned)["rows"] if row["row"] == "t.03")["paper"]
        shutil.rmtree(run.folder)
        return number["value"], number["difference"]

    assert numbers(recipe="nips/cifar100") == (63.79, pytest.approx(1.0))
    assert numbers(recipe="cifar100") == numbers(recipe="nips/cifar100", epochs="2") == (63.79, None)


def finish(run: Any, ends: list[dict[str, float | None]], top1: float = 12.5, protocol: str = "knn") -> None:
    """Write what a finished run leaves: two rows at 32 and 64 images/s."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    (run.folder / "status.json").write_text('{"state": "complete"}')
    machine = {
        "engine": "cpu",
        "cores": 2,
        "processor": "x",
        "versions": dict.fromkeys(("relssl", "torch", "torchvision", "timm"), "1"),
    }
    (run.folder / "environment.json").write_text(json.dumps(machine | {"git": None}))
    rows = [{"step": i, "samples": 64 * i, "loss": 1.0, "images_per_second": 32.0 * i} | ends[-1] for i in (1, 2)]
    rows = [row | {"epoch": row["step"] / 2, "knn_top1": top1 * row["step"] / 2} for row in rows]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"protocol": protocol, "network": "student", "main": "top1", "figures": {"top1": top1}, "seconds": 2.0}
    run.note.write_text(json.dumps({"evaluation": plain(run.evaluation), "results": [result]}))


def test_a_run_that_ended_in_one_point_or_a_uniform_relation_has_collapsed(tmp_path: Path) -> None:
    run = shipped("memory", "smoke", runs=tmp_path).runs[0]  # a memory of 64
    assert outcome(run) is None

    def ended(**ends: float | None) -> dict[str, Any]:
        finish(run, [{"effective_rank": 8.0} | ends])
        content = outcome(run)
        assert content is not None
        return content

    healthy = ended(teacher_neighbours=20.0, embedding_std=0.9)
    assert healthy["figures"] == {"knn student": 12.5} and not healthy["collapsed"]
    assert healthy["training_seconds"] == 64 / 32 + 64 / 64 and healthy["evaluation_seconds"] == 2.0
    assert ended(teacher_neighbours=60.0, embedding_std=0.9)["collapsed"]
    assert ended(teacher_neighbours=20.0, embedding_std=0.05)["collapsed"]
    assert "teacher_neighbours" not in ended(teacher_neighbours=None, embedding_std=0.9)["ends"]  # no memory
    run.note.write_text(json.dumps({"evaluation": {}, "results": []}))
    assert run.state() == "trained"  # it was evaluated otherwise


def test_the_figure_has_a_curve_for_each_run_and_a_name_for_each_row(tmp_path: Path) -> None:
    planned = shipped("memory", "smoke", seeds=2, runs=tmp_path)
    assert curves(results(planned)) == ""
    for run, top1 in zip(planned.runs, (40.0, 60.0, 50.0, 70.0), strict=True):
        finish(run, [{"embedding_std": 1.0, "effective_rank": 50.0}], top1)
    content = results(planned)
    assert [run["curve"] for run in content["runs"]] == [[[0.5, top1 / 2], [1.0, top1]] for top1 in (40.0, 60.0, 50.0, 70.0)]
    drawing = ElementTree.fromstring(curves(content))
    lines = [line.get("points", "").split() for line in drawing.iterfind("{*}polyline")]
    heights = [float(points[-1].split(",")[1]) for points in lines]
    assert sorted(heights, reverse=True) == [heights[i] for i in (0, 2, 1, 3)]  # 40, 50, 60, 70: the better, the higher
    assert (heights[0] - heights[1]) == pytest.approx(2 * (heights[0] - heights[2]), abs=0.2)
    names = [text.text for text in drawing.iterfind("{*}text")]
    assert all(row["label"] in names for row in content["rows"])
    assert "![kNN over epochs](memory-smoke.svg)" in page(content)
    assert {row["backward"] for row in content["rows"]} == {1} and content["rows"][0]["seconds"]["mean"] == 3.0


def seeds(*values: float, collapsed: tuple[bool, ...] | None = None) -> dict[int, dict[str, Any]]:
    """Outcomes of seeds 0, 1, ..."""
    flags = collapsed or (False,) * len(values)
    return {seed: {"figures": {"knn student": value}, "collapsed": flags[seed]} for seed, value in enumerate(values)}


def test_means_spreads_and_differences_by_hand() -> None:
    assert spread({0: 1.0, 1: 2.0, 2: 6.0}) == {
        **{"mean": 3.0, "std": pytest.approx(((4 + 1 + 9) / 2) ** 0.5), "min": 1.0, "max": 6.0},
        "seeds": {"0": 1.0, "1": 2.0, "2": 6.0},
    }
    assert spread({4: 2.5})["std"] is None
    pair = paired({"a": {0: 5.0, 1: 7.0, 2: 1.0}, "b": {0: 1.0}}, {"a": {0: 4.0, 1: 4.0}})
    assert list(pair) == ["a"] and pair["a"]["mean"] == 2.0 and pair["a"]["seeds"] == {"0": 1.0, "1": 3.0}
    about = {"sure": "read", "by": "the paper"}
    pairs = (("c", "knn"), ("c", "linear"), ("d", "knn"))
    numbers = [about | {"data": data, "figure": figure, "value": 50.0} for data, figure in pairs]
    own = against_paper(Row("r", "r", {}, numbers), "c", {"knn student": {0: 48.0, 1: 51.0}})
    assert [(each["figure"], each["difference"]) for each in own] == [("knn", -0.5), ("linear", None)]


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ((10.0, 12.0), (6.0, 8.0), "holds"),  # differ by 4, both deviate by sqrt 2: noise 2
        ((6.0, 8.0), (10.0, 12.0), "does not hold"),
        ((10.0, 12.0), (8.0, 10.0), "within noise"),  # just the noise
        ((10.0,), (9.0, 9.1), "as expected, one seed"),
        ((9.0,), (9.0,), "not as expected, one seed"),
    ],
)
def test_a_direction_counts_beyond_the_spread_alone(better: tuple[float, ...], worse: tuple[float, ...], word: str) -> None:
    expected = {"kind": "above", "rows": ["a", "b"]}
    judged = verdicts(expected, {"a": seeds(*better), "b": seeds(*worse)})["knn student"]
    assert judged["verdict"] == word
    assert judged["noise"] == (None if "one seed" in word else pytest.approx(2.0))
    assert verdicts(expected, {"a": seeds(1.0)}) == {}


def test_collapse_is_judged_seed_by_seed() -> None:
    rows = {"a": seeds(1.0, 1.0, collapsed=(True, True)), "b": seeds(1.0, 1.0, collapsed=(True, False))}

    def word(kind: str, row: str) -> str:
        return str(verdicts({"kind": kind, "rows": [row]}, rows)["collapsed"]["verdict"])

    assert word("collapse", "a") == "holds" and word("sound", "a") == "does not hold"
    assert word("collapse", "b") == word("sound", "b") == "holds for some seeds"
