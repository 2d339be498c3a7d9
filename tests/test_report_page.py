"""The report in a browser: what is pressed, moved and typed shows what the run's files and the formulas say, and the console stays empty."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from browser import HOW, PROGRAM, Browser
from relssl.files import read_rows
from small_runs import final_state, small_run
from test_report import data_of

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=HOW)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("page") / "run", **{"log.report": True}).folder


@pytest.fixture
def page(run: Path) -> Iterator[Browser]:
    with Browser(run / "report.html") as browser:
        yield browser
        assert browser.errors == []


def number(text: str) -> float:
    return float(text.replace(" %", ""))


def test_curves_are_read_by_keyboard_and_pointer(page: Browser, run: Path) -> None:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    place = next(
        i
        for i, title in enumerate(
            json.loads(page.js("JSON.stringify([...document.querySelectorAll('#charts h3')].map(e => e.textContent))"))
        )
        if title == "Loss"
    )
    figure = f"#charts figure:nth-child({place + 1})"
    assert number(page.text(f"{figure} .values").split()[-1]) == pytest.approx(rows[-1]["loss"], rel=1e-3)
    page.focus(f"{figure} svg")
    page.press("Home", 36)
    assert number(page.text(f"{figure} .values").split()[-1]) == pytest.approx(rows[0]["loss"], rel=1e-3)
    page.press("ArrowRight", 39)
    assert number(page.text(f"{figure} .values").split()[-1]) == pytest.approx(rows[1]["loss"], rel=1e-3)
    page.click(f"{figure} svg")
    assert page.text(f"{figure} .values").startswith("epoch ")


def test_the_explorer_shows_the_relations_that_training_has(page: Browser, run: Path) -> None:
    facts = data_of(run / "report.html")["gallery"]
    page.click("#gallery button:nth-child(7)")
    stored, own = facts["relations"]["images"][6], facts["relations"]["temperatures"].index(0.04)
    assert facts["names"][facts["explored"][6]] in page.text("#detail")
    assert number(page.text("#neighbours-value")) == pytest.approx(math.exp(stored["entropy"][own]), rel=1e-3)
    assert number(page.text("#divergence-value")) == pytest.approx(
        stored["cross"][own] - stored["entropy"][own], rel=1e-3, abs=1e-3
    )
    # The memory is the checkpoint's: each key's picture is that of its sample.
    ids = final_state(run)["memory.ids"]
    for slot, image in facts["relations"]["pictures"].items():
        assert image < 0 or facts["names"][image].endswith(f"{int(ids[int(slot)]):06}")

    shares = [
        number(page.text(f".butterfly tbody tr:nth-child({row}) .left")) / 100 for row in range(1, 14)
    ]  # the last: all others
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


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1920, True)])
def test_it_fits_phones_and_wide_screens(run: Path, width: int, dark: bool) -> None:
    with Browser(run / "report.html", width, dark=dark) as page:
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("getComputedStyle(document.body).backgroundColor") == ("rgb(20, 25, 26)" if dark else "rgb(255, 255, 255)")
        unnamed = "[...document.querySelectorAll('button, input, select, [tabindex]')].filter(e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).length"
        assert page.js(unnamed) == 0 and page.errors == []
