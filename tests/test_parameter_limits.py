"""Every parameter of every method has its limits as data, takes NumPy's numbers, and refuses what is no number.

Limits are checked where they are declared: a class of a user's that declares them gets the same.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import vlmprune as vp
from vlmprune.methods.parameters import Choices, Range, choice, limits_of, number

METHODS: dict[str, Any] = {**vp.METHODS, **vp.REDISTRIBUTORS}
WRITTEN = {"schedule", "layer", "preset", "layers", "sink_dims", "blocks", "relevance"}
"""Parameters that are no plain numbers or words: schedules, layers as "1|18:", functions."""
PAIRS = {"global_threshold": "individual_threshold", "individual_threshold": "global_threshold"}

NO_NUMBERS = (True, np.bool_(False), "many", np.array([0.5, 0.25]), (1, 2), 1j, np.float64("nan"))


def limited(name: str) -> Iterator[tuple[str, Range | Choices]]:
    """A method's parameters that have limits."""
    for parameter in METHODS[name].__dataclass_fields__:
        if (limits := limits_of(METHODS[name], parameter)) is not None:
            yield parameter, limits


def made(name: str, parameter: str, value: Any) -> Any:
    return METHODS[name](**{parameter: value}, **({PAIRS[parameter]: 0.5} if parameter in PAIRS else {}))


def stored(method: Any, parameter: str) -> Any:
    """The value of a parameter, also of those that go into the schedule or another field."""
    if parameter in ("tokens", "fraction"):
        return getattr(method.stages[0].budget, parameter)
    if parameter in ("p", "rho"):
        return 1 - getattr(method, {"p": "keep", "rho": "max_sink_share"}[parameter])
    return getattr(method, parameter)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_says_what_it_may_be(name):
    """Red: a parameter is added without limits: nothing refuses a wrong value, and `vlmprune methods` prints none."""
    method = METHODS[name]
    for parameter in list(inspect.signature(method).parameters):
        assert (limits_of(method, parameter) is None) is (parameter in WRITTEN), parameter


@pytest.mark.parametrize("name", METHODS)
def test_numbers_of_numpy_are_plain_numbers(name):
    """Red: `found np.int64(8)`, or a recipe that cannot be written as JSON."""
    for parameter, limits in limited(name):
        if isinstance(limits, Choices):
            values = [one for one in limits if isinstance(one, int | float)]
        else:
            low, high = max(limits.low, 1 if parameter == "tokens" else -100), min(limits.high, 3.0)
            values = [max(round(low), 1)] if limits.whole else [low + (high - low) / 4]
        for value in values:
            kinds = (np.int64, np.int8, np.array) if isinstance(value, int) else (np.float32, np.float64, np.array)
            for kind in kinds:
                found = stored(made(name, parameter, kind(value)), parameter)
                assert type(found) in (int, float), (parameter, kind, found)
                assert found == pytest.approx(value), parameter


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_number_is_refused(name):
    """Red: a bool is taken for 0 or 1, or an array ends in NumPy's own error."""
    for parameter, _ in limited(name):
        for value in NO_NUMBERS:
            with pytest.raises(vp.UsageError) as error:
                made(name, parameter, value)
            assert parameter in str(error.value)
            assert "\n" not in str(error.value)


def test_no_method_checks_a_range_itself():
    """A comparison with two bounds, or of a type, belongs into the field's own limits."""
    wrong = []
    for name, method in METHODS.items():
        for hook in ("__post_init__", "validate"):
            if hook in vars(method):
                tree = ast.parse(textwrap.dedent(inspect.getsource(vars(method)[hook])))
                wrong += [f"{name}.{hook}" for node in ast.walk(tree) if isinstance(node, ast.Compare) and len(node.ops) > 1]
    assert not wrong, wrong


@dataclass(frozen=True, kw_only=True)
class Mine(vp.ScorePruner):
    name, paper, needs, default = "limits of mine", "", frozenset({"features"}), vp.at(0, tokens=4)
    weight: float = number(0.5, low=0, high=1)
    share: float = number(0.5, low=0, high=1, below=True)
    count: int | None = number(None, low=1, whole=True)
    how: str = choice("sum", "mean")
    size: float = number(0, low=0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"weight": 1.5}, "limits of mine: weight must be a number in [0, 1], found 1.5."),
        ({"share": 1}, "limits of mine: share must be a number in [0, 1), found 1."),
        ({"count": 0}, "limits of mine: count must be a whole number >= 1, found 0."),
        ({"count": 2.5}, "limits of mine: count must be a whole number >= 1, found 2.5."),
        ({"how": "mien"}, "unknown value of how in limits of mine 'mien': did you mean 'mean'?"),
        ({"how": True}, "unknown value of how in limits of mine 'True'"),
    ],
)
def test_a_class_of_ones_own_is_checked_alike(given, sentence):
    with pytest.raises(vp.UsageError) as error:
        Mine(**given)
    assert str(error.value).startswith(sentence)


def test_a_class_of_ones_own_keeps_plain_numbers():
    found = Mine(weight=np.float32(0.25), count=np.int16(3), how="mean")
    assert (found.weight, found.count, found.how) == (0.25, 3, "mean")
    assert type(found.weight) is float
    assert type(found.count) is int


def test_limits_in_words():
    shown = {parameter: str(limits_of(Mine, parameter)) for parameter in ("weight", "share", "count", "how", "size")}
    assert shown == {"weight": "0 to 1", "share": "0 to below 1", "count": "≥ 1", "how": "sum, mean", "size": "≥ 0"}
    assert [str(limits) for limits in (Range(), Range(high=2), Range(high=2, below=True))] == ["any", "≤ 2", "< 2"]
    with pytest.raises(vp.UsageError, match="mine: share must be a number < 2, found 2"):
        Range(high=2, below=True).check("mine", "share", 2)
    with pytest.raises(vp.UsageError, match=r"mine: seed must be a whole number, found 1\.5"):
        Range(whole=True).check("mine", "seed", 1.5)
