"""Patches that are dropped before the vision tower: what is left is computed as if the others had never been there, at its true
place; and everything behind the tower follows."""

from __future__ import annotations

import functools
import itertools
import os
import zlib

import pytest
import torch
import transformers as tf
from families import configs
from families.oracles import MOVED, TOLERANCE, dropped_logits, masked_logits
from families.running import generate
from families.table import TINY, make_inputs, shared
from methods.loops.pixelprune import pixelprune
from pixels.oracles import hidden_patches, shorter_features
from pixels.pictures import NAMES, RAGGED, crops_of, packed_of, repetitive, tokens_of

import vlmprune as vp
from vlmprune.tiny import pages

pytestmark = pytest.mark.usefixtures("no_grad")

RECIPES = ("pixelprune", "pixelprune:fraction=0.4", "random:site=pixels,fraction=0.5", "uniform:site=pixels,tokens=5")
PACKED = tuple(name for name in NAMES if name != "llava")
WHOLE = os.environ.get("VLMPRUNE_PIXELS") == "all"


def cells(names, others):
    """A third of all pairs, always the same; all of them with VLMPRUNE_PIXELS=all."""
    pairs = list(itertools.product(names, others))
    return pairs if WHOLE else [pair for pair in pairs if zlib.crc32("/".join(pair).encode()) % 3 == 0]


@functools.cache
def siglip():
    """LLaVA with a tower without a CLS token."""
    config = configs.llava()
    config.vision_config = configs._siglip(attn_implementation="sdpa")
    config.vision_config.image_size = configs.NEXT_SIDE * configs.PATCH
    config.vision_feature_select_strategy = "full"
    config.image_seq_length = configs.NEXT_SIDE**2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlavaForConditionalGeneration(config).float()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0.0, 0.25)
    model.generation_config.suppress_tokens = list(range(configs.FIRST_WORD))
    model.generation_config.pad_token_id = configs.PAD
    return model.eval()


def model_of(name: str):
    return siglip() if name == "siglip" else shared(name)


def inputs_of(name: str, samples, first: int = 0):
    return repetitive("llava" if name == "siglip" else name, samples, first=first)


def kept_before(run, tokens: list[int]) -> list[torch.Tensor]:
    """Per picture `[token]` bool, what entered the tower."""
    stages = [kept for kept in run.last.kept if kept.site == "pixels"]
    return [torch.zeros(n, dtype=torch.bool).index_fill(0, kept.index, True) for kept, n in zip(stages, tokens, strict=True)]


def masks_of(name: str, inputs, run):
    """Arguments of `hidden_patches` for what a run kept."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        tokens = [configs.NEXT_SIDE**2] * crops_of(inputs)
        return kept_before(run, tokens), None, 0 if name == "siglip" else 1
    return kept_before(run, (grids.prod(1) // configs.MERGE**2).tolist()), grids, 0


@pytest.mark.parametrize(("name", "recipe"), cells([*NAMES, "siglip"], RECIPES))
def test_pruned_equals_the_model_with_the_same_patches_hidden(name, recipe):
    """A ragged batch, through the tower and the language model, the prompt and three steps. Red: windows, segments, rotary
    angles, early features, or a token's place."""
    model, inputs = model_of(name), inputs_of(name, RAGGED)
    family = "llava" if name == "siglip" else name
    with vp.wrap(model, recipe) as run:
        _, new, logits = generate(model, inputs, 3)
    keep, grids, before = masks_of(name, inputs, run)
    assert 0 < sum(int(mine.sum()) for mine in keep) < sum(len(mine) for mine in keep)
    with hidden_patches(model, keep, grids, before):
        expected = masked_logits(family, model, inputs, run.last.keep, new[:, :-1])[:, -3:]
    stock = masked_logits(family, model, inputs, {}, new[:, :-1])[:, -3:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert (stock - expected).abs().amax(dim=(1, 2)).min() > MOVED


@pytest.mark.parametrize("name", [*NAMES, "siglip"])
def test_what_is_kept_is_what_the_method_chose(name):
    """By the loops of PixelPrune's rule, of every picture. Red: a choice that is counted row by row is applied in the order of
    windows; the model is exact then, with other tokens."""
    model, inputs = model_of(name), inputs_of(name, RAGGED)
    with vp.wrap(model, "pixelprune") as run:
        model(**inputs)
    for kept, (rows, columns, tokens) in zip(run.last.kept, tokens_of(inputs), strict=True):
        assert kept.index.tolist() == pixelprune(rows, columns, tokens.tolist(), 0.0)[0]


@pytest.mark.parametrize("recipe", RECIPES if WHOLE else RECIPES[1:2])
def test_recurrent_layers_see_what_was_kept_only(recipe):
    """Qwen3.5: rows of dropped tokens are really cut out."""
    name, sample = "qwen3_5", [["text2", "image", "text3", "image", "text4"]]
    model, inputs = shared(name), repetitive(name, sample)
    with vp.wrap(model, recipe) as run:
        logits = model(**inputs).logits
    keep, grids, before = masks_of(name, inputs, run)
    with hidden_patches(model, keep, grids, before):
        expected, columns = dropped_logits(name, model, inputs, run.last.keep)
    torch.testing.assert_close(logits[:, columns], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "recipe"), cells(PACKED, RECIPES))
