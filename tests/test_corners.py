"""Corners that no other test reaches: each of these was written because a bug put there on purpose went unnoticed."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest
import torch
from callers import generate, in_threads, next_turn, words
from methods.loops.divprune import divprune
from oracles import (
    TOLERANCE,
    LiveMaskOracle,
    cls_scores,
    columns_of_image,
    fastv_scores,
    generate_logits,
    image_columns,
    kept_sets,
    masked_forward,
)
from tiny_models import FIRST_WORD, VOCAB, build, make_inputs, shared
from transformers.cache_utils import DynamicLayer, StaticCache

import vlmprune as vp
from vlmprune.adapters.llava import LLAVA
from vlmprune.adapters.qwen_vl import QWEN2_5_VL
from vlmprune.kernels.select_diverse import select_diverse
from vlmprune.live import feature_index
from vlmprune.live.cache import PrunedLayer, pruned_layers
from vlmprune.live.entries import Entries
from vlmprune.live.rows import Reduction
from vlmprune.live.section import LayerStack, Section
from vlmprune.view import View

FAMILIES = ("llava", "qwen2_5_vl")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def layer_of_two():
    layer = PrunedLayer()
    states = torch.arange(24.0).view(2, 1, 3, 4)
    layer.recorded = Entries(torch.tensor([[0, 2, 5], [9, 1, 3]]), torch.tensor([[True] * 3, [False, True, True]]), False, 6)
    layer.update(states, states)
    return layer


@pytest.mark.parametrize("move", ["reorder_cache", "batch_select_indices"])
def test_slots_follow_their_rows(move):
    layer = layer_of_two()
    getattr(layer, move)(torch.tensor([1, 1]))
    assert layer.entries.slots.tolist() == [[9, 1, 3]] * 2
    assert layer.entries.valid.tolist() == [[False, True, True]] * 2


def test_slots_are_repeated_with_their_rows():
    layer = layer_of_two()
    layer.batch_repeat_interleave(2)
    assert layer.entries.slots.tolist() == [[0, 2, 5]] * 2 + [[9, 1, 3]] * 2


def test_reset_forgets_padding():
    layer = layer_of_two()
    layer.reset()
    assert layer.recorded is None
    assert layer.get_seq_length() == layer.stored == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_after_a_cut(family):
    model = shared(family)
    few = {"suppress_tokens": [token for token in range(VOCAB) if token not in range(20, 24)]}
    inputs = make_inputs(family, model, [["text40", "image", "text30"]], 0)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(ids < FIRST_WORD, ids, 20 + ids % 4)
    with vp.wrap(model, "fastv:layer=1|3,fraction=0.7|0.3") as run:
        greedy = generate(model, inputs, 16, **few).sequences
        sets = kept_sets(run.last)
        guessed = generate(model, inputs, 16, **few, prompt_lookup_num_tokens=3, max_matching_ngram_size=1).sequences
        assert kept_sets(run.last) == sets
    assert torch.equal(guessed, greedy)


def test_no_cache_knows_another_picture():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    ids = torch.cat([inputs["input_ids"], words(1, 4, 1)], 1)
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"].flip(-1)}
    sets = []
    for before in ([], [inputs]):
        with vp.wrap(model, "divprune:layer=0,tokens=5") as run:
            for call in (*before, other):
                model.generate(**call, max_new_tokens=2, use_cache=False)
            sets.append(kept_sets(run.last))
    assert sets[0] == sets[1]


def test_no_cache_knows_another_prompt():
    model = shared("llava")
    short, long = (make_inputs("llava", model, [parts]) for parts in (["image", "text3"], ["image", "text9"]))
    encoded = {"image": model.get_image_features(long.pop("pixel_values"), return_dict=True)}
    short.pop("pixel_values")
    short["input_ids"][0, -1] = FIRST_WORD  # no prefix of the long one
    long["input_ids"][0, 18] = FIRST_WORD + 1
    sets = []
    for before in ([], [short]):
        with vp.wrap(model, "fastv:layer=2,tokens=5") as run:
            for call in (*before, long):
                model(**call, mm_encoder_outputs=encoded, use_cache=False)
            sets.append(kept_sets(run.last))
    assert sets[0] == sets[1]


@families
def test_no_cache_in_two_threads(family):
    model = shared(family)

    def job(seed):
        inputs = make_inputs(family, model, [["text6", "image", "text8"]], seed)
        return model.generate(**inputs, max_new_tokens=8, use_cache=False)

    with vp.wrap(model, "random:layer=1,fraction=0.4"):
        jobs = [lambda seed=seed: [job(seed + n) for n in range(4)] for seed in (0, 100)]
        expected = [each() for each in jobs]
        got = in_threads(*jobs)
    for ours, theirs in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_cls_attention_stays_in_its_thread():
    model = shared("llava")
    both = threading.Barrier(2, timeout=30)

    def meet(*_):  # between the tower's block and the projector
        both.wait()

    def job(seed):
        return model(**make_inputs("llava", model, [["text6", "image", "text8"]], seed), use_cache=False).logits

    jobs = [lambda seed=seed: job(seed) for seed in (0, 100)]
    with vp.wrap(model, "cls:layer=0,fraction=0.4"):
        expected = [each() for each in jobs]
    with vp.wrap(model, "cls:layer=0,fraction=0.4"):
        handle = model.model.multi_modal_projector.register_forward_pre_hook(meet)
        try:
            got = in_threads(*jobs)
        finally:
            handle.remove()
    assert all(map(torch.equal, got, expected))


@families
def test_second_turn_with_padding_of_its_own(family):
    model = shared(family)
    samples = [["text7", "image", "text4"], ["text3", "image", "text9"]]
    inputs = make_inputs(family, model, samples)
    new = words(2, 5, 1)

    def talk():
        first, _, _ = generate_logits(model, inputs, 4)
        turn = next_turn(inputs, first.sequences, first.past_key_values, new)
        turn["attention_mask"][0, -5:-3] = 0  # row 0 says three words, row 1 five
        return generate_logits(model, turn, 4)[2]

    with vp.wrap(model, "random:layer=1|3,fraction=0.6|0.3") as run:
        logits = talk()
        keep = run.last.keep
    with LiveMaskOracle(model, keep):
        expected = talk()
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_fastv_of_a_new_image_looks_at_the_new_image():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    later = make_inputs("llava", model, [["text3", "image", "text6"]], seed=5)
    with vp.wrap(model, "fastv:layer=2,tokens=5") as run:
        first, _, _ = generate_logits(model, inputs, 4)
        turn = next_turn(inputs, first.sequences, first.past_key_values, later["input_ids"])
        model.generate(**turn, pixel_values=later["pixel_values"], max_new_tokens=1)
        (kept,) = run.last.kept
    whole = {"input_ids": turn["input_ids"], "attention_mask": turn["attention_mask"]}
    whole["pixel_values"] = torch.cat([inputs["pixel_values"], later["pixel_values"]])
    scores = fastv_scores(shared("llava", "eager"), whole, 2)[0, image_columns(model, turn["input_ids"])[0]][16:]
    assert kept.index.tolist() == sorted(scores.topk(5).indices.tolist())


def test_padding_is_zero_even_beside_nan():
    alive = torch.tensor([[True, True, True], [False, True, True]])
    x = torch.ones(2, 3, 1)
    x[1, 0] = math.nan  # dropped, and the left padding of row 1 points at it
    assert Reduction.keeping(alive).gather(x).isfinite().all()


def test_scatter_overwrites_nothing():
    alive = torch.tensor([[True, True, False], [False, False, True]])
    shorter = Reduction.keeping(alive)
    assert shorter.scatter(torch.ones(2, 2, 1), 3)[..., 0].tolist() == [[1, 1, 0], [0, 0, 1]]


@families
def test_random_draws_anew_at_every_layer(family):
    model = shared(family)
    inputs = make_inputs(family, model, [["image", "text5"]])
    sets = []
    for layer in (1, 2):
        with vp.wrap(model, f"random:layer={layer},fraction=0.5") as run:
            model(**inputs)
            sets.append(run.last.kept[0].index.tolist())
    assert sets[0] != sets[1]


class Level(vp.ScorePruner):
    name, paper, needs, default = "level", "", frozenset(), vp.at(0, tokens=5)

    def score(self, see):
        return torch.zeros(see.images, see.visual)


def test_equal_scores_go_to_the_lower_index():
    for visual in (16, 576):
        view = View(0, visual, torch.arange(visual)[None], {})
        assert Level().select(view, 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_divprune_computes_in_fp32(dtype):
    features = (1 + 0.05 * torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))).to(dtype)  # close together
    assert select_diverse(features, 32).tolist() == [sorted(divprune(x.float(), 32)) for x in features]


def test_divprune_ties_go_to_the_lower_index():
    features = torch.eye(6)[[0, 1, 2, 3, 4, 5]][None]  # all equally far
    assert select_diverse(features, 3).tolist() == [[0, 1, 2]]


def test_cls_block_counts_like_hidden_states():
    for layer, block in ((-1, 3), (-2, 2), (4, 3), (1, 0)):
        config = build("llava").config
        config.vision_feature_layer = layer
        assert LLAVA.tower.feature_block(config) == block


def test_names_of_rows_tell_contents_apart():
    rows = torch.randn(64, 200)
    names = feature_index.hash_rows(torch.cat((rows, rows.flip(1), -rows)))
    assert len(names.unique()) == 3 * 64
    assert torch.equal(feature_index.hash_rows(rows), names[:64])


def test_tower_memory_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(feature_index, "INDEX_ROWS", 64)
    model = shared("llava")
    with vp.wrap(model, "cls:fraction=0.5") as run:
        for seed in range(4):
            model(**make_inputs("llava", model, [["image", "image", "text3"]], seed))
        memory = run._owner().plan.tower.memory
        assert len(memory._all) == len(memory._own.entries) == 2
        model(**make_inputs("llava", model, [["image"] * 5 + ["text3"]]))  # more than is remembered: its own pass always is
        assert len(memory._all) == len(memory._own.entries) == 1


def test_cls_after_a_cut():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text7", "image", "text4"], ["text2", "image", "image", "text3"]])
    scores = cls_scores(shared("llava", "eager"), inputs["pixel_values"])
    with vp.wrap(model, "random:layer=0,tokens=10 + cls:layer=2,tokens=4") as run:
        model(**inputs)
        sets = kept_sets(run.last)
    for score, place in zip(scores, ((0, 0), (1, 0), (1, 1)), strict=True):
        left = torch.tensor(sets[(0, *place)])
        assert sets[(2, *place)] == sorted(left[score[left].topk(4).indices].tolist())


@families
def test_divprune_after_a_stage(family):
    model = shared(family)
    inputs = make_inputs(family, model, [["text7", "image", "text4"], ["text2", "image", "image", "text3"]])
    with vp.wrap(model, "random:layer=1,tokens=10 + divprune:layer=3,tokens=4") as run:
        model(**inputs)
        last = run.last
    sets = kept_sets(last)
    entering = masked_forward(model, inputs, {1: last.keep[1]}, output_hidden_states=True).hidden_states[3]
    for layer, row, n in sets:
        if layer == 3:
            left = torch.tensor(sets[1, row, n])
            features = entering[row, columns_of_image(model, inputs, row, n)][left]
            assert sets[3, row, n] == left[sorted(divprune(features, 4))].tolist()


def test_second_budget_is_of_the_original_of_each_picture():
    model = shared("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", model, [["image", "image", "text3"]])  # 16 and 24 tokens
    with vp.wrap(model, "random:layer=1,tokens=8 + random:layer=3,fraction=0.25") as run:
        model(**inputs)
    assert [stage.kept for stage in run.report().stages] == [(8, 8), (4, 6)]


def test_a_method_is_told_the_original_count(monkeypatch):
    seen = []
    select = vp.Random.select
    monkeypatch.setattr(vp.Random, "select", lambda self, see, keep: (seen.append(see), select(self, see, keep))[1])
    model = shared("llava")
    with vp.wrap(model, "random:layer=1|3,tokens=10|4") as run:
        model(**make_inputs("llava", model, [["image", "text3"]]))
        sets = kept_sets(run.last)
    assert [(see.layer, see.original, see.images, see.visual) for see in seen] == [(1, 16, 1, 16), (3, 16, 1, 10)]
    assert seen[1].position.tolist() == [sets[1, 0, 0]]


def test_report_of_bfloat16_and_of_a_later_turn():
    model = build("llava").bfloat16()
    inputs = make_inputs("llava", model, [["text7", "image", "text4"], ["text3", "image", "text8"]])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vp.wrap(model, "random:layer=2,fraction=0.25") as run:
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report()
        assert report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert report.visual_compute_average == (2 * 16 + 4 * 4) / 6  # per sample
        assert report.visual_nominal_average == (16 + 5 * 4) / 6
        again = inputs | {"attention_mask": torch.ones(2, 54, dtype=torch.long)}
        model(**again, past_key_values=cache, use_cache=True)
        later = run.report()
    assert later.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert later.kv_bytes_unpruned == 2 * report.kv_bytes_unpruned  # 27 + 27 tokens
    assert later.flops_unpruned - report.flops_unpruned == 2 * 6 * 4 * 27 * 27 * 64  # 27 more keys


def test_every_layer_may_have_its_own_rotary():
    section = Section(rows=Reduction.keeping(torch.tensor([[True, False, True]])))
    one, two = ((torch.full((1, 3, 2), x), torch.full((1, 3, 2), -x)) for x in (1.0, 2.0))
    decoder = LayerStack(shared("llava").config.text_config, lambda *_: pytest.fail("no position has moved"), (1,), 6)

    def rotary(full):
        return section.rotary(torch.zeros(1, 3, 4), None, {"position_embeddings": full}, decoder)

    assert rotary(one)[0].unique().tolist() == [1]
    assert rotary(two)[0].unique().tolist() == [2]
    assert rotary(one)[0] is rotary(one)[0]


def test_grids():
    config = shared("qwen2_5_vl").config
    assert QWEN2_5_VL.image_grid({"image_grid_thw": torch.tensor([[1, 8, 12]])}, config) == [(4, 6)]
    config = shared("llava").config
    assert LLAVA.image_grid({"pixel_values": torch.zeros(2, 3, 32, 16)}, config) == [(4, 2)] * 2


def test_llava_counts_the_class_token_with_the_full_strategy():
    config = shared("llava").config
    call = {"pixel_values": torch.zeros(2, 3, 32, 16)}
    assert LLAVA.tokens_per_image(call, config) == [8, 8]
    assert LLAVA.tokens_per_image(call | {"vision_feature_select_strategy": "full"}, config) == [9, 9]


@pytest.mark.parametrize("text", ["random:fraction=0.333333333333,seed=12345678", "random:tokens=3,seed=1000001"])
def test_strings_lose_no_digit(text):
    recipe = vp.Recipe.parse(text)
    assert vp.Recipe.parse(str(recipe)) == recipe


def test_encoded_videos_are_refused():
    """Of families that take none; what others do with them is in tests/video."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    with vp.wrap(model, "random:layer=1,fraction=0.5"), pytest.raises(vp.UsageError, match="videos of llava are not"):
        model(mm_encoder_outputs={"video": SimpleNamespace()}, **inputs)


def test_offloaded_static_cache_is_refused():
    """Transformers builds one on GPUs only; the refusal needs none. What grows may be offloaded (tests/generation)."""
    cache = StaticCache(config=shared("llava").config.text_config, max_cache_len=32)
    cache.offloading = True
    with pytest.raises(vp.UsageError, match="an offloaded static cache"):
        pruned_layers(cache, [0], (0,), lambda layer: pytest.fail("it has no entries"))


@families
def test_keep_all_does_not_touch_the_cache(family):
    model = shared(family)
    inputs = make_inputs(family, model, [["text2", "image", "text2"], ["image", "text9"]])
    with vp.wrap(model, "random:layer=1,fraction=1"):
        cache = model(**inputs, use_cache=True).past_key_values
    assert all(type(layer) is DynamicLayer for layer in cache.layers)


@pytest.mark.parametrize("method", ["cls:fraction=0.4", "flowcut:fraction=0.4"])
@torch.no_grad()
def test_row_separators_under_autocast(method):
    """They are rounded with the features they stand among. Red: they pass for visual tokens that no tower saw."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, [["text3", "image", "text4"]])
    with torch.autocast("cpu", torch.bfloat16), vp.wrap(model, method) as run:
        model(**inputs)
    assert run.report().newlines == 3
