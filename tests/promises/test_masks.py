"""Whatever an attention mask says is obeyed: holes anywhere, tokens of a picture, 4-D masks, block masks.

The judge is the stock model under the same mask, which from the layer of a cut on sees only what was kept
(`oracles.LiveMaskOracle`). All were red before: hidden tokens of a picture came back to sight, and others were lost; a triangle
crashed; every mask that is not 2-D was refused, also where nothing was dropped, and later turns' masks were ignored.
"""

from __future__ import annotations

import pytest
import torch
from oracles import TOLERANCE, Entering, LiveMaskOracle, effect_of, prompt_positions
from promises.few import RECIPES
from tiny_models import FLEX, IMAGE, make_inputs, shared
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

import vlmprune as vp

FEW = [
    "divprune:tokens=4",
    "fastv:layer=2,tokens=4",
    "dart:layer=1,tokens=6",
    "tome:layer=0,tokens=4",
    "pdrop:layer=2,tokens=4",
]
KEEP_ALL = "random:layer=0,fraction=1.0"
SAMPLES = [["text3", "image", "text4"], ["text5", "image", "text6"]]


def inputs_of(family="llava", samples=SAMPLES, **how):
    return make_inputs(family, shared(family), samples, **how)


def pictures(inputs, row):
    return (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]


def hide(inputs, *cells):
    """`inputs` whose mask hides (row, columns)."""
    mask = inputs["attention_mask"].clone()
    for row, columns in cells:
        mask[row, columns] = 0
    return {**inputs, "attention_mask": mask}


@torch.no_grad()
def check(model, inputs, recipe, **call):
    """The pruned model equals the stock one that sees only what was kept; returns the handle."""
    two_dimensional = inputs["attention_mask"].ndim == 2 if isinstance(inputs.get("attention_mask"), torch.Tensor) else False
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        logits = model(**inputs, **call).logits
    mask = inputs["attention_mask"] if two_dimensional else torch.ones_like(inputs["input_ids"])
    effect = effect_of(model, {**inputs, "attention_mask": mask}, run, entering.prompts[0])
    with LiveMaskOracle(model, effect):
        judge = model(**inputs, **call).logits
    alive = next(reversed(run.last.keep.values()))
    assert alive.any()
    difference = (logits - judge)[alive].abs().max()
    assert difference < TOLERANCE, difference
    return run


# --- 2-D: what is hidden is hidden ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECIPES)
def test_hidden_tokens_of_a_picture_are_no_candidates(name):
    model, inputs = shared("llava"), inputs_of()
    hidden = pictures(inputs, 1)[3:9]
    run = check(model, hide(inputs, (1, hidden)), f"{name}:{RECIPES[name]}")
    for kept in run.last.kept:
        if kept.sample == 1:
            assert not set(kept.index.tolist()) & set(range(3, 9))
    assert not any(keep[1, hidden].any() for keep in run.last.keep.values())
    assert run.report().hidden == 6
    assert "hidden by the mask" in str(run.report())


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", FEW)
def test_hidden_tokens_of_other_families(family, recipe):
    """LLaVA-NeXT: a row separator is hidden, too."""
    model, inputs = shared(family), inputs_of(family)
    inputs["position_ids"] = prompt_positions(model, inputs)  # which Qwen's models find only if no token of a picture is hidden
    check(model, hide(inputs, (0, pictures(inputs, 0)[8:15])), recipe)


def test_budgets_count_from_what_is_visible():
    """Nine of sixteen are visible: half of them are five (rounded half up), all of them nine, and twelve are no more."""
    model, inputs = shared("llava"), inputs_of(samples=SAMPLES[:1])
    inputs = hide(inputs, (0, pictures(inputs, 0)[4:11]))
    for budget, kept in (("fraction=0.5", 5), ("fraction=1.0", 9), ("tokens=12", 9), ("tokens=3", 3)):
        with vp.wrap(model, f"uniform:layer=0,{budget}") as run, torch.no_grad():
            model(**inputs)
        assert len(run.last.kept[0].index) == kept


