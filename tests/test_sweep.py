"""The sweep: every method at the budget it was asked for, random beside it at the same schedule, nothing run twice."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import vlmprune as vp
from vlmprune import cli, tiny
from vlmprune.cost import compute_average
from vlmprune.errors import UsageError
from vlmprune.evals import accuracy, sweep_plan, sweep_report, sweep_rows
from vlmprune.evals.answers import Scored
from vlmprune.evals.budgets import PAPER_SCHEDULES, SHARES, PaperSchedule, paper_schedule
from vlmprune.evals.questions import open_questions
from vlmprune.evals.results import Result
from vlmprune.evals.stats import Difference
from vlmprune.evals.sweep_plan import CONTROL, Plan, Point, make_plan
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.tiny.questions import SKILLS

DEPTH, VISUAL = 8, 144


pytestmark = pytest.mark.xdist_group("sweep")  # one process makes what they look at


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


@pytest.fixture(scope="module")
def prompt(embedded):
    """One question, as inputs of the model."""
    question = open_questions(images=1)[0]
    return embedded[1](images=question.images[0], text=tiny.prompt(question.text), return_tensors="pt")


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_every_method_is_swept(embedded):
    plan = make_plan(embedded[0])
    assert {point.method for point in plan.points} == set(vp.METHODS)
    assert not plan.refused
    planned = {(point.method, point.budget) for point in plan.points} | {
        (name, budget) for name, budget, *_ in plan.unreachable
    }
    assert planned == {(name, budget) for name in vp.METHODS for budget in SHARES}


@pytest.mark.parametrize(
    ("method", "at_8", "at_32"),
    [
        ("pdrop", (2, 4, 6), (8, 16, 24)),
        ("adaptinfer", (1, 3, 5), (2, 11, 21)),
        ("sparsevlm", (1, 2, 4), (3, 7, 16)),
        ("mustdrop", (1, 2, 3, 4), (3, 7, 11, 15)),
        ("vscan", (0, 4), (0, 16)),
        ("fastv", (2,), (2,)),
        ("divprune", (0,), (0,)),
    ],
)
def test_layers_are_those_of_the_paper_at_its_depth_and_scaled_at_others(method, at_8, at_32):
    assert PAPER_SCHEDULES[method].at_depth(32) == at_32
    assert PAPER_SCHEDULES[method].at_depth(DEPTH) == at_8


def test_layers_stay_different_and_after_layer_0_in_a_shallow_model():
    assert PaperSchedule((3, 7, 11, 15), (4, 3, 2, 1), 32).at_depth(6) == (1, 2, 3, 4)


@pytest.mark.parametrize("method", PAPER_SCHEDULES)
def test_the_solver_meets_the_average(method):
    paper = PAPER_SCHEDULES[method]
    for budget in SHARES:
        fractions = paper.solve(budget, DEPTH)
        if fractions is None:
            assert budget <= paper.at_depth(DEPTH)[0] * paper.tower / DEPTH
            continue
        assert paper.average(fractions, DEPTH) == pytest.approx(budget, abs=1e-5)
        assert all(0 < fraction <= round(paper.tower, 6) for fraction in fractions)
        free = [(share, kept) for share, kept in zip(fractions, paper.kept, strict=True) if share < round(paper.tower, 6)]
        assert all(fraction / kept == pytest.approx(free[0][0] / free[0][1], abs=1e-5) for fraction, kept in free)


OWN = {
    "scaled": (vp.stages({4: 0.5, 16: 0.25}), PaperSchedule((4, 16), (0.5, 0.25), 32)),
    "of tokens": (vp.stages({0: 96, 16: 32}), PaperSchedule((0, 16), (96, 32), 32)),
    "one stage": (vp.at(layer=2, fraction=0.5), PaperSchedule((2,))),
    "cache": (Schedule((Stage(2, Budget(fraction=0.5)), Stage(2, Budget(fraction=1.0), "cache"))), PaperSchedule((2,))),
    "two units": (Schedule((Stage(2, Budget(fraction=0.5)), Stage(4, Budget(tokens=9)))), None),
    "in the tower": (Schedule((Stage(0, Budget(fraction=0.5), "vision"), Stage(4, Budget(fraction=0.2)))), None),
    "nothing kept": (vp.stages({2: 0.5, 4: 0.0}), None),
}


@pytest.mark.parametrize(("default", "found"), OWN.values(), ids=OWN)
def test_a_method_without_an_entry_is_swept_with_all_stages_of_its_default(default, found, embedded, monkeypatch):
    """Red: only its first stage is swept, or the sweep of all methods ends because one cannot be scaled."""

    @dataclass(frozen=True, kw_only=True)
    class Own(vp.Uniform):
        """A method of one's own."""

        name = "own"

    Own.default = default
    monkeypatch.setitem(vp.METHODS, "own", Own)
    plan = make_plan(embedded[0], ["own"], [0.5])
    if found is None:
        assert "add an entry to PAPER_SCHEDULES" in plan.refused["own"]
        assert {point.method for point in plan.points} == {"random"}
        return
    assert paper_schedule("own") == found
    (point,) = (point for point in plan.points if point.method == "own")
    assert point.layers == found.at_depth(DEPTH)
    assert len(point.fractions) == len(found.layers)


