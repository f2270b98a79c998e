"""Kinds of layers: windows, blocks, recurrent layers, shared keys. What the matrix does not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.configs import LAYERS, WINDOW
from families.oracles import (
    Keep,
    dropped_logits,
    language_model,
    masked_logits,
    native_logits,
    whole,
)
from families.running import close, generate
from families.table import BATCHES, TINY, build, make_inputs, shared, visual_columns
from torch import Tensor

import vlmprune as vp
from vlmprune.live.cache import WindowLayer
from vlmprune.live.masks import pruned_mask
from vlmprune.live.section import window_in_slots

pytestmark = pytest.mark.usefixtures("no_grad")

WINDOWED = [name for name in TINY if TINY[name].window]
RECURRENT = [name for name in TINY if TINY[name].recurrent]
HALF = "random:layer=0,fraction=0.5,seed=0"


def refused(sentence: str, call: Any) -> None:
    with pytest.raises(vp.UsageError) as error:
        call()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


TINY_KINDS = "mm_token_type_ids"


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns as one prompt."""
    along = {"input_ids", "attention_mask", TINY_KINDS}
    return {
        name: torch.cat([first[name], second[name]], 1 if name in along else 0) if name in first else second[name]
        for name in second
    }


# -- windows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWED)
def test_no_layer_stores_more_than_its_window(name):
    """Red: a pruned layer keeps what left its window, and the conversation takes more memory than on the plain model."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["long"])
    plain = generate(model, inputs)[0].past_key_values
    with vp.wrap(model, HALF) as run:
        cache = generate(model, inputs)[0].past_key_values
        record = run.last
    windowed = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    assert len(windowed) == sum(plain.is_sliding) > 0
    for layer in windowed:
        assert layer.stored == WINDOW - 1
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.entries.slots.shape[1] == layer.stored
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert ours.keys is None or ours.keys.shape[2] <= theirs.keys.shape[2]
    prompt = len(record.resident)
    assert (
        record.resident[:LAYERS]
        == [
            0 if layer.keys is None else min(layer.stored, kept)
            for layer, kept in zip(cache.layers, record.resident, strict=True)
        ][:prompt]
    )


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision", "gemma4_e"])
@pytest.mark.parametrize("words", [4, 40])
def test_a_picture_comes_late(name, words):
    """A conversation that begins with words, beyond the window or not; the second and the third turn have a picture. Red: cache
    layers that are taken over forget which tokens their entries belong to."""
    model = shared(name)
    turns = [
        make_inputs(name, [[f"text{words}"]], seed=1),
        *(make_inputs(name, [["text2", "image", "text3"]], seed) for seed in (2, 3)),
    ]
    together, ids = turns[0], turns[0]["input_ids"]
    keep = {0: torch.ones(1, 0, dtype=torch.bool), 2: torch.ones(1, 0, dtype=torch.bool)}
    with vp.wrap(model, "random:layer=0|2,fraction=0.6|0.3,seed=0") as run:
        cache = model(**turns[0], use_cache=True).past_key_values
        keep = {layer: torch.ones_like(ids, dtype=torch.bool) for layer in keep}
        for turn in turns[1:]:
            together = joined(together, turn)
            given = {**turn, "attention_mask": together["attention_mask"]}
            logits = model(**given, past_key_values=cache).logits
            keep = {layer: torch.cat([keep[layer], run.last.keep[layer]], 1) for layer in keep}
        new = torch.tensor([[11, 40]])
        longer = torch.ones(1, together["input_ids"].shape[1] + 2, dtype=torch.long)
        after = model(input_ids=new, attention_mask=longer, past_key_values=cache).logits
    assert not keep[2].all()
    expected = masked_logits(name, model, together, keep, new)
    left = run_rows(keep, turns[-1])
    close(logits[:, left], expected[:, -logits.shape[1] - 2 : -2][:, left])
    close(after, expected[:, -2:])


def run_rows(keep: Keep, turn: dict[str, Any]) -> Tensor:
    """Which rows of the last turn are computed by all layers."""
    length = turn["input_ids"].shape[1]
    return torch.stack([mask[0, -length:] for mask in keep.values()]).all(0)


def test_what_left_the_window_cannot_come_back():
    """As on the plain model. Red: assisted decoding takes tokens back, and what is in the window then is missing."""
    model = shared("aya_vision")
    with vp.wrap(model, HALF):
        cache = model(**make_inputs("aya_vision", BATCHES["long"]), use_cache=True).past_key_values
        refused("cannot crop 2 tokens: entries that left the window of 24 tokens", lambda: cache.crop(-2))
    with vp.wrap(model, HALF):
        inputs = make_inputs("aya_vision", BATCHES["one"])
        cache = model(**inputs, use_cache=True).past_key_values
        cache.activate_past_recording()
        more = torch.randint(8, 96, (1, 30), generator=torch.Generator().manual_seed(0))
        ones = torch.ones(1, cache.get_seq_length() + 30, dtype=torch.long)
        model(input_ids=more, attention_mask=ones, past_key_values=cache)
        cache.crop(-30)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_flash_attention_counts_entries(monkeypatch):
    """Its window is a number of stored entries, and slots without an entry do not count. Where something would be dropped
    beyond the window, it is refused before a layer runs. Red: rows that see too much."""
    assert window_in_slots(24, 24, "flash_attention_2") is None
    assert window_in_slots(24, 25, "sdpa") == 24
    model = build("aya_vision")
    monkeypatch.setattr(language_model(model).config, "_attn_implementation_internal", "flash_attention_2")
    ran = []
    language_model(model).layers[0].register_forward_hook(lambda *_: ran.append(1))
    with vp.wrap(model, "random:layer=2,fraction=0.5"):
        sentence = "the window of the language model's layers has 24, and 'flash_attention_2' counts it in stored tokens"
        refused(sentence, lambda: model(**make_inputs("aya_vision", BATCHES["long"])))
    assert not ran


def test_a_window_is_counted_in_slots():
    slots = torch.tensor([[0, 1, 5, 6, 9]])
    valid = torch.ones_like(slots, dtype=torch.bool)
    seen = pruned_mask(slots, valid, slots, valid, True, "sdpa", torch.float32, window=4)
    assert seen[0, 0].long().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    flex = pruned_mask(slots, valid, slots, valid, True, "flex_attention", torch.float32, window=4)
    rows = torch.arange(5)
    assert torch.equal(flex.mask_mod(0, 0, rows[:, None], rows), seen[0, 0])


TWICE = "random:layer=0|2,fraction=0.6|0.3,seed=0"


@pytest.mark.parametrize("name", ["gemma3", "aya_vision", "paligemma"])
@pytest.mark.parametrize("batch", ["long", "ragged"])
def test_flex_attention(name, batch, monkeypatch):
    """Windows and blocks in block masks: the same logits as sdpa. Red: places are taken for slots."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # transformers compiles it, which fails on a CPU
    inputs, logits = make_inputs(name, BATCHES[batch]), []
    for attention in ("sdpa", "flex_attention"):
        model = build(name, attention)
        with vp.wrap(model, TWICE):
            logits.append(generate(model, inputs)[2])
    close(*logits)


