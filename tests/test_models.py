"""A model is looked at, not believed: other towers, other text models, other people's hooks, weights that are elsewhere."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from oracles import assert_equals_masked, effect_of, generate_logits
from snapshot import Snapshot
from text_models import build_llava, prompts
from tiny_models import build, make_inputs, shared
from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, SiglipVisionConfig

import vlmprune as vp
from vlmprune.live.decoder import attention_of
from vlmprune.live.unhooked import unhooked

RAGGED = [["text2", "image", "text5"], ["image", "text9"]]


# -- vision towers ---------------------------------------------------------------------------------------------------------


def two_pictures(vision: str) -> dict:
    random = torch.Generator().manual_seed(0)
    if vision == "pixtral":  # padded to one size, and different
        return {
            "pixel_values": torch.randn(2, 3, 32, 40, generator=random),
            "image_sizes": torch.tensor([[24, 40], [32, 16]]),
        }
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=random)}


@pytest.mark.parametrize(
    ("vision", "layer", "strategy"),
    [
        ("clip", -2, "default"),
        ("clip", -1, "full"),
        ("clip", [-2, -1], "default"),
        ("siglip", -1, "full"),
        ("siglip", -2, "default"),
        ("siglip", [-3, -1], "full"),
        ("dinov2", -2, "default"),
        ("dinov2", -1, "full"),
        ("pixtral", -1, "full"),
    ],
    ids=str,
)
@torch.no_grad()
def test_tokens_are_counted_as_the_tower_makes_them(vision, layer, strategy):
    """Red: every tower had a CLS token, so that plain forwards were refused with a false count ("full", or without one)."""
    model, pixels = build_llava(vision, layer=layer, strategy=strategy), two_pictures(vision)
    counts = [len(features) for features in model.get_image_features(**pixels, return_dict=True).pooler_output]
    inputs = prompts(model, counts, pixels)
    stock = model(**inputs).logits
    with vp.wrap(model, "divprune:layer=0,fraction=0.5") as run:
        model(**inputs)
        plain = [(kept.original, kept.index.tolist()) for kept in run.last.kept]
        _, generated, logits = generate_logits(model, inputs, 4)
        assert [(kept.original, kept.index.tolist()) for kept in run.last.kept] == plain
        assert [original for original, _ in plain] == counts
        effect = effect_of(model, inputs, run)
    assert_equals_masked(model, inputs, effect, generated, logits)
    with vp.wrap(model, "random:layer=0,fraction=1.0"):
        assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
def test_a_strategy_that_is_given_with_the_call():
    model, pixels = build_llava("siglip", layer=-1, strategy="default"), two_pictures("siglip")
    inputs = prompts(model, [16, 16], pixels)
    with vp.wrap(model, "divprune:layer=0,fraction=0.5") as run:
        model(**inputs, vision_feature_select_strategy="full")
    assert [kept.original for kept in run.last.kept] == [16, 16]


@pytest.mark.parametrize(
    ("vision", "layer", "because"),
    [
        ("siglip", -1, "its vision tower (siglip_vision_model) has no CLS token"),
        ("dinov2", -2, "its vision tower (dinov2_with_registers) is not built like CLIP's"),
        ("clip", [-2, -1], "its features come from several tower layers ([-2, -1])"),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["cls:fraction=0.5", "flowcut:fraction=0.5", "visionzip:fraction=0.5"])
def test_methods_that_need_the_tower_are_refused_by_name(vision, layer, because, recipe):
    model = build_llava(vision, layer=layer, strategy="default" if vision == "clip" else "full")
    with pytest.raises(vp.UsageError, match=f"{recipe.split(':')[0]} needs .*{re.escape(because)}"):
        vp.wrap(model, recipe)


@pytest.mark.parametrize("layer", [-1, [-2, -1]], ids=str)
def test_views_of_a_tower_that_is_not_followed(layer):
    """Red: LLaVA-NeXT with SigLIP, or features from several layers, passed `wrap` and died of a KeyError in the tower."""
    model = build("llava_next")
    if layer == -1:
        like = model.config
        vision = SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=24, patch_size=8
        )
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=vision,
                text_config=like.text_config,
                image_token_index=like.image_token_id,
                image_grid_pinpoints=like.image_grid_pinpoints,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
        ).eval()
    else:
        model.config.vision_feature_layer = layer
    with pytest.raises(vp.UsageError, match="needs the patch and the crop of each token, but its "):
        vp.wrap(model, "cdpruner:fraction=0.5")
    vp.wrap(model, "random:layer=0,fraction=0.5").remove()
    if layer == -1:
        inputs = make_inputs("llava_next", model, RAGGED)
        with vp.wrap(model, "random:layer=1,fraction=0.5") as run, torch.no_grad():
            model(**inputs)
        assert run.report().stages[0].kept


# -- text models -----------------------------------------------------------------------------------------------------------

TEXT_MODELS = ["phi", "stablelm", "phi3", "qwen3", "cohere", "olmo2", "granite", "deepseek_v3", "nemotron"]
"""Parallel blocks, fused projections, norms of queries and keys, no norm before attention, scaled embeddings and residuals,
latent keys, layers that keep their keyword arguments to themselves."""
RECIPES = [
    "random:layer=0,fraction=0.5",
    "fastv:layer=2,fraction=0.5",
    "pdrop:layer=2|4,fraction=0.5|0.25",
    "random:layer=2,fraction=0.5,positions=compact",
]


@pytest.mark.parametrize(
    ("decoder", "attn"), [*((decoder, "sdpa") for decoder in TEXT_MODELS), ("phi", "eager"), ("stablelm", "eager")]
)
@torch.no_grad()
def test_other_text_models_are_exact(decoder, attn):
    """Red: Phi-2 crashed at every cut, Phi-3 under pdrop, StableLM under fastv."""
    model = build_llava(decoder=decoder, attn=attn)
    inputs = make_inputs("llava", model, RAGGED)
    stock = generate_logits(model, inputs, 4)[2]
    for recipe in RECIPES:
        with vp.wrap(model, recipe) as run:
            _, generated, logits = generate_logits(model, inputs, 4)
            effect = effect_of(model, inputs, run)
        assert_equals_masked(model, inputs, effect, generated, logits)
    with vp.wrap(model, "fastv:layer=2,fraction=1.0 + pdrop:layer=3|4,fraction=1.0|1.0"):
        assert torch.equal(generate_logits(model, inputs, 4)[2], stock)
    assert torch.equal(generate_logits(model, inputs, 4)[2], stock)


@pytest.mark.parametrize("decoder", TEXT_MODELS)
@torch.no_grad()
def test_one_layer_ahead_is_what_the_layer_computes(decoder):
    """Red: with norms of queries and keys (Qwen3, OLMo 2), and rotary embeddings that are not Llama's, others were kept in
    silence; projections of other names crashed."""
    model = build_llava(decoder=decoder, attn="eager")
    inputs = make_inputs("llava", model, RAGGED)
    attention = model(**inputs, output_attentions=True).attentions[3].mean(dim=1)[:, -1]
    with vp.wrap(model, "pdrop:layer=3,fraction=0.5") as run:
        model(**inputs)
    for row, kept in enumerate(run.last.kept):
        visual = attention[row][inputs["input_ids"][row] == model.config.image_token_id]
        assert kept.index.tolist() == sorted(visual.topk(8).indices.tolist())


@pytest.mark.parametrize("decoder", ["phi", "stablelm", "phi3", "qwen3", "cohere"])
@pytest.mark.parametrize("recipe", ["pai", "act:layers=1:", "zerotuning"])
@torch.no_grad()
def test_redistribution_without_strength_is_the_model(decoder, recipe):
    """Queries, keys, scaling and visibility are the model's own: an edit that is tiny changes nothing but rounding."""
    model = build_llava(decoder=decoder)
    inputs = make_inputs("llava", model, RAGGED)
    tiny = {
        "pai": "pai:alpha=1e-9",
        "act:layers=1:": "act:layers=1:,beta=0.999999999",
        "zerotuning": "zerotuning:gain=1.000001",
    }
    stock = generate_logits(model, inputs, 4)[2]
    with vp.wrap(model, tiny[recipe]) as run:
        logits = generate_logits(model, inputs, 4)[2]
        assert run.report().edits
    torch.testing.assert_close(logits, stock, atol=5e-5, rtol=0)


