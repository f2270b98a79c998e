"""Pages of `vlmprune report` in a real headless browser: nothing hidden, cut or unreadable, wide and narrow, light and dark.

Without chromium, chromedriver and selenium these tests are skipped; with VLMPRUNE_BROWSER=required, as in CI, they fail.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from browser import Page, browser, need_browser

import vlmprune
from vlmprune.evals import report, report_read

pytestmark = pytest.mark.xdist_group("browser")  # one browser for all
ROOT = Path(vlmprune.__file__).resolve().parent.parent
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
RESULTS = ("sweep", "budgets", "horizon_metric", "adaptinfer_tune")
"""Folders of `docs/results`: one for each kind of result."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    need_browser()
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """The pages of the published results."""
    made = {}
    for name in RESULTS:
        folder = ROOT / "docs" / "results" / name
        made[name] = tmp_path_factory.mktemp(name) / "report.html"
        made[name].write_text(report.texts(folder, report_read.read(folder)[0])[".html"])
    folder = tmp_path_factory.mktemp("long names")
    text = (ROOT / "docs" / "results" / "budgets" / "accuracy.json").read_text()
    for share in ("0.5", "0.25", "0.1", "0.05"):
        text = text.replace(f"fastv:layer=2,fraction={share}", f"pdrop:layer=2|4|6,fraction=0.9|0.8|{share}")
        text = text.replace(f"cls:layer=0,fraction={share}", f"pdrop:layer=1|2|3|4,fraction=0.9|0.8|0.7|{share}")
    (folder / "accuracy.json").write_text(text)
    made["long names"] = folder / "report.html"
    made["long names"].write_text(report.texts(folder, report_read.read(folder)[0])[".html"])
    return made


def wrong(page: Page, path: Path, width: int, scheme: str) -> list[str]:
    """Everything that is wrong with a page, in words."""
    page.open(path, width, scheme)
    page.resize(width, page.run("return document.documentElement.scrollHeight"))
    return [*page.errors(), *page.run(CHECKS)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*RESULTS, "long names"])
def test_nothing_is_hidden_cut_or_unreadable(page, published, name, width, scheme):
    """Red: an error in the console, a missing picture, the page scrolls sideways, a number is hidden, cut, covered or has no
    head, letters are too small, or a contrast is below 4.5."""
    assert not wrong(page, published[name], width, scheme)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_accuracy_of_the_sweep_can_be_read(page, published, width):
    """Red: a mean or its interval is in the file and not on the page."""
    page.open(published["sweep"], width)
    text = page.run("return document.body.innerText").replace("−", "-").replace("\u00a0", " ")
    numbers = json.loads((ROOT / "docs/results/sweep/sweep.json").read_text())
    assert len(numbers["rows"]) > 60
    for row in numbers["rows"]:
        low, high = row["interval"]
        assert f"{100 * row['mean']:.1f}" in text
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text
    for entry in [row["over_random"]["mean"] for row in numbers["rows"] if row["over_random"]]:
        assert f"{100 * entry['value']:+.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]" in text


def test_dark_and_light_are_different(page, published):
    def colours(scheme: str) -> list[str]:
        page.open(published["budgets"], 1280, scheme)
        of = "getComputedStyle(document.querySelector('{}')).{}".format
        return page.run(f"return [{of('body', 'backgroundColor')}, {of('body', 'color')}, {of('svg text', 'fill')}]")

    assert all(one != other for one, other in zip(colours("light"), colours("dark"), strict=True))


def test_print_is_on_white(page, published):
    page.open(published["budgets"], 1280)
    page.prefer("dark", media="print")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


FAULTS = {
    "a hidden column": (1280, "td:nth-child(4) { display: none }", "hidden"),
    "a table that is cut": (1280, ".wide { overflow: hidden; width: 600px } table { width: 1100px }", "cut"),
    "a page that scrolls sideways": (1280, ".wide { overflow: visible } table { width: 3000px }", "sideways"),
    "numbers in the colour of the paper": (1280, "td { color: var(--paper) }", "contrast"),
    "tiny letters": (390, "small { font-size: 5px }", "letters"),
    "something on top": (1280, "header { position: fixed; z-index: 9; background: var(--paper) }", "covered"),
    "drawings that vanish": (1280, ".plot { display: none }", "no drawing"),
    "no heads on a phone": (390, "tbody td.number::before { content: none }", "no head"),
}


@pytest.mark.parametrize(("width", "css", "found"), FAULTS.values(), ids=FAULTS)
def test_the_checks_find(page, published, width, css, found, tmp_path):
    """Red: the checks above would not see this fault."""
    broken = tmp_path / "broken.html"
    broken.write_text(published["budgets"].read_text().replace("</style>", f"{css}</style>", 1))
    assert any(found in said for said in wrong(page, broken, width, "light"))


def test_errors_of_the_console_are_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text('<!DOCTYPE html><body>1<script>throw new Error("planted")</script>')
    page.open(broken, 1280)
    assert any("planted" in said for said in page.errors())


def test_kept_pictures_are_shown(page, tmp_path):
    """Red: the pictures of `kept.json`, or those of `vlmprune run --draw`, are not on the page."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "docs" / "results" / "budgets", folder)
    shutil.copy(ROOT / "docs" / "kept.png", folder / "kept-1.png")
    path = tmp_path / "report.html"
    path.write_text(report.texts(folder, report_read.read(folder)[0])[".html"])
    for width in WIDTHS:
        assert not wrong(page, path, width, "dark")
        assert page.run("return document.images.length") == 1
