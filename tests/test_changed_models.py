"""A model that is changed after it was wrapped: what hooks do not reach any more is said, not left out in silence."""

import pytest
import torch
from tiny_models import build, make_inputs, make_single

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"]]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def replace_text(model, spare):
    model.model.language_model = spare.model.language_model
    return "language_model was replaced"


def replace_layer(model, spare, index=2):
    model.model.language_model.layers[index] = spare.model.language_model.layers[index]
    return rf"language_model\.layers\.{index} was replaced"


def replace_last_layer(model, spare):
    return replace_layer(model, spare, len(spare.model.language_model.layers) - 1)


def replace_layers(model, spare):
    model.model.language_model.layers = spare.model.language_model.layers
    return r"language_model\.layers was replaced"


CHANGES = [replace_text, replace_layer, replace_last_layer, replace_layers]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recipe", ["fastv:layer=2,tokens=4", "divprune:layer=0,tokens=4", "pai:alpha=0.5"])
def test_a_part_that_was_replaced_is_named_and_the_advice_works(family, change, recipe):
    model = build(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, recipe):
        wanted = model(**inputs).logits
        told = change(model, build(family))  # of equal weights
        for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
            with pytest.raises(vp.UsageError, match=told):
                call()
        vp.unwrap(model)
    with vp.wrap(model, recipe):
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("recipe", ["vscan:tokens=4", "cls:tokens=4", "flowcut:fraction=0.4"])
@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_tower_that_was_replaced_is_named(recipe, part):
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, recipe):
        setattr(model.model, part, getattr(build("llava").model, part))
        with pytest.raises(vp.UsageError, match=f"{part} was replaced after vlmprune.wrap"):
            model(**inputs)


def test_what_needs_no_hook_may_be_replaced():
    model = build("llava")
    inputs, words = make_inputs("llava", model, SAMPLES), make_single("llava", model, [["text5"]], 0)
    plain, alone = model(**inputs).logits, model(**words).logits
    spare = build("llava")
    with vp.wrap(model, "fastv:layer=2,tokens=4") as run:
        wanted = model(**inputs).logits
        model.model.language_model.layers[0] = spare.model.language_model.layers[0]  # before the cut, and nobody looks at it
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model(**words).logits, alone)
        model.model.language_model = spare.model.language_model
        with run.override(enabled=False):
            assert torch.equal(model(**inputs).logits, plain)
    with vp.wrap(model, "fastv:layer=2,fraction=1.0"):
        model.model.language_model = build("llava").model.language_model
        assert torch.equal(model(**inputs).logits, plain)


def test_a_part_inside_a_shell_is_still_there():
    class Shell(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, "fastv:layer=2,tokens=4"):
        wanted = model(**inputs).logits
        layers = model.model.language_model.layers
        layers[2] = Shell(layers[2])
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize(
    "recipe", ["fastv:layer=2,tokens=4", "pai:alpha=0.5,layers=1", "sparsevlm:layer=2,tokens=4", "vhr:layers=2"]
)
def test_an_implementation_in_a_layers_own_config_is_named_and_the_advice_works(recipe):
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    vp.wrap(model, recipe)
    model.model.language_model.layers[1].self_attn.config._attn_implementation = "eager"
    replaced = r"language_model\.layers\.1\.self_attn was set to 'eager' in its own config.*has no effect there"
    with pytest.raises(vp.UsageError, match=replaced):
        model(**inputs)
    vp.unwrap(model)
    model.set_attn_implementation("eager")
    other = build("llava", attn="eager")
    with vp.wrap(model, recipe), vp.wrap(other, recipe):
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_an_edit_is_not_lost_between_two_steps():
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, "pai:alpha=0.5"):
        cache = model(**inputs, use_cache=True).past_key_values
        model.model.language_model.layers[3].self_attn.config._attn_implementation = "eager"
        with pytest.raises(vp.UsageError, match=r"layers\.3 was set to 'eager' in its own config"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


def test_switching_the_whole_model_still_works():
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, "fastv:layer=2,tokens=4 + pai:alpha=0.5") as run:
        model(**inputs)
        model.set_attn_implementation("eager")
        model(**inputs)
        assert len(run.last.kept[0].index) == 4
