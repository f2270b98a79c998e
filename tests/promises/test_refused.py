"""What cannot work is refused in one sentence, and the model stays as it was."""

from __future__ import annotations

import pytest
from promises.runs import (
    EVERYWHERE,
    QWENS,
    WITH_CLS,
    assert_untouched,
    one_sentence,
    over,
)
from tiny_models import (
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

ON_QWEN = [(family, recipe.split(",positions")[0]) for family in QWENS for recipe in WITH_CLS]


def refused(family: str, recipe: str, sentence: str) -> None:
    model = shared(family)
    with pytest.raises(vp.UsageError) as refusal:
        vp.wrap(model, recipe).remove()
    assert sentence in str(refusal.value)
    one_sentence(refusal.value)
    assert_untouched(family, model)


@over(ON_QWEN)
def test_methods_of_the_cls_token_are_refused_on_qwen(family, recipe):
    """Red: attention of a token that is not there is replaced by something else."""
    refused(family, recipe, "needs the attention of the vision tower's CLS token, but its vision tower has no CLS token")


CONTRADICTIONS = [
    ("llava", "cls:fraction=0.2 + fastv:layer=2,fraction=0.5", "a later stage cannot keep more"),
    ("llava", "flowcut:fraction=0.2 + pdrop:layer=3,fraction=0.5", "a later stage cannot keep more"),
    ("llava_next", "visionzip:tokens=8 + dart:layer=3,tokens=9", "a later stage cannot keep more"),
    ("llava", "tome:layer=2,fraction=0.5 + dart:layer=2,fraction=0.2", "tome and dart both prune at layer 2"),
    ("llava", "visionzip:fraction=0.5 + divprune:fraction=0.2", "both prune at layer 0"),
    ("qwen2_vl", "flowcut:fraction=0.3 + fastv:layer=2,fraction=0.2", "both prune at layer 2"),
    ("llava", "flowcut:fraction=0.5 + mustdrop:layer=3,fraction=0.3", "both prune at the vision tower"),
    ("llava_next", "mustdrop:layer=3,fraction=0.3 + flowcut:fraction=0.5", "cut"),
    ("llava", "fastv:layer=6", "the model has layers 0 to 5"),
    ("qwen2_5_vl", "dart:layer=7,fraction=0.2", "the model has layers 0 to 5"),
    ("llava", "vscan", "the model has layers 0 to 5"),
    ("qwen2_vl", "flowcut:fraction=0.3,decoder_layer=6", "the model has layers 0 to 5"),
    ("llava", "mustdrop:layer=2,fraction=0.3,cache_layer=6", "the model has layers 0 to 5"),
    ("llava", "visionzip:layer=3,fraction=0.3", "its only stage is layer=0, found 3"),
    ("llava", "flowcut:layer=0,fraction=0.3", "flowcut cannot prune before layer 1"),
    ("qwen2_5_vl", "flowcut:fraction=0.3,variant_on_units=official", "breaks the windows"),
    ("llava", "flowcut:tokens=0", "keep at least tokens=1"),
    ("llava", "mustdrop:layer=2,fraction=0.3,global_threshold=0.1", "give both or neither"),
    ("llava", "random:layer=0|3,fraction=0.5|0.2,site=vision|llm", "random"),  # works nowhere inside a tower
    ("llava", "flowcut:layer=1|2,fraction=0.5|0.2,site=vision|llm", "layer"),  # the tower's place is layer 0
    *((family, "random:fraction=0.5,positions=compact", "has no meaning for the M-RoPE") for family in QWENS),
]


@pytest.mark.parametrize(("family", "recipe", "sentence"), CONTRADICTIONS, ids=[f"{f}-{r}" for f, r, _ in CONTRADICTIONS])
def test_contradictions_are_refused(family, recipe, sentence):
    """Red: a recipe that cannot work is accepted, and prunes nothing or something else."""
    refused(family, recipe, sentence)


@pytest.mark.parametrize("name", sorted({recipe.split(":")[0] for recipe in EVERYWHERE}))
@pytest.mark.parametrize("family", QWENS)
def test_renumbering_is_refused_on_qwen(family, name):
    """Red: places in the picture are shifted as if they were one number."""
    layer = "" if name in ("pixelprune", "fastvid") else "layer=2,"
    refused(family, f"{name}:{layer}fraction=0.4,positions=compact", 'use positions="original"')
