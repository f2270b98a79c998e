"""`vlmprune report`: one page of a folder of results, the same bytes twice, and one sentence for what cannot be shown."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from command_line import vlmprune as command
from PIL import Image

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals import power, report, report_lines, report_losses, report_read
from vlmprune.evals.report_figures import spread

pytestmark = pytest.mark.xdist_group("page")
ROOT = Path(vlmprune.__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def numbers_of(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


@pytest.fixture(scope="module")
def sweep() -> dict[str, str]:
    """The report of the published sweep."""
    return report.texts(RESULTS / "sweep", report_read.read(RESULTS / "sweep")[0])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the published evaluation."""
    made = tmp_path / "results"
    made.mkdir()
    shutil.copy(RESULTS / "budgets" / "accuracy.json", made)
    return made


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one sentence with which a command ends."""
    assert command(monkeypatch, "report", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("vlmprune: ")
    assert "\n" not in said
    return said


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_published_report_is_that_of_its_numbers(sweep):
    """Red: `vlmprune report docs/results/sweep` must be run again, or its files were edited by hand."""
    page = (RESULTS / "sweep" / "report.html").read_text()
    pinned = f"matplotlib=={matplotlib.__version__};" in (ROOT / "constraints.txt").read_text()
    drawings = re.compile("<svg.*?</svg>", re.DOTALL)
    assert (page if pinned else drawings.sub("", page)) == (sweep[".html"] if pinned else drawings.sub("", sweep[".html"]))
    assert (RESULTS / "sweep" / "report.md").read_text() == sweep[".md"]


def test_the_same_bytes_twice(folder):
    """Red: a date, a random id, or an order that differs between runs."""
    once, again = (report.texts(folder, report_read.read(folder)[0]) for _ in range(2))
    assert once == again


def test_nothing_is_fetched_and_nothing_runs(sweep):
    assert "<script" not in sweep[".html"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", sweep[".html"].replace("http://www.w3.org/1999/xlink", ""))
    assert "default-src 'none'" in sweep[".html"]


def test_methods_that_lose_to_random_are_named(sweep):
    """By the verdicts of the file: a method that is planted as losing everywhere is named, one that wins is not."""
    warnings = json.loads(sweep[".json"])["warnings"]
    assert any(said.startswith("`sparsevlm` loses to random") and "50, 35 and 25 %" in said for said in warnings)
    assert not any("`divprune` loses" in said for said in warnings)
    planted = numbers_of("sweep/sweep.json")
    for row in planted["rows"]:
        if row["method"] == "divprune":
            row["over_random"]["mean"] = {"value": -0.2, "low": -0.3, "high": -0.1, "verdict": "loses"}
    said = report_losses.losing(report_lines.of_sweep("sweep.json", planted))
    assert any(sentence.startswith("`divprune` loses to random") for sentence in said)


def test_an_average_that_hides_reading_is_warned_of(sweep):
    warnings = json.loads(sweep[".json"])["warnings"]
    assert any("hides a loss in reading" in said and "`adaptinfer`" in said for said in warnings)
    assert any("hides a loss in counting" in said for said in warnings)
    assert not any("hides a loss in colour" in said for said in warnings)


@pytest.mark.parametrize(
    ("reading", "interval", "others", "warned"),
    [
        (0.5, (0.4, 0.6), 1.0, True),  # reading loses 50, the mean 7
        (0.5, (0.4, 0.6), 0.7, False),  # all lose: the mean says so
        (0.93, (0.9, 0.95), 1.0, False),  # seven points
        (0.5, (0.2, 1.0), 1.0, False),  # not certain
    ],
)
def test_when_an_average_hides_a_loss(reading, interval, others, warned):
    numbers = numbers_of("sweep/sweep.json")
    row = numbers["rows"] = [next(row for row in numbers["rows"] if row["method"] == "cls")]
    for skill, entry in row[0]["by_skill"].items():
        value, (low, high) = (reading, interval) if skill == "reading" else (others, (others, others))
        entry.update(value=value, low=low, high=high)
    row[0]["mean"] = (reading + 6 * others) / 7
    found = report_losses.collapses(report_lines.of_sweep("sweep.json", numbers))
    assert [case.group for case in found] == (["reading"] if warned else [])


def test_random_is_beside_every_method(sweep):
    """In JSON: the accuracy of random tokens at the same layers and counts, as the sweep's controls have it."""
    (found,) = json.loads(sweep[".json"])["comparisons"]
    controls = {
        (tuple(row["layers"]), tuple(row["fractions"])): row["mean"] for row in numbers_of("sweep/sweep.json")["controls"]
    }
    rows = {row["recipe"]: row for row in numbers_of("sweep/sweep.json")["rows"]}
    for line in found["lines"]:
        row = rows[line["recipe"]]
        if row["method"] == "random":
            assert line["random"] is None
        elif row["method"] != "mustdrop":  # what it merges in the tower is dropped before layer 0
            assert line["random"]["value"] == controls[tuple(row["layers"]), tuple(row["fractions"])]
        else:
            assert line["random"]["value"] == controls[(0, *row["layers"]), (0.555556, *row["fractions"])]


