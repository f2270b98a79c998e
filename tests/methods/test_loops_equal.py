"""Every method's choice, and every kernel, against the loop-by-loop transcriptions in loops.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import loops
import oracles
import pytest
import torch
from methods.views import alone, random_view, replaced
from transformers import CLIPConfig, CLIPModel

import vlmprune as vp
from vlmprune.kernels import attention_mass as mass_kernel
from vlmprune.kernels import flow_score as flow_kernel
from vlmprune.kernels import gather_tokens as gather_kernel
from vlmprune.kernels import select_diverse as diverse_kernel
from vlmprune.live.rows import Reduction
from vlmprune.methods import merging
from vlmprune.methods.base import alive_top
from vlmprune.methods.base import top as best
from vlmprune.methods.pruning.cdpruner import scaled
from vlmprune.methods.pruning.sparsevlm import recycled
from vlmprune.methods.tower import Block, TowerState
from vlmprune.view import TowerFacts, View

SIZES = [(0, 20, 7, (5, 3, 1)), (1, 37, 12, (9, 2, 4)), (2, 49, 30, (3, 3, 3)), (3, 16, 1, (1, 6, 2)), (4, 25, 24, (2, 1, 12))]
sizes = pytest.mark.parametrize(("seed", "visual", "keep", "text"), SIZES, ids=[f"{v}-{k}" for _, v, k, _ in SIZES])


def select(method: vp.Pruner, see: View, keep: int) -> tuple[list[list[int]], torch.Tensor | None]:
    """Kept indices of every picture, and merged features."""
    chosen = method.select(see, keep)
    if isinstance(chosen, vp.Choice):
        return [row.tolist() for row in chosen.index], chosen.features
    return chosen.tolist(), None


def pictures(see: View) -> list[SimpleNamespace]:
    """Each picture's probes without the axis of pictures and without padding; `project` and `identity` as they are."""
    found = []
    for image in range(see.images):
        own = alone(see, image)
        probes = {k: v if k == "project" else v[0] for k, v in own.probes.items()}
        found.append(SimpleNamespace(**probes))
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


def quantised(see: View, steps: int = 8) -> View:
    """Attention in eighths: many exact ties, in fp32 as in float64."""
    attention = {k: (v * steps).round() / steps for k, v in see.probes.items() if k.startswith("attention")}
    return replaced(see, **attention)


