"""`relssl evaluate`: every protocol on one run, each figure with its card; what would mislead is refused or noted by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError, NumericError, StorageError
from relssl.evaluation.evaluate import CUSTOMARY, named_sets
from relssl.evaluation.result import compare
from relssl.files import read_rows
from relssl.report.tables import show_evaluation
from relssl.settings.evaluation import read_settings
from relssl.weights import store
from relssl.weights.opening import open_backbones
from small_runs import small_run

Capture = pytest.CaptureFixture[str]
QUICK: dict[str, Any] = {
    "images": (120, 60),
    "network": "student",
    "device": "cpu",
    "precision": "fp32",
    "resamples": 100,
    "knn": {"k": (5, 20), "temperature": (0.1,)},
    "probe": {"strengths": (0.01, 1.0)},
    "linear": {"epochs": 2, "batch_size": 64},
    "semi": {"fractions": (0.1, 0.5), "epochs": 1, "batch_size": 16},
    "finetune": {"epochs": 1, "batch_size": 64},
    "lowshot": {"shots": (1, 4), "draws": 2, "cost": (1.0,)},
}


# oneDNN's fp32 backward of a 1x1 convolution of stride 2 with 8 channels corrupts the heap on two threads and odd batches.
WIDE = {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16], "zero_init_last": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(
        tmp_path_factory.mktemp("runs") / "whole", epochs=1, optimizer={"warmup_epochs": 0}, backbone_args=WIDE
    ).folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELSSL_CACHE", str(tmp_path / "cache"))


def pictures(root: Path, sides: dict[str, dict[str, int]]) -> Path:
    """A folder of noise: {side: {class: images}}."""
    generator = np.random.Generator(np.random.PCG64(0))
    for side, classes in sides.items():
        for word, count in classes.items():
            (root / side / word).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / side / word / f"{side}{i}.png")
    return root


PROTOCOLS = ("knn", "probe", "linear", "semi", "finetune", "lowshot", "retrieval", "transfer")


def test_every_protocol_gives_figures_with_intervals_and_a_card(finished: Path, tmp_path: Path) -> None:
    out, threads = tmp_path / "all.json", torch.get_num_threads()
    answer = relssl.evaluate(finished, "digits", protocol=PROTOCOLS, out=out, **QUICK | {"network": None})
    assert json.loads(out.read_text())["results"] == json.loads(json.dumps(answer["results"]))
    assert {(result["protocol"], result["network"]) for result in answer["results"]} == {
        (protocol, network) for protocol in PROTOCOLS for network in ("student", "teacher")
    }
    assert torch.get_num_threads() == threads and torch.are_deterministic_algorithms_enabled() is False
    for result in answer["results"]:
        protocol, card = result["protocol"], result["card"]
        assert result["main"] in result["figures"]
        for name, (low, high) in result["intervals"].items():
            assert low - 1e-3 <= result["figures"][name] <= high + 1e-3, (protocol, name)
        assert (card["protocol"], card["network"]) == (protocol, result["network"])
        assert (card["view"]["size"], card["precision"]) == (32, "fp32") and card["versions"]["torch"] in torch.__version__
        if protocol != "transfer":
            assert [card["images"][side]["images"] for side in ("bank", "test")] == [120, 60]
            assert any(note.startswith("a subset: 120 of") for note in result["notes"])
        assert ("unchanged" in card["batch_norm"]) == (protocol not in ("semi", "finetune"))
        assert card["view"].get("flip_in_training") == (0.0 if protocol in ("linear", "semi", "finetune") else None)
        assert ("split" in card["settings"]) == (protocol == "semi")
    for protocol in PROTOCOLS:
        written = json.loads((finished / f"evaluations/{protocol}-digits-120-60.json").read_text())
        assert {result["protocol"] for result in written["results"]} == {protocol}


def test_one_pass_over_the_images_serves_all_protocols_on_features(finished: Path, tmp_path: Path) -> None:
    quick = QUICK | {"protocol": "knn,probe,retrieval"}
    first = relssl.evaluate(finished, **quick)
    files = {file: file.stat().st_ino for file in (tmp_path / "cache/features").iterdir()}
    assert len(files) == 2  # bank and test
    again, plain = relssl.evaluate(finished, **quick), relssl.evaluate(finished, cache=False, **quick)
    assert {file: file.stat().st_ino for file in (tmp_path / "cache/features").iterdir()} == files

    def figures(answer: dict[str, Any]) -> list[Any]:
        return [(result["protocol"], result["figures"], result["intervals"]) for result in answer["results"]]

    assert figures(first) == figures(again) == figures(plain)


def test_transfer_is_the_mean_of_each_sets_figure_and_names_those_not_at_hand(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cats in (("mine", 4), ("theirs", 9)):
        pictures(tmp_path / name, {"train": {"cat": 6, "dog": 6}, "val": {"cat": cats, "dog": 4}})
    monkeypatch.setitem(CUSTOMARY, "theirs", "mean_per_class")
    names = [str(tmp_path / name) for name in ("mine", "theirs", "gone")]
    answer = relssl.evaluate(finished, ",".join(names), protocol="transfer", **QUICK)
    (result,) = answer["results"]
    rows, figures = {row["data"]: row for row in result["details"]["rows"]}, result["figures"]
    assert list(rows) == result["setting"]["sets"] == ["mine", "theirs", "gone"] and "not_run" in rows["gone"]
    assert [rows[name]["metric"] for name in ("mine", "theirs")] == ["top1", "mean_per_class"]
    assert result["main"] == "mean" and figures["mean"] == pytest.approx((figures["mine"] + figures["theirs"]) / 2, abs=1e-3)
    assert {name: rows[name]["value"] for name in ("mine", "theirs")} == {name: figures[name] for name in ("mine", "theirs")}
    assert result["intervals"] == {name: rows[name]["interval"] for name in ("mine", "theirs")}
    assert result["notes"][0].startswith("the mean is over 2 of 3 data sets") and "gone was not run" in result["notes"][1]
    assert str(tmp_path) not in json.dumps(answer["data"])
    show_evaluation(answer)
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any("gone not run" in line for line in shown) and any(f"mean {figures['mean']:.2f}" in line for line in shown)
    with pytest.raises(DataError, match="ran on none"):
        relssl.evaluate(finished, names[-1], protocol="transfer", **QUICK)


def test_folders_with_faults_are_refused_or_noted(finished: Path, tmp_path: Path) -> None:
    sides = {"train": {"cat": 4, "dog": 4}, "val": {"cat": 3, "dog": 3}}
    quick = {key: value for key, value in QUICK.items() if key != "images"}
    good = pictures(tmp_path / "good", sides)
    (good / "train/cat/broken.png").write_bytes(b"no")
    first, second = relssl.evaluate(finished, str(good), **quick)["results"]
    assert any(note.startswith("1 of 9 bank images cannot be read") for note in first["notes"])
    assert first["card"]["images"]["bank"]["read"] == 8 and "read" not in first["card"]["images"]["test"]
    assert "k lowered from 20 to 8, the images of the bank" in second["notes"]
    with pytest.raises(DataError, match=r"has no test images; lay it out as train/CLASS/"):
        relssl.evaluate(finished, str(pictures(tmp_path / "c", {"": {"": 5}})), **quick)
    for file in (good / "train/dog").iterdir():
        file.write_bytes(b"no")
    with pytest.raises(DataError, match="of class cat alone"):
        relssl.evaluate(finished, str(good), **quick)


def test_the_same_folder_elsewhere_compares(finished: Path, tmp_path: Path) -> None:
    sides = {"train": {"cat": 6, "dog": 6}, "val": {"cat": 4, "dog": 4}}
    for name in ("a", "b"):
        relssl.evaluate(finished, str(pictures(tmp_path / name / "pets", sides)), out=tmp_path / f"{name}.json", **QUICK)
    assert all(row["difference"] == 0 and row["allowed"] == [] for row in compare(tmp_path / "a.json", tmp_path / "b.json"))
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()
    with pytest.raises(ConfigError, match="pets names more than one data set"):
        relssl.evaluate(finished, f"{tmp_path / 'a/pets'},{tmp_path / 'b/pets'}", protocol="transfer", **QUICK)
    with pytest.raises(ConfigError, match="knn takes one data set, got 2"):
        relssl.evaluate(finished, "digits,cifar10", **QUICK)


def test_an_error_in_a_later_protocol_costs_nothing(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    file, out = finished / "export/backbone.safetensors", tmp_path / "out.json"
    pets = pictures(tmp_path / "pets", {"train": {"cat": 4, "dog": 4}, "val": {"cat": 3, "dog": 3}})
    arguments = ["evaluate", str(file), str(pets), "--protocol", "knn,detection,probe", "--knn.k", "3", "--device", "cpu"]
    assert main([*arguments, "--out", str(out), "--json"]) == 3
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {result["protocol"] for result in printed["results"]} == {"knn"}
    assert json.loads(out.read_text())["results"] == printed["results"]
    assert main(arguments) == 3 and "k 3" in capsys.readouterr().out


def test_a_run_that_cannot_be_written_is_evaluated_into_a_file(finished: Path, tmp_path: Path) -> None:
    run, out, lines = shutil.copytree(finished, tmp_path / "run"), tmp_path / "out.json", list[str]()
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    (run / "evaluations").write_text("in the way")
    with pytest.raises(StorageError, match=r"evaluations: cannot be written .* or give --out FILE"):
        relssl.evaluate(run, **QUICK)
    relssl.evaluate(run, out=out, say=lines.append, **QUICK)
    assert json.loads(out.read_text())["results"] and "the results go to" in lines[0]
    with pytest.raises(ConfigError, match="must be a JSON file"):
        relssl.evaluate(run, out=tmp_path, **QUICK)


def test_a_protocol_that_changes_the_network_is_noticed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relssl.evaluation.heads.linear", lambda backbone, *_: [backbone.bn1.running_mean.add_(1)][:0])
    with pytest.raises(AssertionError, match="linear changed the backbone's weights or batch-norm statistics"):
        relssl.evaluate(finished, protocol="linear", **QUICK)


@pytest.mark.parametrize(("value", "fault"), [(0.0, "constant"), (float("nan"), "NaN")])
def test_collapsed_and_broken_networks_are_refused(value: float, fault: str, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "backbone.safetensors"
    file.with_suffix(".yaml").write_bytes((finished / "export/backbone.yaml").read_bytes())
    weights = load_file(finished / "export/backbone.safetensors")
    save_file({k: torch.full_like(v, value) if v.is_floating_point() else v for k, v in weights.items()}, file)
    with pytest.raises(NumericError, match=fault):
        relssl.evaluate(file, protocol="retrieval", **QUICK | {"network": None})


def test_all_stands_for_the_others_and_columns_of_the_hub_for_one_set() -> None:
    every = read_settings({"protocol": "all"}).protocol
    assert "detection" not in every and read_settings({"protocol": "all,detection,knn"}).protocol == (*every, "detection")
    assert named_sets("hf:a/b#img,fine_label") == ["hf:a/b#img,fine_label"]
    assert named_sets("hf:a#img,fine,digits,hf:b,cifar10") == ["hf:a#img,fine", "digits", "hf:b", "cifar10"]


def test_a_file_is_read_one_network_at_a_time(finished: Path) -> None:
    file = finished / "export/backbone.safetensors"
    with pytest.raises(ConfigError, match=r"network: .* one network at a time"):
        relssl.evaluate(file, "digits", **QUICK | {"network": ("student", "teacher")})


def test_settings_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"knn\.k: .*\nretrieval\.at: "):
        read_settings({"knn.k": "", "retrieval.at": ""})


def test_what_cannot_be_used_is_refused_in_one_line(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    nowhere, run, out = str(tmp_path / "nothing"), str(finished), str(tmp_path / "no/such/a.json")
    for arguments, word in (
        ([nowhere, "digits"], "is no run folder, no file of weights and no timm name"),
        ([run, "--from", "moco"], "--from:"),
        ([run, "--network", "pupil", "--device", "cpu"], "holds student and teacher, not pupil"),
        ([run, "--network", "student,pupil", "--device", "cpu"], "holds student and teacher, not pupil"),
        ([run, "--out", out], "out:"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert word in capsys.readouterr().err


def test_the_command_prints_a_table_or_json(finished: Path, capsys: Capture) -> None:
    arguments = ["evaluate", str(finished), "--images", "100,50", "--device", "cpu", "--resamples", "100"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "95 % interval" in printed.out and "a subset: 100 of" in printed.out and "knn: student on digits" in printed.err
    assert main([*arguments, "--json", "--knn.k", "7", "--knn.temperature", "0.5"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["setting"] for result in answer["results"]] == [{"k": 7, "temperature": 0.5}] * 2


def test_an_unfinished_run_and_images_of_pretraining_are_noted(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    notes = {
        "the run is not complete; its newest checkpoint was measured, which the card names",
        "the test images are those that the run was pretrained on",
    }
    assert not any(notes & {*result["notes"]} for result in relssl.evaluate(run, **QUICK)["results"])
    (run / "status.json").write_text(json.dumps({"state": "running"}))
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["fingerprint"] = load("digits", None, "test").fingerprint()
    (run / "environment.json").write_text(json.dumps(environment))
    results = relssl.evaluate(run, protocol="knn", **QUICK)["results"]  # of a subset of these images
    assert all(notes <= {*result["notes"]} and result["card"]["source"]["checkpoint"] for result in results)
    for path in store.checkpoints(run / "checkpoints"):
        store.remove(path)
    assert main(["evaluate", str(run)]) == 4


def test_an_earlier_checkpoint_is_measured_as_the_run_is(tmp_path: Path, source: Path) -> None:
    first, last = (source / "checkpoints" / f"step-{step:08}" for step in (1, 20))
    for path, step in ((first, 1), (first / "state.safetensors", 1), (last, 20)):
        opened = open_backbones(path)
        tensors, _ = store.load(source / "checkpoints" / f"step-{step:08}")
        assert torch.equal(opened.backbone.state_dict()["conv1.weight"], tensors["student.backbone.conv1.weight"])
        assert (opened.spec.view, opened.folder) == (open_backbones(source).spec.view, None)
    with pytest.raises(ConfigError, match=r"^out: .*checkpoint"):
        relssl.export(last)
    figures = [relssl.evaluate(each, protocol="knn", **QUICK)["results"][0]["figures"] for each in (last, source)]
    assert figures[0] == figures[1]


def test_weights_in_a_folder_for_transformers_are_named_for_what_they_are(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "export/backbone.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is of a Hugging Face folder"):
        relssl.load_backbone(tmp_path / "model.safetensors")


def test_knn_while_training_is_that_of_an_evaluation(source: Path) -> None:
    row, config = read_rows(source / "metrics.jsonl")[-1], relssl.load_run(source).config
    knn = {"k": [int(config.log.knn[0])], "temperature": [config.log.knn[1]]}
    same: dict[str, Any] = {"images": (100, 100), "knn": knn, "device": "cpu", "precision": Engine(config.engine).precision}
    for network, column in (("student", "knn_top1"), ("teacher", "knn_teacher_top1")):
        (result,) = relssl.evaluate(source, protocol="knn", network=network, **same)["results"]
        assert result["figures"]["top1"] == pytest.approx(row[column], abs=1e-3)
    assert row["knn_top1"] != row["knn_teacher_top1"]
