"""`vlmprune.observe`: what it records is what the model computes, and it leaves nothing behind."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from snapshot import Snapshot
from text_models import EAGER, build_llava, text
from tiny_models import ALL_FAMILIES, FIRST_WORD, LAYERS, VOCAB, build, implementations_of, make_inputs, shared
from torch import nn
from transformers import AutoModelForCausalLM

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"], ["text2", "image", "text6"]]
CLOSE = {"atol": 1e-5, "rtol": 0}


def with_weights(family: str, **inputs):
    """The same model and prompt under eager attention, with `output_attentions` and `output_hidden_states`."""
    model = shared(family, "eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize(("family", "attn"), implementations_of(ALL_FAMILIES))
@torch.no_grad()
def test_equals_the_models_own_outputs(family, attn):
    """Red: a row too far, another mask, another scaling; or hidden states that leave the layer."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, SAMPLES)
    stock = model(**inputs).logits
    with vp.observe(model, attention=True, hidden=True, rows=[-1, 3, 6]) as seen:
        assert torch.equal(model(**inputs).logits, stock)
    own, expected = model(**inputs, output_hidden_states=True), with_weights(family, **inputs)
    assert sorted(seen.attention) == sorted(seen.hidden) == list(range(LAYERS))
    real = inputs["attention_mask"][:, 3].bool()  # a row of padding sees nothing of meaning
    for layer in range(LAYERS):
        weights = expected.attentions[layer][:, :, [-1, 3, 6]]
        found = seen.attention[layer]
        assert found.dtype == torch.float32
        assert found.shape == weights.shape
        torch.testing.assert_close(found[real], weights[real], **CLOSE)
        torch.testing.assert_close(found[:, :, 0], weights[:, :, 0], **CLOSE)
        assert torch.equal(seen.hidden[layer], own.hidden_states[layer])


@torch.no_grad()
def test_all_rows_and_rows_of_each_sample():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES, pad="right")
    with vp.observe(model, attention=[2], rows="all") as seen:
        model(**inputs)
    ends = inputs["attention_mask"].sum(dim=1) - 1
    with vp.observe(model, attention=[2], rows=ends[:, None]) as last:
        model(**inputs)
    expected = with_weights("llava", **inputs).attentions[2]
    for sample, end in enumerate(ends.tolist()):
        torch.testing.assert_close(seen.attention[2][sample, :, : end + 1], expected[sample, :, : end + 1], **CLOSE)
        torch.testing.assert_close(last.attention[2][sample, :, 0], expected[sample, :, end], **CLOSE)
    assert list(seen.attention) == [2]
    assert seen.hidden == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mixtral"])
@torch.no_grad()
def test_text_only_decoders(kind):
    """Red: only vision-language models can be observed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text(kind), attn_implementation="sdpa").eval()
    ids = torch.randint(FIRST_WORD, VOCAB, (2, 9))
    with vp.observe(model, attention=True, hidden=True, rows="all") as seen, vp.observe(model.model, hidden=[1]) as base:
        model(ids)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True, output_hidden_states=True)
    for layer in range(LAYERS):
        torch.testing.assert_close(seen.attention[layer], expected.attentions[layer], **CLOSE)
        torch.testing.assert_close(seen.hidden[layer], expected.hidden_states[layer], atol=2e-5, rtol=0)
    assert torch.equal(base.hidden[1], seen.hidden[1])


@torch.no_grad()
def test_sliding_windows_without_a_mask():
    """Red: flash attention, which has no mask of a window, is shown rows that see everything."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text("mistral", sliding_window=4), attn_implementation="eager").eval()
    ids = torch.randint(FIRST_WORD, VOCAB, (1, 9))
    found = {}

    def unmasked(layer, here):
        assert here.kwargs["sliding_window"] == 4
        found[layer] = vp.live.observe.LayerAttention(layer, here.query, here.key, here.value, None, here.scaling, here.kwargs)

    with vp.observe(model, attention=unmasked):
        expected = model(ids, output_attentions=True)
    for layer in range(LAYERS):
        torch.testing.assert_close(found[layer].rows("all"), expected.attentions[layer], **CLOSE)


