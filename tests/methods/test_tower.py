"""Inside real vision towers: what is dropped and merged there, and what methods are told of it, against naive computations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from unittest import mock

import pytest
import tiny_models
import torch
from methods.loops import plain
from methods.loops.cdpruner import cdpruner, cdpruner_relevance
from methods.loops.flowcut import (
    flowcut_clip,
    flowcut_entropy_ratio,
    flowcut_llm,
    flowcut_prune_count,
    flowcut_qwen_official_scores,
    flowcut_smoothed,
    flowcut_terms,
    flowcut_unit_scores,
    pooled,
)
from methods.loops.mustdrop import (
    mustdrop_key_set,
    mustdrop_merge,
    mustdrop_merge_count,
    mustdrop_window_scores,
    mustdrop_windows,
)
from tiny_models import (
    FIRST_WORD,
    IMAGE,
    NEXT_PINPOINTS,
    PAD,
    VISION_END,
    VISION_START,
    VOCAB,
    attentions_of,
    implementations_of,
)
from transformers.models.llava_next.modeling_llava_next import select_best_resolution
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import vlmprune as vp
from vlmprune.schedule import at
from vlmprune.view import FROM_TOWER

SIDE = 6
"""Patches per side of a CLIP view: four windows of 3 × 3."""
LLAVA = {"num_hidden_layers": 9, "image_size": 8 * SIDE}
NEXT = {"num_hidden_layers": 7, "patch_size": 4}  # views of 24 pixels
QWEN = {"depth": 6}
WINDOWS = {"depth": 5, "fullatt_block_indexes": [1, 3]}
PICTURE = (0, 0)
"""Size of a LLaVA-1.5 picture, which has no choice."""


# --- deeper models than the shared ones, and prompts for them ---------------------------------------------------------
@functools.cache
def deep(family: str, attn: str = "sdpa"):
    """A tiny model with a tower deep enough that several cuts differ between pictures. Wrap it only in a `with`."""
    tiny = tiny_models.TINY[family]

    def config():
        made = tiny.config()
        for name, value in {"llava": LLAVA, "llava_next": NEXT, "qwen2_vl": QWEN, "qwen2_5_vl": WINDOWS}[family].items():
            setattr(made.vision_config, name, value)
        if "llava" in family:
            made.image_seq_length = SIDE**2
        return made

    with mock.patch.dict(tiny_models.TINY, {family: dataclasses.replace(tiny, config=config)}):
        model = tiny_models.build(family, attn)
    if "qwen" in family:  # one direction of its own for all queries: the mean query of a block then looks at few patches
        for block in model.model.visual.blocks:
            block.attn.qkv.bias.data[: len(block.attn.qkv.bias) // 3] *= 15
    return model


def packed(size: tuple[int, int]) -> list[tuple[int, int] | None]:
    """(view, raster index) of every token of a LLaVA-NeXT picture (height, width) in the order of the prompt; None for a row
    separator. View 0 is the overview; the crops' raster loses half the padding on either side, rounded down."""
    height, width = size
    canvas = select_best_resolution(size, NEXT_PINPOINTS)
    across = canvas[1] // 24
    rows, columns = canvas[0] // 24 * SIDE, across * SIDE
    above = left = 0
    if width / height > columns / rows:
        above = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    tokens: list[tuple[int, int] | None] = [(0, cell) for cell in range(SIDE**2)]
    for y in range(above, rows - above):
        for x in range(left, columns - left):
            tokens.append((1 + y // SIDE * across + x // SIDE, y % SIDE * SIDE + x % SIDE))
        tokens.append(None)
    return tokens


def views(size: tuple[int, int]) -> int:
    canvas = select_best_resolution(size, NEXT_PINPOINTS)
    return 1 + canvas[0] // 24 * (canvas[1] // 24)


def tokens_of(family: str, size: tuple[int, int]) -> int:
    if family == "llava_next":
        return len(packed(size))
    return SIDE**2 if family == "llava" else size[0] * size[1]


@dataclass
class Prompts:
    """Inputs of a call, and where its pictures are.

    Attributes:
        inputs: for `model(**inputs)`.
        pixels: each picture's own pixels.
        columns: for each picture its row and the positions of its placeholders.
        sizes: each picture's size: pixels (LLaVA-NeXT) or merged tokens (Qwen), rows first.
    """

    inputs: dict
    pixels: list[torch.Tensor] = field(default_factory=list)
    columns: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


def prompts(family: str, rows: list[list[tuple[int, int]]], seed: int = 0, only: int | None = None) -> Prompts:
    """Left-padded prompts with some pictures each (`only`: one of these rows); a row's content depends on its number only."""
    made, ids_of = Prompts({}), []
    chosen = list(enumerate(rows)) if only is None else [(only, rows[only])]
    for number, sizes in chosen:
        draw = torch.Generator().manual_seed(1000 * seed + number)

        def words(count, draw=draw):
            return torch.randint(FIRST_WORD, VOCAB, (count,), generator=draw).tolist()

        ids, starts = words(3 + number), []
        for size in sizes:
            ids += [VISION_START] if "qwen" in family else []
            starts.append((len(ids), tokens_of(family, size)))
            ids += [IMAGE] * tokens_of(family, size) + ([VISION_END] if "qwen" in family else words(1))
            shape = {
                "llava": (3, 8 * SIDE, 8 * SIDE),
                "llava_next": (views(size), 3, 24, 24) if family == "llava_next" else (),
            }.get(family, (4 * size[0] * size[1], 3 * 2 * 16))
            made.pixels.append(2 * torch.randn(*shape, generator=draw))
            made.sizes.append(size)
        ids += words(5 - number)
        ids_of.append((ids, starts))
    longest = max(len(ids) for ids, _ in ids_of)
    input_ids, mask = torch.full((len(ids_of), longest), PAD), torch.zeros(len(ids_of), longest, dtype=torch.long)
    for row, (ids, starts) in enumerate(ids_of):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
        made.columns += [(row, torch.arange(n) + start + longest - len(ids)) for start, n in starts]
    made.inputs = {"input_ids": input_ids, "attention_mask": mask}
    if family == "llava":
        made.inputs["pixel_values"] = torch.stack(made.pixels)
    elif family == "llava_next":
        most = max(map(len, made.pixels))
        crops = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in made.pixels]
        made.inputs |= {"pixel_values": torch.stack(crops), "image_sizes": torch.tensor(made.sizes)}
    else:
        grids = torch.tensor([(1, 2 * h, 2 * w) for h, w in made.sizes])
        made.inputs |= {"pixel_values": torch.cat(made.pixels), "image_grid_thw": grids}
        made.inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
    return made


@contextlib.contextmanager
def hooked(*hooks):
    """(module, hook) pairs, called before the module with all its arguments, for a while."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """What a call let through.

    Attributes:
        run: the handle.
        entering: `[batch, sequence, dim]` what enters the language model.
        lengths: sequence length in every block of the tower.
        layer: hidden states and rotary embeddings that enter decoder layer 1.
    """

    run: vp.Run
    entering: torch.Tensor
    lengths: list[int]
    layer: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


def watched(model, method, inputs) -> Seen:
    """One pruned forward pass."""
    base, found = model.model, {}
    tower = base.visual.blocks if hasattr(base, "visual") else base.vision_tower.encoder.layers
    lengths: dict[int, int] = {}

    def text(_, args, kwargs):
        found["entering"] = kwargs["inputs_embeds"]

    def layer(_, args, kwargs):
        found["layer"] = (args[0] if args else kwargs["hidden_states"]), kwargs["position_embeddings"]

    def block(index, _, args, kwargs):
        lengths[index] = (args[0] if args else kwargs["hidden_states"]).shape[-2]

    with vp.wrap(model, method) as run, torch.no_grad():
        inside = [(module, functools.partial(block, index)) for index, module in enumerate(tower)]
        with hooked((base.language_model, text), (base.language_model.layers[1], layer), *inside):
            model(**inputs)
    return Seen(run, found["entering"], [lengths[index] for index in range(len(tower))], found["layer"])


def entered(seen: Seen, prompt: Prompts, picture: int) -> tuple[list[int], torch.Tensor]:
    """Which of a picture's tokens entered the language model, and as what; the others must be rows of NaN."""
    row, columns = prompt.columns[picture]
    features = seen.entering[row, columns]
    dropped = features.isnan()
    assert torch.equal(dropped.any(1), dropped.all(1))
    return (~dropped[:, 0]).nonzero()[:, 0].tolist(), features[~dropped[:, 0]]


def kept(run: vp.Run, site: str) -> list[list[int]]:
    return [found.index.tolist() for found in run.last.kept if found.site == site]


def features_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=3e-4, rtol=3e-4)