@pytest.mark.parametrize("name", [name for name in WINDOWED if name != "gemma4_moe"] + ["paligemma"])
def test_padding_on_the_right(name, monkeypatch):
    """As in training. Red: slots are counted from the first token of a row."""
    model, inputs = shared(name), make_inputs(name, BATCHES["ragged"], pad="right")
    monkeypatch.setattr("families.oracles.whole", lambda name, model, inputs, new: {**inputs, "use_cache": False})
    with vp.wrap(model, TWICE) as run:
        logits = model(**inputs, use_cache=True).logits
        keep = run.last.keep
    close(logits[keep[2]], masked_logits(name, model, inputs, keep)[keep[2]])


@pytest.mark.parametrize("recipe", [TWICE, "fastv:layer=2,fraction=0.5", "sparsevlm:layer=2,fraction=0.5"])
def test_a_model_that_is_not_causal_without_a_mask(recipe, monkeypatch):
    """PaliGemma without token types: its language model is given no mask, and every token sees all. Red: taken for causal."""
    model, inputs = shared("paligemma"), make_inputs("paligemma", BATCHES["long"])
    inputs.pop("token_type_ids")
    explicit = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}  # the same as a mask
    monkeypatch.setattr("families.oracles.whole", lambda name, model, inputs, new: {**inputs, "use_cache": False})
    with vp.wrap(model, recipe) as run:
        logits = model(**inputs, use_cache=True).logits
        keep = run.last.keep
        close(logits, model(**explicit, use_cache=True).logits)
        assert all(torch.equal(run.last.keep[layer], keep[layer]) for layer in keep)
    if recipe == TWICE:
        close(logits[keep[2]], masked_logits("paligemma", model, inputs, keep)[keep[2]])


