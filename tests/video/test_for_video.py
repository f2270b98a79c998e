"""The methods for video, in families that take videos: exact, in batches as alone, and their choice is that of the loops of
their papers from what enters the language model."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
from families.oracles import expected_logits
from families.running import close, generate
from families.table import BATCHES, make_inputs, make_single, shared
from methods.loops.evs import evs
from methods.loops.fastvid import fastvid
from methods.loops.vidcom2 import vidcom2
from video.cells import NAMES

import vlmprune as vp
from vlmprune.live.videos import check_budgets

pytestmark = pytest.mark.usefixtures("no_grad")

SAMPLES = BATCHES["videos, ragged"]
PART = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "gemma4")
FAMILIES = NAMES if os.environ.get("VLMPRUNE_VIDEO") == "all" else PART
"""`make test` runs these, `make test-video` every family that takes videos."""
METHODS = {
    "evs": "evs:fraction=0.6",
    "vidcom2": "vidcom2:fraction=0.4",
    "fastvid": "fastvid:fraction=0.4,segments=2,threshold=-1",
}


def kept_of(run):
    return {(kept.sample, kept.ordinal): kept.index.tolist() for kept in run.last.kept}


def recording(recipe):
    """The method of a recipe, and the views it is shown."""
    (method,) = vp.Recipe.of(recipe).methods
    views = []

    class Recording(type(method)):
        name = f"recording-{method.name}"

        def select(self, see, keep):
            views.append((see, keep))
            return super().select(see, keep)

    return Recording(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}), views


def looped(name, see, image, keep):
    x, position, cells = see.features[image], see.position[image].tolist(), see.original // see.frames
    if name == "evs":
        return evs(x, position, see.frames, cells, keep)
    if name == "vidcom2":
        return vidcom2(x, position, cells, keep)
    return fastvid(x, position, cells, keep, least=2, threshold=-1)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_videos(family, name):
    """Several videos of different lengths, two in one row: exact counts, the sets of the paper's loops, the same sets alone;
    and the un-pruned model with the same tokens masked, where nothing is merged."""
    model, inputs = shared(family), make_inputs(family, SAMPLES)
    method, views = recording(METHODS[name])
    with vp.wrap(model, method) as run:
        _, new, logits = generate(model, inputs, 2)
        together, keep = kept_of(run), run.last.keep
        sizes = {(kept.sample, kept.ordinal): kept.original for kept in run.last.kept}
    assert {key[0] for key in together} == {0, 1, 2}
    assert len(together) == 4
    chosen = []
    for see, count in views:
        assert see.frames > 1
        for image in range(see.images):
            index = looped(name, see, image, count)
            assert len(index) == count
            chosen.append(see.position[image, index].tolist())
    assert sorted(map(str, chosen)) == sorted(map(str, together.values()))
    share = {"evs": 0.6}.get(name, 0.4)
    for key, index in together.items():
        candidates = sizes[key] - (sizes[key] % next(see.frames for see, _ in views if see.original == sizes[key]))
        assert len(index) == vp.Budget(fraction=share).resolve(candidates)
    if name != "fastvid":
        close(logits, expected_logits(family, model, SAMPLES, keep, new[:, :-1]))
    with vp.wrap(model, METHODS[name]) as run:
        for row in range(len(SAMPLES)):
            model(**make_single(family, SAMPLES, row))
            alone = kept_of(run)
            assert {key[1]: index for key, index in together.items() if key[0] == row} == {
                ordinal: index for (_, ordinal), index in alone.items()
            }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava_next_video"])
def test_merging_over_time_is_exact(family):
    """`check` puts the merged features into the un-pruned model at the places of their anchors."""
    verdict = vp.check(shared(family), make_inputs(family, BATCHES["video"]), METHODS["fastvid"], new_tokens=3)
    assert verdict.passed, verdict


def test_salient_tokens_need_a_cls_token():
    """FastVID's other half: exact where the tower has a CLS token, and refused by name elsewhere."""
    recipe = "fastvid:fraction=0.5,context=0.4,segments=2,threshold=-1"
    verdict = vp.check(shared("llava_next_video"), make_inputs("llava_next_video", BATCHES["video"]), recipe, new_tokens=3)
    assert verdict.passed, verdict
    with pytest.raises(vp.UsageError, match="fastvid needs the attention of the vision tower's CLS token"):
        vp.wrap(shared("qwen2_5_vl"), "fastvid:fraction=0.5,context=0.4")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma4", "llava_onevision"])
@pytest.mark.parametrize("name", ["random", "uniform"])
def test_baselines_per_frame(family, name):
    """Every frame keeps its two tokens; random draws other cells in other frames, uniform the same."""
    model, inputs = shared(family), make_inputs(family, SAMPLES)
    method, views = recording("uniform:layer=0,fraction=0.5")
    with vp.wrap(model, method) as run:
        model(**inputs)
        frames = {see.original: see.frames for see, _ in views}
    with vp.wrap(model, f"{name}:layer=0,tokens=2,per=frame") as run:
        model(**inputs)
        found = run.last.kept
    assert len(found) == 4
    for kept in found:
        size = kept.original // frames[kept.original]
        by_frame = [kept.index[kept.index // size == frame] % size for frame in range(frames[kept.original])]
        assert [len(cells) for cells in by_frame] == [2] * frames[kept.original]
        same = len({tuple(cells.tolist()) for cells in by_frame}) == 1
        assert same == (name == "uniform")


def test_a_picture_beside_a_video():
    """EVS thins the picture evenly, and keeps the first frame of the video."""
    family, samples = "qwen2_5_vl", BATCHES["picture, video"]
    model = shared(family)
    with vp.wrap(model, "evs:fraction=0.6") as run:
        model(**make_inputs(family, samples))
    picture, video = (next(kept for kept in run.last.kept if (kept.sample, kept.ordinal) == (0, n)) for n in (0, 1))
    n, count = picture.original, len(picture.index)
    assert picture.index.tolist() == [(2 * i + 1) * n // (2 * count) for i in range(count)]
    assert video.index[0] == 0
    assert count == vp.Budget(fraction=0.6).resolve(n)


def test_frames_that_are_not_alike_are_refused():
    """VideoLLaMA 3's processor may leave out what does not change: cells cannot be compared then."""
    stages = [SimpleNamespace(method=vp.EVS(), per_frame=False)]

    def video(*frame):
        return SimpleNamespace(images=[SimpleNamespace(frames=max(frame) + 1, frame=np.array(frame))])

    check_budgets(stages, video(0, 0, 0, 1, 1, 1), False)
    check_budgets(stages, video(0, 0, 0, 1, 1, 1, 1), False)  # a separator at the end of the video
    with pytest.raises(vp.UsageError, match=r"evs compares .* but frames of this one have from 1 to 3 tokens"):
        check_budgets(stages, video(0, 0, 0, 1, 2, 2), False)


def test_explained():
    """EVS gives its differences as scores, FastVID what was merged into what."""
    model, inputs = shared("qwen2_5_vl"), make_inputs("qwen2_5_vl", BATCHES["video"])
    with vp.wrap(model, "evs:fraction=0.6", explain=True) as run:
        model(**inputs)
        kept = run.last.kept[0].index.tolist()
        said = [str(run.explain(token=token)) for token in (0, max(kept))]
    assert all("kept" in text for text in said)
    assert "score" in said[1]
    with vp.wrap(model, METHODS["fastvid"], explain=True) as run:
        model(**inputs)
        kept = run.last.kept[0].index.tolist()
        gone = next(token for token in range(run.last.kept[0].original) if token not in kept)
        assert "merged into token" in str(run.explain(token=gone))
