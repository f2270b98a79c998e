"""Every strategy of `generate`, turns, and what carries the marks, under every method."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from oracles import TOLERANCE, generate_logits
from redistribution.recipes import CASES, RECIPES, SAMPLES, VAR
from tiny_models import FLEX, VOCAB, build, make_inputs, make_single, shared
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmprune as vp
from vlmprune.live.cache import MarkedLayer, PrunedLayer, keep_only, pruned_layers
from vlmprune.live.entries import Entries
from vlmprune.live.marks import Marks

STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": 2},
}
CUT = "random:layer=0|3,fraction=0.7|0.4,seed=0 + "
every_case = pytest.mark.parametrize(("family", "recipe"), CASES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generate(model, inputs, new_tokens=6, **strategy):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, output_scores=True, **strategy)


@every_case
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("pruned", ["", CUT], ids=["", "pruned"])
def test_strategy_equals_itself_without_a_cache(family, recipe, strategy, pruned):
    """Red: expanding or reordering the cache mixes up marks; without a cache there is nothing to reorder."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, pruned + recipe):
        cached = generate(model, inputs, **strategy)
        uncached = generate(model, inputs, use_cache=False, **strategy)
    assert torch.equal(cached.sequences, uncached.sequences)
    for ours, theirs in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2 * TOLERANCE, rtol=0)
    assert isinstance(cached.past_key_values.layers[4], MarkedLayer)


@every_case
@pytest.mark.parametrize("pruned", ["", CUT], ids=["", "pruned"])
def test_assisted_equals_greedy(family, recipe, pruned):
    """Red: candidates become sinks or are not edited as decoding rows, or a crop leaves marks of what it removed."""
    model = shared(family)
    few = {"suppress_tokens": [token for token in range(VOCAB) if token not in range(20, 24)]}
    inputs = make_inputs(family, model, [["text20", "image", "text15"]])
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(ids < 8, ids, 20 + ids % 4)
    with vp.wrap(model, pruned + recipe):
        greedy = generate(model, inputs, 12, **few).sequences
        guessed = generate(model, inputs, 12, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **few).sequences
    assert torch.equal(greedy, guessed)