# -- what methods see ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "aya_vision", "gemma4", "gemma4_e", "paligemma", "qwen3_5", "lfm2_vl"])
@pytest.mark.parametrize("method", ["fastv", "pdrop"])
def test_scores_are_the_layers_own_attention(name, method):
    """Beyond the window, and under blocks. Red: attention is computed as if every layer saw everything before a token."""
    layer = 2 if method == "fastv" or name == "gemma4_e" else 1  # a sliding layer, where there are any
    inputs = make_inputs(name, BATCHES["pictures"])
    stock = shared(name, "eager")(**inputs, output_attentions=True).attentions
    with_attention = [index for index, kind in enumerate(kinds_of(name)) if kind in ("full_attention", "sliding_attention")]
    seen = stock[with_attention.index(layer - 1 if method == "fastv" else layer)]
    last = seen.mean(1)[0, -1]
    model = shared(name)
    with vp.wrap(model, f"{method}:layer={layer},fraction=0.5") as run:
        model(**inputs)
        kept = run.last.kept
    places = list(visual_columns(inputs)[0].nonzero()[:, 0].split([picture.original for picture in kept]))
    for mine, picture in zip(places, kept, strict=True):
        highest = last[mine].topk(len(picture.index)).values.sort().values  # outside the window they are all 0
        torch.testing.assert_close(last[mine][picture.index].sort().values, highest, atol=1e-6, rtol=0)


def kinds_of(name: str) -> list[str]:
    return list(getattr(language_model(shared(name)).config, "layer_types", None) or ["full_attention"] * LAYERS)


# -- recurrent layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_what_needs_attention_is_refused_where_there_is_none(name):
    """Before anything runs, with the layers that can be used."""
    model, usable = shared(name), [index for index, kind in enumerate(kinds_of(name)) if kind == "full_attention"]
    layers = ", ".join(str(index + 1) for index in usable if index + 1 < LAYERS)
    kind = kinds_of(name)[0]
    sentence = (
        f"fastv prunes at layer 3 by the attention of layer 2, but layer 2 has no attention ({kind}): prune at one of the "
    )
    refused(sentence + f"layers {layers}.", lambda: vp.wrap(model, "fastv:layer=3,fraction=0.5"))
    ahead = ", ".join(map(str, usable))
    refused(f"prune at one of the layers {ahead}.", lambda: vp.wrap(model, "pdrop:layer=3,fraction=0.5"))
    only = "|".join(map(str, usable))
    refused(f"layer 0 has no attention ({kind}): give it layers={only}.", lambda: vp.wrap(model, "pai:layers=:"))
    refused(f"layer 0 has no attention ({kind}): choose another method.", lambda: vp.wrap(model, f"vhr:layers={usable[-1]}"))
    vp.wrap(model, f"pai:layers={only}").remove()


@pytest.mark.parametrize("name", RECURRENT)
def test_dropped_equals_native(name):
    """A token that is dropped before the first layer is as if it had never been there; `positions=compact` closes the gaps."""
    model = shared(name)
    samples = BATCHES["pictures"]
    inputs = make_inputs(name, samples)
    for more in ("", *([",positions=compact"] if name == "lfm2_vl" else [])):
        with vp.wrap(model, HALF + more) as run:
            _, new, logits = generate(model, inputs)
            keep = run.last.keep
        if more:
            expected = compact_logits(model, whole(name, model, inputs, new[:, :-1]), keep[0], new.shape[1] - 1)
        else:
            expected = native_logits(name, model, inputs, keep[0], new[:, :-1])
        close(logits, expected[:, -logits.shape[1] :])


