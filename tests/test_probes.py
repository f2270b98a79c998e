"""A probe is one entry and one function; a method inside the tower may provide one of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.live.probes import TAKE
from vlmprune.live.tower import FROM_BLOCK, blocks_of_probes
from vlmprune.methods.tower import TowerPruner
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import BEFORE_THE_STAGE, FROM_TOWER, PROBES, PROVIDED, Probe, View, known_probes

SAMPLES = [["text3", "image", "text4"], ["text2", "image", "image", "text5"]]


def test_every_probe_is_taken_by_one_function():
    """Red: an entry without a function fails at the first prompt; a function without an entry can never be asked for."""
    tower_end = {name for name, probe in PROBES.items() if probe.taken == "tower end"}
    before_tower = {name for name, probe in PROBES.items() if probe.taken == "pixels"}
    assert set(TAKE) | set(FROM_BLOCK) | tower_end | before_tower == set(PROBES)
    assert before_tower == {"pixels"}
    assert set(FROM_BLOCK) | tower_end == FROM_TOWER
    assert set(FROM_BLOCK) == {name for name, probe in PROBES.items() if probe.taken == "tower block"}
    assert {name for name, probe in PROBES.items() if probe.taken == "layer before"} == BEFORE_THE_STAGE


def test_blocks_of_a_tower():
    """The block that feeds the projector is the last but one of LLaVA's; the early one stands a quarter into the tower."""
    assert blocks_of_probes(PROBES, feature=22, blocks=24) == {
        22: ["attention_from_cls", "tower_keys"],
        0: ["attention_from_cls_first"],
        5: ["attention_from_cls_early"],
        23: ["attention_from_cls_final"],
    }
    assert blocks_of_probes({"tower_keys", "features"}, feature=2, blocks=3) == {2: ["tower_keys"]}


def test_a_view_names_what_is_missing():
    view = View(0, 4, torch.arange(4)[None], {"features": torch.zeros(1, 4, 2)})
    with pytest.raises(AttributeError, match="the method looks at 'keys' but does not declare it: add it to its `needs`"):
        view.keys  # noqa: B018
    with pytest.raises(AttributeError, match=r"a view has no 'kees'; probes: features"):
        view.kees  # noqa: B018


# -- a probe that a method provides ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Norms(TowerPruner):
    """Keeps tokens whose values are long in the tower's blocks: watches only, and drops before the language model."""

    name, paper, watches = "norms", "", "values in the tower"
    needs = frozenset({"value_norm"})
    default = Schedule((Stage(0, Budget(tokens=4)),))
    provides = Probe("value_norm", "[image, visual]", "sum over blocks of each patch's value norm", "tower method", fp32=True)

    def watch(self, block, state):
        norm = block.value.float().norm(dim=-1).sum(dim=1)[:, 1 if block.cls else 0 :]  # [crop, patch]
        state.carried["value_norm"] = state.carried.get("value_norm", 0) + norm

    def select(self, see, keep):
        return see.value_norm.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


@dataclass(frozen=True, kw_only=True)
class Reader(vp.ScorePruner):
    """Reads in the decoder what another method made in the tower."""

    name, paper, needs, default, first_layer = "reader", "", frozenset({"value_norm"}), vp.at(2, tokens=2), 1

    def score(self, see):
        return see.value_norm


@dataclass(frozen=True, kw_only=True)
class Silent(Norms):
    """Promises a probe and does not make it."""

    name, needs = "silent", frozenset({"silence"})
    provides = Probe("silence", "[image, visual]", "nothing", "tower method")

    def watch(self, block, state):
        pass

    def select(self, see, keep):
        return see.silence


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_a_method_of_ones_own_provides_a_probe(family):
    """Red: the engine watches blocks for one method only, or takes the first crop's numbers for all."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, Norms(tokens=5)) as run:
        model(**inputs)
    assert [len(kept.index) for kept in run.last.kept] == [5, 5, 5]
    with vp.wrap(model, vp.Recipe.of(Norms(tokens=9), Reader(layer=2, tokens=3))) as both:
        model(**inputs)
    first, second = both.last.kept[:3], both.last.kept[3:]
    with vp.wrap(model, Norms(tokens=3)) as run:
        model(**inputs)
    for before, after, best in zip(first, second, run.last.kept, strict=True):
        assert set(after.index.tolist()) < set(before.index.tolist())
        assert after.index.tolist() == best.index.tolist()


@torch.no_grad()
def test_it_is_what_the_blocks_have():
    """The numbers are those of the tower's own value projections, in all blocks up to the one that feeds the projector."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    values, hooks = [], []
    blocks = model.model.vision_tower.encoder.layers
    for block in blocks:
        hooks.append(block.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out)))
    with vp.wrap(model, Norms(tokens=5)) as run:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    heads, watched = blocks[0].self_attn.num_heads, len(blocks) - 2  # all before the one that feeds the projector
    norm = sum(value.unflatten(-1, (heads, -1)).norm(dim=-1).sum(dim=-1)[:, 1:] for value in values[:watched])
    expected = norm.argsort(dim=1, descending=True, stable=True)[:, :5].sort(dim=1).values
    assert [kept.index.tolist() for kept in run.last.kept] == expected.tolist()


def test_nobody_provides_it():
    with pytest.raises(vp.UsageError, match="'value_norm' is made inside the vision tower by a method that is not in this rec"):
        vp.wrap(shared("llava"), Reader())


def test_only_one_method_works_inside_the_tower():
    with pytest.raises(vp.UsageError, match="flowcut and norms both work inside the vision tower, where only one method can"):
        vp.wrap(shared("llava"), vp.Recipe.of(vp.FlowCut(tokens=9), Norms(layer=2, tokens=3)))


@torch.no_grad()
def test_a_probe_that_was_promised_and_not_made():
    model = shared("llava")
    with vp.wrap(model, Silent()), pytest.raises(vp.UsageError, match="silent provides the probe 'silence', but its watch"):
        model(**make_inputs("llava", model, SAMPLES))


def test_provided_probes_are_known():
    assert PROVIDED["flow"] is vp.FlowCut.provides
    assert {"flow", "value_norm"} <= set(known_probes()) - set(PROBES)


# -- names of earlier versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "old", "new"), [(vp.ScorePruner, "per_view", "per_crop"), (Norms, "cut", "drop"), (Norms, "per_view", "per_crop")]
)
def test_a_class_with_an_old_name_is_refused(kind, old, new):
    """Red: a method written for an earlier version runs without what it defines."""
    parts = {"name": "older", "paper": "", "needs": frozenset({"features"}), "default": vp.at(0, tokens=4), old: True}
    made = type("Older", (kind,), parts)
    with pytest.raises(vp.UsageError, match=f"the method Older defines {old}, which is called {new} now: rename it"):
        made()
