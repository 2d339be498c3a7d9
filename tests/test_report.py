"""The report: its figures are those of the run's files, its relations those of the formulas, and nothing of it comes from elsewhere.

In a browser, what is pressed, moved and typed shows the same, and the console stays empty.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import relssl
from browser import HOW, PROGRAM, Browser
from relssl.cli import main
from relssl.errors import ConfigError
from relssl.files import read_rows
from relssl.method.relation import relation
from relssl.report.facts import run_facts
from relssl.report.gallery import neighbours
from relssl.report.relations import relations
from relssl.settings.reading import flat, nest, read_yaml
from small_runs import final_state, small_run

in_browser = pytest.mark.skipif(PROGRAM is None, reason=HOW)


def data_of(page: Path) -> Any:
    """The facts inside a page."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data
    return json.loads(data[1])


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
    small = {"loader.workers": 0, "views.weak.size": 32, "views.strong.size": 32}
    for number in range(40):
        folder = tmp_path / "photos" / evil
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), 40 + number).convert("RGB").save(folder / f"</script>{number}.png".replace("/", "-"))
    run = small_run(tmp_path / "run", data=str(tmp_path / "photos"), max_images=None, batch_size=16, **small).folder
    page = relssl.write_report(run, out=tmp_path / "page.html")
    assert evil not in page.read_text() and "<-script>" not in page.read_text()
    assert all(name.startswith("<-script>") for name in data_of(page)["gallery"]["names"])


def test_images_without_a_label_are_of_no_class() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    labels = [-1] * 30 + [0, 1] * 5
    near = (vectors @ vectors.T).fill_diagonal_(-2).topk(8, dim=1).indices.tolist()
    own = [labels[other] == labels[image] for image in range(30, 40) for other in near[image]]
    assert neighbours({"pixels": vectors}, labels)["pixels"]["same_class"] == pytest.approx(sum(own) / 80, abs=1e-4)
    assert "same_class" not in neighbours({"pixels": vectors}, [-1] * 40)["pixels"]


def test_the_first_epoch_is_too_early_for_a_verdict(run: Path, tmp_path: Path) -> None:
    young = Path(shutil.copytree(run, tmp_path / "young"))
    rows = read_rows(young / "metrics.jsonl")
    (young / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert "too early to judge" in relssl.write_report(young).read_text()


def test_a_page_says_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.yaml").write_text("data: digits\nno_such_setting: 3\n")
    assert main(["report", str(torn)]) == 0
    page = (torn / "report.html").read_text()
    for words in ("status.json is missing or damaged", "no row yet", "no_such_setting", "Nothing to judge yet"):
        assert words in page
    with pytest.raises(ConfigError, match="is no run folder"):
        relssl.write_report(tmp_path)


def test_two_runs_of_one_name_are_compared_and_told_apart(run: Path, tmp_path: Path) -> None:
    one, other = (
        Path(shutil.copytree(run, tmp_path / name / "run", ignore=shutil.ignore_patterns("checkpoints"))) for name in "ab"
    )
    settings = (run / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace("teacher_temperature: 0.04", "teacher_temperature: 0.07"))
    rows = (
        json.dumps({name: value for name, value in row.items() if "knn" not in name}) for row in read_rows(run / "metrics.jsonl")
    )
    (other / "metrics.jsonl").write_text("\n".join(rows))
    page = relssl.write_report(one, other, out=tmp_path / "both.html")
    text = page.read_text()
    assert "method.teacher_temperature" in text and "0.07" in text and "holds no checkpoint" in text
    assert [each["name"] for each in data_of(page)["runs"]] == ["a/run", "b/run"]


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Browser]:
    with Browser(run / "report.html") as browser:
        yield browser
        assert browser.errors == []


def number(text: str) -> float:
    return float(text.replace(" %", ""))


@in_browser
def test_curves_are_read_by_keyboard_and_pointer(page: Browser, run: Path) -> None:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    titles = json.loads(page.js("JSON.stringify([...document.querySelectorAll('#charts h3')].map(e => e.textContent))"))
    figure = f"#charts figure:nth-child({titles.index('Loss') + 1})"
    assert number(page.text(f"{figure} .values").split()[-1]) == pytest.approx(rows[-1]["loss"], rel=1e-3)
    page.focus(f"{figure} svg")
    for row, (key, code) in enumerate({"Home": 36, "ArrowRight": 39}.items()):
        page.press(key, code)
        assert number(page.text(f"{figure} .values").split()[-1]) == pytest.approx(rows[row]["loss"], rel=1e-3)
    page.click(f"{figure} svg")
    assert page.text(f"{figure} .values").startswith("epoch ")


