"""`run.explain`: what a stage decided about a token, and the numbers it decided by, are those of the papers' loops."""

from __future__ import annotations

import dataclasses
import gc
import json
from weakref import ref

import numpy as np
import pytest
import torch
from methods.loops import plain
from methods.loops.flowcut import flowcut_score, flowcut_terms
from methods.loops.sparsevlm import sparsevlm_raters, sparsevlm_scores
from tiny_models import ALL_FAMILIES, build, make_inputs, shared

import vlmprune as vp
from vlmprune.live import explain as explaining

SAMPLES = [["text3", "image", "text4"], ["text2", "image", "image", "text6"]]
CHATTY = [["image", "text4"]]


def run_once(model, inputs, *recipe):
    with vp.wrap(model, *recipe, explain=True) as run, torch.no_grad():
        model(**inputs)
        return run


def recording(method: vp.Pruner):
    """The same method, and the views it is shown when it selects."""
    views = []

    class Recording(type(method)):
        name = f"recording-{method.name}"

        def select(self, see, keep):
            views.append(see)
            return super().select(see, keep)

    return Recording(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}), views


def fastv(see, image):
    heads = see.attention_from_last[image].tolist()
    return [plain.mean([head[token] for head in heads]) for token in range(see.visual)]


def adaptinfer(see, image):
    among, shown = see.attention_among_text[image].tolist(), see.attention_from_text[image].tolist()
    words = range(len(among[0]))
    scores = [0.0] * see.visual
    for head, to_picture in zip(among, shown, strict=True):
        for column in words:
            weight = sum(head[row][column] + (head[column][row] if row != column else 0) for row in words)
            for token in range(see.visual):
                scores[token] += weight * to_picture[column][token]
    return scores


def flowcut(see, image):
    scaling = see.query_of_last.shape[-1] ** -0.5
    share = see.query_of_last.shape[1] // see.keys.shape[1]
    keys, values = (x[image].repeat_interleave(share, dim=0) for x in (see.keys, see.values))
    value = see.value_of_last[image].repeat_interleave(share, dim=0)
    return flowcut_score(*flowcut_terms(see.query_of_last[image], keys, value, values, scaling, scaling))


def sparsevlm(see, image):
    text = see.text_valid[image]
    visual, words = see.embeddings[image], see.text_embeddings[image][text]
    raters = sparsevlm_raters(visual, words)
    means = sparsevlm_scores(see.attention_from_text[image][:, text], raters)
    return [mean * len(raters) * see.attention_from_text.shape[1] for mean in means]  # the method ranks by sums


LOOPS = {
    "fastv": (vp.FastV(layer=2, tokens=5), fastv),
    "adaptinfer": (vp.AdaptInfer(layer=2, tokens=5), adaptinfer),
    "flowcut": (vp.FlowCut(layer=2, tokens=5), flowcut),
    "sparsevlm": (vp.SparseVLM(layer=2, tokens=12, version=1.5), sparsevlm),
}


@pytest.mark.parametrize("name", LOOPS)
def test_scores_and_ranks_are_those_of_the_papers_loops(name):
    """Red: a score of another token, another layer or another head; a rank that counts from the other end."""
    method, loop = LOOPS[name]
    model = shared("llava")
    method, views = recording(method)
    run = run_once(model, make_inputs("llava", model, SAMPLES), method)
    images = iter([(see, image) for see in views for image in range(see.images)])  # pictures of one size are one view
    for sample, ordinal in ((0, 0), (1, 0), (1, 1)):
        see, image = next(images)
        expected = loop(see, image)
        kept = next(k for k in run.last.kept if (k.sample, k.ordinal) == (sample, ordinal)).index.tolist()
        ranking = plain.ranking(expected)
        found = [run.explain(token=token, image=ordinal, sample=sample).verdicts for token in range(see.visual)]
        for token, (verdict,) in enumerate(found):
            assert verdict.score == pytest.approx(expected[token], rel=1e-4)
            assert verdict.rank == ranking.index(token) + 1
            assert verdict.among == see.visual == 16
            assert verdict.kept == (token in kept)
            assert verdict.left == len(kept)
            assert verdict.last_kept_score == pytest.approx(min(expected[other] for other in kept), rel=1e-4)
            assert (verdict.site, verdict.layer, verdict.method) == (
                "llm",
                2,
                method.name + (" (decoder only)" if name == "flowcut" else ""),
            )