@torch.no_grad()
def test_a_mask_of_flash_attention():
    """A 2-D mask, as flash attention is given it, hides the same keys."""
    model = shared("llava", "eager")
    inputs = make_inputs("llava", model, SAMPLES)
    found = {}

    def flat(layer, here):
        parts = here.query, here.key, here.value, inputs["attention_mask"], here.scaling, here.kwargs
        found[layer] = vp.live.observe.LayerAttention(layer, *parts).rows(), here.rows()

    with vp.observe(model, attention=flat):
        model(**inputs)
    for mine, theirs in found.values():
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "recipe", ["fastv:layer=2,tokens=4", "pdrop:layer=2|4,fraction=0.5|0.25", "var:layers=1:5,sink_dims=cosine"]
)
@pytest.mark.parametrize("observed_first", [True, False])
@torch.no_grad()
def test_wrapped_models(recipe, observed_first):
    """Red: a recipe that looks at attention looks at nothing while it is observed; or what was dropped is shown."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, recipe) as run:
        expected = model(**inputs, output_hidden_states=True)
        kept = run.last
        stages = run.report().stages
    with vp.observe(model, attention=True, hidden=True) as outer:
        if observed_first:
            run = vp.wrap(model, recipe)
            found = model(**inputs)
            run.remove()
            seen = outer
        else:
            with vp.wrap(model, recipe) as run, vp.observe(model, attention=True, hidden=True) as seen:
                found = model(**inputs)
                assert run.report().stages == stages
    assert torch.equal(found.logits, expected.logits)
    assert [k.index.tolist() for k in kept.kept] == [k.index.tolist() for k in run.last.kept]
    for layer in range(LAYERS):
        if (stays := kept.keep.get(layer)) is None:
            assert torch.equal(seen.hidden[layer], expected.hidden_states[layer])
        # At a stage's layer, transformers' output is what was there before the stage.
        for sample, left in enumerate([] if stays is None else stays):
            before = expected.hidden_states[layer]
            rows = left if before.shape[1] == len(left) else left[kept.keep[layer - 2][sample]]
            assert torch.equal(seen.hidden[layer][sample, -int(left.sum()) :], before[sample, -len(rows) :][rows])
        assert seen.hidden[layer].shape[1] == kept.entering[layer]
        assert seen.attention[layer].shape == (2, 4, 1, kept.stored[layer])
        torch.testing.assert_close(seen.attention[layer].sum(dim=-1), torch.ones(2, 4, 1))
    if not observed_first:
        for layer in range(LAYERS):
            assert torch.equal(outer.hidden[layer], seen.hidden[layer]), "nested blocks record the same"
            assert torch.equal(outer.attention[layer], seen.attention[layer])


@torch.no_grad()
def test_the_text_only_stream_is_not_observed():
    """Red: VHR's prompt without its picture, which runs beside the prompt, is taken for the prompt."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    lengths = []
    with (
        vp.wrap(model, "vhr:layers=1:5"),
        vp.observe(model, attention=lambda layer, here: lengths.append((layer, here.query.shape[2]))),
    ):
        model(**inputs)
    assert lengths == [(layer, inputs["input_ids"].shape[1]) for layer in range(LAYERS)]


@torch.no_grad()
def test_generation_makes_one_call_per_token():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, "divprune:layer=0,tokens=4"), vp.observe(model, attention=[3], hidden=[3]) as seen:
        model.generate(**inputs, max_new_tokens=3)
    assert len(seen.calls) == 3
    assert [call.hidden[3].shape[1] for call in seen.calls][1:] == [1, 1]
    keys = [call.attention[3].shape[-1] for call in seen.calls]
    assert keys == [keys[0], keys[0] + 1, keys[0] + 2]
    with pytest.raises(vp.UsageError, match=r"3 calls were observed .* seen.calls\[0\]"):
        seen.attention  # noqa: B018


