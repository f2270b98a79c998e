"""Many questions about each clip, packed into one sequence, with the targets of the auxiliary losses."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmprune.tiny.clip_model import CELLS, CLIP_VOCABULARY
from vlmprune.tiny.clip_questions import ClipQuestion, Sights, ask
from vlmprune.tiny.clips import FRAMES, Clip
from vlmprune.tiny.training.clip_cells import CellTarget, cell_target
from vlmprune.tiny.training.packing import COUNT_RULER, Sequences, distribution, integers

VISUAL = FRAMES * CELLS * CELLS
CLIP_PREFIX = 2 + VISUAL
"""Tokens before the question: `<s> USER:` and the clip."""
CLIP_MIXTURE = {"still": 0.08, "moment": 0.12, "change": 0.18, "direction": 0.18, "order": 0.2, "counting": 0.24}
"""Share of each skill in the questions tried."""
QUESTIONS_TRIED = 20
_MOVED = 24
"""Pixels of a movement that count as one in the probe's target."""


@dataclass
class ClipBatch:
    """Packed questions about `B` clips, padded to `Q` tokens each.

    Attributes:
        ids, position_ids: `[B, Q]`.
        mask: `[B, 1, Q, CLIP_PREFIX + Q]` bool; every question attends to the prefix and to itself.
        picture, token: `[n]` the tokens that predict an answer.
        labels: `[n]` what they predict.
        question: `[n]` the question that they belong to.
        skills: skill of each question.
        noun_picture, noun_token: `[m]` last words of noun phrases.
        noun_wanted: `[m, 2, CLIP_PREFIX]` the attention that two heads should have from there.
        cell_picture, cell: `[c]` cells that encode a whole object, `cell` counted in the clip's visual tokens.
        earlier: `[c, CLIP_PREFIX]` the attention that such a cell should have to earlier frames.
        history: `[c, 3]` whether the object is new, and its movement in x and y since the earlier frames.
        shown: `[B, VISUAL]` bool, True on cells that show an object.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor
    picture: Tensor
    token: Tensor
    labels: Tensor
    question: Tensor
    skills: list[str]
    noun_picture: Tensor
    noun_token: Tensor
    noun_wanted: Tensor
    cell_picture: Tensor
    cell: Tensor
    earlier: Tensor
    history: Tensor
    shown: Tensor

    def among(self, kept: Tensor) -> ClipBatch:
        """The same with the visual tokens `kept` `[B, n]` alone, rising; all cells that show an object are among them."""
        start = torch.tensor([[0, 1]]).expand(len(kept), -1)
        columns = torch.cat([start, 2 + kept], 1)  # of the prefix
        asking = torch.arange(self.ids.shape[1]).expand(len(kept), -1) + CLIP_PREFIX
        whole = torch.cat([columns, asking], 1)[:, None, None].expand(-1, 1, self.ids.shape[1], -1)
        wanted = columns[self.noun_picture][:, None].expand(-1, 2, -1)
        return replace(
            self,
            mask=self.mask.gather(3, whole),
            noun_wanted=self.noun_wanted.gather(2, wanted),
            cell=torch.searchsorted(kept[self.cell_picture], self.cell[:, None]).squeeze(1),
            earlier=self.earlier.gather(1, columns[self.cell_picture]),
        )


def pose_clip(clip: Clip, rng: random.Random) -> list[ClipQuestion]:
    """Different questions about one clip, skills drawn from `CLIP_MIXTURE`."""
    asked: dict[str, ClipQuestion] = {}
    for skill in rng.choices(list(CLIP_MIXTURE), list(CLIP_MIXTURE.values()), k=QUESTIONS_TRIED):
        if question := ask(skill, clip.actors, rng):
            asked.setdefault(question.text, question)
    return list(asked.values())


@dataclass
class _Cells:
    """The cells of one clip: which actor they encode, frame by frame."""

    core: np.ndarray
    """`[VISUAL]` index of the actor whose whole a cell encodes, or -1."""
    centre: np.ndarray
    """`[VISUAL]` index of the actor whose centre pixel a cell has, or -1."""
    shown: np.ndarray
    """`[VISUAL]` bool, True on cells that are not background, or not clearly."""

    @classmethod
    def of(cls, clip: Clip) -> _Cells:
        core, centre, shown = [], [], []
        for frame in range(FRAMES):
            present = [index for index, actor in enumerate(clip.actors) if actor.seen[frame] is not None]
            known: CellTarget = cell_target(clip.objects(frame))
            actor_of = np.array([*present, -1])[known.object_of]
            core.append(np.where(known.core, actor_of, -1))
            centre.append(np.where(known.centre, actor_of, -1))
            shown.append((known.object_of >= 0) | ~known.clear)
        return cls(np.concatenate(core), np.concatenate(centre), np.concatenate(shown))

    def seen(self, sights: Sights, centres: bool) -> np.ndarray:
        """Weights over the prefix: the cells of these sights, every sight with the same sum."""
        weights = np.zeros(CLIP_PREFIX, np.float32)
        source = self.centre if centres else self.core
        for actor, frame in sights:
            own = np.flatnonzero(source[frame * CELLS * CELLS : (frame + 1) * CELLS * CELLS] == actor)
            weights[2 + frame * CELLS * CELLS + own] = 1 / max(1, len(own))
        return weights


def _histories(clip: Clip, cells: _Cells) -> list[tuple[int, np.ndarray, tuple[float, float, float]]]:
    """For each core cell: its number, the attention to its object's earlier cells, and what the history probe should say."""
    rows = []
    for cell in np.flatnonzero(cells.core >= 0):
        frame, index = int(cell) // (CELLS * CELLS), int(cells.core[cell])
        actor = clip.actors[index]
        before = [earlier for earlier in actor.frames if earlier < frame]
        now = actor.seen[frame]
        past = [thing for earlier in before if (thing := actor.seen[earlier]) is not None]
        moved = (0.0, 0.0)
        if past and now is not None:
            moved = (
                (now.x - float(np.mean([thing.x for thing in past]))) / _MOVED,
                (now.y - float(np.mean([thing.y for thing in past]))) / _MOVED,
            )
        sights = tuple((index, earlier) for earlier in before)
        rows.append((int(cell), distribution(cells.seen(sights, centres=False)), (float(not past), *moved)))
    return rows