@torch.no_grad()
def test_scores_are_the_methods_own_numbers():
    """Bit for bit, and detached."""
    model = build("llava")
    made = []

    class Norms(vp.ScorePruner):
        name, paper, needs, default = "norms", "", frozenset({"features"}), vp.at(layer=1, tokens=3)

        def score(self, see):
            made.append(see.features.norm(dim=-1))
            return made[-1]

    with torch.enable_grad(), vp.wrap(model, Norms(), explain=True) as run:
        model(**make_inputs("llava", model, CHATTY))
    (kept,) = run.last.kept
    (part,) = kept.judged
    assert part.score.dtype == torch.float32
    assert not part.score.requires_grad
    assert made[0].requires_grad
    assert torch.equal(part.score, made[0][0])
    assert run.explain(token=4).verdicts[0].score == float(made[0][0, 4])


def test_nothing_is_kept_when_nobody_asks():
    """Red: scores outlive the stage; or are computed for nobody."""
    model = build("llava")
    made, asked = [], []

    class Norms(vp.ScorePruner):
        name, paper, needs, default = "norms2", "", frozenset({"features"}), vp.at(layer=1, tokens=3)

        def score(self, see):
            score = see.features.norm(dim=-1)
            made.append(ref(score))
            return score

        def scores(self, see):
            asked.append(see)
            return super().scores(see)

    inputs = make_inputs("llava", model, CHATTY)
    with vp.wrap(model, Norms()) as run, torch.no_grad():
        model(**inputs)
        assert all(kept.judged == () for kept in run.last.kept)
        with pytest.raises(
            vp.UsageError, match=r"kept only when asked for: wrap the model with vlmprune.wrap\(model, recipe, explain=True\)"
        ):
            run.explain(token=3)
    gc.collect()
    assert asked == []
    assert made[0]() is None
    with vp.wrap(model, Norms(), explain=True) as run, torch.no_grad():
        model(**inputs)
        assert len(asked) == 1
        assert run.explain(token=3)


@pytest.mark.parametrize(
    "recipe", ["fastv:layer=2,tokens=4", "visionzip:tokens=6 + pdrop:layer=3,tokens=2", "divprune:tokens=5"]
)
@torch.no_grad()
def test_explaining_changes_no_answer(recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, recipe):
        plain = model(**inputs).logits
    with vp.wrap(model, recipe, explain=True):
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_every_stage_says_what_it_did():
    model = shared("llava")
    run = run_once(
        model, make_inputs("llava", model, CHATTY), "divprune:layer=0,tokens=8 + fastv:layer=2|4,tokens=4|2,cache_layer=1"
    )
    stages = {(kept.site, kept.layer): kept.index.tolist() for kept in run.last.kept}
    left = [stages["llm", layer] for layer in (0, 2, 4)]
    for token in range(16):
        why = run.explain(token=token)
        happened = [verdict.kept for verdict in why.verdicts if verdict.site == "llm"]
        assert happened == [token in kept for kept, before in zip(left, [range(16), *left], strict=False) if token in before]
        assert why.kept == (token in left[-1])
        assert (why.dropped_by is None) == why.kept
        last = why.verdicts[-1]
        if token in left[0]:  # layer 1 computed it, and decoding steps see what the last stage left
            assert last.site == "cache"
            assert last.kept == why.kept
        else:
            assert last.layer == 0
    picked = {token: run.explain(token=token).verdicts[0].pick for token in left[0]}
    assert sorted(picked.values()) == list(range(1, 9))


@torch.no_grad()
def test_a_cache_stage_decides_about_what_its_layers_computed():
    """Red: a token that was dropped before the cache stage's layers is said to be forgotten there."""
    model = shared("llava")
    run = run_once(model, make_inputs("llava", model, CHATTY), "fastv:layer=2|4,tokens=4|2,cache_layer=2")
    first, second = (next(kept.index.tolist() for kept in run.last.kept if kept.layer == layer) for layer in (2, 4))
    for token in range(16):
        sites = [(verdict.site, verdict.kept) for verdict in run.explain(token=token).verdicts]
        if token not in first:
            assert sites == [("llm", False)]
        else:
            assert sites == [("llm", True), ("llm", token in second), ("cache", token in second)]


