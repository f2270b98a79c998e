"""What methods, records and reports say about frames, in every family that takes videos."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from families.configs import IMAGE, VIDEO
from families.running import generate, videos_of
from families.table import BATCHES, TINY, make_inputs, shared
from video.cells import NAMES

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES
from vlmprune.adapters.videos import by_position

pytestmark = pytest.mark.usefixtures("no_grad")

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Looks(vp.Pruner):
    """Keeps the first tokens, and tells what it saw."""

    name = "looks_at_frames"
    paper = "a test"
    needs = frozenset({"frame", "times", "identity"})
    default = vp.at(layer=1, fraction=0.5)

    def select(self, see, keep):
        SEEN.append(see)
        return torch.arange(keep).expand(see.images, keep)


def looked_at(name: str, batch: str, plain: bool = False, **given) -> list:
    """The views of one prompt."""
    SEEN.clear()
    model, inputs = shared(name), make_inputs(name, BATCHES[batch])
    with vp.wrap(model, Looks(**given)) as run:
        if plain:
            model(**inputs)
        else:
            generate(model, inputs, 2)
    assert run.last is None or run.last.kept
    return list(SEEN)


def expected(name: str, batch: str) -> list[tuple[int, int]]:
    """(tokens of a frame, frames) of every video of a batch."""
    return [video for row, parts in enumerate(BATCHES[batch]) for video in videos_of(name, parts, row)]


@pytest.mark.parametrize("plain", [False, True], ids=["generate", "plain call"])
@pytest.mark.parametrize("name", NAMES)
def test_frames_of_every_token(name, plain):
    """Red: frames are counted wrongly, or differ between `generate`, which keeps the grids to itself, and a plain call."""
    seen = sorted((see.frames, see.visual) for see in looked_at(name, "videos, ragged", plain) for _ in range(see.images))
    assert seen == sorted((frames, count * frames) for count, frames in expected(name, "videos, ragged"))
    for see in looked_at(name, "videos, ragged", plain):
        count = see.visual // see.frames
        assert see.frame.dtype == torch.int64
        assert torch.equal(see.frame, (torch.arange(see.visual) // count).expand(see.images, -1))
        assert see.times.shape == (see.images, see.frames)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma4", "llava_onevision", "llava_next_video", "video_llama_3"])
def test_a_picture_is_never_decided_with_a_video(name):
    """Red: a group holds both, so that a method meets frames of pictures."""
    views = looked_at(name, "picture, video")
    assert {see.frames for see in views} >= {1}
    for see in views:
        assert bool(see.times.isnan().all()) or see.frames > 1
        assert see.frames > 1 or not see.frame.any()
    assert sum(see.images for see in views) == 4
    assert sum(see.images for see in views if see.frames > 1) == 2


def test_pictures_and_videos_are_counted_in_the_order_of_the_prompt():
    """Red: pictures are counted first, or the question begins behind the last picture and not behind the video."""
    for batch, videos in (("video, picture", [True, False]), ("picture, video", [False, True])):
        model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", BATCHES[batch])
        with vp.wrap(model, "random:layer=1,fraction=0.5,seed=0") as run:
            model(**inputs)
            kept = run.last.kept
        assert [(one.sample, one.ordinal, one.frames > 0) for one in kept] == [
            (row, number, is_video) for row in (0, 1) for number, is_video in enumerate(videos)
        ]


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 2, 3), (3, 2, 2), (4, 1, 3), (4, 3, 1), (3, 1, 1)])
def test_frames_from_rotary_positions(frames, rows, columns):
    """Red: frames of one row, one column or one token run together."""
    raster = torch.cartesian_prod(*map(torch.arange, (frames, rows, columns))).T.reshape(3, -1)
    positions = raster.numpy() + 5
    positions[0] = 5  # frames that follow each other fast have the same position in time
    assert by_position(positions).tolist() == raster[0].tolist()


def test_positions_that_are_no_rasters_tell_no_frames():
    assert by_position(np.arange(12) + np.zeros((3, 1), dtype=int)) is None


def test_a_later_stage_sees_the_frames_of_what_is_left():
    """Red: `frame` counts tokens that are left, and not those of the video."""
    SEEN.clear()
    model, inputs = shared("qwen3_vl"), make_inputs("qwen3_vl", BATCHES["video"])
    with vp.wrap(model, vp.Random(layer=0, fraction=0.5), Looks(layer=2, fraction=0.2)) as run:
        model(**inputs)
        first = run.last.kept[0]
    assert torch.equal(SEEN[0].frame[0], first.frame[first.index])
    assert torch.equal(SEEN[0].position[0], first.index)


@pytest.mark.parametrize("plain", [False, True], ids=["generate", "plain call"])
def test_times_of_qwen2_5(plain):
    """From `second_per_grid_ts`: 0.5 s apart in even videos, 0.75 s in odd ones."""
    for see in looked_at("qwen2_5_vl", "videos, ragged", plain):
        apart = 0.5 if see.frames == 2 else 0.75
        assert torch.equal(see.times, (apart * torch.arange(see.frames)).expand(see.images, -1))


def test_times_are_unknown_where_generate_mixed_them_up():
    """`generate` repeats the seconds [A, B] of a sample's videos as [A, A, B, B], and the videos as [A, B, A, B]."""
    SEEN.clear()
    model, inputs = shared("qwen2_5_vl"), make_inputs("qwen2_5_vl", BATCHES["two videos"])
    inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.5])
    with vp.wrap(model, Looks()):
        generate(model, inputs, 2, num_beams=2)
    known = [row.tolist() for see in SEEN for row in see.times]
    assert len(known) == 4
    assert sum(math.isnan(row[1]) for row in known) == 2
    assert all(math.isnan(row[1]) or row[1] == (0.5 if len(row) == 2 else 1.5) for row in known)


