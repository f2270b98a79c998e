"""CDPruner: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math

import pytest
import torch
from methods.comparing import close, pictures, random, select, sizes, unit_vectors
from methods.loops import plain
from methods.loops.cdpruner import cdpruner, cdpruner_relevance
from methods.views import random_view
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import vlmprune as vp
from vlmprune.methods.pruning.cdpruner import scaled


def test_cdpruner_relevance():
    assert cdpruner_relevance([[0.1, 0.3], [0.0, 0.0], [0.4, 0.4]]) == pytest.approx(
        [0.5 + 2.5e-6, 1 + 2.5e-6, 2.5e-6], abs=1e-12
    )
    assert cdpruner_relevance([[0.1], [0.1]]) == [1.0, 1.0]


def test_cdpruner_by_hand():
    points = unit_vectors(0, 5, 90, 45)
    assert cdpruner(points, [1.0, 1.0, 1.0, 1.0], 2) == [0, 2]  # equal relevance: the orthogonal one
    assert cdpruner(points, [1.0, 0.9, 0.01, 0.9], 2) == [0, 3]  # .9 sin 45 beats .01 sin 90 and .9 sin 5
    assert cdpruner(points, [1.0, 0.1, 0.5, 0.75], 2) == [0, 3]  # squares: .75^2 / 2 beats .5^2, though .75 / 2 < .5
    assert cdpruner(points, [0.5, 0.9, 0.6, 0.2], 1) == [1]


def test_cdpruner_is_the_incremental_form():
    """The determinant divided by the one before is the squared Cholesky pivot that the official code keeps."""
    features, relevance = random(12, 8), random(12, seed=1).abs() + 0.1
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    left, rows, chosen = kernel.diagonal().clone(), [], []
    for _ in range(6):
        j = int(left.argmax())
        row = (kernel[j] - sum((r[j] * r for r in rows), torch.zeros(12, dtype=torch.float64))) / left[j].sqrt()
        rows.append(row)
        left = left - row**2
        left[j] = -math.inf
        chosen.append(j)
    assert cdpruner(features, relevance, 6) == sorted(chosen)


@sizes
def test_cdpruner_embeddings(seed, visual, keep, text):
    """The `embedding` variant: relevance is the mean cosine to the words (the paper's is minus a mean, hence the sign)."""
    see = random_view(seed, visual=visual, text=text)
    keep, expected = min(keep, 16), []  # up to the rank of the features
    for own in pictures(see):
        minus = [[-plain.cosine(x, word) for word in own.text_features.tolist()] for x in own.features.tolist()]
        expected.append(cdpruner(own.features, cdpruner_relevance(minus), keep))
    assert select(vp.CDPruner(), see, keep)[0] == expected


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_cdpruner_with_a_relevance(keep):
    """A callable gets the patches, the words and their padding; what it returns is scaled picture by picture."""
    see = random_view(5, visual=30, text=(4, 1, 2))
    given, raw = [], torch.randn(3, 30, generator=torch.Generator().manual_seed(9)) * torch.tensor([[1.0], [50.0], [0.01]])

    def relevance(patches, ids, valid):
        given.append((patches, ids, valid))
        return raw

    chosen = select(vp.CDPruner(relevance=relevance), see, keep)[0]
    probes = [see.tower_features, see.text_ids, see.text_valid]
    assert all(torch.equal(one, two) for one, two in zip(given[0], probes, strict=True))
    for own, row, kept in zip(pictures(see), raw, chosen, strict=True):
        assert kept == cdpruner(own.features, cdpruner_relevance(-row[:, None]), keep)


def test_cdpruner_scaling():
    """On [10⁻⁶, 1] and a little, each picture for itself; 1 where all are equal."""
    raw = torch.tensor([[0.1, 0.5, 0.3], [-7.0, -7.0, -7.0], [100.0, 0.0, 1.0]])
    expected = [cdpruner_relevance([[-x] for x in row]) for row in raw.tolist()]
    close(scaled(raw), torch.tensor(expected))


def test_cdpruner_beyond_the_rank_keeps_the_count():
    """More tokens than dimensions: every further determinant is zero, picks go on by index."""
    see = random_view(visual=40)
    chosen = select(vp.CDPruner(), see, 30)[0]
    full = select(vp.CDPruner(), see, 16)[0]
    for kept, first in zip(chosen, full, strict=True):
        rest = [j for j in range(40) if j not in first]
        assert kept == sorted(first + rest[:14])


class Words:
    """A tokenizer of numbers, as much of one as `ClipRelevance` uses."""

    model_max_length = 7

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and int(i) in (1, 2)))

    def __call__(self, text, add_special_tokens=True, **_):
        def ids(piece):
            inner = [int(word) for word in piece.split()]
            return [1, *inner, 2] if add_special_tokens else inner

        if isinstance(text, str):
            return {"input_ids": ids(text)}
        longest = max(len(ids(piece)) for piece in text)
        assert longest <= self.model_max_length
        rows = [ids(piece) + [0] * (longest - len(ids(piece))) for piece in text]
        mask = [[1] * len(ids(piece)) + [0] * (longest - len(ids(piece))) for piece in text]
        return Batch(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))