def compact_logits(model: Any, call: dict[str, Any], keep: Tensor, behind: int) -> Tensor:
    """The stock text model, fed the embeddings that are left, with positions that count them."""
    text, entering = language_model(model), {}
    handle = text.register_forward_pre_hook(lambda module, args, kwargs: entering.update(kwargs), with_kwargs=True)
    try:
        model(**call)
    finally:
        handle.remove()
    wanted = torch.nn.functional.pad(keep[0], (0, behind), value=True)
    embeddings = entering["inputs_embeds"][:, wanted]
    positions = torch.arange(embeddings.shape[1])[None]
    return model.lm_head(text(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("name", ["lfm2_vl"])
def test_later_turns_with_pictures(name):
    """Of one sample, or of several that drop alike, they go on; ragged ones would put padding between turns."""
    model = shared(name)
    first, second = (make_inputs(name, [["text2", "image", "text3"]], seed) for seed in (2, 3))
    together = joined(first, second)
    with vp.wrap(model, "random:layer=0|2,fraction=0.6|0.3,seed=0") as run:
        cache = model(**first, use_cache=True).past_key_values
        keep = run.last.keep
        logits = model(**{**second, "attention_mask": together["attention_mask"]}, past_key_values=cache).logits
        keep = {layer: torch.cat([keep[layer], run.last.keep[layer]], 1) for layer in keep}
    expected, columns = dropped_logits(name, model, together, keep)
    here = columns - first["input_ids"].shape[1]
    close(logits[:, here[here >= 0]], expected[:, here >= 0])
    first = make_inputs(name, [["text2", "image", "text3"]] * 2)
    ragged = make_inputs(name, [["text2", "image", "text3"], ["text1", "image", "image", "text2"]], seed=4)
    mask = torch.cat([first["attention_mask"], ragged["attention_mask"]], 1)
    with vp.wrap(model, HALF):
        cache = model(**first, use_cache=True).past_key_values
        refused(
            "layer 0 is recurrent (conv): padding between the turns of a conversation would change what it remembers",
            lambda: model(**{**ragged, "attention_mask": mask}, past_key_values=cache),
        )


# -- redistribution ------------------------------------------------------------------------------------------------------------

FULL = {"aya_vision": "2|5", "gemma4_e": "1|3", "qwen3_5": "1|5", "lfm2_vl": "1|4", "gemma4": "2|5"}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("batch", ["long", "ragged"])
def test_redistribution_without_strength_is_the_stock_model(name, batch):
    """In layers that see the whole conversation. Red: an edit takes other keys for visible than the model does."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES[batch])
    _, new, stock = generate(model, inputs)
    with vp.wrap(model, f"pai:alpha=1e-7,layers={FULL[name]}") as run:
        _, ours, logits = generate(model, inputs)
        assert run.last.edits
    assert torch.equal(new, ours)
    close(logits, stock)
    with vp.wrap(model, f"pai:alpha=1,layers={FULL[name]}"):
        assert (generate(model, inputs, 1)[2] - stock[:, :1]).abs().max() > 0.01


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_not_redistributed(name):
    model = shared(name)
    kinds = kinds_of(name)
    own = LAYERS - getattr(language_model(model).config, "num_kv_shared_layers", 0)
    full = "|".join(str(index) for index, kind in enumerate(kinds[:own]) if kind == "full_attention")
    refused(
        f"sees the whole conversation, but layer 0 sees a window of {WINDOW} tokens: give it layers={full}.",
        lambda: vp.wrap(model, "pai:layers=0|1"),
    )


def test_shared_keys_are_not_redistributed():
    """They belong to another layer, on whose cache marks would be kept."""
    refused("but layer 5 sees the keys of layer 3: give it layers=1|3.", lambda: vp.wrap(shared("gemma4_e"), "pai:layers=1|5"))


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_blocks_are_not_redistributed(name):
    """They are known when a prompt comes."""
    model = shared(name)
    with vp.wrap(model, "pai:layers=2|5"):
        refused(
            "pai edits attention in which no token sees a later one, but in this model the tokens of a picture, or of the "
            "whole prompt, see each other: leave the method out.",
            lambda: model(**make_inputs(name, BATCHES["one"])),
        )


# -- kinds that are not followed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (["full_attention"] * 5 + ["chunked_attention"], "'chunked_attention' (layers 5)"),
        (["indexed_attention"] * 6, "'indexed_attention' (layers 0, 1, 2, 3, …)"),
        (["hybrid", "full_attention"] * 3, "'hybrid' (layers 0, 2, 4)"),
        (["moe", "full_attention"] * 3, "'moe' (layers 0, 2, 4)"),
        (["holographic"] * 6, "'holographic'"),
    ],
)
def test_other_kinds_are_refused_by_name(kinds, named):
    model = build("llava")
    config = model.model.language_model.config
    config.layer_types = kinds
    config.attention_chunk_size = config.sliding_window = 8
    refused(f"the language model has layers of the kind {named}", lambda: vp.wrap(model, HALF))


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_positions_that_have_kinds_stay(name):
    refused(
        'random: positions="compact" needs rotary embeddings that follow from positions',
        lambda: vp.wrap(shared(name), HALF + ",positions=compact"),
    )
