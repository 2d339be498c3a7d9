"""The report: its figures are those of the run's files, its relations those of the formulas, and nothing of it comes from elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import relssl
from relssl.cli import main
from relssl.errors import ConfigError
from relssl.files import read_rows
from relssl.method.relation import relation
from relssl.report.relations import relations
from small_runs import small_run


def data_of(page: Path) -> Any:
    """The facts inside a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("report") / "run", **{"log.report": True}).folder


def test_a_run_ends_with_its_page(run: Path) -> None:
    page, rows = (run / "report.html").read_text(), read_rows(run / "metrics.jsonl")
    facts = data_of(run / "report.html")
    curves = {curve["title"]: curve for curve in facts["runs"][0]["curves"]}
    assert [y for _, y in curves["Loss"]["lines"][0]["points"]] == [row["loss"] for row in rows if "loss" in row]
    assert dict(curves["kNN top-1, %"]["levels"])["raw pixels"] == rows[0]["knn_raw_pixels"]
    assert f"{rows[-1]['knn_top1']:.1f} %" in page
    assert len(page) < 15e6 and "What is missing" not in page and "None yet." in page
    gallery = facts["gallery"]
    assert len(gallery["names"]) == 320 and len(gallery["neighbours"]["student"]["nearest"]) == 320
    assert all(image not in near for image, near in enumerate(gallery["neighbours"]["pixels"]["nearest"]))


def test_nothing_comes_from_elsewhere(run: Path) -> None:
    page = (run / "report.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "default-src &#39;none&#39;" in policy[1] and "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)


def test_relations_are_exact_at_every_temperature() -> None:
    """A page that holds few similarities and the sums gives the probabilities, entropy and divergence of the formulas in float64."""
    torch.manual_seed(0)
    memory, keys, queries = (torch.nn.functional.normalize(torch.randn(n, 16, dtype=torch.float64), dim=1) for n in (200, 5, 5))
    facts = relations((keys @ memory.T).float(), (queries @ memory.T).float(), teacher_temperature=0.04, student_temperature=0.1)
    assert 0.04 in facts["temperatures"]
    student = relation(queries, memory, 0.1)
    for place, temperature in enumerate(facts["temperatures"]):
        teacher = relation(keys, memory, temperature)
        entropy, divergence = torch.special.entr(teacher).sum(1), (teacher * (teacher / student).log()).nansum(1)
        for row, stored in enumerate(facts["images"]):
            similar = torch.tensor(stored["teacher"], dtype=torch.float64)
            assert torch.allclose(
                (similar / temperature - stored["log_sum"][place]).exp(), teacher[row][stored["slots"]], atol=2e-3
            )
            assert stored["entropy"][place] == pytest.approx(float(entropy[row]), abs=1e-4)
            assert stored["cross"][place] - stored["entropy"][place] == pytest.approx(float(divergence[row]), abs=1e-4)


def test_names_are_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=1>"
    for number in range(40):
        folder = tmp_path / "photos" / evil
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), 40 + number).convert("RGB").save(folder / f"</script>{number}.png".replace("/", "-"))
    run = small_run(
        tmp_path / "run", data=str(tmp_path / "photos"), max_images=None, batch_size=16, **{"loader.workers": 0}
    ).folder
    page = relssl.write_report(run, out=tmp_path / "page.html")
    assert evil not in page.read_text() and "<-script>" not in page.read_text()
    assert all(name.startswith("<-script>") for name in data_of(page)["gallery"]["names"])


def test_a_page_says_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.yaml").write_text("data: digits\nno_such_setting: 3\n")
    assert main(["report", str(torn)]) == 0
    page = (torn / "report.html").read_text()
    assert all(words in page for words in ("status.json is missing", "no row yet", "no_such_setting", "Nothing to judge yet"))
    with pytest.raises(ConfigError, match="is no run folder"):
        relssl.write_report(tmp_path)


def test_two_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = small_run(tmp_path / "other", **{"method.teacher_temperature": 0.07}).folder
    page = relssl.write_report(run, other, out=tmp_path / "both.html")
    text = page.read_text()
    assert "method.teacher_temperature" in text and "0.07" in text
    assert [each["name"] for each in data_of(page)["runs"]] == ["run", "other"]
