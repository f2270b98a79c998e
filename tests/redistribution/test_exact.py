"""Every method in a whole model: equal to the papers' loops, at the prompt and at every step of decoding."""

from __future__ import annotations

import pytest
import torch
from cases import REDISTRIBUTION
from oracles import TOLERANCE, decoder_layers, generate_logits, masked_logits
from redistribution import explicit
from redistribution.explicit import Explicit
from tiny_models import ALL_FAMILIES, LAYERS, attentions_of, build, implementations_of, make_inputs, make_single, shared

import vlmprune as vp
from vlmprune.kernels.grouped_attention import reference

SAMPLES = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["text9"]]
DIMS = [5, 40]
TAU = 2.0
RECIPES = {name: row.recipe(row.tiny[name]) for row in REDISTRIBUTION for name in row.tiny}
VAR = RECIPES["var"]
CLS_ONLY = {row.name for row in REDISTRIBUTION if row.cls}
CASES = [
    pytest.param(family, recipe, id=f"{family}-{name}")
    for name, recipe in RECIPES.items()
    for family in ALL_FAMILIES
    if name not in CLS_ONLY or family.startswith("llava")
]
every_case = pytest.mark.parametrize(("family", "recipe"), CASES)
every_attention = pytest.mark.parametrize(
    ("family", "recipe", "attn"),
    [pytest.param(*case.values, attn, id=f"{case.id}-{attn}") for case in CASES for attn in attentions_of(case.values[0])],
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def edit_of(name: str, eager, inputs):
    """The oracle's layers and edit."""
    if name.startswith("var"):
        layers = range(LAYERS) if name.endswith("layers") else range(2, LAYERS - 1)
        return layers, explicit.var(DIMS, TAU, 0.2, 0.6, 0.1)
    if name == "pai":
        return range(2, LAYERS), explicit.pai(0.5)
    if name == "zerotuning":
        return (1, 3, 4, 5), explicit.zerotuning(4.0)
    if name == "act":
        return range(2, LAYERS - 1), explicit.act(0.4, 2.0)
    return range(2, LAYERS), explicit.paint(0.7, 0.4, paint_sets(eager, inputs))


def paint_sets(eager, inputs):
    """Per sample, local and summary columns, from the eager tower's own attention maps."""
    attentions = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    used = eager.config.vision_feature_layer
    columns = (inputs["input_ids"] == eager.config.image_token_id).nonzero().tolist()
    sets = [(set(), set()) for _ in inputs["input_ids"]]
    patches = attentions[0].shape[-1] - 1
    for picture in range(len(inputs["pixel_values"])):
        first = attentions[0][picture, :, 0, 1:].sum(0).tolist()
        late = attentions[used][picture, :, 0, 1:].sum(0).tolist()
        ranked = sorted(late)

        def quantile(q, ranked=ranked):
            at = q * (len(ranked) - 1)
            low = int(at)
            return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])

        bound = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
        summary = {j for j in range(patches) if late[j] > bound}
        local = set(sorted(range(patches), key=lambda j: -first[j])[: patches // 4]) - summary
        mine = columns[picture * patches : (picture + 1) * patches]
        for where, chosen in ((0, local), (1, summary)):
            sets[mine[0][0]][where].update(mine[j][1] for j in chosen)
    return sets


@pytest.mark.parametrize(
    ("family", "attn", "name"),
    [
        (family, attn, name)
        for name in RECIPES
        if name != "vhr"
        for family in (("llava",) if name == "paint" else ("llava", "qwen2_5_vl"))
        for attn in attentions_of(family)
    ],
)
def test_equals_the_loops(family, attn, name):
    """Red: rows, layers, sinks, groups, padding, or what decoding remembers differ from the paper's."""
    model, eager = shared(family, attn), shared(family, "eager")
    inputs = make_inputs(family, model, SAMPLES)
    _, _, plain = generate_logits(model, inputs, 4)
    with vp.wrap(model, RECIPES[name]):
        _, generated, logits = generate_logits(model, inputs, 4)
    layers, edit = edit_of(name, eager, inputs)
    with Explicit(eager, inputs, layers, edit):
        expected = masked_logits(eager, inputs, {}, generated[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    for row, parts in enumerate(SAMPLES):
        if "image" in parts:
            assert (logits[row] - plain[row]).abs().max() > 0.01, f"the test is blind: nothing changed in row {row}"


@pytest.mark.parametrize("attn", attentions_of("llava"))
def test_var_with_pruning_equals_the_loops(attn):
    """Red: image spans or sinks are not those that survived the cuts."""
    model, eager = shared("llava", attn), shared("llava", "eager")
    inputs = make_inputs("llava", model, SAMPLES)
    recipe = f"random:layer=0|3,fraction=0.8|0.5,seed=1 + {VAR},layers=1:"
    with vp.wrap(model, recipe) as run:
        _, generated, logits = generate_logits(model, inputs, 4)
        keep = run.last.keep
    edit = explicit.var(DIMS, TAU, 0.2, 0.6, 0.1)
    with Explicit(eager, inputs, range(1, LAYERS), edit):
        expected = masked_logits(eager, inputs, keep, generated[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    with vp.wrap(model, "random:layer=0|3,fraction=0.8|0.5,seed=1"):
        _, _, pruned = generate_logits(model, inputs, 4)
    assert (logits[:2] - pruned[:2]).abs().amax(dim=(1, 2)).min() > 0.01, "the test is blind: VAR did nothing"


def vhr_heads(model, inputs, texts, layers):
    """Algorithm 1, one stock forward per layer and stream: heads are scaled in what enters W_O."""
    heads = model.config.text_config.num_attention_heads
    chosen: dict[int, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}

    def enter(layer):
        def hook(module, args):
            split = args[0].unflatten(-1, (heads, -1))
            seen[layer] = split[0, -1].double()
            if layer in chosen:
                return ((split * chosen[layer][:, None]).flatten(-2),)

        return hook

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(enter(n)) for n, layer in enumerate(decoder_layers(model))]
    try:
        for layer in layers:
            model(**inputs)
            seeing = seen[layer]
            model(**texts)
            blind = seen[layer]
            far = (seeing - blind).norm(dim=-1)
            size = blind.square().sum(-1)
            for h in range(heads):
                if far[h] > far.mean() + far.std(correction=0) and size[h] > size.mean() + size.std(correction=0):
                    far = far.clone()
                    far[h] = 0
                    break
            ranked = far.sort().values
            middle = (ranked[(heads - 1) // 2] + ranked[heads // 2]) / 2
            chosen[layer] = torch.where(far > middle, 2.0, 1.0).float()
        return chosen, model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "llava_next", "qwen2_5_vl")))
def test_vhr_equals_algorithm_1(family, attn):
    """Red: the text-only stream sees pictures, other positions, or un-reinforced layers; or heads are chosen otherwise."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, [["text6", "image", "text5"]])
    ids = inputs["input_ids"]
    words = ids[:, ids[0] != model.config.image_token_id]
    texts = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if "mm_token_type_ids" in inputs:
        texts["mm_token_type_ids"] = torch.zeros_like(words)
    chosen, expected = vhr_heads(model, inputs, texts, vp.VHR().layers_of(LAYERS))
    with vp.wrap(model, "vhr") as run:
        logits = model(**inputs).logits
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report()
    for layer, factors in chosen.items():
        assert cache.layers[layer].marks.heads[0].tolist() == factors.tolist(), layer
    assert "vhr" in str(report)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    if family != "qwen2_5_vl":
        return
    deltas = model.model.rope_deltas
    assert deltas is not None, "the text-only stream must not touch the model's own positions"


# --- batches, steps, conversations -----------------------------------------------------------------------------------
@every_case
def test_batch_equals_singles(family, recipe):
    """Red: padding, other samples' pictures, or rows of samples without one leak into a sample."""
    model = shared(family)
    with vp.wrap(model, recipe):
        _, generated, logits = generate_logits(model, make_inputs(family, model, SAMPLES), 4)
        for row in range(3):
            _, alone, expected = generate_logits(model, make_single(family, model, SAMPLES, row), 4)
            assert torch.equal(generated[row : row + 1], alone)
            torch.testing.assert_close(logits[row : row + 1], expected, atol=TOLERANCE, rtol=0)
    _, _, plain = generate_logits(model, make_inputs(family, model, SAMPLES), 1)
    torch.testing.assert_close(logits[2, 0], plain[2, 0], atol=TOLERANCE, rtol=0)


@every_case
@pytest.mark.parametrize("pruned", ["", "random:layer=0|3,fraction=0.7|0.4,seed=0 + "], ids=["", "pruned"])
def test_without_a_cache(family, recipe, pruned):
    """Red: what is marked at the prompt is marked anew, or for generated tokens, when the prompt is run again."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, pruned + recipe):
        _, cached, expected = generate_logits(model, inputs, 5)
        _, uncached, logits = generate_logits(model, inputs, 5, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@every_case
def test_interleaved_conversations(family, recipe):
    """Red: anything of one conversation is kept outside its cache."""
    model = shared(family)
    prompts = [make_inputs(family, model, [SAMPLES[0]], seed=seed) for seed in (1, 2)]

    def step(inputs, cache, length):
        token = torch.full((1, 1), 20 + length)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + length)
        kwargs = {"position_ids": torch.full((3, 1, 1), 50 + length)} if "image_grid_thw" in inputs else {}
        return model(input_ids=token, attention_mask=mask, past_key_values=cache, **kwargs).logits

    def alone(inputs):
        output = model(**inputs, use_cache=True)
        return [output.logits, *(step(inputs, output.past_key_values, n) for n in (1, 2, 3))]

    with vp.wrap(model, recipe):
        expected = [alone(inputs) for inputs in prompts]
        outputs = [model(**inputs, use_cache=True) for inputs in prompts]
        found = [[output.logits] for output in outputs]
        for n in (1, 2, 3):
            for index, inputs in enumerate(prompts):
                found[index].append(step(inputs, outputs[index].past_key_values, n))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# --- what must not change --------------------------------------------------------------------------------------------
NEUTRAL = [row.recipe(arguments) for row in REDISTRIBUTION for arguments in row.neutral]


@pytest.mark.parametrize("attn", attentions_of("llava"))
@pytest.mark.parametrize("recipe", NEUTRAL)
def test_neutral_is_bit_identical(attn, recipe):
    """Red: the machinery disturbs a model in which nothing is edited."""
    model = shared("llava", attn)
    inputs = make_inputs("llava", model, SAMPLES)
    plain = model(**inputs).logits
    with vp.wrap(model, recipe):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


@every_attention
def test_removal_is_bit_identical(family, recipe, attn):
    model = shared(family, attn)
    inputs = make_inputs(family, model, SAMPLES)
    plain = model(**inputs).logits
    run = vp.wrap(model, recipe)
    assert not torch.equal(model(**inputs).logits, plain)
    run.remove()
    assert torch.equal(model(**inputs).logits, plain)


@every_attention
def test_no_leak_from_later_tokens(family, recipe, attn):
    """Red: an edit ignores the causal mask, which SDPA leaves implicit. ACT and VHR look at the whole prompt, by design."""
    if not vp.REDISTRIBUTORS[recipe.partition(":")[0]].causal:
        assert recipe.startswith(("act", "vhr"))
        return
    model = shared(family, attn)
    inputs = make_inputs(family, model, [SAMPLES[1]])
    del inputs["attention_mask"]
    with vp.wrap(model, recipe):
        before = model(**inputs).logits
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, -1] = 90 if inputs["input_ids"][0, -1] != 90 else 91
        after = model(**changed).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("recipe", [VAR, "pai", "zerotuning:gain=2", "act", "vhr"])
def test_nothing_of_size_n_by_n(recipe, monkeypatch):
    """Red: a whole attention map of 4,096 tokens exists at one time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, x.untyped_storage().nbytes() // x.element_size())
            return out

    model = build("llava")
    inputs = make_inputs("llava", model, [["text40", "image", "text4040"]])
    n = inputs["input_ids"].shape[1]
    assert n == 4096
    del inputs["attention_mask"]
    with vp.wrap(model, recipe), Largest():
        model(**inputs, logits_to_keep=1)
    assert Largest.numbers < n * n / 4
    assert Largest.numbers >= reference.CHUNK / 2 or recipe in ("pai", "vhr")
