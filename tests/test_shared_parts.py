"""Two models that share a vision tower or a language model: the one that is not wrapped is left alone, and both cannot be."""

import pytest
import torch
from tiny_models import build, make_inputs

import vlmprune as vp

RECIPES = [
    "vscan:tokens=4",
    "flowcut:tokens=4",
    "cls:tokens=4",
    "visionzip:fraction=0.4",
    "fastv:layer=2,tokens=4",
    "pai:alpha=0.5",
]
SHARED = {
    "tower": ["vision_tower"],
    "tower and projector": ["vision_tower", "multi_modal_projector"],
    "projector": ["multi_modal_projector"],
    "language model": ["language_model"],
    "everything": ["vision_tower", "multi_modal_projector", "language_model"],
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def two(shared):
    mine, other = build("llava"), build("llava", seed=1)
    for part in SHARED[shared]:
        setattr(other.model, part, getattr(mine.model, part))
    return mine, other, make_inputs("llava", mine, [["text3", "image", "text4"]])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shared", SHARED)
def test_a_model_that_is_not_wrapped_is_left_alone(shared, recipe):
    mine, other, inputs = two(shared)
    plain, answer = other(**inputs).logits, other.generate(**inputs, max_new_tokens=3)
    with vp.wrap(mine, recipe):
        wanted = mine(**inputs).logits
        assert torch.equal(other(**inputs).logits, plain)
        assert torch.equal(other.generate(**inputs, max_new_tokens=3), answer)
        assert torch.equal(mine(**inputs).logits, wanted)


@pytest.mark.parametrize("shared", ["tower", "tower and projector", "language model", "everything"])
def test_both_cannot_be_wrapped(shared):
    mine, other, inputs = two(shared)
    plain = other(**inputs).logits
    with vp.wrap(mine, "fastv:layer=2,tokens=4"):
        part = "language model" if "language_model" in SHARED[shared] else "vision tower"
        with pytest.raises(vp.UsageError, match=f"the {part} of this model is a part of another model, too, which is wrapped"):
            vp.wrap(other, "divprune:layer=0,tokens=4")
        assert torch.equal(other(**inputs).logits, plain)
        vp.wrap(mine, "divprune:layer=0,tokens=4")  # its own hooks are no obstacle
        vp.unwrap(mine)
    with vp.wrap(other, "divprune:layer=0,tokens=4") as run:
        other(**inputs)
        assert len(run.last.kept[0].index) == 4


def test_the_language_model_alone_is_still_refused():
    mine, _, _ = two("tower")
    strange = torch.randn(1, 5, 64)
    with vp.wrap(mine, "fastv:layer=2,tokens=4"), pytest.raises(vp.UsageError, match="the language model was called directly"):
        mine.model.language_model(inputs_embeds=strange)
