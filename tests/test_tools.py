"""Views, advise and doctor: the sheet shows the loader's own views, the sweep is that of the formulas, findings are those of the facts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.data.loader import Plan
from relssl.engine import Engine
from relssl.errors import ConfigError
from relssl.files import read_rows
from relssl.report.advise import band_of, sweep
from relssl.report.doctor import machine
from relssl.settings.run import resolve
from relssl.train.run import complete_settings, load_images, open_loader
from small_runs import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("tools") / "run").folder


def test_the_sheet_shows_the_views_of_the_first_step(tmp_path: Path) -> None:
    config = resolve({"data": "digits", "seed": 3, "batch_size": 32, "engine.device": "cpu"})
    images = load_images(config)
    settings = complete_settings(config, images)
    loader = open_loader(settings, Engine.local("cpu"), Plan(len(images), 32, seed=3), images)
    batch = next(iter(loader.stream(0, 1)))[0]
    path = relssl.write_views(settings=config, out=tmp_path / "views.png", images=5)
    sheet = np.asarray(Image.open(path))[16::3, ::3]  # views of 32 pixels are magnified to 96
    mean, std = (np.array(each, np.float64)[:, None, None] for each in settings.views.statistics())
    assert sheet.shape == (5 * 34, 3 * 34, 3)
    for column, views in enumerate((batch.weak, *batch.strong), start=1):
        for row in range(5):
            pixels = np.clip(views[row].double().numpy() * std + mean, 0, 1) * 255
            cell = sheet[34 * row : 34 * row + 32, 34 * column : 34 * column + 32]
            assert np.abs(cell - pixels.transpose(1, 2, 0)).max() <= 0.501  # rounded, and nothing else


def test_views_of_several_sizes_stand_beside_their_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        Image.effect_noise((120, 80), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
    out = tmp_path / "sheets" / "s.png"
    out.parent.mkdir()
    crops = ["--views.weak.size", "128", "--views.crops", "[[128, 0.2, 1], [96, 0.1, 0.2]]"]
    assert main(["views", str(tmp_path), *crops, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"out": str(out)}
    assert Image.open(out).size == (4 * 130, 16 + 4 * 130)
    with pytest.raises(ConfigError, match=r"out: must end in \.png"):
        relssl.write_views(tmp_path, out="views.jpg")


def test_a_sweep_equals_a_float64_oracle() -> None:
    torch.manual_seed(0)
    memory, keys = (torch.nn.functional.normalize(torch.randn(n, 16, dtype=torch.float64), dim=1) for n in (200, 6))
    same, others = torch.rand(6, 200) < 0.3, torch.rand(6, 200) < 0.9
    table = sweep(keys.float(), memory.float(), [0.01, 0.1], others, same & others)
    for row in table:
        scores = np.exp(keys.numpy() @ memory.numpy().T / row["temperature"])
        p = scores / scores.sum(axis=1, keepdims=True)
        assert row["neighbours"] == pytest.approx(np.exp(-(p * np.log(p)).sum(axis=1).mean()), rel=1e-4)
        assert row["purity"] == pytest.approx((p * (same & others).numpy()).sum() / (p * others.numpy()).sum(), abs=1e-4)


def test_the_band_is_where_relations_are_sharp_but_not_one_hot() -> None:
    counts = {0.002: 1.2, 0.01: 12.0, 0.02: 90.0, 0.04: 300.0, 0.06: 500.0, 0.1: 1000.0}
    table = [{"temperature": t, "neighbours": count} for t, count in counts.items()]
    assert band_of(table, resolve({"data": "digits", "method.teacher_temperature": 0.04})) == [0.01, 0.02]
    for count in (1.1, 1900.0):
        alike = [row | {"neighbours": count} for row in table]
        assert band_of(alike, resolve({"data": "digits", "method.teacher_temperature": 0.04})) is None


def test_advise_names_temperature_memory_and_warmup(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(run), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["keys"] == 96 and facts["step"] == 20 and 0.05 < facts["chance"] < 0.2
    assert any(row["temperature"] == facts["temperature"] for row in facts["temperatures"])
    assert [each["setting"].partition("_")[0] for each in facts["advice"]] == ["method.teacher", "method.memory", "method.warmup"]
    assert main(["advise", str(run)]) == 0
    assert "<- the run's own" in capsys.readouterr().out


def test_advise_sees_the_relations_that_are_learned_from(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "features", **{"method.relation": "features", "log.every": 20}).folder
    facts, last = relssl.advise(folder), read_rows(folder / "metrics.jsonl")[-1]
    own = next(row for row in facts["temperatures"] if row["temperature"] == facts["temperature"])
    assert own["neighbours"] == pytest.approx(last["teacher_neighbours"], rel=0.25)  # of other images, a step later
    for method, fault in ({"method": "moco"}, "method.name: moco"), ({"method.sinkhorn_iterations": 3}, "method.sinkhorn"):
        other = small_run(tmp_path / fault[-4:], epochs=1, **method).folder
        with pytest.raises(ConfigError, match=fault):
            relssl.advise(other)


def test_advise_wants_a_memory_that_is_full(tmp_path: Path) -> None:
    young = small_run(tmp_path / "run", epochs=1, method={"memory_size": 4096}).folder
    with pytest.raises(ConfigError, match=r"method\.memory_size: .*train on"):
        relssl.advise(young)


GOOD: dict[str, Any] = {
    "needed": ["torch>=2.10", "pillow>=11", "onnx>=1; extra == 'onnx'"],
    "cores": 8,
    "quota": None,
    "threads": "",
}
GOOD |= {
    "versions": {"torch": "2.14.1", "pillow": "12.0"},
    "memory": 64.0,
    "limit": None,
    "shared": 32.0,
    "free": 900.0,
    "cuda": "13.0",
}
GOOD |= {"flags": {"avx2", "avx512f", "avx512_bf16"}, "gpu": True, "malloc": "", "variables": ""}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, ""),
        ({"versions": {"torch": "2.9", "pillow": "12.0"}}, "package"),
        ({"versions": {"torch": "2.14.1"}}, "package"),
        ({"quota": 1.5, "limit": 4.0, "shared": 0.064, "free": 1.0}, "cpus limit shared disk"),
        ({"gpu": False, "flags": {"avx2"}}, "no-gpu bf16 avx2"),
        ({"cuda": None}, "idle-gpu"),
        ({"cuda": None, "versions": {"pillow": "12.0"}}, "package"),
        ({"threads": "1", "malloc": "libjemalloc.so", "variables": "TORCH_LOGS=all"}, "threads malloc variables"),
    ],
)
def test_the_doctor_judges_the_facts_of_a_machine(
    changed: dict[str, Any], names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine().keys() == GOOD.keys()
    monkeypatch.setattr("relssl.report.doctor.machine", lambda: GOOD | changed)
    assert [each["name"] for each in relssl.doctor()] == names.split()
    assert main(["doctor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == max(1, len(names.split()))


def test_the_doctor_judges_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found() -> set[str]:
        return {each["name"] for each in relssl.doctor(run)}

    assert found() <= {"poor", "waits", "half"}
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings + "brand_new: 1\n")
    assert "missing" in found()
    (run / "config.yaml").write_text(settings)
    status = json.loads((run / "status.json").read_text())
    newest = sorted((run / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_text(newest.read_text() + " ")
    for path in (run / "export").iterdir():
        path.unlink()
    assert {"damaged", "unexported"} <= found()
    for state, name in {"running": "killed", "interrupted": "stopped", "failed": "failed"}.items():
        (run / "status.json").write_text(json.dumps(status | {"state": state}))
        assert name in found()
    assert main(["doctor", str(run)]) == 0
    assert f"relssl resume {run}" in capsys.readouterr().out