def test_every_frame_is_like_a_picture_where_it_is_decided_by_itself():
    """Red: a method that sees one frame is told of several, or random draws the same tokens in every frame."""
    views = looked_at("qwen2_5_vl", "video", per="frame")
    assert sum(see.images for see in views) == 2
    for see in views:
        assert (see.frames, see.visual) == (1, 4)
        assert not see.frame.any()
        assert see.times.shape == (see.images, 1)
    identities = [number for see in views for number in see.identity]
    assert len(set(identities)) == 2
    assert sorted(time for see in views for time in see.times[:, 0].tolist()) == [0.0, 0.5]


@pytest.mark.parametrize("budget", ["tokens=1", "tokens=3", "fraction=0.3", "fraction=0.75"])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_of_frames_are_exact(name, budget):
    """Red: frames share a budget, or a fraction is rounded over the whole video."""
    model, inputs = shared(name), make_inputs(name, BATCHES["videos, ragged"])
    with vp.wrap(model, f"random:layer=1,{budget},per=frame,seed=0") as run:
        model(**inputs)
        kept = run.last.kept
    amount = vp.Budget(**{budget.split("=")[0]: float(budget.split("=")[1]) if "." in budget else int(budget.split("=")[1])})
    assert [stage.by_frame for stage in kept] == [
        (amount.resolve(count),) * frames for count, frames in expected(name, "videos, ragged")
    ]


def test_budgets_of_frames_do_not_count_hidden_tokens():
    """Red: a frame of which the mask hides a part keeps the share of the whole."""
    model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", BATCHES["video"])
    places = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    inputs["attention_mask"][0, places[:2]] = 0  # half of the first frame
    positions = model.model.get_rope_index(**make_inputs("qwen2_vl", BATCHES["video"]))[0]
    with vp.wrap(model, "random:layer=1,fraction=0.5,per=frame,seed=0") as run:
        model(**inputs, position_ids=positions)
    assert run.last.kept[0].by_frame == (1, 2)