def projected(model, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model.multi_modal_projector(features[None].float())[0]


# --- FlowCut in CLIP --------------------------------------------------------------------------------------------------
FOUR = [[PICTURE], [PICTURE, PICTURE], [PICTURE]]


@pytest.mark.parametrize("attn", attentions_of("llava"))
@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize("keep", [5, 14])
def test_flowcut_drops_patches_in_the_tower(keep, scale, attn):
    """Four pictures in one batch, each with its own counts between: what enters the language model is what a loop over one
    picture in float64 gives, behind the projector; and what the picture gives alone."""
    model = deep("llava", attn)
    method, prompt = vp.FlowCut(tokens=keep, semantic_scale=scale), prompts("llava", FOUR)
    feature_block = LLAVA["num_hidden_layers"] - 2
    expected = [flowcut_clip(model.model.vision_tower, p, keep, feature_block, scale) for p in prompt.pixels]
    seen = watched(model, method, prompt.inputs)
    assert kept(seen.run, "vision") == [ids for ids, _ in expected]
    for picture, (ids, features) in enumerate(expected):
        places, rows = entered(seen, prompt, picture)
        assert places == ids
        features_equal(rows, projected(model, features))

    singles = [watched(model, method, prompts("llava", FOUR, only=row).inputs) for row in (0, 2)]
    assert singles[0].lengths != singles[1].lengths, "the pictures of this test must differ"
    for single, picture in zip(singles, (0, 3), strict=True):
        assert kept(single.run, "vision") == [kept(seen.run, "vision")[picture]]
        own = entered(single, prompts("llava", FOUR, only=[0, None, None, 2][picture]), 0)[1]
        torch.testing.assert_close(entered(seen, prompt, picture)[1], own, atol=1e-4, rtol=1e-4)


def test_flowcut_pads_views_only_as_far_as_it_must():
    """In a batch, every block runs on as many tokens as the longest of its pictures has left there, and no more."""
    model, prompt = deep("llava"), prompts("llava", [[PICTURE]] * 3)
    seen = watched(model, "flowcut:tokens=5", prompt.inputs)
    alone = [watched(model, "flowcut:tokens=5", prompts("llava", [[PICTURE]] * 3, only=row).inputs).lengths for row in range(3)]
    assert seen.lengths == [max(lengths) for lengths in zip(*alone, strict=True)]
    assert any(len(set(lengths)) > 1 for lengths in zip(*alone, strict=True)), "the pictures of this test must differ"
    assert seen.lengths[:1] == [37]
    assert seen.lengths[-2:] == [6, 6]  # from the block on whose output feeds the projector


@pytest.mark.parametrize("layers", [(-2, 7), (-3, 6), (4, 3)])
def test_flowcut_ends_where_features_are_taken(layers):
    """`vision_feature_layer` says which block has to see exactly K patches."""
    feature_layer, feature_block = layers
    model = deep("llava")
    prompt = prompts("llava", [[PICTURE]])
    ids, features = flowcut_clip(model.model.vision_tower, prompt.pixels[0], 7, feature_block)
    with mock.patch.object(model.config, "vision_feature_layer", feature_layer):
        seen = watched(model, "flowcut:tokens=7", prompt.inputs)
    places, rows = entered(seen, prompt, 0)
    assert places == ids
    features_equal(rows, projected(model, features))
    assert seen.lengths[feature_block] == 8


@pytest.mark.parametrize("recipe", ["flowcut:tokens=7", "mustdrop:layer=3,tokens=3,windows=2"])
def test_features_of_the_first_block(recipe):
    """No block stands before the one whose output feeds the projector, so none can cut: refused, never un-pruned in silence."""
    model, prompt = deep("llava"), prompts("llava", [[PICTURE]])
    with mock.patch.object(model.config, "vision_feature_layer", 1):
        try:
            seen = watched(model, recipe, prompt.inputs)
        except vp.UsageError:
            return
    assert len(kept(seen.run, "vision")[0]) == {"flowcut:tokens=7": 7}.get(recipe, SIDE**2 - 16)


def test_flowcut_survives_beams_and_encoding_beforehand():
    """The same pictures, encoded inside the call, before it, or copied for beams: the same patches, and the same answer."""
    model, prompt = deep("llava"), prompts("llava", [[PICTURE], [PICTURE]])
    rest = {name: value for name, value in prompt.inputs.items() if name != "pixel_values"}
    with vp.wrap(model, "flowcut:tokens=6") as run, torch.no_grad():
        logits = model(**prompt.inputs).logits[:, -1]
        expected = kept(run, "vision")
        encoded = model.get_image_features(prompt.inputs["pixel_values"], return_dict=True)
        again = model(**rest, mm_encoder_outputs={"image": encoded}).logits[:, -1]
        assert kept(run, "vision") == expected
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
        model.generate(**prompt.inputs, max_new_tokens=2, num_beams=2)
        assert kept(run, "vision") == [ids for ids in expected for _ in range(2)]
    with torch.no_grad():
        assert model.get_image_features(prompt.inputs["pixel_values"], return_dict=True).pooler_output[0].isfinite().all()


# --- FlowCut in LLaVA-NeXT --------------------------------------------------------------------------------------------
SIZES = [(20, 20), (46, 30), (24, 48)]
"""(height, width): overview and 1 × 2 crops with padding above, 2 × 2 crops with padding at the sides, and without padding."""


def test_the_packing_of_these_tests_is_the_models():
    """`packed` against the stock model: features that carry their view and place come out in this order."""
    model, prompt = deep("llava_next"), prompts("llava_next", [SIZES])
    numbers = []

    def numbered(_, args, features):
        numbers.append(torch.arange(features.shape[0] * features.shape[1]).view(features.shape[:2]))
        return numbers[0][..., None].expand_as(features).float()

    handle = model.model.multi_modal_projector.register_forward_hook(numbered)
    try:
        with torch.no_grad():
            found = model.get_image_features(
                prompt.inputs["pixel_values"], prompt.inputs["image_sizes"], return_dict=True
            ).pooler_output
    finally:
        handle.remove()
    first = 0
    for features, size in zip(found, SIZES, strict=True):
        expected = [None if token is None else (first + token[0]) * SIDE**2 + token[1] for token in packed(size)]
        for row, number in zip(features, expected, strict=True):
            assert number is None or (row == number).all()
        first += views(size)


@pytest.mark.parametrize("newlines", ["keep", "drop"])
@pytest.mark.parametrize("attn", attentions_of("llava_next"))
def test_flowcut_per_view(attn, newlines):
    """K/2 patches of every view, rounded down, decided view by view; they survive packing and un-padding at their places; row
    separators as asked for, and the report says so."""
    keep, rows = 15, [[SIZES[0]], [SIZES[1], SIZES[2]]]
    model, prompt = deep("llava_next", attn), prompts("llava_next", rows)
    expected = []  # per picture, the survivors and features of each view
    for pixels in prompt.pixels:
        expected.append([flowcut_clip(model.model.vision_tower, p, keep // 2, NEXT["num_hidden_layers"] - 2) for p in pixels])
        assert all(len(ids) == 7 for ids, _ in expected[-1])
    seen = watched(model, vp.FlowCut(tokens=keep, newlines=newlines), prompt.inputs)
    alive = seen.run.last.keep[0]
    separators = 0
    for picture, (row, columns) in enumerate(prompt.columns):
        layout = packed(prompt.sizes[picture])
        survivors = [token is not None and token[1] in expected[picture][token[0]][0] for token in layout]
        separator = [token is None for token in layout]
        separators += sum(separator)
        stays = [a or (s and newlines == "keep") for a, s in zip(survivors, separator, strict=True)]
        assert alive[row, columns].tolist() == stays
        visual = [token for token in layout if token is not None]
        assert kept(seen.run, "vision")[picture] == [
            number for number, (view, cell) in enumerate(visual) if cell in expected[picture][view][0]
        ]
        features = seen.entering[row, columns][torch.tensor(survivors)]
        naive = [
            expected[picture][token[0]][1][expected[picture][token[0]][0].index(token[1])]
            for token, lives in zip(layout, survivors, strict=True)
            if lives
        ]
        features_equal(features, projected(model, torch.stack(naive)))
    assert torch.equal(
        alive & (prompt.inputs["input_ids"] != IMAGE),
        (prompt.inputs["attention_mask"] == 1) & (prompt.inputs["input_ids"] != IMAGE),
    )
    report = seen.run.report()
    assert report.newlines == separators
    assert report.newline_policy == {"keep": "kept", "drop": "dropped"}[newlines]
    assert f"{separators}, counted as text, {report.newline_policy}" in str(report)
    assert [len(found.index) for found in seen.run.last.kept if found.site == "llm"] == [15, 15, 15]


def test_flowcut_shares_of_a_view():
    """A fraction counts from all views: 0.2 of five views of 36 patches is 36 tokens, so 18 of each view leave the tower."""
    model, prompt = deep("llava_next"), prompts("llava_next", [[(24, 48)]])
    seen = watched(model, vp.FlowCut(fraction=0.2), prompt.inputs)
    assert seen.lengths[-2:] == [19, 19]
    of_view = [token[0] for token in packed((24, 48)) if token is not None]
    (ids,) = kept(seen.run, "vision")
    assert [sum(of_view[j] == view for j in ids) for view in range(3)] == [18, 18, 18]
    assert [len(found.index) for found in seen.run.last.kept] == [54, 22]  # a fifth of three views of 36


def test_crops_that_look_alike_are_decided_separately():
    """A picture with two equal crops (a blank page, say): each crop is still decided separately and gets its own share."""
    model, prompt = deep("llava_next"), prompts("llava_next", [[(24, 48)]])
    pixels = prompt.inputs["pixel_values"].clone()
    pixels[0, 2] = pixels[0, 1]
    tokens = [token for token in packed((24, 48)) if token is not None]
    Peek.seen.clear()
    with vp.wrap(model, PeekPerView(tokens=15)) as run, torch.no_grad():
        model(**prompt.inputs | {"pixel_values": pixels})
    parts = [{tokens[j][0] for j in row.tolist()} for see in Peek.seen for row in see.position]
    assert sorted(map(sorted, parts)) == [[0], [1], [2]]
    of_view = [tokens[j][0] for j in run.last.kept[0].index.tolist()]
    assert [of_view.count(view) for view in range(3)] == [5, 5, 5]


# --- FlowCut without CLS ----------------------------------------------------------------------------------------------
GRIDS = [[(4, 6)], [(4, 4), (6, 4)]]


def patch_attention(block, hidden, rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[head, patch, dim]` of a Qwen tower's block, after rotary embedding, from what enters it."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).view(len(hidden), 3, attention.num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)
    cos, sin = (part[None] for part in rotary)

    def turned(x):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    return turned(q), turned(k), v


@torch.no_grad()
def official(visual, pixels, grid, target: int) -> tuple[torch.Tensor, list[int]]:
    """The official code for one picture: patches dropped behind every second block, survivors merged in groups of four.

    Returns merged features and the number of patches that enter each block.
    """
    grid = torch.tensor([grid])
    hidden = visual.patch_embed(pixels)
    rotary = visual.rotary_pos_emb(hidden, get_vision_position_ids(grid, 2))
    smooth, lengths, depth = None, [], len(visual.blocks)
    for index, block in enumerate(visual.blocks):
        n = len(hidden)
        lengths.append(n)
        q, k, v = patch_attention(block, hidden, rotary)
        hidden = block(hidden, cu_seqlens=torch.tensor([0, n]), position_embeddings=rotary)
        if n <= target:
            continue
        scaling = block.attn.scaling
        smooth = flowcut_smoothed(smooth, flowcut_qwen_official_scores(q, k, v, scaling))
        remaining = depth - index - 1
        if remaining % 2 == 0:
            relation, _, _ = flowcut_terms(pooled(q), k, pooled(v), v, scaling, 1.0)
            dropped = flowcut_prune_count(n, target, remaining, flowcut_entropy_ratio(relation))
            stays = plain.top(smooth, n - dropped)
            hidden, rotary = hidden[stays], tuple(part[stays] for part in rotary)
            smooth = [smooth[j] for j in stays]
    return visual.merger(hidden), lengths


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [3, 6])
def test_flowcut_official_on_qwen(keep, attn):
    """2K tokens of four consecutive surviving patches each, standing on the first places of their picture; two pictures in one
    packed tower sequence as each alone. A picture that has no more than 2K stays as it is."""
    model = deep("qwen2_vl", attn)
    prompt = prompts("qwen2_vl", GRIDS)
    seen = watched(model, vp.FlowCut(tokens=keep), prompt.inputs)
    total = [0] * QWEN["depth"]
    for picture, pixels in enumerate(prompt.pixels):
        height, width = prompt.sizes[picture]
        merged, lengths = official(model.model.visual, pixels, (1, 2 * height, 2 * width), 8 * keep)
        total = [a + b for a, b in zip(total, lengths, strict=True)]
        assert len(merged) == 2 * keep
        assert len(set(lengths)) >= 3, "the tower of this test must drop patches several times"
        places, features = entered(seen, prompt, picture)
        assert places == kept(seen.run, "vision")[picture] == list(range(2 * keep))
        features_equal(features, merged)
    assert seen.lengths == total
    assert [len(found.index) for found in seen.run.last.kept if found.site == "llm"] == [keep] * 3
    assert seen.run.last.kept[0].method == "flowcut (official)"


def test_flowcut_official_leaves_small_pictures_whole():
    """Two pictures, one of them with fewer than 2K tokens: it enters the language model with all of them."""
    model, prompt = deep("qwen2_vl"), prompts("qwen2_vl", [[(2, 4), (4, 6)]])
    with torch.no_grad():
        stock = model.get_image_features(
            prompt.inputs["pixel_values"][:32], prompt.inputs["image_grid_thw"][:1], return_dict=True
        ).pooler_output[0]
    seen = watched(model, vp.FlowCut(tokens=5), prompt.inputs)
    assert kept(seen.run, "vision") == [list(range(8)), list(range(10))]
    features_equal(entered(seen, prompt, 0)[1], stock)
    assert [len(found.index) for found in seen.run.last.kept if found.site == "llm"] == [5, 5]


class PeekFlow(vp.FlowCut):
    seen: list = []  # noqa: RUF012

    def select(self, see, keep):
        if see.layer == 0:
            self.seen.append(see.flow)
        return super().select(see, keep)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_flowcut_units(family, attn):
    """The score of every merged token, from the blocks that see the whole picture, put back from window order by the model's
    own window index; the tower runs un-pruned, and the best 2K tokens enter the decoder."""
    model, keep = deep(family, attn), 4
    visual, prompt = model.model.visual, prompts(family, GRIDS)
    whole = range(QWEN["depth"]) if family == "qwen2_vl" else WINDOWS["fullatt_block_indexes"]
    inputs: dict[int, tuple] = {}

    def entering(index, _, args, kwargs):
        inputs[index] = (args[0] if args else kwargs["hidden_states"]), kwargs["position_embeddings"]

    with torch.no_grad(), hooked(*((visual.blocks[i], functools.partial(entering, i)) for i in whole)):
        model.get_image_features(prompt.inputs["pixel_values"], prompt.inputs["image_grid_thw"], return_dict=True)
        seen_by_block = {i: patch_attention(visual.blocks[i], *inputs[i]) for i in whole}
    patches = [4 * height * width for height, width in prompt.sizes]
    scores = []
    for picture in range(len(patches)):
        own = slice(sum(patches[:picture]), sum(patches[: picture + 1]))
        blocks = [tuple(x[:, own] for x in seen_by_block[i]) for i in whole]
        scores += flowcut_unit_scores(blocks, visual.blocks[0].attn.scaling)
    if family == "qwen2_5_vl":
        vision = model.config.vision_config
        order, _ = get_vision_window_index(
            prompt.inputs["image_grid_thw"], spatial_merge_size=2, window_size=vision.window_size, patch_size=vision.patch_size
        )
        assert order.tolist() != sorted(order.tolist()), "the windows of this test must permute"
        scores = [score for _, score in sorted(zip(order.tolist(), scores, strict=True))]

    PeekFlow.seen.clear()
    seen = watched(model, PeekFlow(tokens=keep, variant_on_units="unit"), prompt.inputs)
    found = [row for flow in PeekFlow.seen for row in flow]
    assert all(not features.isnan().any() for features in seen.entering)
    per_picture = torch.tensor(scores).split([count // 4 for count in patches])
    by_size = sorted(range(3), key=lambda picture: [tuple(s) for s in ((24,), (16,))].index((patches[picture] // 4,)))
    for picture, flow in zip(by_size, found, strict=True):  # pictures of one size are decided together
        features_equal(flow, per_picture[picture])
    first = [k for k in seen.run.last.kept if k.layer == 0]
    for choice, expected in zip(first, per_picture, strict=True):
        assert choice.index.tolist() == plain.top(expected.tolist(), 2 * keep)
        assert choice.method == "flowcut (unit)"
    assert seen.lengths == [sum(patches)] * len(visual.blocks)


@pytest.mark.parametrize(
    ("family", "size"), [("llava_next", (46, 30)), ("qwen2_vl", (4, 6)), ("qwen2_5_vl", (6, 4))], ids=lambda x: str(x)
)
def test_flowcut_in_the_decoder(family, size):
    """The last stage: the flow to the last prompt token in decoder layer 1, from that layer's own projections."""
    model, keep = deep(family), 5
    prompt = prompts(family, [[size]])
    seen = watched(model, vp.FlowCut(tokens=keep), prompt.inputs)
    hidden, (cos, sin) = seen.layer
    layer = model.model.language_model.layers[1]
    with torch.no_grad():
        normed = layer.input_layernorm(hidden)[0]

        def heads(x):
            return x.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)

        def turned(x):
            half = x.shape[-1] // 2
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

        q, k = turned(heads(layer.self_attn.q_proj(normed))), turned(heads(layer.self_attn.k_proj(normed)))
        v = heads(layer.self_attn.v_proj(normed))
    alive = seen.run.last.keep[0][0].nonzero()[:, 0]  # positions of the rows of `hidden`
    assert len(alive) == len(normed)
    _, columns = prompt.columns[0]
    visual = columns if family != "llava_next" else columns[[token is not None for token in packed(size)]]
    rows = [row for row, place in enumerate(alive.tolist()) if place in visual.tolist()]
    before = [visual.tolist().index(int(alive[row])) for row in rows]
    expected = flowcut_llm(q[:, -1], k[:, rows], v[:, -1], v[:, rows], layer.self_attn.scaling, keep)
    final = seen.run.last.kept[-1]
    assert (final.layer, final.site) == (2, "llm")
    assert final.index.tolist() == [before[j] for j in expected]


# --- MustDrop ---------------------------------------------------------------------------------------------------------
@dataclass
class Merged:
    """MustDrop's tower stage for one picture: raster ids, what enters the projector, and each block's `[head, patch]` CLS
    attention."""

    ids: list[int]
    features: torch.Tensor
    attention: dict[int, torch.Tensor]

    @property
    def keys(self) -> list[int]:
        """The key set, as raster ids."""
        last = self.attention[max(self.attention)]
        return [self.ids[j] for j in mustdrop_key_set(last.mean(0))]


@torch.no_grad()
def merged_tower(model, pixels, threshold, windows) -> Merged:
    """The stock blocks on one picture, its windows merged by a loop behind the first."""
    tower = model.model.vision_tower
    blocks = tower.encoder.layers
    hidden = blocks[0](tower.pre_layrnorm(tower.embeddings(pixels[None])), None)
    patches = hidden[0, 1:]
    if windows is None:
        merged, tokens = mustdrop_merge(patches, SIDE, SIDE, threshold)
    else:
        merged, tokens = mustdrop_merge_count(patches, SIDE, SIDE, windows)
    left = dict(enumerate(patches))
    for window in merged:
        nine = mustdrop_windows(SIDE, SIDE)[window]
        for patch in nine:
            del left[patch]
        left[nine[4]] = torch.tensor(tokens[window], dtype=patches.dtype)
    found = Merged(sorted(left), torch.empty(0), {})
    hidden = torch.cat((hidden[:, :1], torch.stack([left[j] for j in found.ids])[None]), dim=1)
    for index in range(1, len(blocks)):
        attention = blocks[index].self_attn
        normed = blocks[index].layer_norm1(hidden)[0]
        q, k = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj)
        )
        found.attention[index] = (q[:, :1] @ k.transpose(1, 2) * attention.scale).softmax(-1)[:, 0, 1:]
        hidden = blocks[index](hidden, None)
        if index == len(blocks) - 2:
            found.features = hidden[0, 1:]
    return found


def unlike(prompt: Prompts) -> torch.Tensor:
    """The pixels of four pictures, two of which have windows of equal patches."""
    pixels = prompt.inputs["pixel_values"].clone()
    pixels[1, :, :24, :24] = pixels[1, :, :8, :8].repeat(1, 3, 3)
    pixels[2] = pixels[2, :, :8, :8].repeat(1, SIDE, SIDE)
    return pixels


@torch.no_grad()
def middling(model, pixels: torch.Tensor) -> float:
    """A threshold that five of the sixteen windows of a batch of four reach."""
    tower = model.model.vision_tower
    first = tower.encoder.layers[0](tower.pre_layrnorm(tower.embeddings(pixels)), None)[:, 1:]
    scores = sorted(score for patches in first for score in mustdrop_window_scores(patches, SIDE, SIDE))
    return (scores[-6] + scores[-5]) / 2


@pytest.mark.parametrize("attn", attentions_of("llava"))
@pytest.mark.parametrize("windows", [None, 0, 1, 3])
def test_mustdrop_merges_in_the_tower(windows, attn):
    """Pictures that merge different numbers of windows, in one batch: ids and features of each as a loop gives them alone."""
    model, prompt = deep("llava", attn), prompts("llava", FOUR)
    pixels = unlike(prompt)
    threshold = middling(model, pixels)
    seen = watched(
        model, vp.MustDrop(layer=3, tokens=5, merge=threshold, windows=windows), prompt.inputs | {"pixel_values": pixels}
    )
    if windows == 0:
        assert kept(seen.run, "vision") == []
        return
    numbers = set()
    for picture in range(4):
        expected = merged_tower(model, pixels[picture], threshold, windows)
        places, rows = entered(seen, prompt, picture)
        assert places == expected.ids == kept(seen.run, "vision")[picture]
        features_equal(rows, projected(model, expected.features))
        numbers.add(len(places))
    assert windows is not None or len(numbers) > 1, "the pictures of this test must merge different numbers"


@pytest.mark.parametrize("tokens", [4, 9])
def test_mustdrop_keeps_its_key_set(tokens):
    """8 % of what the tower left, by the last block's CLS attention, whatever the words say of it; also where the pictures of a
    batch merged different numbers."""
    model, prompt = deep("llava"), prompts("llava", FOUR)
    pixels = unlike(prompt)
    threshold = middling(model, pixels)
    seen = watched(model, vp.MustDrop(layer=3, tokens=tokens, merge=threshold), prompt.inputs | {"pixel_values": pixels})
    found = [choice for choice in seen.run.last.kept if choice.layer == 3]
    sizes = set()
    for picture in range(4):
        expected = merged_tower(model, pixels[picture], threshold, None)
        assert len(expected.keys) == math.ceil(0.08 * len(expected.ids))
        assert set(expected.keys) <= set(found[picture].index.tolist())
        assert len(found[picture].index) == min(tokens, len(expected.ids))
        sizes.add(len(expected.keys))
    assert len(sizes) > 1, "the pictures of this test must have key sets of different sizes"


def test_cls_attention_behind_flowcut():
    """A later method that asks for CLS attention gets that of the survivors, in the block that feeds the projector."""
    model, prompt, maps = deep("llava", "eager"), prompts("llava", [[PICTURE]]), []
    attention = model.model.vision_tower.encoder.layers[LLAVA["num_hidden_layers"] - 2].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    try:
        seen = watched(model, vp.Recipe.of("flowcut:tokens=9", "cls:layer=2,tokens=4"), prompt.inputs)
    finally:
        handle.remove()
    (ids,) = kept(seen.run, "vision")
    scores = maps[0][0, :, 0, 1:].mean(0).tolist()
    assert len(scores) == len(ids) == 9
    assert kept(seen.run, "llm") == [[ids[j] for j in plain.top(scores, 4)]]


# --- what methods are told of the tower -------------------------------------------------------------------------------
TOLD = sorted(FROM_TOWER | {"features", "project"})


class Peek(vp.Pruner):
    """Looks at everything the tower tells, and keeps the first tokens."""

    name = "peek"
    paper = "none"
    needs = frozenset(TOLD)
    default = at(layer=0, fraction=0.5)
    seen: list = []  # noqa: RUF012

    def select(self, see, keep):
        self.seen.append(see)
        return torch.arange(keep).expand(see.images, keep)


@torch.no_grad()
def told(family: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per view `[view, patch, …]`, from the eager tower's own outputs."""
    model = deep(family, "eager")
    tower, blocks = model.model.vision_tower, model.model.vision_tower.config.num_hidden_layers
    output = tower(pixels, output_attentions=True, output_hidden_states=True)
    feature = blocks - 2
    layer = tower.encoder.layers[feature]
    keys = layer.self_attn.k_proj(layer.layer_norm1(output.hidden_states[feature]))[:, 1:]
    rows = {
        "attention_from_cls": output.attentions[feature],
        "attention_from_cls_first": output.attentions[0],
        "attention_from_cls_early": output.attentions[max(blocks // 4 - 1, 0)],
        "attention_from_cls_final": output.attentions[blocks - 1],
    }
    found = {name: attention[:, :, 0, 1:].transpose(1, 2) for name, attention in rows.items()}  # [view, patch, head]
    found["tower_keys"] = keys.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(2)
    found["tower_features"] = output.hidden_states[-2][:, 1:]
    found["features"] = model.model.multi_modal_projector(found["tower_features"])
    found["cell"] = torch.arange(SIDE**2).expand(len(pixels), -1)
    return found


def assert_told(family: str, see, image: int, pixels: torch.Tensor, size: tuple[int, int]) -> None:
    """Everything a view says of one picture."""
    expected = told(family, pixels if family == "llava_next" else pixels[None])
    tokens = [t for t in packed(size) if t is not None] if family == "llava_next" else [(0, c) for c in range(SIDE**2)]
    of_view, cells = (torch.tensor(column) for column in zip(*tokens, strict=True))
    for name in sorted(set(TOLD) - {"project"}):
        found = see.probes[name][image]
        found = found.transpose(0, 1) if name.startswith("attention") else found
        torch.testing.assert_close(
            found, expected[name][of_view, cells], atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name.startswith("attention"):
            assert found.dtype == torch.float32
    torch.testing.assert_close(see.project(see.tower_features)[image], see.features[image], atol=1e-5, rtol=1e-5)
    assert see.side == SIDE


CALLS = {"llava": [[PICTURE], [PICTURE, PICTURE]], "llava_next": [[SIZES[0]], [SIZES[1], SIZES[2]]]}


def views_in_order(prompt: Prompts, copies: int = 1) -> list[tuple]:
    """(view, image in it, picture) of what `Peek` saw: pictures of one size together, in order of first appearance."""
    rows: dict[int, list[int]] = {}
    for picture, (row, _) in enumerate(prompt.columns):
        rows.setdefault(row, []).append(picture)
    order = [picture for row in sorted(rows) for _ in range(copies) for picture in rows[row]]
    groups: dict[int, list[int]] = {}
    for picture in order:
        groups.setdefault(len(prompt.columns[picture][1]), []).append(picture)
    assert len(Peek.seen) == len(groups)
    return [(see, n, p) for see, group in zip(Peek.seen, groups.values(), strict=True) for n, p in enumerate(group)]


@pytest.mark.parametrize(("family", "attn"), implementations_of(CALLS))
@pytest.mark.parametrize("how", ["plain", "encoded", "beams"])
def test_what_the_tower_tells(how, family, attn):
    """CLS attention of three blocks, keys, features and places of every token equal the eager tower's own outputs, through
    packing, un-padding, encoding beforehand, and copying for beams."""
    model, prompt = deep(family, attn), prompts(family, CALLS[family])
    pictures = {name: prompt.inputs[name] for name in ("pixel_values", "image_sizes") if name in prompt.inputs}
    rest = {name: value for name, value in prompt.inputs.items() if name != "pixel_values"}
    Peek.seen.clear()
    with vp.wrap(model, Peek()), torch.no_grad():
        if how == "plain":
            model(**prompt.inputs)
        elif how == "beams":
            model.generate(**prompt.inputs, max_new_tokens=2, num_beams=2)
        else:
            encoded = model.get_image_features(**pictures, return_dict=True)
            model(**rest, mm_encoder_outputs={"image": encoded})
    for see, image, picture in views_in_order(prompt, 2 if how == "beams" else 1):
        assert_told(family, see, image, prompt.pixels[picture], prompt.sizes[picture])


def test_what_the_tower_told_of_earlier_pictures():
    """Several encodings, used in another order and later: each token's past is found by its own features."""
    model = deep("llava")
    several = [prompts("llava", [[PICTURE]], seed) for seed in range(3)]
    with vp.wrap(model, Peek()), torch.no_grad():
        encoded = [model.get_image_features(prompt.inputs["pixel_values"], return_dict=True) for prompt in several]
        for number in (1, 2, 0):
            Peek.seen.clear()
            rest = {name: value for name, value in several[number].inputs.items() if name != "pixel_values"}
            model(**rest, mm_encoder_outputs={"image": encoded[number]})
            assert_told("llava", Peek.seen[0], 0, several[number].pixels[0], PICTURE)


def test_what_the_tower_tells_of_merged_patches():
    """In a batch whose pictures merged different numbers, the padding between takes no share of anybody's attention."""
    model, prompt = deep("llava"), prompts("llava", FOUR)
    pixels = unlike(prompt)
    threshold, blocks = middling(model, pixels), LLAVA["num_hidden_layers"]
    expected = [merged_tower(model, picture, threshold, None) for picture in pixels]
    Peek.seen.clear()
    recipe = vp.Recipe.of(vp.MustDrop(layer=3, tokens=2, merge=threshold), Peek(tokens=3))
    watched(model, recipe, prompt.inputs | {"pixel_values": pixels})
    left = list(range(4))
    for see in Peek.seen:
        for image in range(see.images):
            picture = next(p for p in left if len(expected[p].ids) == see.visual)  # one size: in their order
            left.remove(picture)
            own = expected[picture]
            assert see.cell[image].tolist() == see.position[image].tolist() == own.ids
            assert see.entered == len(own.ids)
            features_equal(see.tower_features[image], own.features)
            features_equal(see.attention_from_cls[image], own.attention[blocks - 2])
            features_equal(see.attention_from_cls_final[image], own.attention[blocks - 1])
            features_equal(see.attention_from_cls_early[image], own.attention[blocks // 4 - 1])
    assert left == []
    assert len(Peek.seen) > 1, "the pictures of this test must merge different numbers"


class PeekPerView(Peek):
    per_crop = True


def test_methods_that_decide_per_view_see_one_view_each():
    """LLaVA-NeXT: every view of every picture is its own `image`, with its share of the budget in proportion to its tokens."""
    model, prompt = deep("llava_next"), prompts("llava_next", [[(46, 30)]])
    Peek.seen.clear()
    with vp.wrap(model, PeekPerView(tokens=20)) as run, torch.no_grad():
        model(**prompt.inputs)
    tokens = [token for token in packed((46, 30)) if token is not None]
    sizes = [sum(view == number for view, _ in tokens) for number in range(5)]
    exact = [20 * size / sum(sizes) for size in sizes]
    shares = [math.floor(x) for x in exact]
    for view in sorted(range(5), key=lambda v: (shares[v] - exact[v], v))[: 20 - sum(shares)]:
        shares[view] += 1
    expected = told("llava_next", prompt.pixels[0])
    seen = []
    for see in Peek.seen:
        for image in range(see.images):
            numbers = see.position[image].tolist()
            (view,) = {tokens[j][0] for j in numbers}
            seen.append(view)
            assert see.original == sizes[view]
            assert see.cell[image].tolist() == [tokens[j][1] for j in numbers]
            found = see.attention_from_cls[image].transpose(0, 1)
            torch.testing.assert_close(found, expected["attention_from_cls"][view, see.cell[image]], atol=2e-5, rtol=2e-5)
    assert sorted(seen) == list(range(5))
    of_view = [tokens[j][0] for j in run.last.kept[0].index.tolist()]
    assert [of_view.count(view) for view in range(5)] == shares


# --- what is scaled over a picture, chosen view by view ---------------------------------------------------------------
def shares_of(total: int, sizes: list[int]) -> list[int]:
    """A budget in proportion to the sizes, the largest remainders first."""
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [math.floor(x) for x in exact]
    for view in sorted(range(len(sizes)), key=lambda v: (shares[v] - exact[v], v))[: total - sum(shares)]:
        shares[view] += 1
    return shares


def cdpruned(prompt: Prompts, seen: Seen, picture: int, raw: list[float], keep: int) -> list[int]:
    """What CDPruner keeps of a picture: `raw` relevance scaled over all its views, and then every view for itself."""
    row, columns = prompt.columns[picture]
    tokens = packed(prompt.sizes[picture])
    features = seen.entering[row, columns][torch.tensor([token is not None for token in tokens])]
    of_view = [token[0] for token in tokens if token is not None]
    relevance = cdpruner_relevance([[-x] for x in raw])
    members = [[j for j, view in enumerate(of_view) if view == number] for number in sorted(set(of_view))]
    found = []
    for mine, share in zip(members, shares_of(keep, list(map(len, members))), strict=True):
        chosen = cdpruner(features[mine], [relevance[j] for j in mine], share) if share else []
        found += [mine[j] for j in chosen]
    return sorted(found)


VIEWED = [[[SIZES[0]]], [[SIZES[1]]], [[SIZES[2]]], [[SIZES[0], SIZES[1]], [SIZES[2]]]]
"""Padding above, at the sides, none: overview and crops then are of one size or of several; and a batch of all of them."""


@pytest.mark.parametrize("rows", VIEWED, ids=["above", "sides", "none", "batch"])
@pytest.mark.parametrize("how", ["embedding", "relevance"])
def test_cdpruner_scales_relevance_over_all_views(how, rows):
    """Red: relevance is scaled within each view, or over those views that happen to be of one size, or over a batch."""
    model, prompt, keep = deep("llava_next"), prompts("llava_next", rows), 15
    unlike_crops = torch.tensor([0.0, 4.0, -4.0, 8.0, -8.0])[:, None, None, None]  # the views' own scales differ
    pixels = prompt.inputs["pixel_values"] + unlike_crops[: prompt.inputs["pixel_values"].shape[1]]

    def relevance(patches, ids, valid):
        return patches.float().square().mean(-1)

    method = vp.CDPruner(tokens=keep, relevance=relevance if how == "relevance" else None)
    seen = watched(model, method, prompt.inputs | {"pixel_values": pixels})
    last = {row: int(columns[-1]) for row, columns in prompt.columns}
    for picture, (row, columns) in enumerate(prompt.columns):
        there = torch.tensor([token is not None for token in packed(prompt.sizes[picture])])
        features = seen.entering[row, columns][there]
        if how == "embedding":
            words = seen.entering[row, last[row] + 1 :].tolist()
            raw = [plain.mean([plain.cosine(x, word) for word in words]) for x in features.tolist()]
        else:
            of_view, cells = zip(*(token for token in packed(prompt.sizes[picture]) if token is not None), strict=True)
            crops = pixels[picture, : views(prompt.sizes[picture])]
            raw = relevance(told("llava_next", crops)["tower_features"][list(of_view), list(cells)], None, None).tolist()
        assert kept(seen.run, "llm")[picture] == cdpruned(prompt, seen, picture, raw, keep)


class Told(PeekPerView):
    """Decides per view by something scaled over the picture: how far a token is from the picture's first one."""

    needs = frozenset({"features", "cell"})
    scales_over_picture = True
    wholes: list = []  # noqa: RUF012

    def over_picture(self, see):
        self.wholes.append(see)
        return torch.arange(see.visual, dtype=torch.float).expand(see.images, -1) + 1000 * see.cell[:, :1]


@pytest.mark.parametrize("before", [[], ["flowcut:tokens=20"]], ids=["", "behind a tower method"])
def test_a_method_gets_its_own_numbers_back_view_by_view(before):
    """Every view sees its part of what was made of the whole picture, also of what an earlier stage left."""
    model, prompt = deep("llava_next"), prompts("llava_next", [[SIZES[0], SIZES[1]], [SIZES[2]]])
    Peek.seen.clear()
    Told.wholes.clear()
    with vp.wrap(model, vp.Recipe.of(*before, Told(layer=0, tokens=20))), torch.no_grad():
        model(**prompt.inputs)
    assert sum(see.images for see in Told.wholes) == 3
    assert all(see.over_picture is None for see in Told.wholes)
    known = {}  # whole pictures by their features
    for see in Told.wholes:
        for image in range(see.images):
            for row, x in enumerate(see.features[image]):
                known[tuple(x.tolist())] = float(row)
    assert Peek.seen
    for see in Peek.seen:
        assert see.over_picture.shape == (see.images, see.visual)
        for image in range(see.images):
            for x, number in zip(see.features[image], see.over_picture[image] % 1000, strict=True):
                assert known[tuple(x.tolist())] == number


@pytest.mark.parametrize(("family", "layer"), [("llava", 0), ("llava_next", 1)])
def test_one_view_needs_no_numbers_of_the_picture(family, layer):
    """Where a picture has one view, and at later layers, where views are not told apart, the view is the picture."""
    model = deep(family)
    prompt = prompts(family, CALLS[family])
    Peek.seen.clear()
    Told.wholes.clear()
    with vp.wrap(model, Told(layer=layer, fraction=0.5)), torch.no_grad():
        model(**prompt.inputs)
    assert Told.wholes == []
    assert all(see.over_picture is None for see in Peek.seen)
