"""Planned numbers of questions, checked by asking as many: simulated recipes that are really so much worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import vlmprune
from simulated import simulate

import vlmprune as vp
from vlmprune.evals import power, stats
from vlmprune.evals.answers import Answered, Answers, Asked
from vlmprune.show.stats import difference_interval


@pytest.fixture(autouse=True)
def _fewer_flips(monkeypatch):
    """Hundreds of tests at 5 %: p-values with two digits will do."""
    monkeypatch.setattr(stats, "FLIPS", 4_999)


def found(rng, pictures, per_picture, loss, **truth):
    first, second, unit = simulate(rng, pictures, per_picture, loss=loss / 100, **truth)
    return stats.difference(second, first, unit).verdict == "loses"


@pytest.mark.parametrize(
    ("per_picture", "cluster", "agreement"),
    [(1, 0.0, 0.8), (1, 0.0, 0.95), (4, 1.0, 0.9), (4, 0.0, 0.8)],
    ids=["often differs", "only the loss differs", "pictures as a whole", "several questions"],
)
def test_five_points_are_found_with_what_was_planned(per_picture, cluster, agreement):
    """As many pictures as `power` says find a loss of 5 points in at least 80 of 100 experiments (planned: 90)."""
    rng = np.random.default_rng(0)
    need = power.units_needed(power.assumed(5, agreement=agreement, per_unit=per_picture, correlation=cluster), 5)
    assert need.questions == need.units * per_picture
    truth = {"accuracy": 0.8, "agreement": agreement, "cluster": cluster}
    assert sum(found(rng, need.units, per_picture, 5, **truth) for _ in range(100)) >= 80
    # Far fewer would not do: the plan is not simply generous.
    assert sum(found(rng, need.units // 3, per_picture, 5, **truth) for _ in range(100)) < 75


def test_power_is_what_was_asked_for():
    """A probability of 60 % is 60 % within binomial error, not merely "at least"."""
    rng = np.random.default_rng(1)
    need = power.units_needed(power.assumed(5, agreement=0.8), 5, power=0.6)
    hits = sum(found(rng, need.units, 1, 5, accuracy=0.8, agreement=0.8) for _ in range(300))
    assert abs(hits / 300 - 0.6) < 3 * (0.6 * 0.4 / 300) ** 0.5


def pilot(tmp_path, rng, pictures, per_picture, **truth):
    """A result file as `vlmprune eval` writes it, of simulated answers."""
    first, second, _ = simulate(rng, pictures, per_picture, **truth)
    ours, theirs = (score.reshape(pictures, -1).sum(axis=1, keepdims=True) for score in (first, second))
    asked = np.full((pictures, 1), per_picture)
    low, high, _ = difference_interval(ours, theirs, asked)
    row = {"by_skill": {"all": {"n": int(asked.sum())}}, "recipe": "fastv:fraction=0.5"}
    row |= {"lost": float((first - second).mean()), "lost_interval": [low, high], "loyalty": float((first == second).mean())}
    whole = {**row, "recipe": "un-pruned", "lost": 0.0, "lost_interval": [-0.01, 0.01], "loyalty": 1.0}
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps({"images": pictures, "rows": [whole, row]}))
    return path


@pytest.mark.parametrize(("per_picture", "cluster"), [(1, 0.0), (5, 1.0), (5, 0.0)])
def test_a_pilot_measures_what_would_be_assumed(tmp_path, per_picture, cluster):
    """Clusters included: the pilot's paired interval has whole pictures as units."""
    path = pilot(
        tmp_path, np.random.default_rng(2), 3_000, per_picture, accuracy=0.8, agreement=0.9, loss=0.05, cluster=cluster
    )
    (spread,) = power.from_pilot(path)
    assert spread.source == "measured against the un-pruned model on 3000 pictures"
    known = power.assumed(5, agreement=0.9, per_unit=per_picture, correlation=cluster)
    assert power.units_needed(spread, 5).units == pytest.approx(power.units_needed(known, 5).units, rel=0.12)


def test_answers_are_a_pilot(tmp_path):
    """From the stored answers of every question, as from the assumptions that they were drawn by."""
    rng = np.random.default_rng(5)
    first, second, unit = simulate(rng, 2_000, 4, 0.8, agreement=0.9, loss=0.05, cluster=0.5)
    names = [str(number) for number in range(len(unit))]
    asked = Asked(names, names, [["yes"]] * len(unit), ["all"] * len(unit), [f"picture {number}" for number in unit])
    rows = []
    for recipe, score in (("un-pruned", first), ("fastv:fraction=0.5", second)):
        given = ["yes" if right else "no" for right in score]
        rows.append(Answers(recipe, 0, given, score.tolist(), 1.0, []))
    Answered([asked], rows).write(tmp_path)
    (spread,) = power.from_pilot(tmp_path)
    assert (spread.name, spread.per_unit) == ("fastv:fraction=0.5", 4)
    assert spread.differing == pytest.approx(0.1, abs=0.01)
    known = power.assumed(5, agreement=0.9, per_unit=4, correlation=0.5)
    assert power.units_needed(spread, 5).units == pytest.approx(power.units_needed(known, 5).units, rel=0.2)


