"""Bad input, and methods that users wrote wrongly: one sentence each, also under `explain=True`."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.cli.why import explained, lines

Crop = namedtuple("Crop", ["name", "cells"])
CHATTY = [["text4", "image", "text6"], ["text3", "image", "text3"]]


def own(base=vp.Pruner, **parts):
    """A method as users write one: it keeps the first four tokens of each picture."""

    def select(self, see, keep):
        index = torch.arange(keep).expand(see.images, keep)
        return vp.Choice(index, joined=self.merged_into(see)) if hasattr(self, "merged_into") else index

    traits = {"name": "mine", "paper": "", "needs": frozenset({"features"}), "default": vp.at(0, tokens=4), "select": select}
    return type("Mine", (base,), traits | parts)()


# -- explain=True ------------------------------------------------------------------------------------------------------------

JOINED = {
    "out of range": (
        lambda self, see: torch.full((see.images, see.visual), 99),
        r"must hold the kept token that each token was merged into, .*, found 99 for token 0 of picture 0\.",
    ),
    "into a dropped token": (
        lambda self, see: torch.arange(see.visual).expand(see.images, -1),
        r"found 4 for token 4 of picture 0\.",
    ),
    "a kept one into another": (
        lambda self, see: torch.zeros(see.images, see.visual, dtype=torch.long),
        r"found 0 for token 1 of picture 0\.",
    ),
    "wrong shape": (
        lambda self, see: torch.zeros(see.images, 3, dtype=torch.long),
        r"must be a tensor \[image, visual\] of shape \[2, 16\], found shape \[2, 3\]\.",
    ),
    "a list": (lambda self, see: [[0]], r"must be a tensor \[image, visual\] of shape \[2, 16\], found \[\[0\]\]\."),
    "floats": (lambda self, see: torch.zeros(see.images, see.visual), r"of whole numbers, found torch.float32\."),
}
ORDERS = {
    "out of range": (
        lambda self, see, keep: torch.arange(30, 30 + keep).expand(see.images, keep),
        r"must return the tokens that select\(see, keep\) kept, each once, found \[30, 31, 32, 33\] instead of "
        r"\[0, 1, 2, 3\] for picture 0\.",
    ),
    "other tokens": (
        lambda self, see, keep: torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]),
        r"found \[0, 1, 2, 4\] instead of \[0, 1, 2, 3\] for picture 1\.",
    ),
    "one twice": (lambda self, see, keep: torch.zeros(see.images, keep).long(), r"found \[0, 0, 0, 0\] instead of"),
    "too many": (
        lambda self, see, keep: torch.arange(keep + 3).expand(see.images, -1),
        r"must be a tensor \[image, keep\] of shape \[2, 4\], found shape \[2, 7\]\.",
    ),
    "a list": (lambda self, see, keep: [[0, 1, 2, 3]] * 2, r"found \[\[0, 1, 2, 3\], \[0, 1, 2, 3\]\]\."),
}


@pytest.mark.parametrize(
    ("part", "wrong", "said"),
    [
        *(pytest.param("merged_into", *case, id=f"joined: {name}") for name, case in JOINED.items()),
        *(pytest.param("order", *case, id=f"order: {name}") for name, case in ORDERS.items()),
    ],
)
@torch.no_grad()
def test_what_explains_is_checked(part, wrong, said):
    """Red: a run that works without `explain=True` crashes with it, or is explained by tokens that are not there."""
    model = shared("llava")
    inputs = make_inputs("llava", model, CHATTY)
    what = r"mine: the joined of its Choice" if part == "merged_into" else r"mine: order\(see, keep\)"
    with vp.wrap(model, own(**{part: wrong})):
        model(**inputs)
    with vp.wrap(model, own(**{part: wrong}), explain=True), pytest.raises(vp.UsageError, match=f"^{what} .*{said}"):
        model(**inputs)


@torch.no_grad()
def test_what_explains_may_be_of_any_whole_numbers():
    model = shared("llava")
    order = lambda self, see, keep: torch.tensor([[3, 1, 0, 2]] * 2, dtype=torch.int16)  # noqa: E731
    joined = lambda self, see: torch.tensor([[0, 1, 2, 3, 1, 1, *[-1] * 10]] * 2, dtype=torch.int8)  # noqa: E731
    with vp.wrap(model, own(order=order, merged_into=joined), explain=True) as run:
        model(**make_inputs("llava", model, CHATTY))
        found = [run.explain(token, sample=1).verdicts[0] for token in range(7)]
    assert [verdict.pick for verdict in found] == [3, 2, 4, 1, None, None, None]
    assert [verdict.merged_into for verdict in found] == [None] * 4 + [1, 1, None]
    assert found[1].merged_from == 2


# -- tokens without a place --------------------------------------------------------------------------------------------------

NO_PLACE = "numbers their tokens 0 to {}, so that no number is a place in the picture"


@torch.no_grad()
def test_tokens_that_the_tower_merged_anywhere_have_no_place():
    """Red: token 0 of what is left is said to be the first of the picture."""
    model = shared("qwen2_vl")
    inputs = make_inputs("qwen2_vl", model, CHATTY)
    with vp.wrap(model, "flowcut:fraction=0.3", explain=True) as run:
        model(**inputs)
    left = len(run.last.kept[0].index)
    assert run.last.kept[0].index.tolist() == list(range(left))
    for token in range(16):
        why = run.explain(token)
        assert not why.in_place
        assert NO_PLACE.format(left - 1) in str(why.verdicts[0])
        assert str(why).count("no number is a place") == 1
        assert why.to_dict()["verdicts"][0]["in_place"] is False


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen2_vl", "flowcut:fraction=1.0"),
        ("qwen2_vl", "flowcut:fraction=0.3,variant_on_units=unit"),
        ("qwen2_5_vl", "flowcut:fraction=0.3"),
        ("qwen2_vl", "fastv:layer=2,tokens=4"),
        ("llava", "flowcut:tokens=4"),
        ("llava_next", "flowcut:tokens=4"),
    ],
)
@torch.no_grad()
def test_all_others_have_one(family, recipe):
    model = shared(family)
    with vp.wrap(model, recipe, explain=True) as run:
        model(**make_inputs(family, model, CHATTY))
    assert all(run.explain(token).in_place for token in range(run.last.kept[0].original))
    assert "no place" not in str(run.explain(0))


@torch.no_grad()
def test_a_token_without_a_place_has_no_cell():
    """Red: `run --why` prints "Its cell is row 0, column 0" of a token that was merged from patches of anywhere."""
    model = shared("qwen2_vl")

    class Asked:
        def crops(self):
            return [Crop("picture", torch.arange(16).reshape(4, 4))]

    for recipe, cell in (
        ("flowcut:fraction=0.3", None),
        ("fastv:layer=2,tokens=4", {"crop": "picture", "row": 1, "column": 1}),
    ):
        with vp.wrap(model, recipe, explain=True) as run:
            model(**make_inputs("qwen2_vl", model, CHATTY))
        (why,) = explained(run, Asked(), [5])
        assert why["cell"] == cell
        assert ("Its cell is row 1, column 1" in " ".join(lines(why))) is (cell is not None)