@pytest.mark.parametrize("recipe", FEW)
@pytest.mark.parametrize("where", ["before", "behind", "both", "end of the picture", "all of a picture"])
def test_holes_anywhere(where, recipe):
    model, inputs = (
        shared("llava"),
        inputs_of(samples=[["text3", "image", "text4", "image", "text5"], ["text9", "image", "text6"]]),
    )
    first = pictures(inputs, 0)
    cells = {
        "before": [(0, [1]), (1, [12, 14])],
        "behind": [(0, [-2]), (1, [-4, -1])],
        "both": [(0, [0, -3]), (1, [-2])],
        "end of the picture": [(0, first[13:16]), (1, pictures(inputs, 1)[-5:])],
        "all of a picture": [(0, first[:16])],
    }[where]
    check(model, hide(inputs, *cells), recipe)


@pytest.mark.parametrize("recipe", [*FEW, "random:layer=0,fraction=0.5", "uniform:layer=1,tokens=2"])
def test_a_triangle_over_batch_and_tokens(recipe):
    """The mask of transformers' own tester: row b shows its first b + 1 tokens."""
    model, inputs = shared("llava"), inputs_of(samples=[["image", "text4"]] * 3)
    inputs["attention_mask"] = inputs["attention_mask"].tril()
    assert check(model, inputs, recipe).report().hidden == 15 + 14 + 13


def test_words_that_are_hidden_are_not_weighed():
    """The sentence says why there are none; where there is nothing to choose, nobody asks for them."""
    model, inputs = shared("llava"), inputs_of(samples=[["image", "text4"]] * 3)
    inputs["attention_mask"] = inputs["attention_mask"].tril()
    with vp.wrap(model, "dart:layer=1,tokens=1"), pytest.raises(vp.UsageError, match="there is none that the mask"):
        model(**inputs)


def test_a_row_and_a_batch_of_which_everything_is_hidden():
    model, inputs = shared("llava"), inputs_of()
    for rows in ([1], [0, 1]):
        nothing = hide(inputs, *((row, slice(None)) for row in rows))
        with vp.wrap(model, "random:layer=1,tokens=4"), torch.no_grad():
            assert model(**nothing).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_any_kind_of_number_hides(dtype):
    model, inputs = shared("llava"), inputs_of()
    inputs = hide(inputs, (1, pictures(inputs, 1)[2:5]))
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    if dtype == torch.float32:
        inputs["attention_mask"] *= 0.5
    check(model, inputs, "fastv:layer=2,tokens=4")


@pytest.mark.parametrize("recipe", ["zerotuning:gain=2", "pai", "var:sink_dims=5|40", "vhr", "act"])
def test_redistribution_does_not_see_hidden_tokens(recipe):
    """Hidden tokens may be anything: other pixels there change nothing that is seen."""
    model, inputs = shared("llava"), inputs_of()
    inputs = hide(inputs, (0, pictures(inputs, 0)[:16]))
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][0] *= -1
    with vp.wrap(model, recipe), torch.no_grad():
        first, second = model(**inputs).logits, model(**other).logits
    seen = inputs["attention_mask"].bool()
    assert (first - second)[seen].abs().max() < TOLERANCE


# --- 4-D and block masks ----------------------------------------------------------------------------------------------
def cells(inputs, kind):
    """`[batch, 1, query, key]` bool."""
    batch, length = inputs["input_ids"].shape
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
    seen = causal & inputs["attention_mask"].bool()[:, None, None]
    own = torch.eye(length, dtype=torch.bool)
    if kind == "padding":
        return seen | own
    if kind == "prefix":  # everything up to the picture's end sees itself
        for row in range(batch):
            end = int(pictures(inputs, row)[-1]) + 1
            seen[row, :, :end, :end] |= inputs["attention_mask"][row, :end].bool()
        return seen | own
    if kind == "window":
        return (seen & ~causal.roll(12, dims=-2)) | own
    if kind == "hides a picture's token from the text alone":
        for row in range(batch):
            places = pictures(inputs, row)
            seen[row, :, int(places[-1]) + 1 :, places[5:8]] = False
        return seen | own
    raise AssertionError(kind)


KINDS = ["padding", "prefix", "window", "hides a picture's token from the text alone"]


def in_form(seen, form):
    if form != "bool":
        hidden = {"additive": torch.finfo(torch.float32).min, "infinite": -torch.inf, "-1e4": -1e4}[form]
        return torch.zeros(seen.shape).masked_fill(~seen, hidden)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("attn", "form"), [("sdpa", "bool"), ("sdpa", "additive"), ("sdpa", "infinite"), ("eager", "-1e4")])
