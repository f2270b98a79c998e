"""What methods are told of the language model, against naive computations on the stock model's own modules."""

from __future__ import annotations

import contextlib

import pytest
import torch
from methods.loops import plain
from oracles import prompt_positions
from tiny_models import ALL_FAMILIES, IMAGE, implementations_of, make_inputs, shared

import vlmprune as vp
from vlmprune.schedule import at
from vlmprune.view import FROM_TOWER, PROBES, View

RAGGED = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["image", "text9"]]
TOLD = frozenset(PROBES) - FROM_TOWER - {"project", "pixels"}
families = pytest.mark.parametrize("family", ALL_FAMILIES)


class Peek(vp.Pruner):
    """Looks at everything there is to see in the language model, and keeps the first tokens."""

    name = "peek"
    paper = "none"
    needs = TOLD
    default = at(layer=3, fraction=0.2)
    seen: list = []  # noqa: RUF012

    def select(self, see, keep):
        self.seen.append(see)
        return torch.arange(keep).expand(see.images, keep)


def peeked(model, recipe: tuple, inputs: dict) -> tuple[vp.Run, list[View], dict]:
    """One call: the handle, what was told, and what entered the language model and its layers before any hook of ours.

    The positions are those that `generate` gives: a plain call would count padding.
    """
    text, found = model.model.language_model, {}
    inputs = {**inputs, "position_ids": prompt_positions(model, inputs)}

    def hook(name):
        def note(_, args, kwargs):
            found[name] = (args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))), kwargs

        return note

    handles = [text.register_forward_pre_hook(hook("text"), with_kwargs=True)]
    handles += [text.layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in range(4)]
    Peek.seen.clear()
    try:
        with vp.wrap(model, *recipe) as run, torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return run, list(Peek.seen), found