def test_records_reports_and_explanations_name_frames():
    """Red: a person cannot tell from which frame a token is."""
    model, inputs = shared("qwen2_5_vl"), make_inputs("qwen2_5_vl", [["text4", "video", "text3", "video", "text5"]])
    with vp.wrap(model, "divprune:layer=1,tokens=9", explain=True) as run:
        model(**inputs)
        first, second = run.last.kept
        report, told = run.report(), run.explain(image=1, token=17)
        with pytest.raises(vp.UsageError, match="there is no token 18: video 1 of sample 0 has 18, numbered 0 to 17"):
            run.explain(image=1, token=18)
        with pytest.raises(vp.UsageError, match="there is no picture or video 2 in sample 0: it has 2 pictures and videos"):
            run.explain(image=2, token=0)
    assert (first.frames, second.frames) == (2, 3)
    assert second.frame.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert second.by_frame == tuple(int((second.frame[second.index] == frame).sum()) for frame in range(3))
    assert second.times == (0.0, 0.75, 1.5)
    assert report.stages[0].frames == (first.by_frame, second.by_frame)
    assert "9 of 18 (3 frames: " in str(report)
    assert json.loads(json.dumps(report.to_dict()))["stages"][0]["frames"][1] == list(second.by_frame)
    assert (told.frame, told.frames, told.time) == (2, 3, 1.5)
    assert str(told).startswith("Token 17 of 18 (video 1, sample 0), in frame 2 of 3, at 1.5 s, ")
    assert told.to_dict()["frame"] == 2


def test_an_explanation_says_that_frames_are_decided_apart():
    model, inputs = shared("qwen3_vl"), make_inputs("qwen3_vl", BATCHES["video"])
    with vp.wrap(model, "fastv:layer=2,tokens=1,per=frame", explain=True) as run:
        model(**inputs)
        told = run.explain(token=6)
        every = [run.explain(token=token) for token in range(8)]
    assert "of 4 in frame 1 (of 2)" in str(told)
    assert (told.verdicts[0].frame, told.verdicts[0].frames, told.verdicts[0].among) == (1, 2, 4)
    assert [one.kept for one in every].count(True) == 2
    assert "crop" not in str(told)


def test_the_check_names_frames():
    model, inputs = shared("qwen3_vl"), make_inputs("qwen3_vl", BATCHES["video"])
    verdict = vp.check(model, inputs, "random:layer=1,tokens=1,per=frame,seed=0")
    assert verdict.passed, verdict
    assert verdict.frames == {1: (2, 2)}
    assert "2 of 8 before layer 1 (in 2 of 2 frames)" in str(verdict)
    alone = vp.check(model, inputs, "random:layer=1,tokens=1,seed=0")
    assert alone.passed, alone
    assert alone.frames == {1: (1, 2)}


@pytest.mark.parametrize("name", NAMES)
def test_cells_for_drawing_are_the_tokens_of_every_frame(name):
    """Red: what is drawn over a frame shows tokens of another one."""
    inputs = make_inputs(name, BATCHES["videos, ragged"])
    family, config = FAMILIES[TINY[name].model_type], shared(name).config
    videos = family.video_cells(inputs, config)
    assert [(frames[0].numel(), len(frames)) for frames in videos] == expected(name, "videos, ragged")
    for frames in videos:
        assert torch.equal(torch.cat([cells.flatten() for cells in frames]), torch.arange(sum(map(torch.numel, frames))))
    assert family.video_cells(make_inputs(name, [["text2"]]), config) == []


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_the_separator_behind_a_video_counts_as_text(policy):
    """LLaVA-OneVision has one at the end of each video; it is no token of a frame, and stays unless newlines=drop."""
    model, inputs = shared("llava_onevision"), make_inputs("llava_onevision", BATCHES["two videos"])
    with vp.wrap(model, f"random:layer=1,tokens=2,per=frame,seed=0,newlines={policy}") as run:
        model(**inputs)
        record = run.last
    assert (record.newlines, record.newlines_kept) == (2, policy == "keep")
    assert [one.by_frame for one in record.kept] == [(2, 2, 2)] * 2
    ends = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0][[12, 25]]
    assert record.keep[1][0, ends].tolist() == [policy == "keep"] * 2