@torch.no_grad()
def test_scores_are_those_of_a_later_turn():
    """What earlier turns left in the cache takes its share of the attention one layer ahead, also with fused projections."""
    model = build_llava(decoder="phi3", attn="eager")
    first, second = (make_inputs("llava", model, [["text4", "image", "text3"]], seed=seed) for seed in (0, 1))
    ids = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    both = {"pixel_values": torch.cat((first["pixel_values"], second["pixel_values"])), "attention_mask": torch.ones_like(ids)}
    attention = model(input_ids=ids, **both, output_attentions=True).attentions[3].mean(dim=1)[0, -1]
    cache = model(**first, use_cache=True).past_key_values
    second["attention_mask"] = both["attention_mask"]
    with vp.wrap(model, "pdrop:layer=3,fraction=0.5") as run:
        model(**second, past_key_values=cache)
    visual = attention[-second["input_ids"].shape[1] :][second["input_ids"][0] == model.config.image_token_id]
    assert run.last.kept[0].index.tolist() == sorted(visual.topk(8).indices.tolist())


@pytest.mark.parametrize(
    ("decoder", "more", "recipe", "sentence"),
    [
        ("gpt_neox", {}, "divprune", "looked for past_key_values by name, found attention_mask, layer_past"),
        ("deepseek_v2", {}, "divprune", "looked for position_embeddings, cosines and sines"),
        ("biogpt", {}, "divprune", "looked for one rotary embedding, found none among embed_tokens"),
        ("gemma2", {}, "fastv", "fastv computes attention as softmax of scaled products, but Gemma2DecoderLayer adds softcap"),
        ("gpt_oss", {}, "pdrop:layer=2,fraction=0.5", "GptOssDecoderLayer adds s_aux"),
        ("gpt_oss", {}, "pai", "pai computes attention as softmax of scaled products"),
        ("doge", {}, "fastv", "DogeDecoderLayer adds a mask of its own"),
        ("granite", {}, "vhr", "vhr also runs the prompt without its picture, from the embeddings on, but GraniteModel"),
        ("stablelm", {}, "vhr", "StableLmDecoderLayer does not hand its keyword arguments on"),
        ("olmo3", {}, "random:layer=1,fraction=0.5,positions=compact", 'positions="compact" needs rotary embeddings that'),
        ("olmo3", {}, "vhr", "those of Olmo3Model depend on the layer"),
    ],
)
def test_what_cannot_be_supported_is_refused_when_wrapping(decoder, more, recipe, sentence):
    """Red: these passed `wrap`, and crashed or answered something else at the first prompt."""
    model = build_llava(decoder=decoder, **more)
    before = Snapshot(model)
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, recipe)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not before.differences(Snapshot(model))