def heads(layer, hidden, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[head, row, dim]` of a decoder layer from what enters it `[row, dim]`."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)

    def split(x):
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)

    def turned(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    q, k, v = (split(project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    return turned(q), turned(k), v


def maps(q, k, scaling) -> torch.Tensor:
    """Causal attention `[head, row, key]`."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(1, 2) * scaling
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)


@torch.no_grad()
def naive(model, run, found, layer: int, inputs: dict) -> list[dict]:
    """Every probe of every picture of one un-padded prompt, at a cut before `layer`."""
    text = model.model.language_model
    ids = inputs["input_ids"][0]
    placeholders = (ids == IMAGE).nonzero()[:, 0]
    embeddings = found["text"][0][0]
    if hasattr(model.model, "image_newline"):
        placeholders = placeholders[~(embeddings[placeholders] == model.model.image_newline).all(1)]
    alive = torch.arange(len(ids))
    if layer > 1 and 1 in run.last.keep:
        alive = run.last.keep[1][0].nonzero()[:, 0]
    row_of = {int(place): row for row, place in enumerate(alive)}
    words = torch.arange(int((ids == IMAGE).nonzero()[-1]) + 1, len(ids))
    last_words = [row_of[int(w)] for w in words]
    hidden, kwargs = found[layer]
    cos, sin = (part[0] for part in kwargs["position_embeddings"])
    here = hidden[0]
    assert len(here) == len(alive)
    q, k, v = heads(text.layers[layer - 1], found[layer - 1][0][0], cos[alive], sin[alive])
    before = maps(q, k, text.layers[layer - 1].self_attn.scaling)
    ahead = maps(*heads(text.layers[layer], here, cos[alive], sin[alive])[:2], text.layers[layer].self_attn.scaling)
    turns = torch.stack((cos, sin), dim=1)
    result, start = [], 0
    originals = {k.ordinal: k.original for k in run.last.kept}
    for ordinal in sorted(originals):
        mine = placeholders[start : start + originals[ordinal]]
        start += originals[ordinal]
        index = [j for j, place in enumerate(mine.tolist()) if place in row_of]
        rows = [row_of[int(mine[j])] for j in index]
        result.append(
            {
                "position": torch.tensor(index),
                "features": here[rows],
                "text_features": here[last_words],
                "text_ids": ids[words],
                "normed_features": text.norm(here[rows]),
                "normed_text_features": text.norm(here[last_words]),
                "embeddings": embeddings[mine],
                "text_embeddings": embeddings[words],
                "attention_from_last": before[:, -1, rows],
                "attention_of_layer": ahead[:, -1, rows],
                "attention_from_text": before[:, last_words][..., rows],
                "attention_among_text": before[:, last_words][..., last_words],
                "query_of_last": q[:, -1],
                "value_of_last": v[:, -1],
                "keys": k[:, rows],
                "values": v[:, rows],
                "text_keys": k[:, last_words],
                "rotary": turns[mine[index]],
                "text_rotary": turns[words],
            }
        )
    return result


def told(see: View, image: int) -> dict:
    """A view's probes of one picture, without padding; what stands in the padding must be zero."""
    words, found = see.text_valid[image], {"position": see.position[image]}
    for name in TOLD - {"text_valid", "identity", "frame", "times"}:
        value = see.probes[name][image]
        axis = {"attention_from_text": 1, "attention_among_text": 1, "text_keys": 1}.get(name, 0 if "text" in name else None)
        if axis is not None:
            padding = value.index_select(axis, (~words).nonzero()[:, 0])
            assert not padding.any() or name == "normed_text_features", name
            value = value.index_select(axis, words.nonzero()[:, 0])
        if name == "attention_among_text":
            assert not value[..., ~words].any()
            value = value[..., words]
        found[name] = value
    return found


@pytest.mark.parametrize(("family", "attn"), implementations_of(ALL_FAMILIES))
@pytest.mark.parametrize("before", [None, "random:layer=1,fraction=0.6"], ids=["first cut", "second cut"])
def test_what_the_language_model_tells(before, family, attn):
    """In a ragged batch, before and after another cut, every picture is told what it is told alone, and that is what the stock
    model's own modules compute."""
    model = shared(family, attn)
    recipe = (Peek(),) if before is None else (before, Peek())
    _, views, _ = peeked(model, recipe, make_inputs(family, model, RAGGED))
    expected, identities = [], []
    for row, parts in enumerate(RAGGED):
        inputs = make_inputs(family, model, [parts], first=row)
        run, alone, found = peeked(model, recipe, inputs)
        pictures = naive(model, run, found, 3, inputs)
        expected += pictures
        sizes = {}
        for see in alone:
            for image in range(see.images):
                sizes.setdefault(see.visual, []).append(see.identity[image])
        identities += [sizes[len(picture["position"])].pop(0) for picture in pictures]
    assert sum(see.images for see in views) == len(expected) == 4
    left = list(range(4))
    for see in views:
        for image in range(see.images):
            picture = next(p for p in left if len(expected[p]["position"]) == see.visual)  # one size: in their order
            left.remove(picture)
            found = told(see, image)
            assert see.identity[image] == identities[picture]
            assert see.entered == see.original == len(expected[picture]["embeddings"])
            for name, value in expected[picture].items():
                torch.testing.assert_close(
                    found[name], value, atol=3e-5, rtol=3e-5, msg=lambda message, name=name: f"{name}: {message}"
                )
            for name in found:
                if name.startswith("attention"):
                    assert found[name].dtype == torch.float32


def test_every_probe_of_the_language_model_is_compared():
    """The comparison above leaves out no probe; four have no counterpart in the stock model and are checked by themselves,
    those of videos in `tests/video/test_facts.py`."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    run, _, found = peeked(model, (Peek(),), inputs)
    assert set(naive(model, run, found, 3, inputs)[0]) - {"position"} == TOLD - {"text_valid", "identity", "frame", "times"}


def test_identity_is_of_the_prompt_and_the_picture():
    """Equal for equal prompts, different for another word, another picture of the prompt, whatever the padding."""
    model = shared("llava")

    def of(inputs):
        return [identity for see in peeked(model, (Peek(),), inputs)[1] for identity in see.identity]

    two = make_inputs("llava", model, [["text3", "image", "text4", "image", "text2"]])
    first, second = of(two)
    assert first != second
    assert of(two) == [first, second]
    changed = {**two, "input_ids": two["input_ids"].clone()}
    changed["input_ids"][0, -1] = 9 + (changed["input_ids"][0, -1] == 9).long()
    assert not set(of(changed)) & {first, second}
    ids = torch.nn.functional.pad(two["input_ids"], (4, 0))
    assert of({**two, "input_ids": ids, "attention_mask": torch.nn.functional.pad(two["attention_mask"], (4, 0))}) == [
        first,
        second,
    ]


# --- what the methods make of it --------------------------------------------------------------------------------------
def eager_attention(model, inputs, layer):
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions[layer]  # [batch, head, query, key]


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "qwen2_5_vl")))
def test_text_attention_is_the_models_own(family, attn):
    """AdaptInfer's kept set from the full eager maps of the layer before the cut, sample by sample."""
    eager, model = shared(family, "eager"), shared(family, attn)
    for row, parts in enumerate(RAGGED):
        inputs = make_inputs(family, model, [parts], first=row)
        attention = eager_attention(eager, inputs, 1)[0]
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        text = torch.arange(int(visual[-1]) + 1, attention.shape[-1])
        with vp.wrap(model, "adaptinfer:layer=2,tokens=5") as run, torch.no_grad():
            model(**inputs)
        start = 0
        for kept in run.last.kept:
            mine = visual[start : start + kept.original]
            start += kept.original
            probes = {
                "attention_from_text": attention[None][:, :, text][..., mine],
                "attention_among_text": attention[None][:, :, text][..., text],
            }
            scores = vp.AdaptInfer().score(View(2, kept.original, torch.arange(kept.original)[None], probes))[0]
            assert kept.index.tolist() == plain.top(scores.tolist(), 5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("layer", [0, 3])
def test_attention_of_layer_is_what_the_layer_computes(family, layer):
    """PyramidDrop's look ahead equals the eager attention of the layer of the cut, had nothing been cut."""
    eager, model = shared(family, "eager"), shared(family)
    inputs = make_inputs(family, model, RAGGED)
    attention = eager_attention(eager, inputs, layer)[:, :, -1].mean(dim=1)  # [batch, key]
    with vp.wrap(model, f"pdrop:layer={layer},tokens=5") as run, torch.no_grad():
        model(**inputs)
    for row in range(len(RAGGED)):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        start = 0
        for kept in (kept for kept in run.last.kept if kept.sample == row):
            scores = attention[row, visual[start : start + kept.original]]
            start += kept.original
            assert kept.index.tolist() == plain.top(scores.tolist(), 5)


@pytest.mark.parametrize("before", [None, "random:layer=3,fraction=0.6"], ids=["un-pruned", "pruned"])
def test_attention_of_layer_counts_an_earlier_turn(before):
    """With a cache, the look ahead shares its attention with what earlier turns left: the same as the layer then computes."""
    model = shared("llava", "eager")
    first, second = (make_inputs("llava", model, [parts]) for parts in (["text3", "image", "text4"], ["image", "text2"]))
    with torch.no_grad(), vp.wrap(model, before) if before else contextlib.nullcontext():
        cache = model(**first, use_cache=True).past_key_values
    second["attention_mask"] = torch.ones(1, cache.get_seq_length() + second["input_ids"].shape[1], dtype=torch.long)
    seen = {}

    class Ahead(vp.PDrop):
        def select(self, see, keep):
            seen["ahead"] = see.attention_of_layer
            return super().select(see, see.visual - 1)

    with torch.no_grad(), vp.wrap(model, Ahead(layer=3, tokens=15)):
        hidden = []
        attention = model.model.language_model.layers[3].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: hidden.append(output[1]))
        try:
            model(**second, past_key_values=cache)
        finally:
            handle.remove()
    ran = hidden[0][0, :, -1, -(second["input_ids"].shape[1] - 1) :]  # [head, key] with one visual token less
    whole = seen["ahead"][0]
    gone = min(range(16), key=lambda j: whole.mean(0)[j])
    kept = [j for j in range(16) if j != gone]
    # What the dropped token would have had goes to all others alike, those of the earlier turn among them.
    torch.testing.assert_close(whole[:, kept] / (1 - whole[:, [gone]]), ran[:, :15], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["adaptinfer:layer=2,tokens=5", "sparsevlm:layer=2,tokens=5", "cdpruner:tokens=5"])
def test_text_needs_a_question_after_the_picture(recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text4", "image"]])
    with vp.wrap(model, recipe), torch.no_grad(), pytest.raises(vp.UsageError, match="put the question after"):
        model(**inputs)


MERGED = {
    "llava": [
        "sparsevlm:layer=2,tokens=7",
        "tome:layer=2,tokens=6",
        "visionzip:tokens=8,contextual=3",
        "vscan:layer=0,tokens=6",
    ],
    "llava_next": ["sparsevlm:layer=2,tokens=7", "tome:tokens=6", "visionzip:tokens=8,contextual=1", "vscan:layer=0,tokens=6"],
    "qwen2_vl": ["sparsevlm:layer=2,tokens=7", "tome:layer=2,tokens=6"],
    "qwen2_5_vl": ["sparsevlm:layer=2,tokens=7", "tome:tokens=6"],
}


@pytest.mark.parametrize(("family", "recipe"), [(family, recipe) for family in MERGED for recipe in MERGED[family]])
def test_merged_features_enter_the_layer(family, recipe):
    """What a method merged stands in the places of the kept tokens when the layer of the cut runs, and text is as it was; the
    record has the same numbers."""
    model, found = shared(family), {}
    inputs = make_inputs(family, model, RAGGED)
    layer = 2 if "layer=2" in recipe else 0
    text = model.model.language_model

    def note(name):
        def hook(_, args, kwargs):
            found[name] = args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))

        return hook

    handles = [text.register_forward_pre_hook(note("embeddings"), with_kwargs=True)]
    handles.append(text.layers[layer].register_forward_pre_hook(note("whole"), with_kwargs=True))
    try:
        with vp.wrap(model, recipe) as run, torch.no_grad():
            handles.append(text.layers[layer].register_forward_pre_hook(note("short"), with_kwargs=True))
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    alive = run.last.keep[layer]
    for row in range(len(RAGGED)):
        places = alive[row].nonzero()[:, 0]
        here, before = found["short"][row, -len(places) :], found["whole"][row, places]
        visual = inputs["input_ids"][row, places] == IMAGE
        if family == "llava_next":  # row separators count as text
            visual &= ~(found["embeddings"][row, places] == model.model.image_newline).all(1)
        merged = torch.cat([kept.features for kept in run.last.kept if kept.sample == row and kept.layer == layer])
        assert torch.equal(here[visual], merged)
        assert torch.equal(here[~visual], before[~visual])
        assert not torch.equal(merged, before[visual]), "the method of this test must merge"