def test_averages_by_hand():
    assert compute_average(1, 8, {2: 0.5}) == (2 + 6 * 0.5) / 8
    assert compute_average(576, 32, {0: 96, 16: 32}) == 64  # VScan 96 -> 32 is 64 on average
    assert PAPER_SCHEDULES["fastv"].solve(0.5, 8) == (round(1 / 3, 6),)
    assert PAPER_SCHEDULES["vscan"].solve(64 / 576, 32) == (round(96 / 576, 6), round(32 / 576, 6))
    assert PAPER_SCHEDULES["divprune"].solve(0.1, 8) == (0.1,)


def test_every_paper_schedule_is_of_a_method():
    """Red: an entry that no method uses any more."""
    assert set(PAPER_SCHEDULES) <= set(vp.METHODS)


def test_what_is_merged_in_the_tower_counts_from_the_first_layer_on():
    assert PaperSchedule((1, 2), (1.0, 0.5), tower=0.5).average((0.5, 0.25), 4) == (0.5 + 0.5 + 2 * 0.25) / 4
    assert PaperSchedule((1,), tower=0.5).solve(0.3, 4) == (round((4 * 0.3 - 0.5) / 3, 6),)
    assert PaperSchedule((1,), tower=0.5).solve(0.6, 4) is None
    point = Point("mustdrop", 0.4, (1, 2), (0.5, 0.25))
    assert point.control() == Point("random", 0.4, (0, 1, 2), (0.555556, 0.5, 0.25))
    assert point.places == "tower, 1, 2"


def test_what_a_late_cut_cannot_reach_is_said(embedded):
    plan = make_plan(embedded[0], ["fastv"], [0.35, 0.25, 0.1])
    assert plan.unreachable == [("fastv", 0.25, 0.25, 1), ("fastv", 0.1, 0.25, 1)]
    assert [point.budget for point in plan.points if point.method == "fastv"] == [0.35]


def test_measured_averages_meet_the_budgets_and_random_keeps_as_many_at_the_same_layers(embedded, prompt):
    model, _ = embedded
    plan = make_plan(model, budgets=(0.5, 0.15))
    for point in plan.points:
        reports = []
        for twin in (point, point.control()):
            with torch.inference_mode(), vp.wrap(model, twin.recipe(seed=1)) as run:
                model(**prompt)
            reports.append(run.report())
        # Each count is rounded to whole tokens, and is one at least.
        assert reports[0].visual_compute_average == pytest.approx(point.budget * VISUAL, abs=1), point
        assert reports[1].visual_compute_average == reports[0].visual_compute_average, point


def test_a_seed_draws_other_scenes_and_other_random_tokens(embedded):
    point = Point("random", 0.5, (0,), (0.5,))
    assert str(point.recipe(0)) != str(point.recipe(2))
    assert str(Point("divprune", 0.5, (0,), (0.5,)).recipe(0)) == str(Point("divprune", 0.5, (0,), (0.5,)).recipe(2))
    seeds = [{question.unit for question in open_questions(images=4, seed=seed)} for seed in range(3)]
    assert len(set.union(*seeds)) == 12