@pytest.mark.parametrize("recipe", [*FEW, "adaptinfer:layer=2,tokens=4", "fastv:layer=1,tokens=8 + random:layer=3,tokens=3"])
def test_four_axes(kind, attn, form, recipe):
    model, inputs = shared("llava", attn), inputs_of()
    check(model, {**inputs, "attention_mask": in_form(cells(inputs, kind), form)}, recipe)


@pytest.mark.parametrize("kind", ["padding", "prefix", "window"])
@pytest.mark.parametrize("recipe", ["divprune:tokens=4", "fastv:layer=2,tokens=4", "pdrop:layer=2,tokens=4"])
def test_block_masks(kind, recipe):
    model, inputs = shared("llava", FLEX), inputs_of()
    seen = cells(inputs, kind)
    batch, _, length, _ = seen.shape
    mask = create_block_mask(lambda b, h, q, k: seen[b, 0, q, k], batch, None, length, length, device="cpu")
    check(model, {**inputs, "attention_mask": mask}, recipe)


def test_a_mask_that_only_says_padding_chooses_as_the_2d_one():
    model, inputs = shared("llava"), inputs_of()
    for recipe in FEW:
        kept = []
        for mask in (inputs["attention_mask"], cells(inputs, "padding")):
            with vp.wrap(model, recipe) as run, torch.no_grad():
                model(**{**inputs, "attention_mask": mask})
            kept.append([k.index.tolist() for k in run.last.kept])
        assert kept[0] == kept[1], recipe


def test_masks_for_each_kind_of_layer():
    """As `generate` gives Qwen2.5-VL."""
    model, inputs = shared("qwen2_5_vl"), inputs_of("qwen2_5_vl", SAMPLES[:1])
    with vp.wrap(model, FEW[1]), torch.no_grad():
        expected = model(**inputs).logits
        position = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})[0]
        given = {**inputs, "attention_mask": {"full_attention": cells(inputs, "padding")}, "position_ids": position}
        assert (model(**given).logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["padding", "window"])
def test_decoding_under_four_axes(kind):
    """The mask of a later step is obeyed, too: in the cut layers it was ignored."""
    model, inputs = shared("llava"), inputs_of(samples=SAMPLES[:1])
    seen = cells(inputs, kind)
    length = seen.shape[-1]
    step = torch.ones(1, 1, 1, length + 1, dtype=torch.bool)
    step[..., [1, 20, length - 2]] = False
    call = {**inputs, "attention_mask": seen, "past_key_values": DynamicCache(config=model.config.text_config)}
    following = {"input_ids": torch.tensor([[11]]), "attention_mask": step}
    with torch.no_grad():
        with vp.wrap(model, "fastv:layer=2,tokens=4") as run:
            model(**call)
            logits = model(**following, past_key_values=call["past_key_values"]).logits
        call["past_key_values"] = DynamicCache(config=model.config.text_config)
        with LiveMaskOracle(model, dict(run.last.keep)):
            model(**call)
            judge = model(**following, past_key_values=call["past_key_values"]).logits
    assert (logits - judge).abs().max() < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_later_turn_may_hide_more(tokens):
    """A 2-D mask of a later turn, or of a step of a batch, hides what earlier ones saw."""
    model, inputs = shared("llava"), inputs_of()
    length = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens), value=1)
    mask[0, length - 2] = mask[1, pictures(inputs, 1)] = 0
    following = {"input_ids": torch.full((2, tokens), 11), "attention_mask": mask}
    with torch.no_grad():
        with vp.wrap(model, "fastv:layer=2,tokens=4") as run:
            cache = model(**inputs, use_cache=True).past_key_values
            logits = model(**following, past_key_values=cache).logits
        with LiveMaskOracle(model, dict(run.last.keep)):
            cache = model(**inputs, use_cache=True).past_key_values
            judge = model(**following, past_key_values=cache).logits
    assert (logits - judge).abs().max() < TOLERANCE


