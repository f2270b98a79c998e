"""What every method promises, whatever it computes: exact counts, rising indices, pictures that do not meet, fp32 scores."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import PRUNING, relevance
from methods.views import CASES, MERGING, alone, in_dtype, in_fp32, random_view
from tiny_models import ALL_FAMILIES, build, make_inputs, shared

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES
from vlmprune.methods.base import Choice
from vlmprune.schedule import SITES, Budget
from vlmprune.view import View

cases = pytest.mark.parametrize("name", CASES)
HALVES = [torch.float16, torch.bfloat16]


def counts(choice: Choice) -> list[int]:
    return [len(row) for row in choice.index]


def assert_sound(name: str, choice: Choice, see: View, keep: int) -> None:
    """Rising, different, in range, as many as asked for (at most, where the method decides), with features of their kind."""
    method = CASES[name].method
    assert len(choice.index) == see.images
    for row in choice.index:
        assert row.dtype == torch.long
        assert (row.diff() > 0).all(), "not rising"
        assert len(row) == 0 or (row[0] >= 0 and row[-1] < see.visual), "out of range"
        assert len(row) <= keep if method.adaptive else len(row) == keep
    if choice.features is not None:
        assert choice.features.shape == (see.images, keep, see.features.shape[-1])
        assert choice.features.dtype == see.features.dtype
        assert choice.features.isfinite().all()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("keep", [1, 7, 19])
def test_choice_is_sound(name, dtype, keep):
    """In every dtype a model may have, for the smallest budget, a middling one, and all but one."""
    see = in_dtype(random_view(), dtype)
    assert_sound(name, CASES[name].select(see, keep), see, keep)


@cases
@pytest.mark.parametrize(("images", "visual", "keep", "text"), [(1, 2, 1, [1]), (2, 3, 2, [1, 4]), (3, 65, 64, [30, 1, 2])])
def test_choice_is_sound_at_the_edges(name, images, visual, keep, text):
    """Hardly anything to choose from, one word, many words, and more than fits the papers' constants."""
    see = random_view(1, images, visual, text)
    assert_sound(name, CASES[name].select(see, keep), see, keep)


@cases
def test_merging_methods_give_features(name):
    """Methods that merge hand over hidden states, the others only indices: an unchanged copy would cost memory."""
    assert (CASES[name].select(random_view(), 7).features is not None) == (name in MERGING)


@cases
def test_same_again(name):
    """A second look gives the same choice, also by a new object."""
    see, case = random_view(), CASES[name]
    first, second = case.select(see, 7), case.select(see, 7)
    for one, two in zip(first.index, second.index, strict=True):
        assert torch.equal(one, two)
    if first.features is not None:
        assert torch.equal(first.features, second.features)


@cases
def test_probes_are_left_as_they_were(name):
    """Methods share views: none may write into what it sees."""
    see, before = random_view(), random_view()
    CASES[name].select(see, 7)
    for probe, value in see.probes.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), before.probes[probe].nan_to_num()), probe


@cases
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_are_fp32(name, dtype):
    """Half-precision probes are scored as their own numbers in fp32, so that ties and order do not depend on rounding."""
    half = in_dtype(random_view(visual=48, gone=1, in_tower=1), dtype)
    for keep in (5, 20):
        chosen, expected = CASES[name].select(half, keep), CASES[name].select(in_fp32(half), keep)
        for one, two in zip(chosen.index, expected.index, strict=True):
            assert torch.equal(one, two)
        if expected.features is not None:
            limit = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(chosen.features.float(), expected.features, atol=limit, rtol=limit)


@cases
@pytest.mark.parametrize("text", [[4, 4, 4], [6, 1, 3]], ids=["equal texts", "ragged texts"])
@pytest.mark.parametrize("keep", [2, 11, 19])
def test_pictures_do_not_meet(name, text, keep):
    """What a picture keeps and merges does not depend on the pictures decided with it, nor on the length of their text."""
    see = random_view(2, text=text)
    together = CASES[name].select(see, keep)
    for image in range(see.images):
        single = CASES[name].select(alone(see, image), keep)
        assert together.index[image].tolist() == single.index[0].tolist()
        if together.features is not None:
            torch.testing.assert_close(together.features[image], single.features[0], atol=1e-5, rtol=1e-5)


class Watched(dict):
    """Probes that note which of them were looked at."""

    def __init__(self, probes):
        super().__init__(probes)
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)


@cases
def test_looks_at_what_it_declares(name):
    """Nothing undeclared, or a live call would fail; and nothing declared in vain, as every probe costs time."""
    case = CASES[name]
    see = case.declared(random_view(visual=40, gone=1, in_tower=1))
    probes = Watched(see.probes)
    case.method.select(View(see.layer, see.original, see.position, probes, see.entered, see.side, see.grid), 15)
    assert probes.seen == case.needs - case.idle


