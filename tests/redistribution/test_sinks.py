"""Sink dimensions: the finder on planted massive activations, the table, and what `var` makes of them in a whole model."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch
from oracles import generate_logits
from tiny_models import FIRST_WORD, LAYERS, build, make_inputs, shared
from transformers import LlamaConfig

import vlmprune as vp
from vlmprune.evals.sinks import PROMPTS, find_sinks
from vlmprune.methods.sink_dims import KNOWN, known_sinks, shape_of

MARK = 70
"""A word that behaves like a delimiter: it becomes a sink wherever it stands."""


def planted(dims: dict[int, float], family: str = "llava", layer: int = 1):
    """A model whose layer `layer` writes huge numbers into some dimensions for the first token, and for `MARK`."""
    model = build(family)
    decoder = model.get_decoder()
    with torch.no_grad():
        signal = torch.zeros(decoder.config.hidden_size)
        signal[7] = 40.0  # an embedding dimension that only such words have
        decoder.embed_tokens.weight[:, 7] = 0
        for word in (MARK, *range(FIRST_WORD, FIRST_WORD + len(PROMPTS))):  # the words that prompts here begin with
            decoder.embed_tokens.weight[word] = signal
        for earlier in decoder.layers[: layer + 1]:  # nobody else writes there
            earlier.self_attn.o_proj.weight[7] = 0
            earlier.mlp.down_proj.weight[7] = 0
        if family == "llava":
            model.model.multi_modal_projector.linear_2.weight[7] = 0
            model.model.multi_modal_projector.linear_2.bias[7] = 0
        target = decoder.layers[layer]
        target.post_attention_layernorm.weight[7] = 1.0
        mlp = target.mlp
        mlp.gate_proj.weight[0] = 0
        mlp.up_proj.weight[0] = 0
        mlp.gate_proj.weight[0, 7] = mlp.up_proj.weight[0, 7] = 4.0
        mlp.down_proj.weight[:, 0] = 0
        for dim, size in dims.items():
            mlp.down_proj.weight[dim, 0] = 8 * size
    return model


def prompts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_WORD + len(PROMPTS), MARK, (len(PROMPTS), 20), generator=random)
    words[:, 0] = torch.arange(FIRST_WORD, FIRST_WORD + len(PROMPTS))
    words[:, 12] = MARK
    return [row[None] for row in words]


@pytest.mark.parametrize("dims", [{33: 8.0}, {33: 8.0, 50: -6.0}, {3: -4.0, 12: 8.0, 60: 5.0}], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_finder_names_planted_dimensions(dims, family):
    """Red: the finder misses a dimension, or names one too many."""
    found = find_sinks(planted(dims, family), prompts())
    assert found.dims == tuple(sorted(dims))
    assert found.layers == (2, 3, 4, 5)
    assert found.agreement == 1
    assert not any("by this threshold, where" in caution for caution in found.cautions)
    assert found.flagged == pytest.approx(1 / 19, abs=1e-6), "the delimiter, and nothing else"
    assert f"sink_dims={'|'.join(map(str, sorted(dims)))}" in found.advice
    json.dumps(found.to_dict())


def test_finder_finds_nothing_where_nothing_is():
    found = find_sinks(shared("llava"), prompts())
    assert found.dims == ()
    assert found.layers == ()
    assert "No sink dimensions" in found.advice
    assert "cosine" in found.advice
    assert found.rows()


def test_finder_wants_activations_that_last():
    """Red: a dimension that is large in one layer only is called a sink dimension."""
    assert find_sinks(planted({33: 8.0}, layer=4), prompts()).dims == ()


@contextmanager
def loud(model, layer: int, numbers: dict[int, float], places=(0,)):
    """Huge numbers in some dimensions of the tokens at some places (None: of all), from `layer` on."""

    def hook(_, args):
        hidden = args[0].clone()
        for dim, size in numbers.items():
            hidden[:, slice(None) if places is None else list(places), dim] += size
        return (hidden, *args[1:])

    handle = model.get_decoder().layers[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_finder_names_four_at_most():
    """Red: it stops earlier, or goes on."""
    model = build("llava")
    with loud(model, 1, {3: 3e5, 20: -2.9e5, 33: 2.8e5, 50: 2.7e5}):
        assert find_sinks(model, prompts()).dims == (3, 20, 33, 50)
    with loud(model, 1, {3: 3e5, 20: -2.9e5, 33: 2.8e5, 50: 2.7e5, 60: 2.6e5}):
        assert find_sinks(model, prompts()).dims == (3, 20, 33, 50)


@pytest.mark.parametrize(("layer", "dims"), [(3, (33,)), (4, ())])
def test_finder_wants_two_fifths_of_the_depth(layer, dims):
    """Red: another share of the depth; three of six layers are enough, two are not."""
    model = build("llava")
    with loud(model, layer, {33: 1e5}):
        found = find_sinks(model, prompts())
    assert found.dims == dims
    assert found.layers == (tuple(range(layer, LAYERS)) if dims else ())


def test_layers_are_those_of_the_dimensions():
    """Red: a layer in which another dimension is massive counts as one of theirs."""
    model = build("llava")
    with loud(model, 1, {33: 1e5}), loud(model, 3, {33: -1e5, 5: 1e5}), loud(model, 4, {33: 1e5, 5: -1e5}):
        found = find_sinks(model, prompts())
    assert found.dims == (33,)
    assert found.layers == (1, 2, 4, 5)
    assert dict(found.rows())["on in layers"] == "1–2, 4–5"


def marks_by_advice(model, advice: str, prompt_ids: torch.Tensor) -> list[list[int]]:
    """Text sinks per layer, when the advice is followed on a text with a picture behind it."""
    inputs = make_inputs("llava", model, [["text20", "image", "text3"]])
    inputs["input_ids"][0, :20] = prompt_ids[0, :20]
    with vp.wrap(model, f"{advice},layers=1:"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return [(layer.marks.groups[0, 0] == 3).nonzero()[:, 0].tolist() for layer in cache.layers[1:]]


def test_the_threshold_can_be_used():
    """Red: with a delimiter in every short text, the threshold falls among delimiters, and is printed as one never reached."""
    model = build("llava")
    with loud(model, 1, {33: 1e5}, (0, 12)):
        found = find_sinks(model, prompts())
        assert found.dims == (33,)
        assert found.ordinary < found.energy < 0.9
        assert found.advice == f"var:sink_dims=33,sink_energy={found.energy}"
        assert found.flagged == pytest.approx(1 / 19, abs=1e-6)
        assert not any("by this threshold, where" in caution for caution in found.cautions)
        assert marks_by_advice(model, found.advice, prompts()[0]) == [[0, 12]] * 5


def test_what_every_token_holds_is_no_sink_dimension():
    """Red: a dimension that is massive in all tokens is named, alone or beside a real one."""
    model = build("llava")
    with loud(model, 1, {7: 1e5}, None):
        found = find_sinks(model, prompts())
        assert found.dims == ()
        assert "100% of later tokens are as large in dimension 7 as the first token" in found.advice
        assert "100% of later tokens are as large in dimension 7" in dict(found.rows())["no sink dimensions"]
        with loud(model, 1, {33: 3e5}):
            found = find_sinks(model, prompts())
    assert found.dims == (33,)
    assert found.flagged == 0
    assert found.everywhere == ((7, 1.0),)
    assert found.agreement == 1


def test_many_sinks_are_worth_a_warning():
    model = build("llava")
    with loud(model, 1, {33: 1e5}, (0, 5, 10, 15)):
        found = find_sinks(model, prompts())
    assert found.dims == (33,)
    assert any("15.8% of later tokens are sinks by this threshold" in caution for caution in found.cautions)
    assert found.to_dict()["cautions"] == found.cautions
    quiet = dataclasses.replace(found, flagged=0.01, flagged_attention=0.02, other_attention=0.03)
    assert quiet.cautions == (
        "Caution: later tokens that are sinks by this threshold get 2.0% of attention each, others 3.0%: they do not act as "
        "sinks.",
    )
    assert not dataclasses.replace(quiet, flagged_attention=0.04).cautions


def test_finder_leaves_no_trace():
    model = planted({33: 8.0})
    before = [dict(vars(layer.self_attn)) for layer in model.get_decoder().layers]
    find_sinks(model, prompts())
    assert [dict(vars(layer.self_attn)) for layer in model.get_decoder().layers] == before


def test_finder_refuses():
    with pytest.raises(vp.UsageError, match="at least 8 tokens"):
        find_sinks(shared("llava"), [torch.ones(1, 3, dtype=torch.long)])
    with pytest.raises(vp.UsageError, match="found no decoder layers in Linear"):
        find_sinks(torch.nn.Linear(2, 2), prompts())


def test_var_on_planted_sinks():
    """The delimiter behind the picture and the first token are text sinks from layer 2 on, whichever way they are told."""
    model = planted({33: 8.0})
    inputs = make_inputs("llava", model, [["text5", "image", "text6"]])
    inputs["input_ids"][0, 0] = FIRST_WORD
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where((ids == MARK) | ((ids > 7) & (ids < 16)), 20, ids)
    inputs["input_ids"][0, 0], inputs["input_ids"][0, -3] = FIRST_WORD, MARK
    at = {}
    for how in ("sink_dims=33,sink_energy=0.5", "sink_dims=cosine", "sink_dims=33,tau=6"):
        with vp.wrap(model, f"var:{how},layers=2:"), torch.no_grad():
            output, *_ = generate_logits(model, inputs, 3)
        cache = output.past_key_values
        at[how] = [(layer.marks.groups[0, 0] == 3).nonzero()[:, 0].tolist() for layer in cache.layers[2:]]
    assert all(found == [[0, ids.shape[1] - 3]] * 4 for found in at.values()), at


def test_auto_takes_the_known_dimensions(monkeypatch):
    from vlmprune.methods import sink_dims

    model = planted({33: 8.0})
    inputs = make_inputs("llava", model, [["text5", "image", "text6"]])
    known = sink_dims.Known("ours", shape_of(model.get_decoder().config), (33,), 0.5, "planted")
    monkeypatch.setattr(sink_dims, "KNOWN", (known,))
    logits = []
    for recipe in (
        "var:max_sink_share=1,min_image_mass=0",
        "var:max_sink_share=1,min_image_mass=0,sink_dims=33,sink_energy=0.5",
    ):
        with vp.wrap(model, recipe), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    # Which energy: known of these dimensions, the default for others, and what is given.
    monkeypatch.setattr(sink_dims, "KNOWN", (dataclasses.replace(known, dims=(33, 40)),))
    for recipe, energy in (("var", 0.5), ("var:sink_dims=33", 0.5), ("var:sink_dims=5|33", None), ("var:sink_dims=5", None)):
        seen = []
        with vp.wrap(model, recipe), pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(
                vp.VAR, "groups", lambda self, see, seen=seen: seen.append(self._known) or see.visual.to(torch.int8)[:, None]
            )
            model(**inputs)
        assert {known for _, known in seen} == {energy}, recipe
    rumour = sink_dims.Known("theirs", shape_of(model.get_decoder().config), (4, 2), 0.5, "a public table", trusted=False)
    monkeypatch.setattr(sink_dims, "KNOWN", (rumour,))
    with pytest.raises(vp.UsageError, match=r"not known; a public table, says 4\|2 for theirs: find them with `vlmprune sinks"):
        vp.wrap(model, "var")


def llama_2(**changed):
    return LlamaConfig(
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 32064} | changed
    )


def test_known_by_more_than_the_shape():
    """Red: a CodeLlama or LLaMA-1 of 7 B passes for LLaMA-2."""
    assert known_sinks(llama_2()).dims == (1415, 2533)
    assert known_sinks(llama_2(vocab_size=32000)).dims == (1415, 2533)
    code = llama_2(vocab_size=32016, rope_theta=1e6, max_position_embeddings=16384)
    with pytest.raises(vp.UsageError, match=r"the shape of LLaMA-2-7B.*but rope_theta=1000000.0, there 10000 and max_position"):
        known_sinks(code)
    with pytest.raises(
        vp.UsageError, match=r"max_position_embeddings=2048, there 4096 and rms_norm_eps=1e-06, there 1e-05: find"
    ):
        known_sinks(llama_2(rms_norm_eps=1e-6, max_position_embeddings=2048))
    assert known_sinks(llama_2(rms_norm_eps=9.999999747378752e-06)).dims == (1415, 2533), "a file in fp32"


def test_finder_and_table_disagree(monkeypatch):
    """A model of the config of a known one that has other weights: the config cannot tell, the finder does."""
    from vlmprune.methods import sink_dims

    model = planted({33: 8.0})
    known = sink_dims.Known("ours", shape_of(model.get_decoder().config), (33,), 0.5, "planted")
    monkeypatch.setattr(sink_dims, "KNOWN", (known,))
    found = find_sinks(model, prompts())
    assert not any("by its config" in caution for caution in found.cautions)
    assert dict(found.rows())["known before"] == "33, as ours, by its config alone"
    monkeypatch.setattr(sink_dims, "KNOWN", (dataclasses.replace(known, dims=(4,)),))
    assert "by its config this is ours, whose sink dimensions are 4" in find_sinks(model, prompts()).cautions[-1]


def test_table():
    assert len({(known.shape, known.trusted) for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        assert max(known.dims) < known.shape[1]
        assert known.dims == tuple(sorted(known.dims))


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("general", (0.4, 0.2, "")),
        ("hallucination", (0.4, 0.5, "")),
        ("vision", (0.4, 0.1, "")),
        ("released-code", (0.6, 0.5, "2:")),
    ],
)
def test_presets_and_the_papers_sense(preset, values):
    """Red: p or rho is read in the released code's sense, or a preset mixes the two."""
    method = vp.VAR(preset=preset, sink_dims="1")
    assert (method.keep, method.max_sink_share, method.layers) == values
    assert vp.VAR(p=0.6, sink_dims="1").keep == pytest.approx(0.4)
    assert vp.VAR(rho=0.8, sink_dims="1").max_sink_share == pytest.approx(0.2)
    parsed = vp.Recipe.parse("flowcut:tokens=64 + var:p=0.75,sink_dims=1415|2533,layers=1|18:")
    (var,) = parsed.redistributors
    assert (var.keep, var.dims, var.layers_of(32)) == (0.25, (1415, 2533), (1, *range(18, 32)))
    assert vp.Recipe.parse(str(parsed)) == parsed == vp.Recipe.from_dict(json.loads(json.dumps(parsed.to_dict())))
    assert vp.VAR(sink_dims="1").layers_of(32) == tuple(range(2, 31))
    assert vp.VHR().layers_of(32) == (1, *range(18, 32))
    assert vp.PAI().layers_of(32) == tuple(range(2, 32))