@pytest.mark.parametrize("decoder", ["gemma2", "gpt_oss", "olmo3"])
@torch.no_grad()
def test_cuts_that_look_at_no_attention_do_not_mind(decoder):
    """Soft caps, attention sinks and rotary embeddings by layer are the model's own business."""
    model = build_llava(decoder=decoder)
    inputs = make_inputs("llava", model, RAGGED)
    with vp.wrap(model, "divprune:layer=0,fraction=0.6 + random:layer=3,fraction=0.3") as run:
        _, generated, logits = generate_logits(model, inputs, 4)
        effect = effect_of(model, inputs, run)
    assert_equals_masked(model, inputs, effect, generated, logits)


def test_a_part_that_is_missing_is_named():
    model = build("llava")
    text = model.model.language_model
    text.other = text.norm
    del text.norm
    vp.wrap(model, "divprune").remove()  # the only norm there is, whatever it is called
    text.second_norm = nn.LayerNorm(64)
    with pytest.raises(
        vp.UsageError, match=r"LlamaModel is not built as expected: looked for one final norm, found other, second_"
    ):
        vp.wrap(model, "divprune")
    del model.model.language_model
    with pytest.raises(vp.UsageError, match=r"LlavaModel is not built as expected: looked for its language model"):
        vp.wrap(model, "divprune")


# -- other people's hooks, and weights that are elsewhere ------------------------------------------------------------------


@torch.no_grad()
def test_other_peoples_hooks_run_once():
    """Red: what a layer would compute was asked of the live modules, so that hooks on its projections counted a forward pass
    more."""
    model = build("llava")
    inputs = make_inputs("llava", model, RAGGED)
    layer = model.model.language_model.layers[2]
    calls: dict[str, int] = {}
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        module.register_forward_pre_hook(
            lambda *_, name=name: calls.update({f"before {name}": calls.get(f"before {name}", 0) + 1})
        )
    with vp.wrap(model, "pdrop:layer=2,fraction=0.5") as run:
        assert not calls  # looking at a model is no forward pass either
        model(**inputs)
        assert set(calls.values()) == {1}
        assert run.report().stages[0].kept == (8, 8)


@torch.no_grad()
def test_looking_leaves_nothing_behind():
    model = shared("llava")
    before = Snapshot(model)
    state = torch.get_rng_state()
    model.train()
    try:
        with vp.wrap(model, "fastv:layer=1,fraction=0.5 + pdrop:layer=2,fraction=0.3 + vhr"):
            pass
        assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert not before.differences(Snapshot(model))