# -- refusals ------------------------------------------------------------------------------------------------------------------


def refused(model, inputs, recipe="random:layer=1,fraction=0.5,seed=0") -> str:
    with vp.wrap(model, recipe), pytest.raises(vp.UsageError) as found:
        model(**inputs)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("batch", ["one", "picture, video"])
def test_budgets_of_frames_are_refused_for_pictures(batch):
    model, inputs = shared("qwen3_vl"), make_inputs("qwen3_vl", BATCHES[batch])
    said = refused(model, inputs, "random:layer=1,tokens=2,per=frame,seed=0")
    assert 'random has a budget for each frame (per="frame"), but this prompt has a picture, which has no frames' in said


def test_budgets_of_frames_are_refused_inside_the_tower():
    with pytest.raises(vp.UsageError, match='flowcut: per="frame" counts tokens of the language model'):
        vp.Recipe.parse("flowcut:tokens=8,per=frame")


def test_an_unknown_per_is_refused():
    with pytest.raises(vp.UsageError, match="unknown value of per in random 'frames': did you mean 'frame'"):
        vp.Recipe.parse("random:per=frames")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "gemma4", "glm4v"])
def test_video_tokens_that_do_not_match_are_refused(name):
    model, inputs = shared(name), make_inputs(name, BATCHES["video"])
    token = IMAGE if name == "glm4v" else VIDEO
    inputs["input_ids"][0, (inputs["input_ids"][0] == token).nonzero()[0, 0]] = 9
    said = refused(model, inputs)
    assert "video tokens do not match the videos: the prompt has" in said
    assert "put one video placeholder in the text for each video" in said


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "gemma4", "glm4v"])
def test_frames_that_do_not_match_the_prompt_are_refused(name):
    """Red: two frames that stand together in the prompt count as one."""
    model, inputs = shared(name), make_inputs(name, BATCHES["video"])
    ids, token = inputs["input_ids"][0], IMAGE if name == "glm4v" else VIDEO
    places = (ids == token).nonzero()[:, 0]
    between = list(range(int(places[3]) + 1, int(places[4])))  # behind the first frame
    order = [place for place in range(len(ids)) if place not in between] + between
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = inputs[key][:, order]
    positions = torch.arange(len(ids)).expand(3, 1, -1) if name != "gemma4" else torch.arange(len(ids))[None]
    said = refused(model, {**inputs, "position_ids": positions})
    assert "the frames of video 0 do not match the prompt: the video has 2 frames, but its tokens stand in 1 groups" in said


def test_frames_that_nothing_tells_are_refused():
    """Qwen2-VL, encoded beforehand, without a grid and with positions that are no raster's."""
    model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", BATCHES["video"])
    encoded = model.model.get_video_features(inputs.pop("pixel_values_videos"), inputs.pop("video_grid_thw"), return_dict=True)
    said = refused(model, {**inputs, "mm_encoder_outputs": {"video": encoded}})
    assert "the frames of video 0 cannot be told" in said


def test_a_video_cut_off_by_truncation_is_said():
    model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", [["text2", "video"]])
    short = {key: inputs[key][:, :-3] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    said = refused(model, {**inputs, **short, "position_ids": torch.arange(short["input_ids"].shape[1]).expand(3, 1, -1)})
    assert "row 0 ends with a video token, as a prompt does that was cut inside a video" in said


def test_pictures_and_videos_with_one_placeholder_are_refused():
    model, inputs = shared("glm4v"), make_inputs("glm4v", BATCHES["picture, video"])
    assert "pictures and videos of glm4v have the same placeholder" in refused(model, inputs)