@torch.no_grad()
def test_functions_get_the_layers_own_tensors():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    shapes, states = {}, {}
    with (
        vp.observe(
            model, attention=lambda layer, here: shapes.update({layer: here}), hidden=lambda layer, x: states.update({layer: x})
        ) as seen,
        vp.observe(model, attention=True, hidden=True) as stored,
    ):
        model(**inputs)
    assert seen.attention == seen.hidden == {}
    for layer in range(LAYERS):
        here = shapes[layer]
        assert here.layer == layer
        assert here.value.shape == here.key.shape
        assert torch.equal(here.rows(), stored.attention[layer])
        assert torch.equal(states[layer], stored.hidden[layer])


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_left_behind(wrapped):
    """Red: a hook, a config or an attribute of the model is another one than before."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with torch.no_grad():
        model(**inputs)
        before = Snapshot(model)
        run = vp.wrap(model, "fastv:layer=2,tokens=4") if wrapped else None
        with vp.observe(model, attention=True, hidden=True):
            model(**inputs)
            if run is not None:
                run.remove()  # in another order than they came
        assert not before.differences(Snapshot(model))
        outer, inner = vp.observe(model, attention=[1, 2]), vp.observe(model, attention=[2], hidden=True)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        model(**inputs)
        inner.__exit__(None, None, None)
        assert not before.differences(Snapshot(model))


def test_an_exception_restores_the_model():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    before = Snapshot(model)

    def fail(layer, here):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), vp.observe(model, attention=fail, hidden=[0]) as seen:
        model(**inputs)
    assert seen.calls == []
    assert not before.differences(Snapshot(model))
    with (
        pytest.raises(vp.UsageError, match="no decoder layer 6; the model has 6"),
        vp.observe(model, hidden=[1], attention=[6]),
    ):
        pass
    assert not before.differences(Snapshot(model))


@torch.no_grad()
def test_a_call_that_failed_is_not_among_the_calls():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.observe(model, hidden=True) as seen:
        with pytest.raises(RuntimeError):
            model.get_decoder()(inputs_embeds=torch.zeros(1, 2, 3))
        model(**inputs)
    assert seen.hidden[0].shape[1] == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_other_threads_are_not_recorded():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    stock, found = model(**inputs).logits, []
    with vp.observe(model, attention=True, hidden=True) as seen:
        thread = threading.Thread(target=lambda: found.append(model(**inputs).logits))
        thread.start()
        thread.join()
        with pytest.raises(vp.UsageError, match="no call was observed"):
            seen.hidden  # noqa: B018
    with torch.no_grad():
        assert torch.equal(found[0], stock)


@torch.no_grad()
def test_a_thread_in_the_midst_of_a_call_is_not_recorded():
    """Red: what another thread computes meanwhile is recorded as a part of the call."""
    model = shared("llava")
    inputs, other = make_inputs("llava", model, SAMPLES), make_inputs("llava", model, [["text9", "image"]])
    rows = []

    def meanwhile(layer, here):
        rows.append((layer, here.query.shape[2]))
        if layer == 2 and len(rows) == 3:  # once
            with torch.no_grad():
                thread = threading.Thread(target=lambda: model(**other))
                thread.start()
                thread.join()

    with vp.observe(model, attention=meanwhile, hidden=True) as seen:
        model(**inputs)
    assert rows == [(layer, inputs["input_ids"].shape[1]) for layer in range(LAYERS)]
    assert {x.shape[1] for x in seen.hidden.values()} == {inputs["input_ids"].shape[1]}


def test_recomputation_in_the_backward_pass_is_no_call():
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    model.train().gradient_checkpointing_enable()
    layers = []
    with vp.observe(model, attention=lambda layer, here: layers.append(layer)):
        model(**inputs).logits.sum().backward()
    assert layers == list(range(LAYERS))


def test_nothing_recorded_holds_a_graph():
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    model.train().gradient_checkpointing_enable()
    with vp.observe(model, attention=True, hidden=True) as seen:
        model(**inputs).logits.sum().backward()
    assert len(seen.calls) == 1, "layers that run again in the backward pass are no call"
    assert not any(x.requires_grad for x in (*seen.attention.values(), *seen.hidden.values()))


@torch.no_grad()
def test_a_compiled_model(monkeypatch):
    """Red: what was compiled before the block shows nothing in it."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    compiled = torch.compile(model, backend="eager")
    stock = compiled(**inputs).logits
    with vp.observe(compiled, attention=True, hidden=True) as seen:
        torch.testing.assert_close(compiled(**inputs).logits, stock)
    with vp.observe(model, attention=True, hidden=True) as plain:
        model(**inputs)
    for layer in range(LAYERS):
        torch.testing.assert_close(seen.attention[layer], plain.attention[layer])
        torch.testing.assert_close(seen.hidden[layer], plain.hidden[layer])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "nothing to observe: pass attention=… or hidden=…"),
        ({"attention": []}, "nothing to observe"),
        ({"attention": [0, 6]}, "attention: there is no decoder layer 6; the model has 6, numbered 0 to 5"),
        ({"hidden": [-1]}, "hidden: there is no decoder layer -1"),
        ({"attention": "all"}, "attention must be True, decoder layers such as [2, 5], or a function, found 'all'"),
        ({"hidden": [0.5]}, "hidden must be True, decoder layers"),
        ({"attention": [1], "rows": "first"}, "unknown value of rows 'first'"),
        ({"attention": [1], "rows": []}, 'rows must be "last", "all", row numbers'),
        ({"attention": [1], "rows": 1.5}, 'rows must be "last", "all", row numbers'),
        ({"attention": print, "rows": [1]}, "rows=… belongs to attention=… with layer numbers"),
        ({"hidden": True, "rows": "all"}, "rows=… belongs to attention=…"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(asked, sentence):
    model = shared("llava")
    with pytest.raises(vp.UsageError) as error, vp.observe(model, **asked):
        pass
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([99], "there is no row 99 in a call whose layer 1 computes"),
        (torch.zeros(3, 1, dtype=torch.long), "rows are given for 3 samples, and the call has 2"),
    ],
)
@torch.no_grad()
def test_rows_that_are_not_there(rows, sentence):
    model = shared("llava")
    with vp.observe(model, attention=[1], rows=rows), pytest.raises(vp.UsageError, match=sentence):
        model(**make_inputs("llava", model, SAMPLES))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [("a name", "found the name 'a name'"), (None, "found None"), (nn.Linear(2, 2), "found no decoder layers in Linear")],
    ids=str,
)
def test_what_is_no_decoder(given, sentence):
    with pytest.raises(vp.UsageError, match=sentence), vp.observe(given, hidden=True):
        pass