@torch.no_grad()
def test_picks_are_in_the_order_of_selection():
    """Red: the rank of a pick is the token's place."""
    model = shared("llava")
    found = {}

    class Watched(vp.DivPrune):
        name = "watched"

        def select(self, see, keep):
            found["features"] = see.features[0].double()
            return super().select(see, keep)

    run = run_once(model, make_inputs("llava", model, CHATTY), Watched(tokens=6))
    picks = {run.explain(token=t).verdicts[0].pick: t for t in run.last.kept[0].index.tolist()}
    x = torch.nn.functional.normalize(found["features"], dim=-1)
    distance = 1 - x @ x.T
    for pick in range(3, 7):  # each is the one farthest from those before
        before = [picks[number] for number in range(1, pick)]
        nearest = distance[:, before].amin(dim=1)
        assert int(nearest.argmax()) == picks[pick]


@pytest.mark.parametrize(
    "recipe", ["tome:tokens=5", "visionzip:tokens=6", "vscan:layer=0,tokens=6", "sparsevlm:layer=2,tokens=6,version=1.5"]
)
@torch.no_grad()
def test_merged_tokens_say_into_which(recipe):
    """Red: a token is said to be a part of another one than its features went into."""
    model = shared("llava")
    run = run_once(model, make_inputs("llava", model, CHATTY), recipe)
    (stage,) = run.last.kept
    kept = stage.index.tolist()
    found = {token: run.explain(token=token).verdicts[0] for token in range(16)}
    merged = {token: verdict.merged_into for token, verdict in found.items() if verdict.merged_into is not None}
    assert merged
    assert set(merged.values()) <= set(kept)
    assert not set(merged) & set(kept)
    for token in kept:
        assert found[token].merged_from == list(merged.values()).count(token)
    if not recipe.startswith("sparsevlm"):  # which drops some for good
        assert len(merged) == 16 - len(kept)


def means(see, token, parts):
    return see.features[0, [token, *parts]].mean(dim=0)


def zipped(see, token, parts):
    tower = see.tower_features[0]
    return see.project(tower[token] + tower[parts].mean(dim=0)) if parts else None