def test_a_view_refuses_what_was_not_declared():
    see = View(0, 4, torch.arange(4)[None], {})
    with pytest.raises(AttributeError, match=r"looks at 'features' but does not declare it"):
        see.features  # noqa: B018
    with pytest.raises(AttributeError, match="a view has no 'colour'"):
        see.colour  # noqa: B018


@pytest.mark.parametrize("keep", [1, 4, 12])
def test_an_adaptive_method_stays_within_its_budget(keep):
    """`Pruner.adaptive`: the budget is an upper limit, also where the thresholds would keep more."""
    see = random_view()
    for thresholds in ((1.0, 0.0), (0.04, 0.3), (2.0, 2.0)):
        g, u = thresholds
        method = vp.MustDrop(layer=2, tokens=keep, global_threshold=g, individual_threshold=u)
        assert method.adaptive
        chosen = method.select(View(2, see.original, see.position, {n: see.probes[n] for n in method.needs}, see.entered), keep)
        assert max(counts(chosen)) <= keep


def test_only_thresholds_are_adaptive():
    adaptive = {name for name, case in CASES.items() if case.method.adaptive}
    assert adaptive == {"mustdrop-thresholds", "pixelprune", "pixelprune-tolerance"}


# --- in real models ---------------------------------------------------------------------------------------------------
TINY = {row.name: f"{row.name}:{row.tiny[0]}" for row in PRUNING}
NEEDS_CLS = {row.name for row in PRUNING if row.cls}
RAGGED = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["image", "text9"]]
runs = pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in TINY for family in ALL_FAMILIES if "llava" in family or name not in NEEDS_CLS],
)


@functools.cache
def rounded(family):
    """A bfloat16 model of this module's own: rounding a shared one would change it for other tests."""
    return build(family).to(torch.bfloat16)


@runs
def test_exact_counts_in_a_half_precision_model(name, family):
    """A bfloat16 model runs, its logits are finite, and every picture keeps exactly its share at every stage."""
    model = rounded(family)
    inputs = make_inputs(family, model, RAGGED)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vp.wrap(model, TINY[name]) as run, torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    budgets = {(stage.site, stage.layer): stage.budget for stage, _ in vp.Recipe.of(TINY[name]).cuts(FAMILIES[family].facts)}
    assert len(run.last.kept) >= 4 * len([site for site, _ in budgets if site != "cache"])
    in_tower = {(kept.sample, kept.ordinal): len(kept.index) for kept in run.last.kept if kept.site == "vision"}
    for kept in run.last.kept:
        assert kept.site in SITES
        rising = kept.index.diff() > 0
        assert rising.all()
        if kept.site == "llm":
            left = in_tower.get((kept.sample, kept.ordinal), kept.original)
            assert len(kept.index) == min(budgets[kept.site, kept.layer].resolve(kept.original), left)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_relevance_of_patches_works_or_is_refused(family):
    """CDPruner with a relevance looks at what enters the projector, which Qwen-VL merges by four: no crash in the middle."""
    model = shared(family)
    try:
        run = vp.wrap(model, vp.CDPruner(fraction=0.4, relevance=relevance))
    except vp.UsageError:
        return
    with run, torch.no_grad():
        model(**make_inputs(family, model, RAGGED))
    for kept in run.last.kept:
        assert len(kept.index) == Budget(fraction=0.4).resolve(kept.original)


INSIDE = ["flowcut:tokens=6", "mustdrop:layer=3,tokens=3,windows=1"]
BEHIND = ["vscan:layer=0,tokens=4", "cls:layer=0,tokens=4", "visionzip:layer=0,tokens=4", "holov:layer=0,tokens=4"]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("behind", BEHIND)
def test_a_method_behind_a_tower_method_works_or_is_refused(inside, behind, family):
    """What the tower's blocks saw of patches that it dropped later must not be taken for what they saw of the survivors."""
    model = shared(family)
    try:
        run = vp.wrap(model, inside, behind)
    except vp.UsageError:
        return
    with run, torch.no_grad():
        model(**make_inputs(family, model, RAGGED))
    left = {(kept.sample, kept.ordinal): set(kept.index.tolist()) for kept in run.last.kept if kept.site == "vision"}
    second = [kept for kept in run.last.kept if kept.site == "llm" and kept.layer == 0]
    assert len(second) == 4
    for kept in second:
        assert len(kept.index) == min(4, len(left[kept.sample, kept.ordinal]))
        assert set(kept.index.tolist()) <= left[kept.sample, kept.ordinal]