@pytest.mark.parametrize(("kind", "what"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
@torch.no_grad()
def test_attention_that_is_no_plain_softmax(kind, what):
    """Red: numbers that the model does not compute with are shown as its attention."""
    assert kind in EAGER
    model = build_llava(decoder=kind, attn="eager")
    ids = torch.full((1, 4), FIRST_WORD)
    with vp.observe(model, attention=[1]), pytest.raises(vp.UsageError, match=f"plain softmax .* adds {what}"):
        model(input_ids=ids)
    with vp.observe(model, hidden=[1]) as seen:
        model(input_ids=ids)
    assert seen.hidden[1].shape == (1, 4, 64)


@torch.no_grad()
def test_attention_past_transformers_functions():
    """Red: a layer that nobody could look at is silently left out."""
    model = build("llava")
    layer = model.get_decoder().layers[2]

    def own(hidden_states, **kwargs):
        return hidden_states, None

    layer.self_attn.forward = own
    with (
        vp.observe(model, attention=[1, 2]),
        pytest.raises(vp.UsageError, match=r"layer\(s\) 2 of LlamaModel compute attention without"),
    ):
        model(**make_inputs("llava", model, SAMPLES))


def test_an_observed_model_is_not_copied():
    model = build("llava")
    with (
        vp.observe(model, attention=[1]),
        pytest.raises(vp.UsageError, match="cannot be copied or pickled while it is observed"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)