def test_assistant_model():
    model, assistant = shared("llava"), build("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    with vp.wrap(model, VAR):
        greedy = generate(model, inputs, 12).sequences
        assert torch.equal(generate(model, inputs, 12, assistant_model=assistant).sequences, greedy)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_second_turn(recipe):
    """Red: a turn of text on the cache differs from the same turn token by token (all rows of decoding are edited alike)."""
    if recipe.startswith(("pai", "paint")):
        return  # of a turn's rows these edit the last only, as of a prompt: see the next test
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    words = torch.tensor([[30, 31, 32, 33]])
    with vp.wrap(model, recipe):
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        at_once = model(input_ids=words, past_key_values=caches[0]).logits
        steps = [model(input_ids=words[:, n : n + 1], past_key_values=caches[1]).logits for n in range(4)]
    torch.testing.assert_close(at_once, torch.cat(steps, 1), atol=TOLERANCE, rtol=0)


def test_second_turn_edits_its_last_row():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    words = torch.tensor([[30, 31, 32, 33]])
    with vp.wrap(model, "pai:alpha=0.5,layers=5"):
        cache = model(**inputs, use_cache=True).past_key_values
        edited = model(input_ids=words, past_key_values=cache).logits
    cache = model(**inputs, use_cache=True).past_key_values
    plain = model(input_ids=words, past_key_values=cache).logits
    assert torch.equal(edited[:, :-1], plain[:, :-1])
    assert (edited[:, -1] - plain[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", [*RECIPES.values(), "var:sink_dims=cosine,max_sink_share=1,min_image_mass=0"])
def test_a_turn_with_pictures_for_some(recipe):
    """Red: beside a sample that brings a picture in a later turn, a turn of text is marked, or its rows are not edited."""
    model = shared("llava")
    begins = [make_inputs("llava", model, [["text5", "image", "text4"]], seed=1, first=row) for row in range(2)]
    together = make_inputs("llava", model, [["text5", "image", "text4"]] * 2, seed=1)
    later = make_inputs("llava", model, [["text3", "image", "text4"]], seed=2)
    tokens = later["input_ids"].shape[1]
    words = torch.randint(8, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(3))
    past = together["input_ids"].shape[1]
    step = torch.tensor([[40]])

    def go_on(begin, ids, pixels):
        cache = model(**begin, use_cache=True).past_key_values
        mask = torch.ones(len(ids), past + tokens, dtype=torch.long)
        turn = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, past_key_values=cache).logits
        mask = torch.ones(len(ids), past + tokens + 1, dtype=torch.long)
        return turn, model(input_ids=step.expand(len(ids), 1), attention_mask=mask, past_key_values=cache).logits

    with vp.wrap(model, recipe):
        found = go_on(together, torch.cat((later["input_ids"], words)), later["pixel_values"])
        expected = go_on(begins[0], later["input_ids"], later["pixel_values"]), go_on(begins[1], words, None)
    for row in range(2):
        for batched, alone in zip(found, expected[row], strict=True):
            torch.testing.assert_close(batched[row : row + 1], alone, atol=2 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("recipe", [VAR + ",layers=1:", "pai", "act:alpha=2", "vhr"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_on_either_side_of_a_cut(recipe, pad):
    """Red: rows are still those of before a cut, which kept the longest sample alone and moved all others."""
    family = "qwen2_5_vl"
    model = shared(family)
    samples = [["text30", "image", "text20"], ["text2", "image", "image", "text3"], ["text4", "image", "text2"]]
    inputs = make_inputs(family, model, samples, pad=pad)
    with vp.wrap(model, f"random:layer=3,tokens=16 + {recipe}"):
        logits = model(**inputs).logits
        for row in range(3):
            expected = model(**make_single(family, model, samples, row)).logits[0, -3:]
            found = logits[row, inputs["attention_mask"][row].bool()][-3:]
            torch.testing.assert_close(found, expected, atol=2 * TOLERANCE, rtol=0)


def test_the_first_token_of_padded_samples():
    """Red: padding stands for the first token that the cosine compares with."""
    model = shared("llava")
    samples = [["text9", "image", "text4"], ["text2", "image", "text3"]]
    with vp.wrap(model, "var:sink_dims=cosine,layers=1:"):
        batch = model(**make_inputs("llava", model, samples), use_cache=True).past_key_values
        single = model(**make_single("llava", model, samples, 1), use_cache=True).past_key_values
    for both, alone in zip(batch.layers[1:], single.layers[1:], strict=True):
        assert torch.equal(both.marks.groups[1, 0, 8:], alone.marks.groups[0, 0])
        assert alone.marks.groups[0, 0, 0] == 3


def test_act_marks_a_later_turn_by_its_own_columns():
    """Red: attention to what came before is taken for attention to the turn's tokens."""
    model, eager = shared("llava"), shared("llava", "eager")
    first, later = (make_inputs("llava", model, [["text5", "image", "text4"]], seed=seed) for seed in (1, 2))
    for inputs in (first, later):
        del inputs["attention_mask"]
    past = first["input_ids"].shape[1]
    turn = later["input_ids"].shape[1]
    with vp.wrap(model, "act:alpha=2,layers=2"):
        cache = model(**first, use_cache=True).past_key_values
        model(**later, past_key_values=cache)
        found = cache.layers[2].marks.groups[0, :, past:]
    cache = eager(**first, use_cache=True).past_key_values  # the layers before are not edited: they are the plain model's
    shown = eager(**later, past_key_values=cache, output_attentions=True).attentions[2][0, :, :, past:].double()
    means = shown.sum(dim=1) / (turn - torch.arange(turn))
    assert torch.equal(found.bool(), means > 2 / turn)
    assert 0 < found.float().mean() < 1


def test_rows_behind_a_picture_of_llava_next():
    """Red: the row separator that ends a picture counts as a row of text behind it, which is edited."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, [["text5", "image", "text4"], ["text3", "image", "text6"]])
    for recipe in (VAR, "holov:tokens=8 + " + VAR):
        with vp.wrap(model, recipe) as run:
            model(**inputs)
            (record, *_) = run.last.edits
        assert record.masses.shape[2] == 6
        assert record.valid.sum(dim=1).tolist() == [4, 6]


# --- what else a model returns ---------------------------------------------------------------------------------------
@every_case
def test_hidden_states_and_attentions(family, recipe):
    """Red: the text-only stream's layers are recorded beside the prompt's."""
    model = shared(family, "eager")
    inputs = make_inputs(family, model, SAMPLES)
    want = {"output_hidden_states": True, "output_attentions": True}
    shapes = [[tuple(x.shape) for x in part] for part in map(model(**inputs, **want).get, ("hidden_states", "attentions"))]
    with vp.wrap(model, recipe):
        output = model(**inputs, **want)
        assert [[tuple(x.shape) for x in part] for part in (output.hidden_states, output.attentions)] == shapes
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
        answer = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **want)
    assert [len(x) for x in answer.hidden_states] == [len(shapes[0])] * 3
    assert [len(x) for x in answer.attentions] == [len(shapes[1])] * 3


def test_hooks_of_others_fire_once():
    """Red: the text-only stream calls decoder layers with their hooks."""
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    with vp.wrap(model, "vhr"):
        model(**inputs)
    assert len(seen) == len(model.model.language_model.layers)


@pytest.mark.parametrize("recipe", [VAR, CUT + VAR, "var:sink_dims=cosine,max_sink_share=1,min_image_mass=0", "act:alpha=2"])
def test_second_picture(recipe):
    """Red: marks of the first turn are lost, or stand at wrong entries, when a later turn brings a picture."""
    model = shared("llava")
    first, later = (make_inputs("llava", model, [["text5", "image", "text4"]], seed=seed) for seed in (1, 2))
    for inputs in (first, later):
        del inputs["attention_mask"]
    with vp.wrap(model, recipe):
        cache = model(**first, use_cache=True).past_key_values
        before = [layer.marks.groups.clone() for layer in cache.layers[2:5]]
        entries = [layer.keys.shape[-2] for layer in cache.layers[2:5]]
        model(input_ids=torch.tensor([[50]]), past_key_values=cache)
        model(**later, past_key_values=cache)
        for layer, old, stored in zip(cache.layers[2:5], before, entries, strict=True):
            codes = layer.marks.groups
            assert codes.shape[-1] == layer.keys.shape[-2]
            assert torch.equal(codes[..., :stored], old)
            assert not codes[..., stored].any(), "what came between is ordinary"
            assert codes[..., stored + 1 :].any()


def test_marks_follow_the_cache():
    """Red: a cache operation forgets or misplaces marks."""

    def filled(cls, *args):
        layer = cls(*args)
        layer.update(torch.randn(2, 1, 6, 4), torch.randn(2, 1, 6, 4))
        codes, heads = torch.tensor([[[0, 1, 2, 3]], [[3, 2, 1, 0]]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        layer.marks = Marks("var", codes, heads=heads)
        layer.marks.members(3, 4, torch.float32)
        return layer

    for args in ((MarkedLayer,), (PrunedLayer,)):
        layer = filled(*args)
        layer.reorder_cache(torch.tensor([1, 1]))
        assert layer.marks.groups.tolist() == [[[3, 2, 1, 0]]] * 2
        assert layer.marks.heads.tolist() == [[2.0, 1.0]] * 2
        assert layer.marks.members(3, 4, torch.float32)[0, 0].argmax(-1).tolist() == [3, 2, 1, 0]
        layer = filled(*args)
        layer.batch_repeat_interleave(2)
        assert layer.marks.groups[:, 0, 0].tolist() == [0, 0, 3, 3]
        layer.batch_select_indices(torch.tensor([2]))
        assert layer.marks.groups.tolist() == [[[3, 2, 1, 0]]]
        layer = filled(*args)
        layer.crop(-1)
        assert layer.marks.groups.shape[-1] == 4
        layer.crop(-2)
        assert layer.marks.groups.tolist() == [[[0, 1, 2]], [[3, 2, 1]]]
        assert copy.deepcopy(layer).marks.groups.tolist() == layer.marks.groups.tolist()
        layer.reset()
        assert layer.marks is None
    cache = DynamicCache()
    cache.layers.append(filled(MarkedLayer))
    (pruned,) = pruned_layers(cache, [0], (0,), lambda layer: Entries.complete(2, 6, layer.keys.device, None))
    keep_only([pruned], torch.tensor([[True, False, True, False, True, True]] * 2), 0)
    assert pruned.marks.groups.tolist() == [[[0, 2, 0, 0]], [[3, 1, 0, 0]]]
    assert pruned.keys.shape[-2] == 4


def test_callers_own_cache():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, VAR):
        _, _, expected = generate_logits(model, inputs)
        for cache in (DynamicCache(), DynamicCache(config=model.config.get_text_config())):
            _, _, logits = generate_logits(model, inputs, past_key_values=cache)
            assert torch.equal(logits, expected)


# --- flash attention's contract --------------------------------------------------------------------------------------
def fake_flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What transformers' flash attention does with its arguments: 2-D masks, its kernel looked up in the module's config."""
    assert module.config._attn_implementation == "flash_attention_2", "the kernel would be looked for under another name"
    assert next(layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)).weight.dtype == query.dtype
    rows, keys = query.shape[2], key.shape[2]
    visible = (torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None])[None, None]
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        visible = visible & attention_mask[:, None, None, -keys:].bool()
        visible = visible | (torch.arange(keys) == torch.arange(keys - rows, keys)[:, None])
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, visible, scaling=scaling)


@pytest.fixture
def flash(monkeypatch):
    """A model whose language model runs our stand-in for flash attention."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", fake_flash)
    model = build("llava")
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_attention_2")
    return model


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("pruned", ["", CUT], ids=["", "pruned"])
def test_flash_contract(flash, recipe, pruned):
    """Red: under flash attention masks are 2-D or none, and a module that names our key would ask for such a kernel."""
    inputs = make_inputs("llava", flash, SAMPLES)
    model = shared("llava")
    with vp.wrap(model, pruned + recipe):
        _, ids, expected = generate_logits(model, inputs, 4)
    with vp.wrap(flash, pruned + recipe):
        _, flash_ids, logits = generate_logits(flash, inputs, 4)
    assert torch.equal(ids, flash_ids)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_flex_attention_says_what_sdpa_says(recipe):
    """Red: an edit, a text-only stream or a decoding step behind a cut depends on how the model's own attention runs."""
    model, flex = shared("llava"), shared("llava", FLEX)
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, CUT + recipe):
        _, ids, expected = generate_logits(model, inputs, 4)
    with vp.wrap(flex, CUT + recipe):
        _, flex_ids, logits = generate_logits(flex, inputs, 4)
    assert torch.equal(ids, flex_ids)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_flash_looks_at_the_modules_own_config(flash):
    """Red: the stand-in would not notice."""
    module = flash.model.language_model.layers[0].self_attn
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = "vlmprune"
    with pytest.raises(AssertionError, match="another name"):
        fake_flash(module, *[torch.zeros(1, 4, 2, 16)] * 3, None)


# --- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (
            "var",
            r"sink dimensions of this text model \(llama, 6 layers, dim 64\) are not known: find them with `vlmprune sinks",
        ),
        ("var:sink_dims=64", "sink_dims has 64, but the model has dimensions 0 to 63"),
        ("var:sink_dims=first", "sink_dims must be 'auto', 'cosine' or dimensions"),
        ("var:preset=generl,sink_dims=1", "unknown preset of var 'generl': did you mean 'general'"),
        ("var:p=1.5,sink_dims=1", r"p must be a number in \[0, 1\], found 1.5"),
        ("var:rho=-0.1,sink_dims=1", r"rho must be a number in \[0, 1\], found -0.1"),
        ("var:rho=high,sink_dims=1", r"rho must be a number in \[0, 1\], found 'high'"),
        ("var:p=0.5,keep=0.2", "give p, keep or a preset; only one"),
        ("var:keep=2,sink_dims=1", r"keep must be a number in \[0, 1\], found 2"),
        ("var:tua=2", "unknown parameter of var 'tua': did you mean 'tau'"),
        ("var:sink_dims=1,layers=2:9", "is to edit layers '2:9', but the model has layers 0 to 5"),
        ("var:sink_dims=1,layers=6", "is to edit layers '6', but the model has layers 0 to 5"),
        ("var:sink_dims=1,tau=8", r"tau=8 is never reached: in a residual of 64 numbers φ stays below √64 = 8.0"),
        ("var:sink_dims=1,sink_energy=1", r"sink_energy must be a number in \[0, 1\), found 1"),
        ("pai:layers=two", "layers are written as indices and slices"),
        ("pai + zerotuning:gain=2", "pai and zerotuning both edit layer"),
        ("pai + pai:layers=0", "pai is in the recipe twice"),
        ("vhr:distance=l1", "unknown value of distance in vhr 'l1'"),
        ("vra", "unknown method 'vra': did you mean .*'var'"),
    ],
)
def test_bad_input(recipe, sentence):
    model = shared("llava")
    before = dict(vars(model.model.language_model))
    with pytest.raises(vp.UsageError, match=sentence):
        vp.wrap(model, recipe)
    assert vars(model.model.language_model) == before


