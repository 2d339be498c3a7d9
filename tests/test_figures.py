"""Figures of rows: alarms on provoked failures and none on healthy rows, and the line in words."""

from pathlib import Path
from typing import Any

import pytest
import torch

import relssl
from relssl.errors import Interrupted
from relssl.files import read_json
from relssl.settings.run import resolve
from relssl.train.figures import ALARMS, alarms, in_words
from small_runs import repeatable_rows, small_run

HEALTHY = {"step": 400, "epoch": 9, "teacher_neighbours": 9.0, "embedding_std": 0.98, "effective_rank": 40.0}
HEALTHY |= {"teacher_momentum": 0.99, "matched_age": 4.0}
FAILURES: dict[str, dict[str, Any]] = {
    "uniform-teacher": {"teacher_neighbours": 511.0},
    "one-hot-teacher": {"teacher_neighbours": 1.01},
    "dimensional-collapse": {"embedding_std": 0.05},
    "frozen-teacher": {"teacher_momentum": 1.0},
    "stale-memory": {"matched_age": 0.5},
    "dead-projector": {"embedding_std": 0.0},
}


def names(*rows: dict[str, Any], **settings: Any) -> set[str]:
    return set(alarms(rows, resolve(settings)))


def test_each_alarm_is_raised_by_its_failure_and_none_by_healthy_rows() -> None:
    assert set(ALARMS) == set(FAILURES)
    assert names(HEALTHY) == names(HEALTHY | {"effective_rank": None, "teacher_neighbours": None}) == names() == set()
    for name, figures in FAILURES.items():
        assert name in names(HEALTHY | figures), name
        assert names(HEALTHY, HEALTHY | figures) == set()  # once is no sign
    assert names(HEALTHY | FAILURES["frozen-teacher"] | {"epoch": 19}) == set()  # where a cosine ends
    assert names(HEALTHY | FAILURES["dead-projector"], recipe="supervised/digits") == set()
    assert names(HEALTHY | {"effective_rank": 3.9}, batch_size=4, **{"method.memory_size": 16}) == set()  # no more is possible
    assert names(HEALTHY | {"effective_rank": 1.9}, batch_size=4, **{"method.memory_size": 16}) == {"dimensional-collapse"}


def test_relations_in_words() -> None:
    def words(neighbours: float) -> str:
        return in_words({"teacher_neighbours": neighbours, "agreement": 0.61}, 4096)

    assert words(14.2) == "14 of 4,096 neighbours, sharp; student agrees on 61%"
    assert "one-hot" in words(1.0) and "soft" in words(900.0) and "close to uniform" in words(4000.0)
    assert in_words({"embedding_std": 1.0}, 4096) == ""


def test_an_alarm_warns_stops_or_is_off(tmp_path: Path) -> None:
    uniform = {"method.teacher_temperature": 10.0, "method.allow_unsharpened": True, "log.knn_every": 0, "max_images": 128}
    folders = {alarm: tmp_path / alarm for alarm in ("warn", "off", "stop")}
    for alarm in ("warn", "off"):
        small_run(folders[alarm], **uniform, epochs=6, **{"log.alarms": alarm})
    lines = {alarm: (folders[alarm] / "run.log").read_text() for alarm in ("warn", "off")}
    assert lines["warn"].count("uniform-teacher") == 1 and "method.teacher_temperature" in lines["warn"]
    assert "uniform-teacher" not in lines["off"]
    with pytest.raises(Interrupted, match=r"uniform-teacher.*relssl resume") as stopped:
        small_run(folders["stop"], **uniform, epochs=6, **{"log.alarms": "stop"})
    status, rows = read_json(folders["stop"] / "status.json"), repeatable_rows(folders["stop"])
    assert stopped.value.exit_code == status["exit_code"] == 6
    assert status["last_checkpoint"] == f"step-{status['step']:08d}" and status["step"] < 24
    assert rows == repeatable_rows(folders["warn"])[: len(rows)]


class DeadProjector:
    """Kills all units of both projectors before the first step."""

    def on_start(self, run: Any) -> None:
        for network in run.networks:
            for module in network.projector.modules():
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.bias.data.fill_(-1e3)


# Failures of whole runs on digits by the alarm that names them first, and seeds of healthy ones.
WHOLE: dict[str, dict[str, Any]] = {
    "uniform-teacher": {"method.teacher_temperature": 10.0, "method.allow_unsharpened": True},
    "one-hot-teacher": {"method.teacher_temperature": 1e-3},
    "dimensional-collapse": {"optimizer.lr": 30.0, "method.warmup": "none"},
    "frozen-teacher": {"method.teacher_momentum": 1.0},
    "stale-memory": {"method.memory_size": 2560, "method.teacher_momentum": 0.0},
    "dead-projector": {"hooks": [DeadProjector()]},
} | {f"seed {seed}": {"seed": seed} for seed in range(10)}


@pytest.mark.torture
@pytest.mark.parametrize("name", WHOLE)
def test_alarms_on_whole_runs(name: str, tmp_path: Path) -> None:
    quiet = {"log.knn_every": 0, "log.to": "none", "log.report": False}
    relssl.pretrain("digits", out=tmp_path / "run", quiet=True, **{"epochs": 4, **quiet, **WHOLE[name]})
    lines = [line for line in (tmp_path / "run" / "run.log").read_text().splitlines() if line.startswith("alarm: ")]
    print(name, *lines, sep="\n  ")
    assert [line.split(": ")[2] for line in lines][:1] == ([] if name.startswith("seed") else [name])


def test_alarms_are_of_what_the_method_reads_and_as_long_as_the_run() -> None:
    ending = HEALTHY | FAILURES["frozen-teacher"]
    assert names(ending | {"step": 399}, max_steps=400) == set()  # where the cosine of a run of so many steps ends
    assert names(ending | {"step": 100}, max_steps=400) == {"frozen-teacher"}
    moco: dict[str, Any] = {"recipe": "moco/digits", "method.memory_size": 512}
    for name in ("one-hot-teacher", "uniform-teacher"):  # by a temperature that MoCo's loss does not have
        assert name in names(HEALTHY | FAILURES[name]) and names(HEALTHY | FAILURES[name], **moco) == set()