class Batch(dict):
    def to(self, device):
        return self


def test_clip_relevance():
    """Minus the mean cosine of a patch's CLIP embedding with those of the question's pieces, five words each."""
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(
            CLIPConfig(text_config=text | ends, vision_config=vision | {"patch_size": 8}, projection_dim=12)
        ).eval()
    for parameter in clip.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    see = random_view(images=3, visual=9, text=(12, 5, 1), gone=0, in_tower=0)
    found = vp.ClipRelevance(clip, Words(), Words())(see.tower_features, see.text_ids, see.text_valid)
    for own, row in zip(pictures(see), found, strict=True):
        patches = clip.visual_projection(clip.vision_model.post_layernorm(own.tower_features)).tolist()
        ids = own.text_ids.tolist()
        pieces = []
        for start in range(0, len(ids), 5):
            piece = torch.tensor([[1, *ids[start : start + 5], 2]])
            pieces.append(clip.get_text_features(input_ids=piece).pooler_output[0].tolist())
        expected = [-plain.mean([plain.cosine(patch, piece) for piece in pieces]) for patch in patches]
        close(row, torch.tensor(expected))


@torch.no_grad()
def test_cdpruner_at_the_size_of_the_paper():
    """A square picture of 2 × 2 crops without padding, K = 320, so 64 of each view as the official code keeps: the same
    tokens as the determinants of every view's kernel give, its relevance scaled over all five. Scaled within each view, a
    third of them are others."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=5, image_grid_pinpoints=[[672, 672]])
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval().double()  # in float32 rounding decides a pick now and then
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15, generator=draw)
    brightness = torch.tensor([0.0, 1.5, -1.5, 3.0, -3.0])[:, None, None, None] * torch.randn(5, 3, 1, 1, generator=draw)
    pixels = torch.randn(5, 3, 336, 336, generator=draw) + brightness
    ids = torch.tensor([[1, 7, *[5] * (5 * 576 + 48), 11, 12, 13]])
    projection, question, seen = torch.randn(64, 12, generator=draw), torch.randn(12, generator=draw), {}

    def relevance(patches, *_):
        return -torch.cosine_similarity(patches.double() @ projection.double(), question.double(), dim=-1)

    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.update(x=args[0], features=out))
    try:
        with vp.wrap(model, vp.CDPruner(tokens=320, relevance=relevance)) as run:
            model(input_ids=ids, pixel_values=pixels[None].double(), image_sizes=torch.tensor([[672, 672]]))
    finally:
        handle.remove()

    def expected(raw: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> list[set[int]]:
        unit = torch.nn.functional.normalize(seen["features"].double(), dim=-1)
        weight = (raw - low + 1e-6) / (high - low)
        sets = []
        for kernel in weight[:, :, None] * (unit @ unit.mT) * weight[:, None]:
            left, rows, chosen = kernel.diagonal().clone(), [], []
            for _ in range(64):
                j = int(left.argmax())
                row = (kernel[j] - sum((r[j] * r for r in rows), torch.zeros(576).double())) / left[j].sqrt()
                rows.append(row)
                left = left - row**2
                left[j] = -torch.inf
                chosen.append(j)
            sets.append(set(chosen))
        return sets

    ours: list[set[int]] = [set() for _ in range(5)]
    for j in run.last.kept[0].index.tolist():  # the base view, then the crops' rows of 48
        y, x = divmod(j - 576, 48)
        view, cell = (0, j) if j < 576 else (1 + y // 24 * 2 + x // 24, y % 24 * 24 + x % 24)
        ours[view].add(cell)
    raw = relevance(seen["x"])
    assert ours == expected(raw, raw.min(), raw.max())
    apart = expected(raw, raw.amin(1, keepdim=True), raw.amax(1, keepdim=True))
    assert sum(len(a & b) for a, b in zip(ours, apart, strict=True)) < 0.8 * 320