def test_one_random_row_serves_all_methods_with_the_same_schedule(embedded):
    plan = make_plan(embedded[0], ["cls", "divprune", "fastv"], [0.5])
    assert plan.controls() == [Point("random", 0.5, (0,), (0.5,)), Point("random", 0.5, (2,), (0.333333,))]
    assert len(plan.recipes(seed=0)) == 5


# --- comparing -------------------------------------------------------------------------------------------------------


def answers(right: dict[str, float], pictures: int = 40, share: float = 0.5) -> Scored:
    """Every skill asked once per picture, with a share of right answers."""
    score = [float(picture < right.get(skill, 0.5) * pictures) for picture in range(pictures) for skill in SKILLS]
    unit = np.repeat(np.arange(pictures), len(SKILLS))
    return Scored(np.array(score), unit, list(SKILLS) * pictures, np.array(score), share, 1.0)


def differences(given: Scored, control: Scored) -> dict[str, Difference]:
    mean, skills = sweep_rows.differences({"": (given, control)})[""]
    return {"mean": mean, **skills}


def test_verdicts_on_planted_numbers():
    half = answers({})
    found = differences(answers({"counting": 0, "colour": 1}), half)
    assert {name for name in found if found[name].verdict == "ties"} == {"mean", *SKILLS} - {"counting", "colour"}
    assert found["counting"].verdict == "loses"
    assert found["colour"].verdict == "beats"
    assert found["colour"].value == 0.5
    assert found["colour"].low < 0.5 < found["colour"].high
    assert found["mean"].value == pytest.approx(0)
    better, worse = (differences(answers(dict.fromkeys(SKILLS, share)), half)["mean"] for share in (0.8, 0.2))
    assert (better.verdict, worse.verdict) == ("beats", "loses")
    assert better.value == pytest.approx(0.3)
    assert str(better).startswith("+30.0 [")


def test_the_difference_is_paired():
    """Two methods that are right about almost the same pictures differ by little."""
    one, other = answers(dict.fromkeys(SKILLS, 0.5)), answers(dict.fromkeys(SKILLS, 0.7))
    difference = differences(other, one)["mean"]
    assert difference.verdict == "beats"
    assert difference.high - difference.low < 0.3


def planted(right: dict[str, dict[str, float]], *more: Point) -> sweep_rows.Sweep:
    """A sweep of made-up answers at 50 %, and at `more` points: method -> skill -> share of right answers."""
    points = [*(Point(method, 0.5, (0,), (0.5,)) for method in right), *more]
    plan = Plan(points, [("fastv", 0.25, 0.25, 1), ("fastv", 0.1, 0.25, 1)], {"tome": "tome cannot do that."})

    def scored(point):
        skills = dict.fromkeys(SKILLS, 1.0) if point is None else right[point.method]
        return "recipe", answers(skills, share=0.3 if point and point.method == "uniform" else 0.5)

    return sweep_rows.compare(plan, scored)


def test_verdicts_are_corrected_for_all_points():
    """Red: a sweep of many points finds winners by chance."""
    point = Point("cls", 0.5, (0,), (0.5,))
    plan = Plan([replace(point, budget=0.5 + 0.001 * n) for n in range(40)])
    shares = {CONTROL: 0.5, "cls": 0.65}  # six of forty pictures: p = 0.031

    def scored(point):
        return "recipe", answers(dict.fromkeys(SKILLS, 1.0 if point is None else shares[point.method]))

    alone = sweep_rows.compare(Plan([point]), scored).methods[0].over_random["mean"]
    among = sweep_rows.compare(plan, scored).methods[0].over_random["mean"]
    assert (alone.p, alone.verdict) == (among.p, "beats") == (2 / 2**6, "beats")
    assert (among.corrected, among.verdict) == (1.0, "ties")
    said = sweep_report.summary(sweep_rows.compare(plan, scored))[0]
    assert "0 beat random" in said
    assert "corrected for that (Holm)" in said