def test_an_evaluation_compares_with_random_at_the_same_layer_and_share_only(folder):
    """FastV at layer 2 has no random tokens beside it in this file; the pruners before layer 0 have."""
    page = report.texts(folder, report_read.read(folder)[0])
    (found,) = json.loads(page[".json"])["comparisons"]
    beside = {line["recipe"]: line["random"] for line in found["lines"]}
    random = {line["recipe"]: line["mean"]["value"] for line in found["lines"]}
    assert beside["fastv:layer=2,fraction=0.25"] is None
    assert beside["cls:layer=0,fraction=0.25"]["value"] == random["random:layer=0,fraction=0.25"]
    assert "Highest mean" not in page[".md"]  # the budgets are no costs


def test_every_number_of_the_sweep_is_in_markdown(sweep):
    for row in numbers_of("sweep/sweep.json")["rows"]:
        low, high = row["interval"]
        assert f"{100 * row['mean']:.1f}" in sweep[".md"]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in sweep[".md"]
    assert "![Accuracy: figure](sweep.png)" in sweep[".md"]


@pytest.mark.parametrize("name", ["horizon_metric", "adaptinfer_tune", "tuned", "redistribution"])
def test_other_published_results(name):
    sources, notes = report_read.read(RESULTS / name)
    assert not notes
    texts = report.texts(RESULTS / name, sources)
    assert texts[".html"].startswith("<!DOCTYPE html>")
    assert "torch 2.13.0+cpu" in texts[".md"]


def test_several_results_in_one_folder(folder):
    shutil.copy(RESULTS / "sweep" / "sweep.json", folder)
    shutil.copy(RESULTS / "horizon_metric" / "horizon.json", folder)
    page = report.document(folder, report_read.read(folder)[0])
    titles = [section.title for section in page.sections]
    assert titles[:2] == ["In short (sweep.json)", "In short (accuracy.json)"]
    assert "Information horizon" in titles
    anchors = [section.anchor for section in page.sections]
    assert len(set(anchors)) == len(anchors)


def test_own_questions_and_budgets_in_tokens(folder):
    """New files have the tokens that are left: recipes of one method form a line, whatever unit their budgets have."""
    numbers = json.loads((folder / "accuracy.json").read_text())
    numbers.update(model="my-vlm", data="my-questions", split=None, pictures=150)
    numbers["rows"] = [row for row in numbers["rows"] if row["recipe"].startswith(("un-pruned", "random", "cls"))]
    for row in numbers["rows"]:
        share = 1.0 if row["recipe"] == "un-pruned" else float(row["recipe"].partition("fraction=")[2])
        row.update(recipe=row["recipe"].replace(f"fraction={share:g}", f"tokens={576 * share:.0f}"), kept=576 * share, p=0.25)
        row["by_skill"] = {"all": row["by_skill"]["reading"]}
    (folder / "accuracy.json").write_text(json.dumps(numbers))
    texts = report.texts(folder, report_read.read(folder)[0])
    (found,) = json.loads(texts[".json"])["comparisons"]
    cls = [line for line in found["lines"] if line["name"] == "cls, layer 0"]
    assert [line["budget"] for line in cls] == [0.5, 0.25, 0.1, 0.05]
    assert all(line["random"] for line in cls)
    assert "on `my-vlm`: `my-questions`, 150 pictures" in texts[".md"]
    assert "p = 0.25" in texts[".md"]
    assert "What the means hide" not in texts[".md"]  # there is one group


