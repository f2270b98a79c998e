"""Towers whose squares of patches become tokens before the projector: CLS attention (InternVL), and flow without a stage
inside."""

from __future__ import annotations

import pytest
import torch
from families.configs import SIDE
from families.oracles import MOVED, TOLERANCE, masked_logits
from families.running import generate
from families.table import BATCHES, make_inputs, shared

import vlmprune as vp
from vlmprune.methods.tower import TowerPruner
from vlmprune.schedule import Budget, Schedule, Stage

pytestmark = pytest.mark.usefixtures("no_grad")
UNIT = 2
TOKENS = (SIDE // UNIT) ** 2


def squares(patches: torch.Tensor) -> list[list[float]]:
    """Per tile, the mean of each square of `patches` `[tile, patch]`, cell by cell."""
    found = []
    for tile in patches.view(len(patches), SIDE, SIDE):
        cells = range(SIDE // UNIT)
        found.append(
            [
                sum(float(tile[UNIT * row + down, UNIT * column + right]) for down in range(UNIT) for right in range(UNIT))
                / UNIT**2
                for row in cells
                for column in cells
            ]
        )
    return found


def test_the_model_makes_tokens_of_these_squares():
    """The stock model's own shuffle. Red: token (i, j) is made of other patches than our probes are."""
    numbered = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE, 1).float()
    shuffled = shared("internvl").model.pixel_shuffle(numbered, scale_factor=1 / UNIT).reshape(TOKENS, UNIT**2)
    for token, patches in enumerate(shuffled.tolist()):
        row, column = divmod(token, SIDE // UNIT)
        mine = {(UNIT * row + down) * SIDE + UNIT * column + right for down in range(UNIT) for right in range(UNIT)}
        assert set(patches) == mine


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cls_attention_is_the_towers_own(attention):
    """Oracle: attention maps of the stock tower in eager mode. Red: another block, row or head; squares in another order."""
    eager, model = shared("internvl", "eager"), shared("internvl", attention)
    inputs = make_inputs("internvl", BATCHES["pictures"])
    maps = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    scores = squares(maps[-1][:, :, 0, 1:].mean(dim=1))
    with vp.wrap(model, "cls:tokens=4") as run:
        model(**inputs)
    kept = {image.ordinal: image.index.tolist() for image in run.last.kept}
    # Pictures of even number are one tile, those of odd number two, which share a budget of the whole picture.
    start = 0
    for ordinal, image in enumerate(run.last.kept):
        tiles = image.original // TOKENS
        mine = [score for tile in scores[start : start + tiles] for score in tile]
        start += tiles
        best = sorted(sorted(range(len(mine)), key=lambda token: -mine[token])[:4])
        assert kept[ordinal] == best
    assert [image.original for image in run.last.kept] == [TOKENS, 2 * TOKENS]


METHODS = [
    "cls:fraction=0.4",
    "visionzip:fraction=0.5",
    "holov:fraction=0.4",
    "vscan:layer=0|3,fraction=0.6|0.3",
    "cdpruner:fraction=0.4",
    "flowcut:fraction=0.3",
    "mustdrop:layer=2,fraction=0.5,merge=1.1",
]


@pytest.mark.parametrize("recipe", METHODS)
def test_methods_that_look_into_the_tower_are_exact(recipe):
    """Red: what the tower saw belongs to another token, or features are merged into another place."""
    name = "internvl"
    model, inputs = shared(name), make_inputs(name, BATCHES["ragged"])
    with vp.wrap(model, recipe) as run:
        _, new, logits = generate(model, inputs)
        last = run.last
    if any(image.features is not None for image in last.kept):
        places = [(inputs["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0] for row in range(3)]
        merged = {image.layer for image in last.kept if image.features is not None}
        assert merged == {0}

        def put(module, args, kwargs):
            hidden, starts = args[0].clone(), [0, 0, 0]
            for image in last.kept:
                if image.layer == 0:
                    start = starts[image.sample]
                    mine = places[image.sample][start : start + image.original]
                    hidden[image.sample, mine[image.index]] = image.features
                    starts[image.sample] += image.original
            return (hidden, *args[1:]), kwargs

        handle = model.model.language_model.layers[0].register_forward_pre_hook(put, with_kwargs=True)
    else:
        handle = None
    keep = {layer: mask & last.keep_cache.get(layer, mask) for layer, mask in last.keep.items()}
    try:
        expected = masked_logits(name, model, inputs, keep, new[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    finally:
        if handle is not None:
            handle.remove()
    unpruned = masked_logits(name, model, inputs, {}, new[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    steps = slice(0, 1) if last.keep_cache else slice(None)  # what the cache stage drops is hidden from later rows only
    torch.testing.assert_close(logits[:, steps], expected[:, steps], atol=TOLERANCE, rtol=0)
    assert (logits - unpruned).abs().amax(dim=(1, 2)).min() > MOVED


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "internvl"])
def test_flow_keeps_whole_units_without_a_stage_inside(name):
    """Red: patches are dropped in a tower that needs them; or its unit variant is not exact."""
    model, inputs = shared(name), make_inputs(name, BATCHES["ragged"])
    with vp.wrap(model, "flowcut:fraction=0.3") as run:
        _, new, logits = generate(model, inputs)
        last = run.last
    assert {image.method for image in last.kept} == {"flowcut (unit)"}
    assert {image.site for image in last.kept} == {"llm"}
    expected = masked_logits(name, model, inputs, last.keep, new[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_flow_of_units_is_the_mean_over_their_patches():
    """Oracle: one tile, block by block and patch by patch, from the tower's own weights. Red: other patches or blocks."""
    model, inputs = shared("internvl"), make_inputs("internvl", BATCHES["one"])
    tower, seen = model.model.vision_tower, []
    handles = [
        layer.attention.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((module, args[0])), with_kwargs=True
        )
        for layer in tower.encoder.layer
    ]
    tower(inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    flow = None
    for module, hidden in seen[:-1]:  # as in the paper's code, what feeds the projector is not looked at
        heads, dim = module.num_heads, module.head_dim
        query, key, value = (
            norm(project(hidden)).view(1, -1, heads, dim).transpose(1, 2)
            for norm, project in (
                (module.q_norm, module.q_proj),
                (module.k_norm, module.k_proj),
                (torch.nn.Identity(), module.v_proj),
            )
        )
        relation = (query[:, :, :1] @ key.transpose(2, 3) * module.scale).softmax(-1).mean(1)[0, 0, 1:]
        semantic = (value[:, :, :1] @ value.transpose(2, 3)).softmax(-1).mean(1)[0, 0, 1:]
        magnitude = value.mean(1)[0, 1:].abs().sum(-1)
        score = (relation / relation.sum() + semantic / semantic.sum()) * magnitude
        flow = score if flow is None else 0.5 * flow + 0.5 * score
    assert flow is not None
    (units,) = squares(flow[None])
    with vp.wrap(model, "flowcut:tokens=2") as run:
        model(**inputs)
    first = run.last.kept[0]
    assert first.index.tolist() == sorted(sorted(range(TOKENS), key=lambda token: -units[token])[:4])


@pytest.mark.parametrize(
    ("name", "recipe", "sentence"),
    [
        ("internvl", "mustdrop:layer=2,fraction=0.5", "this one needs all to its end: set merge=1.1"),
        ("internvl", "flowcut:fraction=0.5,variant_on_units=official", 'drops patches that this tower needs: use "unit"'),
        ("qwen3_vl", "flowcut:fraction=0.5,variant_on_units=official", 'drops patches that this tower needs: use "unit"'),
        ("qwen3_vl", "cls:fraction=0.5", "its vision tower has no CLS token"),
        ("smolvlm", "flowcut:fraction=0.5", "its vision tower has no CLS token"),
    ],
)
def test_what_such_towers_cannot_do_is_refused(name, recipe, sentence):
    with pytest.raises(vp.UsageError) as refusal:
        vp.wrap(shared(name), recipe)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_method_of_ones_own_is_refused_inside_such_a_tower():
    """The engine's own sentence, whoever wrote the method."""

    class Inside(TowerPruner):
        name = "inside_of_squares"
        paper = "none"
        watches = "nothing"
        needs = frozenset()
        default = Schedule((Stage(0, Budget(fraction=0.5), "vision"),))

    with pytest.raises(vp.UsageError, match="needs all of them up to its end"):
        vp.wrap(shared("qwen3_vl"), Inside())