@in_browser
def test_the_explorer_shows_the_relations_that_training_has(page: Browser, run: Path) -> None:
    facts = data_of(run / "report.html")["gallery"]
    page.click("#gallery button:nth-child(7)")
    stored, own = facts["relations"]["images"][6], facts["relations"]["temperatures"].index(0.04)
    assert facts["names"][facts["explored"][6]] in page.text("#detail")
    assert number(page.text("#neighbours-value")) == pytest.approx(math.exp(stored["entropy"][own]), rel=1e-3)
    divergence = stored["cross"][own] - stored["entropy"][own]
    assert number(page.text("#divergence-value")) == pytest.approx(divergence, rel=1e-3, abs=1e-3)
    # The memory is the checkpoint's: each key's picture is that of its sample.
    ids = final_state(run)["memory.ids"]
    for slot, image in facts["relations"]["pictures"].items():
        assert image < 0 or facts["names"][image].endswith(f"{int(ids[int(slot)]):06}")

    # The last row is that of all others.
    shares = [number(page.text(f".butterfly tbody tr:nth-child({row}) .left")) / 100 for row in range(1, 14)]
    wanted = torch.tensor(stored["teacher"], dtype=torch.float64) / 0.04 - stored["log_sum"][own]
    assert shares[0] == pytest.approx(float(wanted.exp().max()), abs=6e-3) and sum(shares) == pytest.approx(1, abs=0.03)

    page.focus("#temperature")
    page.press("Home", 36)
    assert number(page.text("#neighbours-value")) == pytest.approx(math.exp(stored["entropy"][0]), rel=1e-3)
    assert number(page.text(".butterfly tbody tr:first-child .left")) / 100 > shares[0]  # sharper
    page.press("End", 35)
    assert number(page.text("#neighbours-value")) == pytest.approx(math.exp(stored["entropy"][-1]), rel=1e-3)
    page.click("#reset")
    assert page.text("#temperature-value") == "0.04, the run's own"
    page.click('#detail input[value="disagreement"]')
    assert page.js("document.querySelector('#detail input:checked').value") == "disagreement"


@in_browser
def test_images_are_browsed(page: Browser, run: Path) -> None:
    facts = data_of(run / "report.html")["gallery"]
    for kind in ("certain", "uncertain", "disagree", "hubs", "pairs"):
        page.js(f"by('browse').value = '{kind}'; by('browse').dispatchEvent(new Event('change'))")
        page.click("#gallery button")
        image = int(page.js("document.querySelector('#gallery button').dataset.image"))
        assert facts["names"][image] in page.text("#neighbours")
    order = "JSON.stringify([...document.querySelectorAll('#gallery button')].map(e => Number(e.dataset.image)))"
    page.js("by('browse').value = 'certain'; by('browse').dispatchEvent(new Event('change'))")
    shown, own = json.loads(page.js(order)), facts["relations"]["temperatures"].index(0.04)
    entropy = [facts["relations"]["images"][facts["explored"].index(image)]["entropy"][own] for image in shown]
    assert entropy == sorted(entropy)


@in_browser
def test_the_map_is_searched_and_walked(page: Browser, run: Path) -> None:
    names = data_of(run / "report.html")["gallery"]["names"]
    page.focus("#search")
    page("Input.insertText", text=names[17])
    assert page.text("#found") == f"1 of {len(names)} images"
    page.click("#matches button")
    assert names[17] in page.text("#neighbours")
    assert page.js("document.querySelectorAll('#map .on').length") == 1
    page.focus("#map svg")
    page.press("ArrowRight", 39)
    walked = page.text(".map-hint")
    page.press("Enter", 13)
    assert walked.split(",")[0] in page.text("#neighbours") and not walked.startswith(names[17])
    page.click('#projections input[value="PCA"]')
    page.click("#map svg")
    assert page.text(".map-hint")


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1920, True)])
def test_it_fits_phones_and_wide_screens(run: Path, width: int, dark: bool) -> None:
    with Browser(run / "report.html", width, dark=dark) as page:
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("getComputedStyle(document.body).backgroundColor") == ("rgb(20, 25, 26)" if dark else "rgb(255, 255, 255)")
        unnamed = "[...document.querySelectorAll('button, input, select, [tabindex]')].filter(e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).length"
        assert page.js(unnamed) == 0 and page.errors == []


@pytest.mark.parametrize(
    ("change", "drop", "settings", "words"),
    [
        (
            {},
            ("agreement", "teacher_neighbours", "kl"),
            {"method.name": "simclr"},
            "unknown['No sign of a collapse.', 'What that is worth, labelled images can say",
        ),
        ({"epoch": 0, "embedding_std": 0.0}, (), {}, "unknown['It is too early to judge"),
        ({"embedding_std": 0.0}, (), {}, "collapsing"),
        ({}, (), {"start": "some/run"}, "given weights"),
    ],
)
def test_the_verdict_is_of_the_methods_own_signs(
    run: Path, tmp_path: Path, change: dict[str, Any], drop: tuple[str, ...], settings: dict[str, Any], words: str
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints")))
    dropped = drop if "start" in settings else (*drop, "knn_top1", "knn_teacher_top1")
    rows = [{name: value for name, value in row.items() if name not in dropped} for row in read_rows(run / "metrics.jsonl")]
    rows = [row | change if "loss" in row else row for row in rows]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = nest(flat(read_yaml(run / "config.yaml")) | settings)
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    facts = run_facts(other)
    assert words in facts["verdict"]["word"] + str(facts["verdict"]["lines"]) + str(facts["verdict"]["bars"])
    assert ("untrained" in str(facts["curves"])) == (not dropped and "start" not in settings)