def test_p_values_that_are_corrected_are_shown():
    """A file of the present version has them; one of an earlier version has intervals only."""
    numbers = numbers_of("sweep/sweep.json")
    assert all(line.over_random["mean"].p is None for line in report_lines.of_sweep("it", numbers).lines if line.over_random)
    new = {"value": 0.01, "low": -0.01, "high": 0.02, "p": 0.01, "corrected": 0.2, "n": 90, "units": 30, "source": "bootstrap"}
    for row in numbers["rows"]:
        row["over_random"] = dict.fromkeys(row["over_random"], new)
    lines = report_lines.of_sweep("it", numbers).lines
    assert {(line.over_random["mean"].p, line.over_random["mean"].verdict) for line in lines if line.over_random} == {
        (0.2, "ties")
    }


def test_text_of_a_file_is_no_markup(folder):
    numbers = json.loads((folder / "accuracy.json").read_text())
    numbers["rows"][1]["recipe"] = "<b onclick='x'>own</b> & \"$x^2$\""
    numbers["command"] = "</style><script>alert(1)</script>"
    (folder / "accuracy.json").write_text(json.dumps(numbers))
    page = report.texts(folder, report_read.read(folder)[0])[".html"]
    assert "<b onclick" not in page
    assert "<script" not in page
    assert "&lt;b onclick" in page


def test_labels_keep_their_distance():
    placed = spread([99, 98, 97, 50, 3], apart=10, low=0, high=100)
    assert placed == sorted(placed, reverse=True)
    assert all(one - other >= 10 for one, other in pairwise(placed))
    assert placed[3] == 50
    assert placed[0] == 99
    assert spread([5, 4, 3], apart=10, low=0, high=100) == [20, 10, 0]


LMMS = {
    "results": {
        "vlmprune_reading": {
            "alias": "vlmprune_reading",
            "exact_match,none": 0.9074,
            "exact_match_stderr,none": 0.031,
            " ": " ",
        }
    },
    "configs": {"vlmprune_reading": {}},
    "n-samples": {"vlmprune_reading": {"original": 54, "effective": 54}},
    "config": {"model": "vlmprune", "model_args": 'pretrained=tiny,recipe="random:layer=0,fraction=0.25",dtype=float32'},
    "throughput": {"total_gen_tokens": 99, "avg_ttft_ms": 12.345, "avg_kept_tokens": 36.0},
}