def test_features_equal_those_of_the_tower_on_the_shorter_list(name, recipe):
    """The kept tokens' features, and what leaves the tower early of them; NaN elsewhere. Red: a merge unit is torn apart, or
    its feature is put at another token's place."""
    model, inputs = shared(name), repetitive(name, RAGGED)
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with vp.wrap(model, recipe) as run:
        model(**inputs)
        keep = kept_before(run, (grids.prod(1) // configs.MERGE**2).tolist())
        given = model.model.get_image_features(pixel_values=pixels, image_grid_thw=grids)
        found = [torch.cat(list(part)) for part in (given.pooler_output, *getattr(given, "deepstack_features", ()))]
    features, early = shorter_features(model, pixels, grids, keep)
    stays = torch.cat(keep)
    for ours, expected in zip(found, (features, *early), strict=True):
        torch.testing.assert_close(ours[stays], expected, atol=TOLERANCE, rtol=0)
        assert ours[~stays].isnan().all()
    assert bool(early) == (name == "qwen3_vl")


@pytest.mark.parametrize(
    ("name", "recipe"),
    cells(
        [*NAMES, "qwen3_5", "llava_next", "siglip"],
        ["random:site=pixels,fraction=1.0", "uniform:site=pixels,tokens=1000", "pixelprune"],
    ),
)
def test_keeping_everything_and_removing_change_no_bit(name, recipe):
    """PixelPrune on noise, where nothing repeats."""
    model = model_of(name)
    inputs = make_inputs("llava" if name == "siglip" else name, RAGGED)
    stock = model(**inputs).logits
    with vp.wrap(model, recipe) as run:
        assert torch.equal(model(**inputs).logits, stock)
        assert all(len(kept.index) == kept.original for kept in run.last.kept)
    with vp.wrap(model, "random:site=pixels,fraction=0.4"):
        assert not torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize(("name", "recipe"), cells([*NAMES, "siglip"], RECIPES))
def test_a_batch_is_its_samples(name, recipe):
    """Red: pictures of a batch are decided together, or padding of shorter ones is seen."""
    model, inputs = model_of(name), inputs_of(name, RAGGED)
    with vp.wrap(model, recipe) as run:
        _, new, logits = generate(model, inputs, 2)
        together = {(kept.sample, kept.ordinal): kept.index.tolist() for kept in run.last.kept}
        for row in range(len(RAGGED)):
            _, alone_new, alone = generate(model, inputs_of(name, RAGGED[row : row + 1], first=row), 2)
            kept_alone = {(row, kept.ordinal): kept.index.tolist() for kept in run.last.kept}
            assert kept_alone == {place: index for place, index in together.items() if place[0] == row}
            torch.testing.assert_close(logits[row], alone[0], atol=TOLERANCE, rtol=0)
            assert torch.equal(new[row], alone_new[0])


LATER = (
    "fastv:layer=2,fraction=0.3",
    "divprune:layer=0,tokens=3",
    "random:layer=1,fraction=0.4 + pdrop:layer=3,fraction=0.2",
    "fastv:layer=3,fraction=0.3,cache_layer=1",
)
BEFORE = "random:site=pixels,fraction=0.6"


@pytest.mark.parametrize(("name", "later"), cells([*NAMES, "llava_next"], LATER))
def test_later_stages_work_on_what_is_left(name, later):
    """Red: a stage of the language model addresses tokens that never entered it, or DeepStack adds to the wrong ones."""
    model, inputs = shared(name), repetitive(name, [["text2", "image", "text3", "image", "text4"]])
    verdict = vp.check(model, inputs, f"{BEFORE} + {later}", new_tokens=3)
    assert verdict.verdict == "exact", str(verdict)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("qwen2_vl", "flowcut:fraction=0.2"),
        ("qwen2_vl", "flowcut:fraction=0.2,variant_on_units=unit"),
        ("qwen2_5_vl", "flowcut:fraction=0.2"),
        ("qwen3_vl", "flowcut:fraction=0.2"),
        ("llava", "flowcut:fraction=0.4"),
        ("llava_next", "flowcut:fraction=0.3"),
        ("llava", "mustdrop:layer=2,fraction=0.4,windows=1,cache_layer=1"),
        ("llava", "evit:fraction=0.4"),
        ("llava", "cls:layer=0,fraction=0.3"),
        ("llava_next", "visionzip:fraction=0.3"),
    ],
)
def test_a_method_inside_the_tower_works_on_what_entered_it(name, inside):
    """Each stage's own count is in the record, and the language model is exact from there on. Red: what was seen of a patch is
    filed under another one, or what two stages dropped cannot be told apart."""
    model, inputs = shared(name), repetitive(name, [["text2", "image", "text3", "image", "text4"]])
    recipe = f"{BEFORE} + {inside}"
    verdict = vp.check(model, inputs, recipe, new_tokens=3)
    assert verdict.verdict == "exact", str(verdict)
    with vp.wrap(model, BEFORE) as run:
        model(**inputs)
        first = [kept.index.tolist() for kept in run.last.kept]
    with vp.wrap(model, recipe) as run:
        model(**inputs)
        stages: dict[tuple[str, int], list[list[int]]] = {}
        for kept in run.last.kept:
            stages.setdefault((kept.site, kept.layer), []).append(kept.index.tolist())
    assert stages.pop(("pixels", 0)) == first
    for left in stages.values():
        assert all(set(mine) <= set(entered) for mine, entered in zip(left, first, strict=True))
    assert any(len(mine) < len(entered) for mine, entered in zip(left, first, strict=True))


