"""Clips are what their questions say, and the training on them computes what the model computes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlmprune.tiny import load, train_clips
from vlmprune.tiny.answers import accuracy_by_skill
from vlmprune.tiny.clip_model import CELLS, CLIP_VOCABULARY, build_clip_model, build_clip_processor, clip_prompt
from vlmprune.tiny.clip_questions import CLIP_SKILLS
from vlmprune.tiny.clips import DIRECTIONS, FRAMES, ROLES, Clip, compose_clip, held_out_clips, make_clip
from vlmprune.tiny.evaluate import blind_baseline
from vlmprune.tiny.scenes import SPLITS, TRAINING_SEEDS
from vlmprune.tiny.training import loop
from vlmprune.tiny.training.clip_cells import SIDE, cell_target
from vlmprune.tiny.training.clip_language import ClipLanguageStage, _some_background, adopt
from vlmprune.tiny.training.clip_packing import VISUAL, pack_clips, pose_clip
from vlmprune.tiny.training.clip_pooling import frame_pixels, initialise_pooling, patches, pooled
from vlmprune.tiny.training.code import FIELDS
from vlmprune.tiny.training.language import normed, read
from vlmprune.tiny.training.loop import batch_seed


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(held_out_clips(60, "dev"))


def test_a_seed_is_a_clip() -> None:
    one, again, other = make_clip(5), make_clip(5), make_clip(6)
    assert (one.actors, one.questions) == (again.actors, again.questions) != (other.actors, other.questions)
    assert [frame.tobytes() for frame in one.frames()] == [frame.tobytes() for frame in again.frames()]
    assert compose_clip(5).actors == one.actors


def test_held_out_clips_are_none_of_the_training() -> None:
    assert max(batch_seed(0, "clips", step, 0) for step in range(50)) + (1 << 20) < TRAINING_SEEDS < min(SPLITS.values())


def test_actors_do_what_their_role_says(clips: list[Clip]) -> None:
    found = Counter(actor.role for clip in clips for actor in clip.actors)
    assert set(found) == set(ROLES)
    for clip in clips:
        assert len({actor.start.shape for actor in clip.actors}) == len(clip.actors)
        colours = [colour for actor in clip.actors for colour in {actor.start.colour, actor.end.colour}]
        assert len(set(colours)) == len(colours)
        for actor in clip.actors:
            places = {(thing.x, thing.y) for thing in actor.seen if thing is not None}
            assert (len(places) > 1) == (actor.role == "moving")
            assert (actor.start.colour != actor.end.colour) == (actor.role == "changing")
            expected = {"appearing": actor.frames[0] > 0 and actor.frames[-1] == FRAMES - 1, "passing": len(actor.frames) == 1}
            assert expected.get(actor.role, len(actor.frames) == FRAMES)
            if actor.role == "moving":
                x, y = DIRECTIONS[actor.direction]
                assert (actor.end.x - actor.start.x) * x + (actor.end.y - actor.start.y) * y >= 24


def test_what_changes_is_seen_in_the_pixels(clips: list[Clip]) -> None:
    """A passing object is in its frame and in no other."""
    clip = next(clip for clip in clips if any(actor.role == "passing" for actor in clip.actors))
    actor = next(actor for actor in clip.actors if actor.role == "passing")
    thing, frames = actor.start, np.stack([np.asarray(frame, float) for frame in clip.frames()])
    area = frames[:, thing.y - 3 : thing.y + 4, thing.x - 3 : thing.x + 4].mean((1, 2))
    away = np.linalg.norm(area - np.median(area, axis=0), axis=1)
    assert away.argmax() == actor.frames[0]
    assert np.delete(away, actor.frames[0]).max() < 5


def test_answers_follow_from_what_happens(clips: list[Clip]) -> None:
    """By another way than the generator's: from the objects of each frame."""
    asked: Counter[str] = Counter()
    for clip in clips:
        by_frame = [{thing.shape: thing for thing in clip.objects(frame)} for frame in range(FRAMES)]
        first_seen = {
            shape: min(frame for frame in range(FRAMES) if shape in by_frame[frame])
            for shape in {shape for own in by_frame for shape in own}
        }
        for question in clip.questions:
            words = question.text.split()
            asked[question.skill] += 1
            if question.skill == "counting":
                counts = {"first": len(by_frame[0]), "last": len(by_frame[-1]), "how": sum(map(bool, first_seen.values()))}
                assert question.answer == str(counts[words[1]])
            elif question.skill == "order":
                earlier = first_seen[words[3]] < first_seen[words[10]]
                assert question.answer == ("before" if earlier else "after")
            elif question.skill == "change":
                frame = 0 if words[3] == "first" else -1
                assert question.answer == by_frame[frame][words[7]].colour
            elif question.skill == "direction":
                start, end = by_frame[0][words[4]], by_frame[-1][words[4]]
                x, y = DIRECTIONS[question.answer]
                assert (end.x - start.x) * x > 20 or (end.y - start.y) * y > 20
            else:
                seen = [own for own in by_frame if any(question.answer in (t.colour, t.shape) for t in own.values())]
                assert len(seen) == (1 if question.skill == "moment" else FRAMES)
            assert all(word in CLIP_VOCABULARY for word in (*words, *question.answer.split()))
    assert set(asked) == set(CLIP_SKILLS)


def test_without_looking_is_far_from_right(clips: list[Clip]) -> None:
    blind = blind_baseline(held_out_clips(400, "test"), clips, CLIP_SKILLS)
    assert max(entry.value for entry in blind.values()) < 0.75