@pytest.mark.parametrize(
    ("method", "made_of"),
    [
        (vp.ToMe(tokens=3), means),  # several rounds
        (vp.VScan(layer=0, tokens=5), means),
        (vp.SparseVLM(layer=2, tokens=6, version=1.5), means),
        (vp.VisionZip(tokens=8, contextual=3), zipped),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@torch.no_grad()
def test_merged_features_are_those_of_the_parts(method, made_of):
    """Red: a token is said to be a part of another one than its features went into."""
    model = shared("llava")
    method, views = recording(method)
    run = run_once(model, make_inputs("llava", model, CHATTY), method)
    (stage,), (see,) = run.last.kept, views
    found = {token: run.explain(token=token).verdicts[0] for token in range(16)}
    merged = 0
    for token, features in zip(stage.index.tolist(), stage.features, strict=True):
        parts = [other for other, verdict in found.items() if verdict.merged_into == token]
        assert found[token].merged_from == len(parts)
        if (expected := made_of(see, token, parts)) is not None:
            torch.testing.assert_close(features, expected)
            merged += len(parts)
    assert merged > 2


@torch.no_grad()
def test_crops_are_judged_apart():
    """Red: the rank counts over the picture, whose crops have attention of their own."""
    model = shared("llava_next")
    run = run_once(model, make_inputs("llava_next", model, CHATTY), "cls:tokens=6")
    (stage,) = run.last.kept
    found = [run.explain(token=token).verdicts[0] for token in range(stage.original)]
    assert {verdict.crop for verdict in found} == set(range(found[0].crops)) == {0, 1, 2}
    assert [verdict.crop for verdict in found[:9]] == [0] * 9, "the whole picture comes first"
    for crop in range(3):
        mine = [verdict for verdict in found if verdict.crop == crop]
        assert sorted(verdict.rank for verdict in mine) == list(range(1, len(mine) + 1))
        assert {verdict.among for verdict in mine} == {len(mine)}
        assert all(verdict.kept == (verdict.rank <= verdict.left) for verdict in mine)
    assert run.last.newlines > 0
    assert f"The prompt's {run.last.newlines} row separators count as text, have no index, and were kept." in str(
        run.explain(token=0)
    )
    assert "in crop 0 (of 3; crop 0 is the whole picture)" in str(run.explain(token=0))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_inside_the_tower(family):
    model = shared(family)
    run = run_once(model, make_inputs(family, model, CHATTY), "flowcut:tokens=4")
    stages = {kept.site: kept.index.tolist() for kept in run.last.kept}
    for token in range(run.last.kept[0].original):
        why = run.explain(token=token)
        first = why.verdicts[0]
        assert (first.site, first.kept, first.score) == ("vision", token in stages["vision"], None)
        assert "scores inside the tower are not kept: the method drops the lowest flow" in str(first)
        assert len(why.verdicts) == 1 + (family == "llava_next" and first.kept)


@torch.no_grad()
def test_hidden_tokens_never_entered():
    model = shared("llava")
    inputs = make_inputs("llava", model, CHATTY)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    inputs["attention_mask"][0, places[5]] = 0
    run = run_once(model, inputs, "fastv:layer=2,tokens=4")
    why = run.explain(token=5)
    assert why.hidden
    assert not why.kept
    assert why.verdicts == ()
    assert str(why) == (
        "Token 5 of 16 (picture 0, sample 0) never entered: the call's attention mask hides it, and no stage may keep it."
    )
    assert run.explain(token=4).verdicts[0].among == 15


@torch.no_grad()
def test_a_budget_that_leaves_nothing_to_decide():
    model = shared("llava")
    run = run_once(model, make_inputs("llava", model, CHATTY), vp.FastV(schedule=vp.stages({2: 1.0, 4: 0.0})))
    assert [str(verdict) for verdict in run.explain(token=3).verdicts] == [
        "before layer 2, fastv: kept; the budget keeps all 16 tokens.",
        "before layer 4, fastv: dropped; the budget drops all 16 tokens.",
    ]


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_after_generation(use_cache):
    """Red: without a cache the prompt runs again for every token, and the choice of its first run has no reasons left."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    first = run_once(model, inputs, "fastv:layer=2,tokens=4").explain(token=3, image=1, sample=1)
    with vp.wrap(model, "fastv:layer=2,tokens=4", explain=True) as run:
        model.generate(**inputs, max_new_tokens=3, use_cache=use_cache)
        (found,), (expected,) = run.explain(token=3, image=1, sample=1).verdicts, first.verdicts
    assert found.score == pytest.approx(expected.score, rel=1e-5)  # it is computed in another order
    assert dataclasses.replace(found, score=0, last_kept_score=0) == dataclasses.replace(expected, score=0, last_kept_score=0)


def test_with_gradients_and_checkpointing():
    model = build("llava")
    inputs = make_inputs("llava", model, CHATTY)
    expected = run_once(model, inputs, "fastv:layer=2,tokens=4").explain(token=3)
    model.train().gradient_checkpointing_enable()
    with vp.wrap(model, "fastv:layer=2,tokens=4", explain=True) as run:
        model(**inputs).logits.sum().backward()
        assert run.explain(token=3) == expected
        assert not any(part.score.requires_grad for kept in run.last.kept for part in kept.judged)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_as_data_and_as_text(family):
    model = shared(family)
    run = run_once(model, make_inputs(family, model, SAMPLES), "fastv:layer=2|4,tokens=6|3")
    for sample, image in ((0, 0), (1, 1)):
        why = run.explain(token=np.int64(2), image=image, sample=sample)
        data = why.to_dict()
        assert json.loads(json.dumps(data)) == data
        assert data["lines"] == str(why).split("\n  ")
        assert data["verdicts"][0]["score"] == why.verdicts[0].score
        assert str(why).startswith(f"Token 2 of {why.tokens} (picture {image}, sample {sample}) ")
        verdict = why.verdicts[0]
        assert f"rank {verdict.rank} of {verdict.among}; 6 stay; the lowest kept score is " in str(verdict)


def test_numbers_that_differ_are_shown_to_differ():
    assert explaining._number(0.12345678, 0.12345699) == "0.1234568"
    assert explaining._number(0.12345699, 0.12345678) == "0.123457"
    assert explaining._number(0.5, 0.5) == "0.5"
    assert explaining._number(float("-inf"), 0.5) == "-inf"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"token": 16}, "there is no token 16: picture 0 of sample 0 has 16, numbered 0 to 15"),
        ({"token": -1}, "there is no token -1"),
        ({"token": 2, "image": 1}, "there is no picture 1 in sample 0: it has 1 picture, numbered 0"),
        ({"token": 2, "sample": 2}, "there is no sample 2: the batch has 2, numbered 0 to 1"),
        ({"token": "2"}, "token must be a whole number, found '2'"),
        ({"token": True}, "token must be a whole number, found True"),
        ({"token": 2.0}, "token must be a whole number, found 2.0"),
    ],
    ids=str,
)
def test_tokens_that_are_not_there(asked, sentence):
    model = shared("llava")
    run = run_once(model, make_inputs("llava", model, SAMPLES), "fastv:layer=2,tokens=4")
    with pytest.raises(vp.UsageError) as error:
        run.explain(**asked)
    assert sentence in str(error.value)


@torch.no_grad()
def test_prompts_with_nothing_to_explain():
    model = shared("llava")
    with vp.wrap(model, "fastv:layer=2,tokens=4", explain=True) as run:
        with pytest.raises(vp.UsageError, match="has not run a prompt"):
            run.explain(token=2)
        model(input_ids=make_inputs("llava", model, [["text5"]])["input_ids"])
        with pytest.raises(vp.UsageError, match="this prompt has no picture"):
            run.explain(token=2)
    run = run_once(model, make_inputs("llava", model, CHATTY), "act:layers=1")
    with pytest.raises(vp.UsageError, match="drops no visual tokens: all of them stayed"):
        run.explain(token=2)


@torch.no_grad()
def test_scores_of_somebody_elses_method_are_checked():
    class Wrong(vp.Pruner):
        name, paper, needs, default = "wrong-scores", "", frozenset({"features"}), vp.at(layer=0, tokens=3)

        def select(self, see, keep):
            return torch.arange(keep).expand(see.images, keep)

        def scores(self, see):
            return see.features

    model = shared("llava")
    with pytest.raises(vp.UsageError, match=r"wrong-scores: scores\(see\) must return a tensor \[image, visual\]"):
        run_once(model, make_inputs("llava", model, CHATTY), Wrong())


def test_on_the_command_line(monkeypatch, capsys, tmp_path):
    """Red: `run --why` explains another run than the one it prints, or another cell."""
    from command_line import vlmprune

    from vlmprune.tiny.scenes import make_scene

    make_scene(1).image.save(tmp_path / "scene.png")
    asked = ("run", "--model", "tiny", "--image", tmp_path / "scene.png", "--prompt", "how many objects are there ?")
    asked += ("--recipe", "fastv:layer=2,tokens=20", "--max-new-tokens", 1, "--why", 57)
    assert vlmprune(monkeypatch, *asked, "--why", 100, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    first, second = result["why"]
    assert (first["token"], second["token"]) == (57, 100)
    assert first["cell"] == {"crop": "picture", "row": 57 // 12, "column": 57 % 12}
    assert first["kept"] == (57 in result["kept"])
    assert second["kept"] == (100 in result["kept"])
    assert first["verdicts"][0]["among"] == 144
    assert vlmprune(monkeypatch, *asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert first["lines"][0] + " Its cell is row 4, column 9 (counted from 0) of the picture." in out
    assert first["lines"][1] in out
    assert vlmprune(monkeypatch, *asked, "--why", 144) == 2
    assert "there is no token 144: the picture has 144" in capsys.readouterr().err


@torch.no_grad()
def test_a_dropped_token_above_a_kept_one_is_no_matter_of_scores():
    """Red: a token is dropped with a higher score than the last kept one has, and the sentence leaves it at that."""
    model = shared("llava")
    run = run_once(model, make_inputs("llava", model, [["text7", "image", "text4"]]), "visionzip:fraction=0.4")
    verdicts = [run.explain(token).verdicts[0] for token in range(16)]
    above = [verdict for verdict in verdicts if not verdict.kept and verdict.score > verdict.last_kept_score]
    assert any(verdict.rank > verdict.left for verdict in above)
    for verdict in above:
        assert "the score alone does not decide: the method keeps what CLS attends to most" in str(verdict)
    below = [verdict for verdict in verdicts if not verdict.kept and verdict.score < verdict.last_kept_score]
    assert not any("alone" in str(verdict) for verdict in below)