def test_the_summary_names_what_does_not_beat_random():
    right = {"random": {}, "cls": {"counting": 0.9}, "divprune": dict.fromkeys(SKILLS, 0.9), "uniform": {"reading": 0}}
    said = sweep_report.summary(planted(right))
    assert said[0].startswith("Of 3 points (a method at a budget), 2 beat random")
    assert "0 tie and 1 lose" in said[0]
    (mean,) = [sentence for sentence in said if sentence.startswith("On the mean")]
    assert mean.startswith("On the mean, `uniform` does not beat random: loses at 50 % (-7.1 [")
    assert not any("divprune" in sentence for sentence in said)
    skills = [sentence for sentence in said if sentence.startswith("On single skills")]
    assert skills[0].startswith("On single skills, `cls` does not beat random: existence ties at 50 %; colour ties")
    assert "counting" not in skills[0]
    assert skills[1].endswith("reading loses at 50 %.")
    assert "`uniform` at 50 % really costs 30.0 %." in said
    assert "Not reachable: `fastv` at 25 % and 10 %; its stages cost between 25 % and 100 %." in said
    assert said[-1] == "Not run: tome cannot do that."


def result_of(swept: sweep_rows.Sweep) -> Result:
    return sweep_report.result({"images": 40, "seeds": 1, "split": "test", **swept.to_dict()})


def test_tables(tmp_path):
    right = {"random": {}, "divprune": dict.fromkeys(SKILLS, 0.9), "uniform": {"reading": 0}}
    text = result_of(planted(right, Point("divprune", 0.1, (0,), (0.1,)))).markdown()
    (uniform,) = [line for line in text.splitlines() if line.startswith("| `uniform` | 0 |")]
    assert uniform.endswith("| not reachable |")
    result = planted(right)
    text = result_of(result).markdown()
    (divprune,) = [line for line in text.splitlines() if line.startswith("| `divprune` | 0 | 90.0 [")]
    assert divprune.endswith("▲ |")
    assert "| un-pruned |" + " 100.0 |" * len(SKILLS) in text
    assert text.count("▼") == 1 + 1 + 1  # the legend, the mean and one skill
    result_of(result).write(tmp_path / "sweep")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}


# --- the command -----------------------------------------------------------------------------------------------------


def vlmprune(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vlmprune", "sweep", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_command(monkeypatch, capsys, tmp_path):
    arguments = ("--method", "cls", "--method", "fastv", "--budget", 0.25, "--seeds", 1, "--images", 2, "--out", tmp_path)
    assert vlmprune(monkeypatch, *arguments, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in numbers["rows"]] == ["cls", "random"]
    assert numbers["unreachable"] == [{"method": "fastv", "budget": 0.25, "lowest": 0.25, "highest": 1}]
    assert numbers["rows"][0]["over_random"]["mean"]["verdict"] in ("beats", "ties", "loses")
    assert numbers["rows"][0]["share"] == 0.25
    assert numbers["images"] == 2
    assert json.loads((tmp_path / "sweep.json").read_text()) == numbers
    assert "| `cls` | 0 |" in (tmp_path / "sweep.md").read_text()
    assert vlmprune(monkeypatch, *arguments, "--threads", torch.get_num_threads()) == 0
    assert "over random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "fastvv"), "unknown method 'fastvv': did you mean 'fastv' or 'fastvid'?"),
        (("--budget", "1.5"), "a budget is a share of the visual tokens between 0 and 1, found 1.5"),
        (("--split", "zzz"), "unknown split 'zzz'"),
    ],
)
def test_mistakes(monkeypatch, capsys, arguments, sentence):
    assert vlmprune(monkeypatch, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_every_recipe_of_eval_is_looked_at_before_the_first_is_run(embedded, monkeypatch):
    """Red: the last recipe is refused after all others were run."""
    model, processor = embedded
    monkeypatch.setattr(accuracy, "answer", lambda *more: pytest.fail("a recipe was run"))
    with pytest.raises(vp.UsageError, match="fastv prunes at layer 30"):
        accuracy.evaluate(model, processor, ["random:fraction=0.5", "fastv:layer=30,fraction=0.5"], 2)


def test_a_method_that_refuses_the_model_is_told_and_left_out(embedded, monkeypatch):
    def refuse(model, recipe):
        if recipe.methods[0].name == "cls":
            raise UsageError("cls cannot work here.")
        return vp.Run(model, recipe)

    monkeypatch.setattr(sweep_plan.vlmprune, "wrap", refuse)
    plan = make_plan(embedded[0], ["cls", "divprune"], [0.5])
    assert plan.refused == {"cls": "cls cannot work here."}
    assert [point.method for point in plan.points] == ["divprune", "random"]