def hots(*shape: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit vectors along a few axes, with many duplicates: cosines are exactly 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    return torch.eye(width)[torch.randint(0, width // 2, shape, generator=draw)]


# --- scores of attention ----------------------------------------------------------------------------------------------
ROWS = {
    "fastv": (vp.FastV(), "attention_from_last"),
    "cls": (vp.CLS(), "attention_from_cls"),
    "pdrop": (vp.PDrop(), "attention_of_layer"),
    "vscan": (vp.VScan(), "attention_of_layer"),
}


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("name", ROWS)
def test_mean_over_heads(name, ties, seed, visual, keep, text):
    """FastV, FasterVLM, PyramidDrop and VScan's second stage: the mean over heads of one row of attention."""
    method, probe = ROWS[name]
    see = random_view(seed, visual=visual, text=text, layer=16)
    see = quantised(see) if ties else see
    expected = [loops.top(loops.mean_of(heads), keep) for heads in see.probes[probe].tolist()]
    assert select(method, see, keep)[0] == expected


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_adaptinfer(ties, seed, visual, keep, text):
    """Section 4.2, with its symmetrised weights written out."""
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see, 2) if ties else see
    expected = []
    for own in pictures(see):
        among, seen = own.attention_among_text.tolist(), own.attention_from_text.tolist()
        words, scores = range(len(among[0])), [0.0] * visual
        for m, a in zip(among, seen, strict=True):
            for t in words:
                weight = sum(m[u][t] + m[t][u] - (m[t][t] if u == t else 0.0) for u in words)
                for j in range(visual):
                    scores[j] += weight * a[t][j]
        expected.append(loops.top(scores, keep))
    assert select(vp.AdaptInfer(), see, keep)[0] == expected


# --- diversity --------------------------------------------------------------------------------------------------------
@sizes
def test_divprune(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    expected = [sorted(oracles.divprune(own.features, keep)) for own in pictures(see)]
    assert select(vp.DivPrune(), see, keep)[0] == expected


def test_divprune_with_duplicates():
    """Equal distances everywhere: the lower index, and never the same twice."""
    see = replaced(random_view(images=3, visual=20), features=hots(3, 20))
    for keep in (1, 7, 12, 19):
        assert select(vp.DivPrune(), see, keep)[0] == [sorted(oracles.divprune(own.features, keep)) for own in pictures(see)]


@sizes
def test_cdpruner_embeddings(seed, visual, keep, text):
    """The `embedding` variant: relevance is the mean cosine to the words (the paper's is minus a mean, hence the sign)."""
    see = random_view(seed, visual=visual, text=text)
    keep, expected = min(keep, 16), []  # up to the rank of the features
    for own in pictures(see):
        minus = [[-loops.cosine(x, word) for word in own.text_features.tolist()] for x in own.features.tolist()]
        expected.append(loops.cdpruner(own.features, loops.cdpruner_relevance(minus), keep))
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
        assert kept == loops.cdpruner(own.features, loops.cdpruner_relevance(-row[:, None]), keep)


def test_cdpruner_scaling():
    """On [10⁻⁶, 1] and a little, each picture for itself; 1 where all are equal."""
    raw = torch.tensor([[0.1, 0.5, 0.3], [-7.0, -7.0, -7.0], [100.0, 0.0, 1.0]])
    expected = [loops.cdpruner_relevance([[-x] for x in row]) for row in raw.tolist()]
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
        expected = [-loops.mean([loops.cosine(patch, piece) for piece in pieces]) for patch in patches]
        close(row, torch.tensor(expected))


@sizes
def test_dart(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    expected = [
        loops.dart(own.keys, own.text_keys, own.normed_features, own.normed_text_features, keep) for own in pictures(see)
    ]
    assert select(vp.DART(), see, keep)[0] == expected


def test_dart_with_ties():
    """Equal norms and equal cosines: the lower index."""
    see = random_view(visual=24, text=(6, 3, 2))
    whole = {name: see.probes[name].round().clamp(-1, 1) for name in ("keys", "text_keys")}
    valid = see.text_valid[..., None]
    see = replaced(see, **whole, normed_features=hots(3, 24), normed_text_features=hots(3, 6, seed=1) * valid)
    for keep in (2, 9, 17):
        expected = [
            loops.dart(own.keys, own.text_keys, own.normed_features, own.normed_text_features, keep) for own in pictures(see)
        ]
        assert select(vp.DART(), see, keep)[0] == expected


# --- parts of the picture ---------------------------------------------------------------------------------------------
@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_holov(ties, seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see) if ties else see
    expected = [loops.holov(own.attention_from_cls.mean(0), own.features, keep) for own in pictures(see)]
    assert select(vp.HoloV(), see, keep)[0] == expected


def test_holov_one_run_takes_all_it_can():
    """A run with nearly all the attention: its quota is cut to its length, the rest goes on round after round."""
    attention = torch.full((1, 2, 40), 1e-4)
    attention[..., 3:6] = 0.3
    see = replaced(random_view(images=1, visual=40), attention_from_cls=attention)
    (own,) = pictures(see)
    for keep in (3, 11, 30, 39):
        assert select(vp.HoloV(), see, keep)[0] == [loops.holov(own.attention_from_cls.mean(0), own.features, keep)]


@pytest.mark.parametrize(("side", "keep"), [(5, 9), (6, 33), (7, 48), (8, 40), (3, 1), (12, 100)])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_vscan(ties, side, keep):
    """Windows, the global scan, and merging, on grids that four does not divide too."""
    visual = side**2
    see = random_view(side, images=2, visual=visual, text=(2, 3), layer=0, gone=0, in_tower=0)
    see = replaced(see, cell=torch.arange(visual).expand(2, visual), side=side)
    if ties:
        see = replaced(quantised(see), features=hots(2, visual, seed=1))
    index, features = select(vp.VScan(), see, keep)
    for own, kept, merged in zip(pictures(see), index, features, strict=True):
        expected, tokens = loops.vscan(
            own.attention_from_cls_early.mean(0), own.attention_from_cls.mean(0), own.features, side, side, keep
        )
        assert kept == expected
        close(merged, tokens)


def test_vscan_on_part_of_a_view():
    """Un-padded crops lack rows or columns: a token's window is that of its place in the whole view."""
    side, rows = 8, 5
    see = random_view(images=2, visual=side * rows, text=(2, 3), layer=0, gone=0, in_tower=0)
    cells = torch.arange(side, side * (rows + 1))  # rows 1 to 5 of 8
    see = replaced(see, cell=cells.expand(2, -1), side=side)
    for keep in (10, 32, 39):
        index, _ = select(vp.VScan(), see, keep)
        for own, kept in zip(pictures(see), index, strict=True):
            early, late = (loops.mean_of(a.tolist()) for a in (own.attention_from_cls_early, own.attention_from_cls))
            local = set()
            for window in {(cell // side // 2, cell % side // 2) for cell in cells.tolist()}:
                inside = [j for j, cell in enumerate(cells.tolist()) if (cell // side // 2, cell % side // 2) == window]
                local |= {inside[i] for i in loops.top([early[j] for j in inside], keep // 2 // 16)}
            rest = [j for j in loops.ranking(late) if j not in local]
            assert kept == sorted([*local, *rest[: keep - len(local)]])


# --- merging ----------------------------------------------------------------------------------------------------------
@sizes
@pytest.mark.parametrize("contextual", [None, 0, 1, 3, 99])
def test_visionzip(contextual, seed, visual, keep, text):
    """Dominant and contextual tokens; contextual ones pass the projector after merging and stand at their targets' places."""
    see = random_view(seed, visual=visual, text=text, layer=0)
    merged = min(math.floor(keep * 5 / 32 + 0.5) if contextual is None else contextual, keep)
    index, features = select(vp.VisionZip(contextual=contextual), see, keep)
    for image, own in enumerate(pictures(see)):
        keys = own.tower_keys[None]  # one head: the probe is its mean already
        dominant, targets, tokens = loops.visionzip(own.attention_from_cls, keys, own.tower_features, keep, merged)
        assert index[image] == sorted(dominant + targets)
        if not merged:
            assert features is None
            continue
        places = {j: own.features[j].double() for j in dominant} | dict(zip(targets, own.project(tokens), strict=True))
        close(features[image], torch.stack([places[j] for j in sorted(places)]))


def test_visionzip_shares():
    """10 of 64, 20 of 128, 30 of 192 are contextual, as published."""
    for keep, merged in ((64, 10), (128, 20), (192, 30)):
        see = random_view(images=1, visual=keep + 20, text=(2,), layer=0)
        seen = []
        vp.VisionZip().select(replaced(see, project=lambda x, seen=seen: (seen.append(x.shape[1]), x)[1]), keep)
        assert seen == [merged]


def test_visionzip_with_ties():
    see = quantised(random_view(visual=30, layer=0))
    see = replaced(see, tower_keys=hots(3, 30, width=8))
    index, features = select(vp.VisionZip(contextual=4), see, 13)
    for image, own in enumerate(pictures(see)):
        dominant, targets, tokens = loops.visionzip(own.attention_from_cls, own.tower_keys[None], own.tower_features, 13, 4)
        assert index[image] == sorted(dominant + targets)
        close(features[image][[index[image].index(t) for t in targets]], own.project(tokens))


@sizes
def test_tome(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text, layer=0)
    index, features = select(vp.ToMe(), see, keep)
    for own, kept, merged in zip(pictures(see), index, features, strict=True):
        expected, tokens = loops.tome(own.features, keep)
        assert kept == expected
        close(merged, tokens)


def test_tome_with_ties():
    see = replaced(random_view(visual=21, layer=0), features=hots(3, 21))
    for keep in (20, 15, 11):  # one round: afterwards cosines of means are no longer exact
        index, features = select(vp.ToMe(), see, keep)
        for own, kept, merged in zip(pictures(see), index, features, strict=True):
            expected, tokens = loops.tome(own.features, keep)
            assert kept == expected
            close(merged, tokens)


# --- SparseVLM --------------------------------------------------------------------------------------------------------
def rating_words(own: SimpleNamespace) -> list[int]:
    """Raters of one picture; what the tower dropped never entered the language model."""
    entered = [row for row in own.embeddings.tolist() if not math.isnan(row[0])]
    return loops.sparsevlm_raters(entered, own.text_embeddings)


def test_raters_are_some_words_only():
    """The views of these tests tell raters from others, and leave out what the tower dropped."""
    found = [len(rating_words(own)) for own in pictures(random_view(1, text=(9, 2, 4)))]
    assert found[0] < 9
    assert found[2] < 4
    assert random_view(1).embeddings.isnan().any()


@sizes
def test_sparsevlm_1_5(seed, visual, keep, text):
    """Exactly K: the most plain tokens such that they and their clusters make K; the clusters stand at their centres."""
    see = random_view(seed, visual=visual, text=text)
    index, features = select(vp.SparseVLM(), see, keep)
    splits = [(plain, loops.sparsevlm_recycle_count(visual, plain)) for plain in range(keep, 0, -1)]
    plain, clusters = next(((p, c) for p, c in splits if p + c == keep), (keep, 0))
    for image, own in enumerate(pictures(see)):
        scores = loops.sparsevlm_scores(own.attention_from_text, rating_words(own))
        kept = loops.top(scores, plain)
        if not clusters:
            assert index[image] == kept
            assert features is None
            continue
        joined, tokens = loops.sparsevlm_recycle(own.features, scores, kept)
        centres = [joined[i] for i in loops.sparsevlm_cluster([own.features[j].tolist() for j in joined], clusters)[0]]
        assert index[image] == sorted(kept + centres)
        places = {j: own.features[j].double() for j in kept} | dict(zip(centres, tokens, strict=True))
        close(features[image], torch.stack([places[j] for j in sorted(places)]))


@pytest.mark.parametrize("heads", [4, 14, 17])
@sizes
def test_sparsevlm_2(heads, seed, visual, keep, text):
    """Attention over what rotary positions alone would give, in the heads that look at the picture most."""
    see = random_view(seed, visual=visual, text=text, heads=heads)
    index, features = select(vp.SparseVLM(version=2), see, keep)
    assert features is None
    for image, own in enumerate(pictures(see)):
        bias = loops.sparsevlm_rope_bias(*own.text_rotary.unbind(1), *own.rotary.unbind(1))
        corrected = loops.sparsevlm_v2_correct(own.attention_from_text, bias)
        assert index[image] == loops.top(loops.sparsevlm_v2_scores(corrected, rating_words(own)), keep)


def test_sparsevlm_counts():
    """How many tokens are recycled, into how many clusters, for every number that can be dropped of 576."""
    for dropped in range(576):
        tokens, clusters = recycled(dropped)
        assert tokens == loops.sparsevlm_recycled_tokens(576, 576 - dropped)
        assert clusters == loops.sparsevlm_recycle_count(576, 576 - dropped)


@pytest.mark.parametrize(("tokens", "clusters"), [(30, 4), (7, 7), (50, 1), (9, 3), (1, 1)])
def test_density_peaks(tokens, clusters):
    x = random_view(tokens, images=3, visual=tokens).features
    centres, home = merging.density_peaks(x, clusters)
    for image in range(3):
        assert (centres[image].tolist(), home[image].tolist()) == loops.sparsevlm_cluster(x[image], clusters)


def test_density_peaks_with_ties():
    """Duplicates: equal densities go to the lower index, and a centre stays in its own cluster."""
    x = hots(3, 20, width=8)
    for clusters in (1, 3, 6):
        centres, home = merging.density_peaks(x, clusters)
        for image in range(3):
            assert (centres[image].tolist(), home[image].tolist()) == loops.sparsevlm_cluster(x[image], clusters)


# --- MustDrop ---------------------------------------------------------------------------------------------------------
@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_mustdrop_counts(ties, seed, visual, keep, text):
    """The key set, 8 % of what entered the language model, and then the best by the words' attention."""
    see = random_view(seed, visual=visual, text=text, gone=11, in_tower=3)
    see = quantised(see) if ties else see
    index, features = select(vp.MustDrop(), see, keep)
    assert features is None
    for kept, own in zip(index, pictures(see), strict=True):
        salience = loops.mean_of(own.attention_from_cls_final.tolist())
        entered = [*salience, *[-1.0] * (see.entered - visual)]  # what an earlier stage dropped was no key
        keys = [j for j in loops.mustdrop_key_set(entered) if j < visual]
        assert kept == loops.mustdrop_top(own.attention_from_text.mean(0), keys, keep)


@sizes
@pytest.mark.parametrize(("g", "u"), [(0.05, 0.2), (0.03, 0.05), (1.0, 0.0), (0.0, 1.0), (2.0, 2.0)])
def test_mustdrop_thresholds(g, u, seed, visual, keep, text):
    """The dual filter, as many tokens as pass it; the key set stays whatever it says."""
    see = random_view(seed, visual=visual, text=text, gone=11, in_tower=3)
    index, _ = select(vp.MustDrop(global_threshold=g, individual_threshold=u), see, visual)
    for kept, own in zip(index, pictures(see), strict=True):
        salience = loops.mean_of(own.attention_from_cls_final.tolist())
        keys = loops.top(salience, math.ceil(0.08 * see.entered))
        assert kept == loops.mustdrop_filter(own.attention_from_text.mean(0), keys, g, u)


def grids(side: int, views: int = 3, width: int = 6) -> torch.Tensor:
    """Patches `[view, side², width]` of which some windows are alike."""
    draw = torch.Generator().manual_seed(side)
    hidden = torch.randn(views, side, side, width, generator=draw)
    for view in range(views):
        for row in range(0, side - 2, 3):
            for column in range(0, side - 2, 3):
                common = torch.randn(width, generator=draw)
                hidden[view, row : row + 3, column : column + 3] *= torch.rand((), generator=draw)
                hidden[view, row : row + 3, column : column + 3] += common * (1 + view)
    return hidden.flatten(1, 2)


def expected_merge(patches: torch.Tensor, side: int, threshold: float, windows: int | None) -> dict[int, torch.Tensor]:
    """What is left of a view: raster index -> feature. Rows and columns that fill no window stay as they are."""
    per_side = side // 3
    grid = patches.view(side, side, -1)[: 3 * per_side, : 3 * per_side]
    flat, edge = grid.flatten(0, 1), 3 * per_side
    if windows is None:
        merged, tokens = loops.mustdrop_merge(flat, edge, edge, threshold)
    else:
        merged, tokens = loops.mustdrop_merge_count(flat, edge, edge, windows)
    left = {index: patches[index].double() for index in range(side**2)}
    for number in merged:
        window = [patch // edge * side + patch % edge for patch in loops.mustdrop_windows(edge, edge)[number]]
        for patch in window:
            del left[patch]
        left[window[4]] = torch.tensor(tokens[number], dtype=torch.float64)
    return left


@pytest.mark.parametrize("side", [3, 6, 9, 7, 5])
@pytest.mark.parametrize(("threshold", "windows"), [(0.8, None), (0.5, None), (-1.0, None), (0.8, 1), (0.8, 3)])
def test_mustdrop_merge(side, threshold, windows):
    """Behind the first block: each view merges its own windows, at their middles, and nothing else moves."""
    hidden = grids(side)
    state = TowerState(TowerFacts(cls=True), side**2, torch.arange(side**2).expand(3, -1), side)
    stays, patches = vp.MustDrop(merge=threshold, windows=windows).drop(0, 10, hidden, state)
    numbers = set()
    for view in range(3):
        left = expected_merge(hidden[view], side, threshold, windows)
        assert stays[view].nonzero()[:, 0].tolist() == sorted(left)
        close(patches[view, sorted(left)], torch.stack([left[j] for j in sorted(left)]))
        numbers.add(len(left))
    if threshold == 0.5 and windows is None and side == 9:
        assert len(numbers) > 1, "the views of this test must merge different numbers"


def test_mustdrop_merges_behind_the_first_block_only():
    hidden = grids(6)
    state = TowerState(TowerFacts(cls=True), 36, torch.arange(36).expand(3, -1), 6)
    for index in range(1, 4):
        assert vp.MustDrop(merge=-1).drop(index, 3, hidden, state) is None
    small = TowerState(TowerFacts(cls=True), 4, torch.arange(4).expand(3, -1), 2)
    assert vp.MustDrop(merge=-1).drop(0, 3, hidden[:, :4], small) is None


# --- FlowCut ----------------------------------------------------------------------------------------------------------
@sizes
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_flowcut_in_the_decoder(heads, kv_heads, seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text, heads=heads, kv_heads=kv_heads)
    expected = [
        loops.flowcut_llm(own.query_of_last, own.keys, own.value_of_last, own.values, 8**-0.5, keep) for own in pictures(see)
    ]
    assert select(vp.FlowCut(layer=2, tokens=5), see, keep)[0] == expected


def test_flowcut_units_by_their_score():
    see = random_view(layer=0)
    assert select(vp.FlowCut(), see, 6)[0] == [loops.top(row, 6) for row in see.flow.tolist()]


def blocks(count: int, views: int, tokens: int, heads: int = 3, dim: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """(query, key, value) `[view, head, token, dim]` of some blocks."""
    draw = torch.Generator().manual_seed(seed)
    return [tuple(1.5 * torch.randn(views, heads, tokens, dim, generator=draw) for _ in range(3)) for _ in range(count)]


@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize("patches", [9, 16])
def test_flowcut_watches_cls(scale, patches):
    """The score of every patch over three blocks, and the relation of the last: CLS is inside both softmaxes."""
    method = vp.FlowCut(semantic_scale=scale)
    state = TowerState(TowerFacts(cls=True), 4, torch.arange(patches).expand(2, -1), 4)
    smooth: list = [None, None]
    for index, (q, k, v) in enumerate(blocks(3, 2, 1 + patches)):
        method.watch(Block(index, 9, q, k, v, 0.5, True, None), state)
        for view in range(2):
            semantic_scale = 1.0 if scale == "code" else 0.5  # dim 4
            terms = loops.flowcut_terms(q[view, :, 0], k[view], v[view, :, 0], v[view], 0.5, semantic_scale)
            a, s, d = (term[1:] for term in terms)
            smooth[view] = loops.flowcut_smoothed(smooth[view], loops.flowcut_score(a, s, d))
            close(state.carried["flow"][view], torch.tensor(smooth[view]))
            close(state.carried["relation"][view], torch.tensor(a))


def test_flowcut_watches_around_padding():
    """A view that kept fewer patches than another: its padding takes no part, and it scores as if it were alone."""
    ((q, k, v),) = blocks(1, 2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 1:4] = False  # CLS first, then three of padding, as they stand in a live call
    state = TowerState(TowerFacts(cls=True), 2, torch.arange(9).expand(2, -1), 3, valid[:, 1:])
    vp.FlowCut().watch(Block(0, 9, q, k, v, 0.5, True, valid), state)
    for view in range(2):
        real = valid[view]
        a, s, d = (
            term[1:] for term in loops.flowcut_terms(q[view, :, 0], k[view][:, real], v[view, :, 0], v[view][:, real], 0.5, 1.0)
        )
        close(state.carried["flow"][view][real[1:]], torch.tensor(loops.flowcut_score(a, s, d)))
        ratio = flow_kernel.entropy_ratio(state.carried["relation"], real[1:].sum()[None].expand(2))[view]
        assert ratio == pytest.approx(loops.entropy_ratio(a), abs=1e-6)
    assert not state.carried["relation"][1, :3].any()


@pytest.mark.parametrize("variant", ["unit", "official"])
def test_flowcut_watches_units(variant):
    """Towers without CLS: the mean token stands in for it. The official score lacks the semantic term and the sums."""
    method = vp.FlowCut(variant_on_units=variant)
    state = TowerState(TowerFacts(patches_per_token=4), 8, torch.arange(16)[None], 4)
    seen = blocks(3, 1, 16, seed=3)
    smooth = None
    for index, (q, k, v) in enumerate(seen):
        method.watch(Block(index, 9, q, k, v, 0.5, False, None), state)
        smooth = loops.flowcut_smoothed(smooth, loops.flowcut_qwen_official_scores(q[0], k[0], v[0], 0.5))
    flow = state.carried["flow"][0]
    if variant == "official":
        close(flow, torch.tensor(smooth))
    else:
        expected = loops.flowcut_unit_scores([(q[0], k[0], v[0]) for q, k, v in seen], 0.5)
        close(flow.unflatten(0, (-1, 4)).mean(1), torch.tensor(expected))


@pytest.mark.parametrize("target", [1, 5, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_flowcut_cuts(target, padded):
    """Behind every second block, each view by its own entropy; behind the last, down to the target; ties to the lower index."""
    draw = torch.Generator().manual_seed(target)
    patches, views, last = 30, 4, 7
    flow = (torch.randn(views, patches, generator=draw).abs() * 4).round() / 4
    relation = (torch.randn(views, patches, generator=draw) * torch.tensor([[0.1], [1.0], [3.0], [9.0]])).softmax(-1)
    valid = None
    if padded:
        valid = torch.arange(patches) >= torch.tensor([0, 4, 8, 29 - target])[:, None]
        relation = relation * valid
        flow = flow * valid
    state = TowerState(TowerFacts(cls=True), target, torch.arange(patches).expand(views, -1), 6, valid)
    state.carried = {"flow": flow, "relation": relation}
    hidden = torch.randn(views, patches, 3, generator=draw)
    for index in range(last + 2):
        remaining = last - index - 1
        cut = vp.FlowCut().drop(index, last, hidden, state)
        if remaining < 0 or remaining % 2:
            assert cut is None
            continue
        stays, same = cut
        assert same is hidden
        for view in range(views):
            real = range(patches) if valid is None else valid[view].nonzero()[:, 0].tolist()
            ratio = loops.entropy_ratio([relation[view, j] for j in real])
            count = len(real) - loops.flowcut_prune_count(len(real), target, remaining, ratio)
            expected = [real[i] for i in loops.top([flow[view, j] for j in real], count)]
            assert stays[view].nonzero()[:, 0].tolist() == expected


def test_flowcut_leaves_short_views_alone():
    state = TowerState(TowerFacts(cls=True), 9, torch.arange(9).expand(2, -1), 3)
    assert vp.FlowCut().drop(6, 7, torch.zeros(2, 9, 3), state) is None


# --- baselines --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("visual", "keep"), [(9, 3), (10, 4), (576, 64), (7, 6), (5, 1), (11, 10)])
def test_uniform(visual, keep):
    see = View(0, visual, torch.arange(visual).expand(2, -1), {})
    assert select(vp.Uniform(), see, keep)[0] == [[math.floor((i + 0.5) * visual / keep) for i in range(keep)]] * 2


def test_random_is_reproducible():
    """The set follows from seed, layer and prompt alone: not from global seeds, other pictures, or the order of calls."""

    def draw(identity, seed=0, layer=0, visual=50, keep=20):
        see = View(layer, visual, torch.arange(visual).expand(len(identity), -1), {"identity": identity})
        return select(vp.Random(seed=seed), see, keep)[0]

    torch.manual_seed(1)
    first = draw((7, 8, 7))
    torch.manual_seed(2)
    assert draw((7, 8, 7)) == first
    assert draw((8,)) == [first[1]]
    assert first[0] == first[2]
    different = [first[0], first[1], draw((7,), seed=1)[0], draw((7,), layer=1)[0]]
    assert len(set(map(tuple, different))) == 4
    smaller = draw((7,), keep=5)[0]
    assert set(smaller) <= set(first[0])  # a smaller budget keeps some of the same


def test_random_is_uniform():
    """Over many prompts every token is kept as often as any other (4.5 standard deviations)."""
    visual, keep, prompts = 12, 5, 2000
    see = View(0, visual, torch.arange(visual).expand(prompts, -1), {"identity": tuple(range(prompts))})
    often = torch.bincount(vp.Random().select(see, keep).flatten(), minlength=visual).double() / prompts
    deviation = math.sqrt(keep / visual * (1 - keep / visual) / prompts)
    assert (often - keep / visual).abs().max() < 4.5 * deviation


# --- kernels ----------------------------------------------------------------------------------------------------------
def naive_rows(query, key, scaling, visible):
    """`[head][row][key]` of one sample, by loops."""
    heads, group = query.shape[0], query.shape[0] // key.shape[0]
    found = []
    for head in range(heads):
        rows = []
        for row in range(query.shape[1]):
            seen = [j for j in range(key.shape[1]) if visible is None or visible[row, j]]
            shares = loops.softmax(
                [scaling * loops.dot(query[head, row].tolist(), key[head // group, j].tolist()) for j in seen]
            )
            rows.append([shares[seen.index(j)] if j in seen else 0.0 for j in range(key.shape[1])])
        found.append(rows)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernels(masked, heads, kv_heads):
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, heads, 3, 5, generator=draw), torch.randn(2, kv_heads, 7, 5, generator=draw)
    visible = None
    if masked:
        visible = torch.rand(2, 3, 7, generator=draw) > 0.4
        visible[..., 0] = True
    found = mass_kernel.attention_rows(query, key, 0.4, visible)
    assert found.dtype == torch.float32
    for sample in range(2):
        close(found[sample], naive_rows(query[sample], key[sample], 0.4, None if visible is None else visible[sample]))
    if masked:
        assert not found[~visible[:, None].expand_as(found)].any()
    close(mass_kernel.attention_mass(query, key, 0.4, visible), found.sum(2))
    half = mass_kernel.attention_rows(query.bfloat16(), key.bfloat16(), 0.4, visible)
    assert torch.equal(half, mass_kernel.attention_rows(query.bfloat16().float(), key.bfloat16().float(), 0.4, visible))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_flow_kernel(padded, heads, kv_heads):
    draw = torch.Generator().manual_seed(1)
    query, anchor = torch.randn(2, heads, 5, generator=draw), torch.randn(2, kv_heads, 5, generator=draw)
    key, value = torch.randn(2, kv_heads, 8, 5, generator=draw), torch.randn(2, kv_heads, 8, 5, generator=draw)
    valid = torch.rand(2, 8, generator=draw) > 0.3 if padded else None
    found = flow_kernel.flow_score(query, key, value, anchor, 0.7, 0.3, valid)
    for view in range(2):
        real = torch.ones(8, dtype=torch.bool) if valid is None else valid[view]
        k, v, va = (x[view].repeat_interleave(heads // kv_heads, 0) for x in (key, value, anchor))
        expected = loops.flowcut_terms(query[view], k[:, real], va, v[:, real], 0.7, 0.3)
        for term, numbers in zip(found, expected, strict=True):
            assert term.dtype == torch.float32
            close(term[view][real], torch.tensor(numbers))
        if padded:
            assert not found[0][view][~real].any()
            assert not found[1][view][~real].any()


def test_entropy_ratio():
    draw = torch.Generator().manual_seed(2)
    relation = (3 * torch.randn(5, 12, generator=draw)).softmax(-1)
    relation[4] = torch.eye(12)[3]
    relation[3, 4:] = 0  # padding, or underflow
    present = torch.tensor([12, 12, 12, 4, 12])
    expected = [loops.entropy_ratio(row[:n]) for row, n in zip(relation, present.tolist(), strict=True)]
    close(flow_kernel.entropy_ratio(relation, present), torch.tensor(expected))
    close(flow_kernel.share(relation), torch.tensor([loops.normalised(row) for row in relation.tolist()]))


@sizes
def test_greedy_order(seed, visual, keep, text):
    x = random_view(seed, visual=visual, text=text).features
    expected = [oracles.divprune(row, keep) for row in x]
    assert diverse_kernel.greedy_order(x, keep).tolist() == expected
    assert diverse_kernel.select_diverse(x, keep).tolist() == [sorted(row) for row in expected]
    assert diverse_kernel.greedy_order(x, 0).shape == (3, 0)


def test_greedy_order_in_pieces(monkeypatch):
    """The first pick is found a piece of the similarity matrix at a time: any size of piece, the same order."""
    x = random_view(visual=30).features
    whole = diverse_kernel.greedy_order(x, 9)
    for module, impl in ((diverse_kernel.reference, "reference"), (diverse_kernel.cpu, "auto")):
        for chunk in (1, 7, 30, 64):
            monkeypatch.setattr(module, "CHUNK", chunk)
            assert torch.equal(diverse_kernel.greedy_order(x, 9, impl=impl), whole)


@sizes
def test_determinant_order(seed, visual, keep, text):
    """Every beginning of the order is the naive greedy set of its size."""
    see = random_view(seed, visual=visual, text=text)
    x, weight = see.features, see.flow + 0.05
    order = diverse_kernel.determinant_order(x, weight, min(keep, 16))
    for image in range(see.images):
        for count in {1, 2, 3, (min(keep, 16) + 1) // 2, min(keep, 16)} & set(range(min(keep, 16) + 1)):
            assert sorted(order[image, :count].tolist()) == loops.cdpruner(x[image], weight[image], count)


@pytest.mark.parametrize("shape", [(11, 4), (2, 11, 4), (3, 2, 11, 4)])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one for the batch"])
def test_gather_kernel(shape, shared):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(1 if shared else 2, *shape, generator=draw)
    x[..., 5, :] = torch.nan  # a dropped token, which nothing real points at
    rows = torch.tensor([[0, 3, 10], [5, 5, 7]])
    valid = torch.tensor([[True, True, True], [False, False, True]])
    found = gather_kernel.gather_tokens(x, rows, valid)
    assert found.shape == (2, *shape[:-2], 3, 4)
    for sample in range(2):
        for place, row in enumerate(rows[sample].tolist()):
            expected = x[0 if shared else sample][..., row, :]
            expected = expected if valid[sample, place] else torch.zeros_like(expected)
            assert torch.equal(found[sample][..., place, :], expected)
    assert gather_kernel.gather_tokens(x, rows).isnan().any()


def test_small_helpers():
    """`top`, `alive_top`, and the pieces of merging, each by a loop."""
    draw = torch.Generator().manual_seed(4)
    score = (torch.randn(3, 15, generator=draw) * 2).round() / 2
    assert best(score, 6).tolist() == [loops.top(row, 6) for row in score.tolist()]
    assert best(score, 0).shape == (3, 0)
    valid = torch.rand(3, 15, generator=draw) > 0.3
    found = alive_top(score, torch.tensor([1, 4, 9]), valid)
    for row, count, real, stays in zip(score.tolist(), (1, 4, 9), valid.tolist(), found, strict=True):
        there = [j for j in range(15) if real[j]]
        assert stays.nonzero()[:, 0].tolist() == [there[i] for i in loops.top([row[j] for j in there], count)]
    chosen = torch.tensor([[1, 4], [0, 14], [7, 8]])
    assert merging.others(chosen, 15).tolist() == [[j for j in range(15) if j not in row] for row in chosen.tolist()]
    x, centres = torch.randn(3, 15, 4, generator=draw), torch.randn(3, 5, 4, generator=draw)
    home = merging.nearest(x, centres)
    for image in range(3):
        for token in range(15):
            likeness = [loops.cosine(x[image, token].tolist(), c) for c in centres[image].tolist()]
            assert home[image, token] == loops.ranking(likeness)[0]
    total, count = merging.gathered(x, home, 5)
    for image in range(3):
        for centre in range(5):
            members = [x[image, t] for t in range(15) if home[image, t] == centre]
            assert count[image, centre, 0] == len(members)
            close(total[image, centre], sum(members, torch.zeros(4)))


def test_a_reduction_is_its_kernel():
    """The one gather and scatter of the library: rows that are kept go on and come back to their places."""
    alive = torch.tensor([[True, False, True, True], [False, False, True, False]])
    reduction = Reduction.keeping(alive)
    assert not reduction.dense
    assert reduction.valid.tolist() == [[True, True, True], [False, False, True]]
    x = torch.arange(8.0).view(2, 4, 1)
    assert reduction.gather(x)[..., 0].tolist() == [[0.0, 2.0, 3.0], [0.0, 0.0, 6.0]]
    assert reduction.scatter(reduction.gather(x), 4)[..., 0].tolist() == [[0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 6.0, 0.0]]


X = torch.ones(1, 2, 4, 3)
OPS = {
    "attention_rows": lambda impl: mass_kernel.attention_rows(X, X, 1.0, impl=impl),
    "attention_mass": lambda impl: mass_kernel.attention_mass(X, X, 1.0, impl=impl),
    "flow_score": lambda impl: flow_kernel.flow_score(X[:, :, 0], X, X, X[:, :, 0], 1.0, 1.0, impl=impl),
    "gather_tokens": lambda impl: gather_kernel.gather_tokens(X, torch.zeros(1, 2, dtype=torch.long), impl=impl),
    "greedy_order": lambda impl: diverse_kernel.greedy_order(X[0], 2, impl=impl),
    "select_diverse": lambda impl: diverse_kernel.select_diverse(X[0], 2, impl=impl),
    "determinant_order": lambda impl: diverse_kernel.determinant_order(X[0], X[0, :, :, 0], 2, impl=impl),
}


@pytest.mark.parametrize("op", OPS)
def test_implementations_are_chosen_aloud(op, monkeypatch):
    """A kernel on a CPU is refused, never replaced in silence; "reference" and "auto" are the same there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(vp.UsageError, match=r"impl='triton' needs CUDA tensors, but .* on cpu: pass impl='reference'"):
        OPS[op]("triton")
    with pytest.raises(vp.UsageError, match="unknown impl 'tritn': did you mean 'triton'"):
        OPS[op]("tritn")
    one, two = OPS[op]("auto"), OPS[op]("reference")
    for x, y in zip(
        (one,) if isinstance(one, torch.Tensor) else one, (two,) if isinstance(two, torch.Tensor) else two, strict=True
    ):
        assert torch.equal(x, y)
