"""Budgets, stages and their rounding: what is kept, and when."""

from __future__ import annotations

import pytest

import vlmprune as vp
from vlmprune.schedule import Budget, Stage


@pytest.mark.parametrize(
    ("budget", "visual", "kept"),
    [
        (Budget(fraction=0.5), 575, 288),  # half up, where Python's round would go to even
        (Budget(fraction=0.5), 577, 289),
        (Budget(fraction=0.098), 576, 56),  # DivPrune's figure
        (Budget(fraction=0.001), 16, 1),  # never nothing, unless asked for
        (Budget(fraction=0.0), 16, 0),
        (Budget(fraction=1), 16, 16),
        (Budget(tokens=0), 16, 0),
        (Budget(tokens=64), 576, 64),
        (Budget(tokens=64), 36, 36),  # a small picture keeps what it has
    ],
    ids=str,
)
def test_rounding(budget, visual, kept):
    assert budget.resolve(visual) == kept


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "found neither"),
        ({"tokens": 3, "fraction": 0.5}, "found both"),
        ({"tokens": -1}, "tokens must be a whole number >= 0, found -1"),
        ({"tokens": 1.5}, "tokens must be a whole number >= 0, found 1.5"),
        ({"tokens": True}, "found True"),
        ({"fraction": 1.5}, "fraction must lie in [0, 1], found 1.5"),
        ({"fraction": -0.1}, "fraction must lie in [0, 1], found -0.1"),
        ({"fraction": float("nan")}, "fraction must lie in [0, 1], found nan"),
        ({"fraction": "half"}, "fraction must be a number in [0, 1], found 'half'"),
    ],
    ids=str,
)
def test_budget_out_of_range(arguments, sentence):
    with pytest.raises(vp.UsageError) as error:
        Budget(**arguments)
    assert sentence in str(error.value)


def test_schedules():
    assert vp.at(2, fraction=0.5).stages == (Stage(2, Budget(fraction=0.5)),)
    assert vp.stages({16: 0.25, 8: 0.5}).stages == (Stage(8, Budget(fraction=0.5)), Stage(16, Budget(fraction=0.25)))
    assert vp.stages({2: 300, 6: 200}).stages[1].budget.tokens == 200


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: vp.stages({}), "at least one stage"),
        (lambda: vp.at(-1, tokens=3), "layer must be a whole number >= 0"),
        (lambda: vp.at(1.5, tokens=3), "layer must be a whole number >= 0"),
        (lambda: vp.stages({1: 0.25, 3: 0.5}), "a later stage cannot keep more"),
        (lambda: vp.stages({1: 10, 3: 20}), "a later stage cannot keep more"),
        (lambda: vp.Schedule((Stage(3, Budget(tokens=2)), Stage(3, Budget(tokens=1)))), "different layers in rising order"),
    ],
)
def test_bad_schedules(build, sentence):
    with pytest.raises(vp.UsageError, match=sentence.replace("(", r"\(")):
        build()