def test_redistribution_sees_what_is_left():
    """VAR and VHR behind it: finite, and other logits than without. Red: marks of tokens that are not there."""
    model, inputs = shared("qwen2_5_vl"), repetitive("qwen2_5_vl", RAGGED)
    with vp.wrap(model, "pixelprune"):
        plain = model(**inputs).logits
    for edit in ("var:sink_dims=5|20,tau=2.0,keep=0.2,max_sink_share=0.6,min_image_mass=0.1", "vhr:alpha=2"):
        with vp.wrap(model, f"pixelprune + {edit}") as run:
            logits = model(**inputs).logits
        assert run.last.edits
        assert logits.isfinite().all()
        assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_beams_pictures_encoded_beforehand_and_no_cache(name):
    """What was dropped rides inside the features, through every copy of them."""
    model, inputs = shared(name), repetitive(name, RAGGED)
    with vp.wrap(model, "pixelprune"):
        plain = model.generate(**inputs, max_new_tokens=3)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, use_cache=False), plain)
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2)
        assert beams.shape[0] == 2 * len(RAGGED)
        given = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        encoded = model.model.get_image_features(**given, return_dict=True)
        rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
        logits = model(**rest, mm_encoder_outputs={"image": encoded}).logits
        torch.testing.assert_close(logits, model(**inputs).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", pages.KINDS)
def test_pages(name, kind):
    """Of pages and screens less than two thirds of the patches enter, and every dropped one is the copy of a neighbour; of a
    picture without flat areas all do."""
    model, side = shared(name), 12 * configs.MERGE * configs.PATCH
    picture = pages.KINDS[kind](side, side, 1)
    pixels, grid = packed_of(picture)
    ids = [configs.FIRST_WORD, configs.START, *[configs.IMAGE] * 144, configs.END, configs.FIRST_WORD + 1]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_grid_thw": grid}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == configs.IMAGE).long() * TINY[name].kind_of_image
    with vp.wrap(model, "pixelprune") as run:
        _, new, logits = generate(model, inputs, 2)
        report = run.report()
    (kept,) = run.last.kept
    if kind == "texture":
        assert len(kept.index) == 144
        return
    assert 0 < len(kept.index) < 96
    assert report.tower_flops < 0.7 * report.tower_flops_unpruned
    tokens = pixels.view(144, -1)
    copies = {tuple(tokens[index].tolist()) for index in kept.index.tolist()}
    assert all(tuple(token.tolist()) in copies for token in tokens), "something of the picture is lost"
    masks, grids, before = masks_of(name, inputs, run)
    with hidden_patches(model, masks, grids, before):
        expected = masked_logits(name, model, inputs, run.last.keep, new[:, :-1])[:, -2:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