def pack_clips(clips: list[Clip], questions: list[list[ClipQuestion]]) -> ClipBatch:
    """Put the questions about each clip one after the other."""
    sequences = Sequences(len(clips), CLIP_VOCABULARY)
    nouns: list[tuple[int, int, np.ndarray]] = []
    histories: list[tuple[int, int, np.ndarray, tuple[float, float, float]]] = []
    shown: list[np.ndarray] = []
    for picture, (clip, asked) in enumerate(zip(clips, questions, strict=True)):
        cells = _Cells.of(clip)
        shown.append(cells.shown)
        histories += [(picture, *row) for row in _histories(clip, cells)]
        for question in asked:
            start = sequences.add(picture, question.text.split(), question.answer.split(), question.skill)
            counting = question.skill == "counting"
            for noun in question.nouns:
                heads = [
                    distribution(cells.seen(sights, centres=counting), COUNT_RULER if counting else 0.0)
                    for sights in (noun.early, noun.late)
                ]
                nouns.append((picture, start + noun.word, np.stack(heads)))

    return ClipBatch(
        **sequences.packed(CLIP_PREFIX),
        noun_picture=integers([noun[0] for noun in nouns]),
        noun_token=integers([noun[1] for noun in nouns]),
        noun_wanted=torch.from_numpy(np.stack([noun[2] for noun in nouns])),
        cell_picture=integers([row[0] for row in histories]),
        cell=integers([row[1] for row in histories]),
        earlier=torch.from_numpy(np.stack([row[2] for row in histories])),
        history=torch.tensor([row[3] for row in histories]),
        shown=torch.from_numpy(np.stack(shown)),
    )