def test_a_later_turn_without_a_mask():
    model, inputs = shared("llava"), inputs_of()
    with vp.wrap(model, "fastv:layer=2,tokens=4"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(vp.UsageError, match="earlier turns hid tokens, which were dropped"):
            model(input_ids=torch.full((2, 1), 11), past_key_values=cache)


# --- what is refused, and where nothing may be ------------------------------------------------------------------------
def test_redistribution_refuses_what_it_cannot_follow():
    model, inputs = shared("llava"), inputs_of()
    given = {**inputs, "attention_mask": cells(inputs, "window")}
    sentence = "zerotuning supports masks that only mark padding"
    with vp.wrap(model, "divprune:tokens=4 + zerotuning:gain=2"), pytest.raises(vp.UsageError, match=sentence):
        model(**given)
    with vp.wrap(model, "zerotuning:gain=2"), torch.no_grad():  # one that says padding is padding
        expected = model(**inputs).logits
        logits = model(**{**inputs, "attention_mask": cells(inputs, "padding")}).logits
    assert (logits - expected)[inputs["attention_mask"].bool()].abs().max() < TOLERANCE


@pytest.mark.parametrize("recipe", FEW)
def test_weights_and_masks_per_head(recipe):
    """Obeyed cell by cell; methods that look at attention refuse them."""
    model, inputs = shared("llava"), inputs_of()
    seen = in_form(cells(inputs, "padding"), "additive")
    distance = torch.arange(seen.shape[-1])
    seen = seen.expand(-1, model.config.text_config.num_attention_heads, -1, -1).clone()
    seen -= 0.1 * (distance[:, None] - distance).clamp(min=0) * torch.arange(1, seen.shape[1] + 1)[:, None, None]
    given = {**inputs, "attention_mask": seen.clamp(min=torch.finfo(torch.float32).min)}
    if recipe[:5] in ("fastv", "pdrop"):
        with vp.wrap(model, recipe), pytest.raises(vp.UsageError, match="differs between heads, or weighs tokens"):
            model(**given)
        return
    with vp.wrap(model, recipe) as run, torch.no_grad():
        model(**given)
    assert run.last.kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attn", ["sdpa", "eager", FLEX])
def test_where_nothing_is_dropped_nothing_is_refused(kind, attn):
    model, inputs = shared("llava", attn), inputs_of()
    seen = cells(inputs, kind)
    mask = in_form(seen, "bool" if attn == "sdpa" else "additive")
    if attn == FLEX:
        mask = create_block_mask(lambda b, h, q, k: seen[b, 0, q, k], *[len(seen), None, *seen.shape[2:]], device="cpu")
    given = {**inputs, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**given).logits
        for recipe in (KEEP_ALL, "fastv:layer=2,fraction=1.0", "adaptinfer:layer=2,tokens=16", "zerotuning:gain=1"):
            with vp.wrap(model, recipe):
                assert torch.equal(model(**given).logits, expected), recipe


@pytest.mark.parametrize("recipe", [KEEP_ALL, "adaptinfer:layer=2,fraction=1.0", "cls:fraction=1.0"])
def test_keep_all_takes_any_2d_mask(recipe):
    """Also prompts that end with their picture, of which a method that weighs words is not asked."""
    model, inputs = shared("llava"), inputs_of(samples=[["text3", "image"]] * 3)
    for mask in (inputs["attention_mask"], inputs["attention_mask"].tril(), inputs["attention_mask"] * 0):
        with torch.no_grad():
            expected = model(**{**inputs, "attention_mask": mask}).logits
            with vp.wrap(model, recipe):
                assert torch.equal(model(**{**inputs, "attention_mask": mask}).logits, expected)


def test_static_cache_where_nothing_is_dropped():
    for family in ("llava", "qwen2_5_vl"):
        model, inputs = shared(family), inputs_of(family)
        with torch.no_grad():
            expected = model.generate(**inputs, max_new_tokens=4, cache_implementation="static", disable_compile=True)
            with vp.wrap(model, KEEP_ALL):
                found = model.generate(**inputs, max_new_tokens=4, cache_implementation="static", disable_compile=True)
                assert torch.equal(found, expected)
            with vp.wrap(model, KEEP_ALL):
                found = model(**inputs, past_key_values=StaticCache(model.config, 64)).logits
            assert torch.equal(found, model(**inputs, past_key_values=StaticCache(model.config, 64)).logits)
