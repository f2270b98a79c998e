"""Compiled decoding: as many graphs as the plain model, none of them broken, none compiled again, and the same tokens.

On a CPU, transformers compiles decoding only if it is told to (`Graphs.config`). Graphs are counted by a backend that runs them
as they are. `make test-static` also compiles other kinds of layers, and runs inductor itself.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from generation.static_runs import ALL, Graphs
from gradients import EDITING
from tiny_models import build, make_inputs
from transformers import CompileConfig, StaticCache

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"]]
WORD = torch.full((1, 1), 20)


@pytest.fixture(autouse=True)
def dynamo(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set where flex attention runs un-compiled
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def wrapped(model, recipe):
    return vp.wrap(model, recipe) if recipe else nullcontext()


def decoded(model, prompts, recipe, graphs) -> list[int]:
    """How many graphs there are after each prompt; each is generated compiled as a whole, and not compiled."""
    config, counts = graphs.config(fullgraph=True), []
    asked = {"max_new_tokens": 5, "cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}
    with wrapped(model, recipe):
        for inputs in prompts:
            plain = model.generate(**inputs, **asked, disable_compile=True)
            found = model.generate(**inputs, **asked, compile_config=config)
            assert torch.equal(found.sequences, plain.sequences)
            for ours, theirs in zip(found.logits, plain.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
            counts.append(graphs.count)
    return counts


RUNS = [
    ("qwen2_5_vl", "fastv:layer=2,tokens=5,cache_layer=1+pai"),
    ("llava", "random:layer=0,tokens=4,positions=compact+zerotuning:gain=2"),
    ("llava", f"random:layer=0,tokens=4,positions=compact + {EDITING['var']},layers=1:3 + {EDITING['act']},layers=3:"),
    ("llava", "random:layer=1|3,fraction=0.6|0.3"),
    ("llava", "vhr"),
]


@pytest.mark.parametrize(("family", "recipe"), RUNS if ALL else RUNS[:2])
def test_generate(family, recipe):
    """Red: a hook cannot be compiled (torch refuses a whole graph), or a second prompt is compiled anew."""
    model = build(family)
    prompts = [make_inputs(family, model, SAMPLES, seed=seed) for seed in range(2)]
    assert decoded(model, prompts, recipe, Graphs()) == [1, 1]


@pytest.mark.parametrize("how", ["model", "forward", "in place"] if ALL else ["model"])
def test_by_hand(how):
    """`torch.compile` of the model, of its `forward`, and in place: a step is one graph, whatever the prompt was."""
    counts = {}
    for recipe in (None, "fastv:layer=2,tokens=4+zerotuning:gain=2"):
        torch._dynamo.reset()
        model, graphs = build("llava"), Graphs()
        backend = graphs.config().backend
        if how == "in place":
            model.compile(backend=backend)
        compiled = torch.compile(model.forward if how == "forward" else model, backend=backend) if how != "in place" else model
        with wrapped(model, recipe):
            seen = []
            for seed in range(2):
                inputs = make_inputs("llava", model, SAMPLES, seed=seed)
                cache = StaticCache(model.config, 40)
                torch.compiler.set_stance("force_eager")
                model(**inputs, past_key_values=cache)
                torch.compiler.set_stance("default")
                for _ in range(3):
                    logits = compiled(input_ids=WORD, past_key_values=cache).logits
                seen.append(graphs.count)
        counts[recipe] = seen
        assert logits.isfinite().all()
    plain, ours = counts.values()
    assert ours == plain
    assert ours[0] > 0


def test_a_recipe_that_is_gone():
    """A compiled step of a pruned conversation is refused as one that is not compiled."""
    model = build("llava")
    inputs, compiled = make_inputs("llava", model, SAMPLES), torch.compile(model, backend="eager")
    with vp.wrap(model, "random:layer=1,tokens=4"):
        cache = model(**inputs, past_key_values=StaticCache(model.config, 40)).past_key_values
        compiled(input_ids=WORD, past_key_values=cache)
    with pytest.raises(vp.UsageError, match="the recipe it began with has been removed"):
        compiled(input_ids=WORD, past_key_values=cache)


def test_switched_off_for_a_caller():
    """Red: a compiled graph edits attention where the caller switched it off."""
    model = build("llava")
    inputs, compiled = make_inputs("llava", model, SAMPLES), torch.compile(model, backend="eager")
    answers = {}
    for run_ in (model, compiled):
        with vp.wrap(model, "zerotuning:gain=3") as handle:
            cache = model(**inputs, past_key_values=StaticCache(model.config, 40)).past_key_values
            edited = run_(input_ids=WORD, past_key_values=cache).logits
            with handle.override(enabled=False):
                answers[run_] = torch.cat([edited, run_(input_ids=WORD, past_key_values=cache).logits])
    torch.testing.assert_close(answers[compiled], answers[model], atol=5e-5, rtol=0)


PARTS = {
    "": "random:layer=1,tokens=4",
    "model": "random:layer=1,tokens=4",
    "model.language_model": "random:layer=1,tokens=4",
    "model.language_model.layers.1": "random:layer=1,tokens=4",
    "model.vision_tower": "flowcut:fraction=0.5",
    "model.vision_tower.encoder.layers.1": "flowcut:fraction=0.5",
    "model.multi_modal_projector": "cls:fraction=0.5",
}
"""Part -> a recipe that looks at it, or into it."""


@pytest.mark.parametrize("part", PARTS)
def test_a_compiled_part_is_refused_in_true_words(part):
    """Its compiled forward would call the layers of the model past the look that `wrap` takes at them.

    Red: the recipe is ignored, or methods miss what they need of the vision tower.
    """
    model = build("llava")
    module = model.get_submodule(part)
    module.forward = torch.compile(module.forward, backend="eager")
    sentence = rf"^{type(module).__name__}.forward was replaced by torch.compile.*wrap the model first"
    with pytest.raises(vp.UsageError, match=sentence):
        vp.wrap(model, PARTS[part])
    del module.forward
    with vp.wrap(model, PARTS[part]):
        pass


def test_a_part_is_compiled_after_wrap():
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, "random:layer=1,tokens=4"):
        pruned = model(**inputs).logits
        model.model.language_model.forward = torch.compile(model.model.language_model.forward, backend="eager")
        torch.testing.assert_close(model(**inputs).logits, pruned, atol=5e-5, rtol=0)


if ALL:  # each takes a compiler half a minute or more

    @pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "qwen3_5", "gemma4_e"])
    def test_kinds_of_layers(family):
        """Gemma 3, whose plain model is compiled again as its windows fill; Qwen3-VL with DeepStack, and others."""
        from families.table import BATCHES, shared
        from families.table import make_inputs as inputs_of

        model, inputs = shared(family), inputs_of(family, BATCHES["one"])
        counts = []
        for recipe in (None, "random:layer=2,fraction=0.3"):
            torch._dynamo.reset()
            vars(model).pop("_compiled_call", None)
            counts.append(decoded(model, [inputs] * 2, recipe, Graphs())[-1])
        vars(model).pop("_compiled_call")
        assert 1 <= counts[1] <= counts[0]

    def test_inductor():
        model = build("llava")
        inputs = make_inputs("llava", model, SAMPLES)
        config = CompileConfig(fullgraph=True, mode=None)
        config._compile_all_devices = True
        with vp.wrap(model, "random:layer=2,tokens=4+zerotuning:gain=2"):
            plain = model.generate(**inputs, max_new_tokens=5, cache_implementation="static", disable_compile=True)
            found = model.generate(**inputs, max_new_tokens=5, cache_implementation="static", compile_config=config)
        assert torch.equal(found, plain)
