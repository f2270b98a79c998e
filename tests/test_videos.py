"""Videos by name: which frames are read, what a model is given of them, `run`, `view` and `check --video`, and bad input."""

from __future__ import annotations

import builtins
import json
import sys
from importlib.util import find_spec

import folders
import numpy as np
import pytest
import torch
import videos
from PIL import Image
from typer.testing import CliRunner

import vlmprune as vp
from vlmprune.cli import app
from vlmprune.evals.questions import open_questions
from vlmprune.loading import videos as loading
from vlmprune.loading.frames import KINDS, FramesProcessor
from vlmprune.loading.models import open_model
from vlmprune.loading.prompts import make_batch, prompt_text
from vlmprune.loading.questions import open_question
from vlmprune.loading.shown import Shown
from vlmprune.loading.videos import VideoFile, chosen, open_video


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of models, of frames, and a video file."""
    here = tmp_path_factory.mktemp("videos")
    found = {name: make(here / name) for name, make in folders.OF_VIDEOS.items()}
    found |= {"frames": videos.folder(here / "frames"), "file": videos.file(here / "clip.mp4")}
    return {**found, "llava": folders.llava(here / "llava"), "picture": picture(here / "one.png")}


def picture(path):
    videos.frame(3).save(path)
    return path


def numbers(video):
    return [videos.number_of(frame) for frame in video.frames]


def no_notes(sentence):
    pytest.fail(sentence)


# -- frames ------------------------------------------------------------------------------------------------------------------


def test_frames_of_a_file(made):
    """Evenly spaced, as transformers samples; their times."""
    video = open_video(made["file"], report=no_notes)
    assert numbers(video) == video.index == [25 * i // 8 for i in range(8)]
    assert (video.total, video.rate) == (25, 10.0)
    assert video.times == [index / 10 for index in video.index]
    assert numbers(open_video(made["file"], frames=25, report=no_notes)) == list(range(25))
    assert numbers(open_video(made["file"], fps=2, report=no_notes)) == [0, 5, 10, 15, 20]
    assert numbers(open_video(made["file"], frames=1, report=no_notes)) == [0]
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    known = VideoMetadata(total_num_frames=25, fps=10.0)
    for frames in (1, 3, 8, 24):
        assert chosen(25, frames, None, None, "it") == default_sample_indices_fn(known, num_frames=frames).tolist()
    assert chosen(25, None, 10.0, 2, "it") == default_sample_indices_fn(known, fps=2).tolist()


def test_frames_of_a_folder(made):
    """All of them, in the order of the numbers in their names; no times."""
    video = open_video(made["frames"], report=no_notes)
    assert numbers(video) == video.index == list(range(6))
    assert video.times is None
    assert numbers(open_video(made["frames"], frames=3, report=no_notes)) == [0, 2, 4]
    assert video.pixels().shape == (6, videos.HEIGHT, videos.WIDTH, 3)
    assert len(video) == len(list(video)) == 6


def test_names_of_frames_may_have_any_characters(tmp_path):
    """A raised digit is no number of ours, and names that count alike have an order of their own."""
    for number, name in enumerate(("a01.png", "a1.png", "a2.png", "²1.png")):
        videos.frame(number).save(tmp_path / name)
    assert numbers(open_video(tmp_path, report=no_notes)) == [0, 1, 2, 3]


def test_a_video_that_ends_early(tmp_path):
    """What can be decoded is used, and said; the header may promise more."""
    whole = videos.file(tmp_path / "whole.ts", codec="mpeg2video", form="mpegts")
    assert open_video(whole, report=no_notes).total == 25
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    video = open_video(cut, report=lambda note: None)
    assert 0 < video.total < 25
    assert numbers(video) == video.index


def test_a_decoder_that_fails_on_the_way(made, monkeypatch):
    """Frames after which decoding fails are left out, and said."""
    import av

    decoded = loading._decoded

    def failing(path):
        for number, frame in enumerate(decoded(path)):
            if number == 9:
                raise av.error.InvalidDataError(1, "broken packet")
            yield frame

    monkeypatch.setattr(loading, "_decoded", failing)
    notes = []
    video = open_video(made["file"], frames=3, report=notes.append)
    assert numbers(video) == [0, 3, 6]
    assert notes == video.notes == [f"{made['file']}: only its first 9 frames can be decoded (broken packet)"]


BAD = {
    "missing": (lambda here: here / "no.mp4", {}, "there is no video at"),
    "address": (lambda here: "https://example.org/a.mp4", {}, "https:… is an address: download the video"),
    "empty file": (lambda here: written(here / "a.mp4", b""), {}, "a.mp4 is empty: give a video file"),
    "no video": (lambda here: written(here / "a.mp4", b"words " * 99), {}, "cannot be read as a video (Invalid data found"),
    "cut off": (lambda here: written(here / "b.mp4", videos.file(here / "a.mp4").read_bytes()[:3000]), {}, "cannot be read as"),
    "sound": (lambda here: videos.sound(here / "a.wav"), {}, "a.wav has no pictures, only audio"),
    "too many": (
        lambda here: videos.file(here / "a.mp4", 3),
        {"frames": 4},
        "a.mp4 has 3 frames, found --frames 4: give at most 3",
    ),
    "one": (lambda here: videos.file(here / "a.mp4", 1), {"frames": 4}, "a.mp4 has 1 frame, found --frames 4"),
    "too fast": (lambda here: videos.file(here / "a.mp4", 3), {"fps": 12}, "has 10 frames in a second, found --fps 12"),
    "both": (lambda here: videos.file(here / "a.mp4", 3), {"fps": 2, "frames": 2}, "found --frames 2 and --fps 2: give one"),
    "empty folder": (lambda here: here, {}, "there is no picture in"),
    "few pictures": (lambda here: videos.folder(here / "f", 2), {"frames": 3}, "f has 2 frames, found --frames 3"),
    "fps of a folder": (lambda here: videos.folder(here / "f", 2), {"fps": 3}, "is a folder of frames, which have no times"),
    "other sizes": (lambda here: mixed(here / "f"), {}, "the frames of a video have one size, found 80 × 64 pixels in"),
    "a file of two sizes": (
        lambda here: joined(here),
        {},
        "the frames of a video have one size, found 80 × 64 pixels in frame 0 of",
    ),
    "broken picture": (lambda here: broken(here / "f"), {}, "frame9.png is not a picture that can be read"),
}


def written(path, data):
    path.write_bytes(data)
    return path


def mixed(path):
    videos.folder(path)
    videos.frame(1, 60, 64).save(path / "frame9.png")
    return path


def joined(here):
    """A stream whose pictures become larger on the way."""
    parts = [videos.file(here / f"{width}.ts", 6, "mpeg2video", "mpegts", width) for width in (80, 160)]
    return written(here / "a.ts", b"".join(part.read_bytes() for part in parts))


def broken(path):
    videos.folder(path)
    return written(path / "frame9.png", b"\x89PNG").parent


@pytest.mark.parametrize("case", BAD)
def test_bad_videos(case, tmp_path):
    make, more, sentence = BAD[case]
    with pytest.raises(vp.UsageError) as error:
        open_video(make(tmp_path), report=lambda note: None, **more)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_decoded(made, monkeypatch):
    """A container that opens, and whose first frame cannot be decoded."""
    import av

    def failing(path):
        raise av.error.InvalidDataError(1, "broken packet")
        yield

    monkeypatch.setattr(loading, "_decoded", failing)
    with pytest.raises(vp.UsageError, match=r"no frame of .* can be decoded \(broken packet\)"):
        open_video(made["file"])


def test_files_need_pyav_and_folders_do_not(made, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "av" else find_spec(name))
    imported = builtins.__import__

    def without(name, *rest):
        assert name != "av"
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        vp.UsageError, match=r"decoding a video file needs av: install it with `pip install 'vlmprune\[video\]'`"
    ):
        open_video(made["file"])
    assert len(open_video(made["frames"])) == 6


# -- what a model is given ---------------------------------------------------------------------------------------------------

# Values of transformers' own processors with torchvision 0.28.0, on the frames of `noise`. Where torchvision is installed,
# tests/with_torchvision/ compares every bit.
SETTINGS = {
    "qwen2_vl": {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 16384}},
    "qwen3_vl": {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 40000}},
    "glm4v": {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 40000}},
    "llava_onevision": {"size": {"height": 48, "width": 40}},
    "llava_next_video": {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 56}},
}
GOLDEN = {
    "qwen2_vl": ([384, 384], [[2, 12, 16]], [-0.79957, 1.079392, 0.48406, -1.106137, -0.584356, 0.559099, 1.375596, 0.083987]),
    "qwen3_vl": (
        [384, 384],
        [[2, 12, 16]],
        [-0.466667, 0.411765, 0.168627, -0.631373, -0.505882, 0.207843, 0.701961, -0.137255],
    ),
    "glm4v": ([384, 384], [[2, 12, 16]], [-0.79957, 1.079392, 0.48406, -1.106137, -0.584356, 0.559099, 1.375596, 0.083987]),
    "llava_onevision": (
        [1, 3, 3, 48, 40],
        None,
        [0.485092, -0.731569, 0.837651, 0.397501, 0.198913, 0.126648, 0.368305, -0.356375],
    ),
    "llava_next_video": (
        [1, 3, 3, 48, 56],
        None,
        [-0.42001, 0.379006, 0.766551, -0.653585, 0.138882, 0.411049, -0.551396, 0.979317],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_frames_become_what_transformers_makes_of_them(name):
    found = FramesProcessor(KINDS[name], lambda: SETTINGS[name])([noise()])
    pixels = found["pixel_values_videos"]
    shape, grid, values = GOLDEN[name]
    assert list(pixels.shape) == shape
    assert grid == (found["video_grid_thw"].tolist() if "video_grid_thw" in found else None)
    torch.testing.assert_close(pixels.flatten()[13 :: pixels.numel() // 9 | 1][:8], torch.tensor(values), atol=1e-6, rtol=0)


def noise():
    return np.random.default_rng(0).integers(0, 256, (3, 90, 130, 3), dtype=np.uint8)


def test_a_setting_that_needs_torchvision():
    with pytest.raises(vp.UsageError, match="settings that need torchvision"):
        FramesProcessor(KINDS["qwen2_vl"], lambda: {"cap_pixels_per_frame": True})([noise()])


@pytest.mark.parametrize("model", folders.OF_VIDEOS)
def test_prompts_with_videos(made, model):
    """Through the chat template and the processor: as many placeholders as the frames make tokens, and the same as alone in a
    ragged batch."""
    processor, _ = open_model(str(made[model]), "cpu", shown=("video",))
    shown = [open_video(made["frames"]), open_video(made["frames"], frames=4)]
    if model == "llava_onevision":
        shown[1] = shown[0]  # frames of one batch are one tensor
    texts = [prompt_text(processor, question, 0, 1) for question in ("what is this ?", "and what about that one ?")]
    together = make_batch(processor, [[], []], texts, [[video] for video in shown])
    tokens = {"qwen2_5_vl": (60, 40), "llava_onevision": (55, 55)}[model]
    assert (together["input_ids"] == processor.video_token_id).sum(dim=1).tolist() == list(tokens)
    for row, (text, video) in enumerate(zip(texts, shown, strict=True)):
        alone = make_batch(processor, [[]], [text], [[video]])
        assert together["input_ids"][row, together["attention_mask"][row] == 1].tolist() == alone["input_ids"][0].tolist()
    if model == "llava_onevision":
        with pytest.raises(vp.UsageError, match="need the same number of frames, found 6, 4; ask one at a time"):
            make_batch(processor, [[], []], texts, [[shown[0]], [open_video(made["frames"], frames=4)]])
    with pytest.raises(vp.UsageError, match=r"video tokens do not match the video: 2 .* for one video; write one"):
        prompt_text(processor, f"{processor.video_token}{processor.video_token} what ?", 0, 1)
    whole = f"{processor.video_token} what ?"
    assert prompt_text(processor, whole, 0, 1) == whole


def test_a_processor_with_our_part_can_be_saved(made, tmp_path):
    processor, _ = open_model(str(made["qwen2_5_vl"]), "cpu")
    processor.save_pretrained(tmp_path)
    assert not any("FramesProcessor" in path.read_text() for path in tmp_path.glob("*.json"))


def test_questions_with_videos(made, tmp_path):
    """`questions.jsonl` names videos; the fingerprint changes with their frames."""
    entry = {"video": str(made["file"]), "frames": 4, "question": "what ?", "answer": "a"}

    def opened(**more):
        (tmp_path / "questions.jsonl").write_text(json.dumps({**entry, **more}) + "\n")
        return open_questions(str(tmp_path))

    questions = opened()
    assert questions[0].videos == (VideoFile(made["file"], 4),)
    assert [numbers(video) for video in questions[0].clips()] == [[0, 6, 12, 18]]
    assert questions.fingerprint == opened().fingerprint != opened(frames=5).fingerprint
    assert questions[0].unit == str(made["file"])
    with pytest.raises(vp.UsageError, match="needs a text as 'image'"):  # of horizon and tune
        open_questions(str(tmp_path), needs=("answer", "image"))
    for frames in (0, "8", True, 1.5):
        with pytest.raises(vp.UsageError, match="needs a whole number from 1 as 'frames'"):
            opened(frames=frames)
    with pytest.raises(vp.UsageError, match="has 25 frames, found --frames 40"):
        opened(frames=40)


# -- commands ----------------------------------------------------------------------------------------------------------------


def ran(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("model", folders.OF_VIDEOS)
@pytest.mark.parametrize("shown", ["file", "frames"])
def test_run_a_video(made, tmp_path, model, shown):
    target = tmp_path / "kept.png"
    arguments = [
        "run",
        "--model",
        made[model],
        "--video",
        made[shown],
        "--frames",
        4,
        "--prompt",
        "what ?",
        "--max-new-tokens",
        2,
    ]
    result = ran(*arguments, "--recipe", "evs:fraction=0.5", "--draw", target, "--why", 5, "--json")
    answer = json.loads(result.stdout)
    step = 25 // 4 if shown == "file" else 6 / 4
    assert answer["video"]["frames"] == [int(step * i) if shown == "frames" else 25 * i // 4 for i in range(4)]
    assert "picture" not in answer
    views = answer["views"]
    together = 2 if model == "qwen2_5_vl" else 1  # frames that become one
    assert len(views) == 4 // together
    assert len(views[0]["kept"]) == views[0]["tokens"], "EVS keeps the first frame"
    assert sum(len(view["kept"]) for view in views) == answer["pruned"]["visual_tokens"] == len(answer["kept"])
    assert sum(view["tokens"] for view in views) == answer["unpruned"]["visual_tokens"]
    first = answer["video"]["frames"][0]
    assert views[0]["name"] == (f"frame {first}, 0.00 s" if shown == "file" else f"frame {first}")
    assert "evs" in answer["why"][0]["lines"][1]
    assert Image.open(target).size[0] == 256 * len(views) + 12 * (len(views) - 1)


def test_view_of_a_video(made, tmp_path):
    """A contact sheet, rows of four frames, in one prefill; the numbers are printed."""
    target = tmp_path / "sheet.png"
    result = ran("view", "--model", made["llava_onevision"], "--video", made["frames"], "--prompt", "what ?", "--out", target)
    assert "frame 0: 9 of 9 tokens kept" in result.stdout
    assert "recipe evs:fraction=0.25" in result.stdout
    width, height = Image.open(target).size
    assert width == 4 * 256 + 3 * 12
    assert height > 2 * 256
    one = ran("view", "--kept", "--model", made["llava"], "--image", made["picture"], "--prompt", "what ?", "--out", target)
    assert "picture: 14 of 144 tokens kept" in one.stdout


def test_check_of_a_video(made):
    result = ran("check", "--model", made["qwen2_5_vl"], "--video", made["frames"], "--prompt", "what ?", "--recipe", "vidcom2")
    assert "exact: vidcom2" in result.stdout


def test_a_picture_and_a_video(made):
    """Both in one prompt: the picture first."""
    arguments = ["--image", made["picture"], "--video", made["frames"], "--prompt", "what ?", "--recipe", "random:fraction=0.5"]
    answer = json.loads(ran("run", "--model", made["qwen2_5_vl"], *arguments, "--max-new-tokens", 2, "--json").stdout)
    assert [view["name"] for view in answer["views"]] == ["picture", "frame 0", "frame 2", "frame 4"]
    assert len(answer["views"][0]["kept"]) / answer["views"][0]["tokens"] == 0.5
    assert sum(len(view["kept"]) for view in answer["views"]) == answer["pruned"]["visual_tokens"]
    assert {"picture", "video"} <= set(answer)


MISTAKES = {
    "nothing": ([], "nothing is shown: give --image with a picture, or --video"),
    "frames of a picture": (["--image", "picture", "--frames", "4"], "--frames and --fps choose frames of a video"),
    "no videos": (["--video", "frames", "--model", "llava"], "llava takes no videos here: show it pictures, or choose"),
    "sinks": (["--video", "frames", "--sinks"], "the view of sinks is of a picture"),
    "two figures": (["--image", "picture", "--sinks", "--kept"], "found --sinks and --kept, which are two figures"),
    "nothing to draw": (["--video", "frames", "--recipe", "var:sink_dims=cosine"], "drops no visual tokens, so that there is"),
    "more frames": (["--video", "frames", "--frames", "9"], "has 6 frames, found --frames 9: give at most 6"),
    "below one frame": (["--video", "frames", "--recipe", "evs:tokens=3"], "evs keeps the first frame of a video whole"),
    "per frame": (["--video", "frames", "--recipe", "evs:per=frame"], "evs compares the frames of a video"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(made, case, tmp_path):
    arguments, sentence = MISTAKES[case]
    named = [str(made.get(argument, argument)) for argument in arguments]
    model = [] if "--model" in named else ["--model", str(made["llava_onevision"])]
    done = CliRunner().invoke(app, ["view", *named, *model, "--prompt", "what ?", "--out", str(tmp_path / "a.png")])
    text = str(done.exception) if isinstance(done.exception, vp.UsageError) else done.output
    assert done.exit_code != 0
    assert sentence in text


def test_a_family_with_one_placeholder_for_both():
    config = type("Config", (), {"model_type": "glm4v", "image_token_id": 5, "video_token_id": 6})()
    with pytest.raises(vp.UsageError, match="one placeholder for pictures and videos, so that it cannot be shown both"):
        loading.check_shown(config, ("picture", "video"))
    loading.check_shown(config, ("video",))


def test_a_processor_without_its_part_for_videos(made):
    processor, _ = open_model(str(made["qwen2_5_vl"]), "cpu")
    if find_spec("torchvision") is None:
        del processor.video_processor
        with pytest.raises(vp.UsageError, match="videos need torchvision here, of which the video part"):
            make_batch(processor, [[]], ["x"], [[open_video(made["frames"])]])
    processor.video_token = None
    with pytest.raises(vp.UsageError, match="has no video token"):
        loading.check_processor(processor)


def test_a_question_about_a_video_reads_nothing_twice(made, monkeypatch):
    """Everything is checked before the weights are read."""
    calls = []
    monkeypatch.setattr(loading, "_file", lambda *rest: calls.append(rest) or open_video(made["frames"]))
    question = open_question(str(made["llava_onevision"]), Shown(video=made["file"]), "what ?", "cpu")
    assert len(calls) == 1
    assert "torchvision" not in sys.modules or find_spec("torchvision")
    assert question.picture is None
    assert len(question.seen()) == len(question.crops()) == 6