@pytest.mark.parametrize(("recipe", "layers"), [("var:sink_dims=1", "2:-1"), ("act", "2:-1"), ("pai", "2:"), ("vhr", None)])
def test_a_model_with_none_of_the_layers(recipe, layers):
    """Red: a method whose own layers a shallow model lacks does nothing, in silence."""
    model = build("llava")
    del model.model.language_model.layers[2:]
    model.config.text_config.num_hidden_layers = 2
    if layers is None:
        vp.wrap(model, recipe).remove()
        return
    found = f"edits layers '{layers}' by default; this model has none of them: its layers are 0 to 1;"
    with pytest.raises(vp.UsageError, match=re.escape(found)):
        vp.wrap(model, recipe)
    vp.wrap(model, f"{recipe}{',' if ':' in recipe else ':'}layers=1").remove()


def test_needs_a_cls_token():
    with pytest.raises(vp.UsageError, match="paint needs the attention of the vision tower's CLS token"):
        vp.wrap(shared("qwen2_vl"), "paint")


def test_foreign_conversations_are_refused():
    """Red: a conversation goes on without marks, or with those of another method."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    word = torch.tensor([[30]])
    plain = model(**inputs, use_cache=True).past_key_values
    with vp.wrap(model, VAR) as run:
        with pytest.raises(vp.UsageError, match="began without redistribution, this recipe has var"):
            model(input_ids=word, past_key_values=plain)
        steered = model(**inputs, use_cache=True).past_key_values
        run.enabled = False
        model(input_ids=word, past_key_values=steered)
    with vp.wrap(model, "pai"), pytest.raises(vp.UsageError, match=r"began under var.*this recipe has pai"):
        model(input_ids=word, past_key_values=steered)


def test_other_caches_are_refused():
    from transformers import StaticCache

    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    cache.offloading = True
    with vp.wrap(model, VAR), pytest.raises(vp.UsageError, match=r"found an offloaded static cache"):
        model(**inputs, past_key_values=cache)


def test_a_prompt_that_is_only_a_picture():
    model = shared("llava")
    with vp.wrap(model, "vhr"), pytest.raises(vp.UsageError, match="a prompt is only a picture"):
        model(**make_inputs("llava", model, [["image"]]))
    with vp.wrap(model, VAR):
        model(**make_inputs("llava", model, [["image"]]))


def test_gradients_flow():
    """Red: an edit cuts the graph, or turns it into NaN."""
    model = build("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    for recipe in (VAR, "pai", "zerotuning:gain=2", "act", "vhr"):
        with torch.enable_grad(), vp.wrap(model, recipe):
            model.zero_grad()
            model(**inputs).logits[:, -1].sum().backward()
        gradient = model.model.language_model.layers[1].self_attn.q_proj.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_nothing_global():
    assert "vlmprune.live.redistribution" in sys.modules
    module = sys.modules["vlmprune.live.redistribution"]
    assert not [name for name, value in vars(module).items() if isinstance(value, dict | list) and not name.startswith("__")]


def test_candidates_are_never_marked():
    """Red: tokens that assisted decoding guessed behind the prompt become sinks, which plain decoding never makes of them."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[30, 31, 32]])), dim=1)
    everything = "sink_dims=5,tau=0,max_sink_share=1,min_image_mass=0"
    with vp.wrap(model, f"var:{everything}"):
        cache = model(input_ids=ids, mm_encoder_outputs={"image": encoded}, logits_to_keep=4, use_cache=True).past_key_values
    for layer in cache.layers[2:5]:
        assert layer.marks.groups[0, 0, :-3].all()
        assert not layer.marks.groups[0, 0, -3:].any()