def test_results_of_lmms_eval(folder):
    """Two runs of a task beside each other, each with its recipe, error, documents and measured columns."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "20261128_results.json").write_text(json.dumps(LMMS))
    plain = {**LMMS, "config": {"model_args": {"pretrained": "tiny", "recipe": "none"}}, "throughput": {}}
    (folder / "20261129_results.json").write_text(json.dumps(plain))
    text = report.texts(folder, report_read.read(folder)[0])[".md"]
    assert "| `random:layer=0,fraction=0.25` | vlmprune_reading | exact_match | 0.9074 ± 0.031 | 54 |" in text
    assert "| `none` | vlmprune_reading | exact_match | 0.9074 ± 0.031 | 54 |" in text
    assert "| `random:layer=0,fraction=0.25` | 12.35 | 36 |" in text
    other = {**LMMS, "config": {"model_args": "pretrained=llava,recipe=none"}}
    (folder / "20261130_results.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="mixes settings: the model is"):
        report_read.read(folder)


TIMES = {"ms": 30.0, "low": 29.0, "high": 31.0}
BENCH = {
    "recipe": "un-pruned", "batch": 2, "rounds": 3, "new_tokens": 2, "prompt": 600, "visual": 576.0,
    "times": {"ttft": TIMES, "e2e": TIMES}, "faster": {}, "flops": 1000, "ideal": 1.0, "ideal_prefill": 1.0, "achieved": 1.0,
    "kv_bytes": 2**20, "peak_bytes": 2**22, "overhead": {},
}  # fmt: skip
RATIO = {"times": 2.5, "low": 2.25, "high": 2.75}
PRUNED = {**BENCH, "recipe": "fastv:layer=2,tokens=64", "faster": {"ttft": RATIO, "e2e": RATIO}, "overhead": {"choosing": 0.01}}
TRIAL = {
    "recipe": "divprune:fraction=0.098", "origin": "default", "reach": 0.1, "cost": 0.097, "flops": 0.157, "accuracy": 0.92,
    "drop": {"value": 0.077, "low": 0.03, "high": 0.133, "units": 16}, "left": "", "rung": 0,
}  # fmt: skip
OTHERS = {
    "bench": ({"title": "a shape", "rows": [BENCH, PRUNED]}, "2.50× [2.25, 2.75]", True),
    "max_drop": (
        {
            "model": "tiny", "data": "scenes", "max_drop": 30.0, "horizon": 7, "notes": [], "skipped": [], "trials": [TRIAL],
            "questions": {"tuning": {"units": 8, "questions": 68}, "held-out": {"units": 16, "questions": 160}},
            "finalists": [TRIAL], "winner": TRIAL, "best_default": TRIAL, "gain": None,
            "unpruned": {"tuning": 0.99, "held-out": 0.99},
        },
        "`divprune:fraction=0.098` loses 7.7 [3.0, 13.3] points on 16 held-out pictures",
        True,
    ),
    "power": (power.plan([(power.assumed(2.0, 0.9), 2.0)], 0.9, 0.05, 1), "paired sign-flip test over pictures", False),
    "lmms": (
        {
            "model": "tiny", "batch": 8,
            "rows": [
                {"recipe": recipe, "task": "vlmprune_reading", "documents": 54, "scores": {"exact_match": score}, "same": same,
                 "columns": {"ttft_ms": 12.3}, "file": "x_results.json"}
                for recipe, score, same in (("none", 0.9815, 1.0), ("random:layer=0,fraction=0.25", 0.6481, 0.63))
            ],
        },
        "| vlmprune_reading | exact_match | 0.9815 | 0.6481 |",
        False,
    ),
}  # fmt: skip
"""Numbers of commands that have no published result yet; what their report says, and whether it draws."""


@pytest.mark.parametrize("kind", OTHERS)
def test_results_of_other_commands(kind, tmp_path):
    """As the command shows them; what lmms-eval itself wrote is summed up by lmms.json, and is not shown beside it."""
    numbers, says, drawn = OTHERS[kind]
    (tmp_path / f"{kind}.json").write_text(json.dumps(numbers))
    if kind == "lmms":
        (tmp_path / "x_results.json").write_text(json.dumps(LMMS))
    sources, notes = report_read.read(tmp_path)
    assert [source.kind for source in sources] == [kind]
    assert not notes
    texts = report.texts(tmp_path, sources)
    assert says in texts[".md"]
    assert ("<svg" in texts[".html"]) is drawn


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_three_files(folder, monkeypatch, capsys):
    assert command(monkeypatch, "report", folder) == 0
    assert f"The report is {folder}/report.html" in capsys.readouterr().out.replace("\n", "")
    assert {path.name for path in folder.iterdir()} == {"accuracy.json", "report.html", "report.md", "report.json"}
    before = (folder / "report.html").read_bytes()
    assert command(monkeypatch, "report", folder) == 0  # its own JSON is no result
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize(("name", "start"), [("page.html", "<!DOCTYPE"), ("page.md", "# vlmprune"), ("page.json", "{")])
def test_one_file_of_a_kind(folder, tmp_path, name, start, monkeypatch):
    assert command(monkeypatch, "report", folder, "--out", tmp_path / "new" / name) == 0
    assert (tmp_path / "new" / name).read_text().startswith(start)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_pictures_are_made_once_and_found_again(folder, monkeypatch, capsys):
    """Each shows the tokens that the recipe keeps: as many framed patches as the caption says."""
    numbers = json.loads((folder / "accuracy.json").read_text())
    numbers["rows"] = [row for row in numbers["rows"] if "0.25" in row["recipe"] or row["recipe"] == "un-pruned"]
    (folder / "accuracy.json").write_text(json.dumps(numbers))
    assert command(monkeypatch, "report", folder, "--pictures", "--out", folder / "report.html") == 0
    rows = json.loads((folder / "kept.json").read_text())["rows"]
    assert [row["name"] for row in rows[:5]] == [
        "un-pruned",
        "random, layer 0",
        "cls, layer 0",
        "divprune, layer 0",
        "fastv, layer 2",
    ]
    assert {row["kept"] for row in rows if row["recipe"]} == {36}
    assert [row["answer"] for row in rows if row["recipe"] is None][:2] == ["2", "2 7 1"]  # right; the third is not
    for row in rows:
        picture = Image.open(BytesIO(base64.b64decode(row["png"]))).convert("RGB")
        corners = [picture.getpixel((12 * column, 12 * line)) for line in range(12) for column in range(12)]
        framed = sum(red > 225 and 170 < green < 220 and blue < 60 for red, green, blue in corners)
        assert framed == (36 if row["recipe"] else 0)
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == len(rows) == 15
    assert command(monkeypatch, "report", folder, "--out", folder / "again.html") == 0
    assert (folder / "again.html").read_text() == page


def test_commands_say_how_to_see_their_folder_as_a_page(tmp_path, monkeypatch, capsys):
    """`eval` writes a folder, and the command that it names shows it."""
    out = tmp_path / "my results"
    assert command(monkeypatch, "eval", "--images", 2, "--recipe", "random:fraction=0.5", "--out", out) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "shows this folder as a page" in line]
    name, *arguments = shlex.split(line.split("`")[1])
    assert name == "vlmprune"
    assert command(monkeypatch, *arguments) == 0
    assert (out / "report.html").exists()


# --- what cannot be shown --------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path, monkeypatch, capsys):
    assert "there is no such folder" in refused(monkeypatch, capsys, tmp_path / "nowhere")
    assert "it is a file" in refused(monkeypatch, capsys, Path(__file__))


def test_a_folder_without_results(tmp_path, monkeypatch, capsys):
    assert "no JSON file" in refused(monkeypatch, capsys, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "answers-0001.jsonl").write_text("{}\n")
    (tmp_path / "settings.json").write_text("{}\n")
    assert "has answers but no result yet" in refused(monkeypatch, capsys, tmp_path)


def test_unknown_json(folder, monkeypatch, capsys):
    """Alone it is refused; beside results it is named and left out."""
    (folder / "package.json").write_text('{"name": "x"}')
    assert command(monkeypatch, "report", folder) == 0
    assert f"{folder}/package.json is left out: it is no result of" in capsys.readouterr().err
    (folder / "accuracy.json").unlink()
    (folder / "report.json").unlink()
    assert "package.json is no result of eval, sweep" in refused(monkeypatch, capsys, folder)


def test_a_torn_file(folder, monkeypatch, capsys):
    (folder / "bench.json").write_text('{"title": "a", "rows": [')
    assert "cannot read" in (said := refused(monkeypatch, capsys, folder))
    assert "bench.json (line 1" in said


@pytest.mark.parametrize(("key", "value"), [("model", "llava"), ("data", "my"), ("split", "dev")])
def test_mixed_settings(folder, key, value, monkeypatch, capsys):
    (folder / "sweep.json").write_text(json.dumps({**numbers_of("sweep/sweep.json"), key: value}))
    said = refused(monkeypatch, capsys, folder)
    assert f"mixes settings: {key} is " in said
    assert value in said


def test_pictures_of_another_model(folder, monkeypatch, capsys):
    numbers = {**json.loads((folder / "accuracy.json").read_text()), "model": "llava"}
    (folder / "accuracy.json").write_text(json.dumps(numbers))
    assert "--pictures draws with the embedded model, and these results are of llava" in refused(
        monkeypatch, capsys, folder, "--pictures"
    )


def test_pictures_without_recipes(tmp_path, monkeypatch, capsys):
    shutil.copy(RESULTS / "horizon_metric" / "horizon.json", tmp_path)
    assert "--pictures needs recipes to draw" in refused(monkeypatch, capsys, tmp_path, "--pictures")


@pytest.mark.parametrize("name", ["page.pdf", "page", "."])
def test_a_file_of_another_kind(folder, name, tmp_path, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, folder, "--out", tmp_path / name)
    assert "ends in .html, .md or .json" in said


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package(folder, package, monkeypatch, capsys):
    monkeypatch.setattr("vlmprune.loading.outputs.find_spec", lambda name: None if name == package else object())
    said = refused(monkeypatch, capsys, folder)
    assert f"a report needs {package}: install it with `pip install 'vlmprune[evals]'`." in said