def test_a_pilot_without_differences_still_plans():
    """Nothing differed in the pilot: what loses 5 points differs in 5 of 100 answers all the same."""
    quiet = power.Spread("quiet", 0.0, 0.0, 1, "measured")
    assert power.units_needed(quiet, 5).units == power.units_needed(power.assumed(5, agreement=0.95), 5).units


def test_more_of_everything_needs_more():
    def units(loss=5.0, **other):
        own = {key: other.pop(key) for key in ("power", "alpha", "comparisons") if key in other}
        return power.units_needed(power.assumed(loss, **{"agreement": 0.8, **other}), loss, **own).units

    assert units() < units(power=0.95) < units(power=0.99)
    assert units() < units(alpha=0.01)
    assert units() < units(comparisons=10) < units(comparisons=100)
    assert units() < units(loss=2) < units(loss=1)
    assert units(agreement=0.95) < units() < units(agreement=None, accuracy=0.5)
    assert units(per_unit=4, correlation=0) < units(per_unit=4, correlation=0.5) < units(per_unit=4, correlation=1) == units()


def test_by_hand():
    """Connor's formula, and one comparison: n = (1.96 √0.2 + 1.2816 √(0.2 − 0.05²))² / 0.05² + 20."""
    expected = (1.959964 * 0.2**0.5 + 1.281552 * (0.2 - 0.0025) ** 0.5) ** 2 / 0.0025 + 20
    assert power.units_needed(power.assumed(5, agreement=0.8), 5).units == int(expected) + 1


def test_command(monkeypatch, capsys, tmp_path):
    assert vlmprune(monkeypatch, "power", "--agreement", 0.8, "--loss", 5, "--loss", 1, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["units"] for row in rows] == [power.units_needed(power.assumed(n, agreement=0.8), n).units for n in (5, 1)]
    path = pilot(tmp_path, np.random.default_rng(3), 200, 2, accuracy=0.8, agreement=0.9)
    assert vlmprune(monkeypatch, "power", "--pilot", path, "--comparisons", 3, "--out", tmp_path / "new") == 0
    assert "fastv:fraction=0.5" in capsys.readouterr().out
    text = (tmp_path / "new" / "power.md").read_text()
    assert "corrected for 3 comparisons" in text
    assert "un-pruned model on 200 pictures" in text


@pytest.mark.parametrize("file", ["budgets/accuracy.json", "sweep/sweep.json"])
def test_committed_results_are_pilots(file):
    spreads = power.from_pilot(Path(vp.__file__).parent.parent / "docs" / "results" / file)
    assert len(spreads) > 10
    assert all(power.units_needed(spread, 2).units > 5 for spread in spreads)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give --pilot, --agreement or at least --accuracy"),
        (("--accuracy", 90), "accuracy is a share between 0 and 1, found 90"),
        (("--agreement", 0.99, "--loss", 5), "at most 1 points can be lost, found a loss of 5"),
        (("--accuracy", 0.03, "--loss", 5), "cannot lose 5 points"),
        (("--accuracy", 0.9, "--loss", 0), "between 0 and 100, found 0"),
        (("--accuracy", 0.9, "--power", 1), "power is a probability between 0 and 1, found 1"),
        (("--accuracy", 0.9, "--power", 0.04), "above alpha"),
        (("--pilot", "nothing.json"), "cannot be read as JSON"),
        (("--pilot", "other.json"), "holds no comparison"),
        (("--pilot", "alone.json"), "compares no recipe"),
        (("--pilot", "."), "there is no answers.jsonl"),
        (("--pilot", "alone.json", "--accuracy", 0.9), "a pilot replaces --accuracy"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, arguments, sentence):
    (tmp_path / "other.json").write_text('{"samples": 3}')
    row = {"by_skill": {"all": {"n": 3}}, "recipe": "un-pruned", "lost": 0.0, "lost_interval": [0, 0], "loyalty": 1.0}
    (tmp_path / "alone.json").write_text(json.dumps({"images": 3, "rows": [row]}))
    monkeypatch.chdir(tmp_path)
    assert vlmprune(monkeypatch, "power", *arguments) == 2
    assert sentence in capsys.readouterr().err