def test_cells_encode_the_objects_in_them(clips: list[Clip]) -> None:
    objects = clips[0].objects(FRAMES - 1)
    known = cell_target(objects)
    assert known.centre.sum() == len({(thing.x // SIDE, thing.y // SIDE) for thing in objects})
    for thing in objects:
        cell = thing.y // SIDE * CELLS + thing.x // SIDE
        assert known.core[cell]
        assert objects[known.object_of[cell]] == thing
    assert (known.code[:, FIELDS["background"].start] == (known.object_of < 0)).all()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_clip_model()
    adopt(made, load()[0])
    initialise_pooling(made)
    return made


def test_the_picture_models_weights_are_adopted(model) -> None:
    theirs = load()[0].state_dict()
    ours = model.state_dict()
    assert all(torch.equal(ours[name][: len(weight)], weight) for name, weight in theirs.items())


def test_training_and_model_read_clips_alike(model, clips: list[Clip]) -> None:
    """Packed questions on pooled features, against one prompt through processor and model."""
    chosen = clips[:2]
    asked = [clip.questions[0] for clip in chosen]
    inputs = build_clip_processor()(
        text=[clip_prompt(question.text) for question in asked],
        videos=[clip.frames() for clip in chosen],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert torch.allclose(inputs["pixel_values_videos"].flatten(0, 1), frame_pixels(chosen), atol=1e-6)
    with torch.no_grad():
        stock = model(**inputs).logits[:, -1]
        visual = pooled(model, patches(model, frame_pixels(chosen))).unflatten(0, (2, FRAMES)).flatten(1, 2)
        batch = pack_clips(chosen, [[question] for question in asked])
        hidden = read(model, visual, batch)[batch.picture, batch.token]
        ours = model.lm_head(normed(model.model.language_model.norm, hidden))
        kept = _some_background(batch.shown, 0)
        fewer = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        all_kept = torch.arange(VISUAL).expand(2, -1)
        same = read(model, visual, batch.among(all_kept), places=2 + all_kept)[batch.picture, batch.token]
        short = batch.among(kept)
        hidden_short = read(model, fewer, short, places=2 + kept)[0]
        language = model.model.language_model
        words = len(asked[0].text.split()) + 2
        start = language.embed_tokens(torch.tensor([CLIP_VOCABULARY["<s>"], CLIP_VOCABULARY["USER:"]]))
        embedded = torch.cat([start, fewer[0], language.embed_tokens(batch.ids[0, :words])])[None]
        places = torch.cat([torch.arange(2), 2 + kept[0], batch.position_ids[0, :words]])[None]
        alone = language(inputs_embeds=embedded, position_ids=places).last_hidden_state[0, -words:]
    first = [int((batch.question == number).nonzero()[0]) for number in range(2)]
    assert torch.allclose(ours[first], stock, atol=2e-5)
    assert torch.equal(hidden, same)
    assert torch.allclose(normed(language.norm, hidden_short[:words]), alone, atol=2e-4)
    assert torch.equal(kept[short.cell_picture, short.cell], batch.cell)
    assert torch.allclose(short.noun_wanted.sum(-1), torch.ones(1))
    assert torch.allclose(short.earlier.sum(-1), torch.ones(1))


def test_wanted_attention_is_on_what_is_asked_about(clips: list[Clip]) -> None:
    clip = next(clip for clip in clips if any(question.skill == "moment" for question in clip.questions))
    question = next(question for question in clip.questions if question.skill == "moment")
    batch = pack_clips([clip], [[question]])
    frame = clip.actors[question.nouns[0].early[0][0]].frames[0]
    cells = batch.noun_wanted[0, 0, 2:].nonzero().flatten() // CELLS**2
    assert cells.unique().tolist() == [frame]


def test_losses_start_and_fall(model) -> None:
    """A few steps on one batch: every auxiliary loss is there and the whole falls."""
    torch.manual_seed(0)
    visual = torch.randn(8, VISUAL, 128).bfloat16()
    stage = ClipLanguageStage(model, 4, range(8), visual)
    optimiser = torch.optim.Adam(stage.probe.parameters(), 0.01)
    losses = []
    for _ in range(3):
        loss, metrics = stage.loss(3, 0.0)
        assert {"earlier", "frame", "new", "moved", "noun"} <= metrics.keys()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not {"frame", "noun"} & stage.loss(3, 0.9)[1].keys()


@pytest.mark.parametrize("stop_at", [1, 3], ids=["in the first stage", "in the second stage"])
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    monkeypatch.setattr(train_clips, "BATCH", {"pooling": 2, "clips": 2})

    def run(out: str, *extra: str) -> dict[str, torch.Tensor]:
        (tmp_path / out).mkdir(exist_ok=True)
        options = ["--out", str(tmp_path / out), "--steps-scale", "0.001", "--save-every", "1", "--clips", "3"]
        train_clips.work(train_clips.parse([*options, *extra]))
        return load_file(tmp_path / out / "checkpoint" / "model.safetensors")

    whole = run("whole")
    saves = []
    replace_file = loop.replace_file

    def die(path: Path, write) -> None:
        replace_file(path, write)
        saves.append(path)
        if len([path for path in saves if path.name == "state.pt"]) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "replace_file", die)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    resumed = run("stopped", "--resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_questions_are_posed_for_every_skill(clips: list[Clip]) -> None:
    posed = [question for clip in clips for question in pose_clip(clip, random.Random(clip.seed))]
    assert {question.skill for question in posed} == set(CLIP_SKILLS)
    assert accuracy_by_skill([], skills=CLIP_SKILLS) == {}