@pytest.mark.parametrize("place", ["offloaded", "dispatched"])
@pytest.mark.parametrize(
    "recipe", ["fastv:layer=2,fraction=0.5", "pdrop:layer=2,fraction=0.5", "divprune:layer=0,fraction=0.5"]
)
@torch.no_grad()
def test_weights_that_accelerate_fetches(place, recipe):
    model = build("llava")
    inputs = make_inputs("llava", model, RAGGED)
    with vp.wrap(model, recipe):
        expected = generate_logits(model, inputs, 4)[2]
    if place == "offloaded":
        cpu_offload(model, execution_device="cpu")
        assert model.model.language_model.layers[2].self_attn.q_proj.weight.is_meta
    else:
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with vp.wrap(model, recipe) as run:
        assert torch.equal(generate_logits(model, inputs, 4)[2], expected)
        assert run.report().stages[0].kept == (8, 8)
    if place == "offloaded":
        assert model.model.language_model.layers[2].self_attn.q_proj.weight.is_meta


def test_a_copy_shares_weights_and_nothing_else():
    layer = build("llava").model.language_model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: pytest.fail("a hook of the layer ran"))
    copied = unhooked(layer)
    assert {name: id(p) for name, p in copied.named_parameters()} == {name: id(p) for name, p in layer.named_parameters()}
    copied.self_attn.config = None
    copied.self_attn.o_proj = None
    assert layer.self_attn.config is not None
    assert layer.self_attn.o_proj is not None


def test_attention_that_goes_past_transformers_functions():
    class Own(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.layer_idx = config, 0

        def forward(self, hidden_states, **_):
            return hidden_states, None

    model = build("llava")
    for layer in model.model.language_model.layers:
        layer.self_attn = Own(layer.self_attn.config)
    with pytest.raises(
        vp.UsageError, match="LlamaDecoderLayer computes its attention without transformers' attention functions"
    ):
        vp.wrap(model, "fastv:layer=2,fraction=0.5")
    vp.wrap(model, "divprune").remove()
    with pytest.raises(vp.UsageError, match="without transformers' attention functions"):
        attention_of(model.model.language_model.layers[0], "self_attn", torch.zeros(1, 1, 64))


# -- models that are shallower than papers' --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "recipe", "proposed"),
    [
        (8, "pdrop", "pdrop:layer=2|4|6,fraction=0.5|0.25|0.125"),
        (6, "vscan", "vscan:layer=0|3,tokens=96|32"),
        (4, "mustdrop", "mustdrop:layer=1|2|3,fraction=0.4|0.2|0.14"),
        (3, "random:layer=1|2|3|4,tokens=9|8|7|6", "random:layer=0|1|2,tokens=9|8|7"),
        (8, "fastv:layer=20,tokens=3", "fastv:layer=5,tokens=3"),
        (6, "random:layer=20|40,fraction=0.5|0.2,seed=4", "random:layer=4|5,fraction=0.5|0.2,seed=4"),
        (6, "mustdrop:layer=2,fraction=0.3,cache_layer=6", "mustdrop:layer=2,fraction=0.3,cache_layer=1"),
        (6, "pai:layers=10:20", "layers=2:4"),
        (6, "vhr:layers=1|18:", "layers=0|3:"),
        (6, "act:layers=-9:", "layers=-3:"),
    ],
)
def test_layers_the_model_lacks_are_proposed_to_scale(depth, recipe, proposed):
    """Red: "choose one". What is proposed works; where nothing fits, nothing is proposed."""
    model = build_llava(num_hidden_layers=depth)
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, recipe)
    sentence = str(error.value)
    assert f"the model has layers 0 to {depth - 1}" in sentence
    if recipe == "mustdrop":
        assert (
            "mustdrop has 4 stages in the language model, and may prune at 3 of its 4 layers, 1 to 3: give it fewer" in sentence
        )
    _, found, advice = sentence.partition("for example ")
    assert advice == f"{proposed}."
    advice = advice.rstrip(".")
    vp.wrap(model, advice if found and ":" in advice.split("=")[0] else f"{recipe.split(':')[0]}:{advice}").remove()


def test_a_proposal_does_not_meet_another_method():
    """fastv would go to layer 1, where random cuts already."""
    model = build_llava(num_hidden_layers=6)
    with pytest.raises(vp.UsageError, match=r"the model has layers 0 to 5: choose among them\.$"):
        vp.wrap(model, "random:layer=1,fraction=0.6 + fastv:layer=6,fraction=0.5")
