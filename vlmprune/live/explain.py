"""Why a visual token was dropped, or kept: what every stage decided about it, and by which numbers.

    with vlmprune.wrap(model, "fastv:layer=2,tokens=64", explain=True) as run:
        model(**inputs)
    print(run.explain(image=0, token=57))

Scores are computed and kept only under `explain=True`. They stay on the device; ranks are computed by `run.explain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown
from vlmprune.live.record import Judged, Kept, Prefill, place_of
from vlmprune.methods import Choice, Pruner
from vlmprune.methods.checks import check_joined, check_numbers, check_order
from vlmprune.methods.tower import TowerPruner
from vlmprune.schedule import IN_TOWER, Site, plain
from vlmprune.show import units
from vlmprune.view import View

# -- while a stage chooses ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def judged(method: Pruner, see: View | None, choice: Choice, index: Sequence[Tensor]) -> list[Judged]:
    """What a stage decided about pictures, or crops, of one size.

    Args:
        see: what the method saw; None where it was not asked, because the budget keeps everything or nothing.
        choice: what it chose.
        index: `[visual]` of each, the tokens that were there.

    Raises:
        UsageError: the method's scores, its order or `Choice.joined` are not what they must be.
    """
    if see is None:
        return [Judged(own, asked=False) for own in index]
    score, order = method.scores(see), None
    if score is not None:
        check_numbers(f"{method.name}: scores(see)", score, (see.images, see.visual))
    if isinstance(choice.index, Tensor) and (order := method.order(see, choice.index.shape[1])) is not None:
        check_order(method.name, order, choice.index)
    if choice.joined is not None:
        check_joined(method.name, choice.joined, choice.index, see.visual)
    return [
        Judged(
            index=own,
            score=None if score is None else score[number].detach(),
            order=None if order is None else own[order[number].long().to(own.device)],
            joined=None if choice.joined is None else _tokens(own, choice.joined[number]),
        )
        for number, own in enumerate(index)
    ]


def _tokens(index: Tensor, joined: Tensor) -> Tensor:
    """Places among the tokens that were there, as indices into the picture; −1 stays."""
    joined = joined.long().to(index.device)
    return torch.where(joined < 0, joined, index[joined.clamp_min(0)])


def by_picture(found: dict[int, Judged], pictures: Sequence[int], count: int) -> list[tuple[Judged, ...]]:
    """What was decided about each of `count` pictures, its crops in their order. `pictures`: the picture of every part."""
    return [tuple(found[part] for part in sorted(found) if pictures[part] == picture) for picture in range(count)]


def how_it_chooses(method: Pruner, site: Site) -> str:
    """How a method decides at a site, in words that complete "the method …"."""
    return method.chooses_in_tower if site == "vision" and isinstance(method, TowerPruner) else method.chooses


# -- afterwards --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What one stage decided about one token.

    Attributes:
        layer: first decoder layer that computes only what the stage kept.
        site: "pixels" (before the vision tower), "vision" (inside it), "llm", or "cache" (what decoding steps see).
        method: the method that decided, with its variant.
        kept: whether the token stayed.
        left: tokens that the stage kept, of those it decided about together with this one.
        among: tokens it decided about together.
        score: the method's score of the token, or None.
        rank: place of the score among these, 1 is the highest; equal scores: the lower index first. None without a score.
        last_kept_score: the lowest score among the tokens that stayed; None without scores, or if none stayed.
        pick: for a kept token of a method that picks one after the other, as which it was picked, from 1.
        merged_into: token that this one was merged into, or None.
        merged_from: how many other tokens were merged into this one.
        frame, frames: of a video whose frames are judged apart (`per="frame"`): number of the frame, and how many there are;
            else None and 1.
        crop, crops: LLaVA-NeXT, where crops are judged apart: number of the crop (0 is the whole picture scaled down), and how
            many there are; else None and 1.
        asked: False where the budget keeps everything or nothing, so that the method was not asked.
        how: how the method decides, in words.
        in_place: False where the tower merged the patches that were left wherever they were (FlowCut on Qwen2-VL): the number
            of a token is no place in the picture from there on.
    """

    layer: int
    site: Site
    method: str
    kept: bool
    left: int
    among: int
    score: float | None = None
    rank: int | None = None
    last_kept_score: float | None = None
    pick: int | None = None
    merged_into: int | None = None
    merged_from: int = 0
    crop: int | None = None
    crops: int = 1
    frame: int | None = None
    frames: int = 1
    asked: bool = True
    how: str = ""
    in_place: bool = True

    @property
    def place(self) -> str:
        """Where the stage is, in words."""
        return place_of(self.site, self.layer)

    def __str__(self) -> str:
        return f"{self.place}, {self.method}: {'; '.join(self._facts())}."

    def _facts(self) -> Iterator[str]:
        if self.site == "cache":
            yield "kept" if self.kept else "forgotten after the prompt: decoding steps do not see it"
            return
        if self.merged_into is not None:
            yield f"merged into token {self.merged_into}, and gone as a token of its own"
        else:
            yield "kept" if self.kept else "dropped"
        if self.merged_from:
            yield f"{self.merged_from} other {'token was' if self.merged_from == 1 else 'tokens were'} merged into it"
        within = "" if self.crop is None else f" in crop {self.crop} (of {self.crops}; crop 0 is the whole picture)"
        within = within if self.frame is None else f" in frame {self.frame} (of {self.frames})"
        if not self.asked:
            yield f"the budget {'keeps' if self.left else 'drops'} all {self.among} tokens{within}"
            return
        if self.score is not None:
            yield f"score {_number(self.score, self.last_kept_score)}, rank {self.rank} of {self.among}{within}"
            if self.last_kept_score is not None:
                last = _number(self.last_kept_score, self.score)
                yield f"{self.left} {'stays, with' if self.left == 1 else 'stay; the lowest kept score is'} {last}"
            if self._in_spite_of_score:
                yield f"the score alone does not decide: the method {self.how}"
            return
        if self.pick is not None:
            yield f"pick {self.pick} of {self.left}"
        yield f"{self.left} of {self.among} tokens{within} stay"
        where = "inside" if self.site == "vision" else "before"
        known = f"scores {where} the tower are not kept" if self.site in IN_TOWER else "no token has a score"
        yield f"{known}: the method {self.how}"
        if not self.in_place:
            yield (
                f"it merges the patches that are left wherever they were, and numbers their tokens 0 to {self.left - 1}, so "
                "that no number is a place in the picture"
            )

    @property
    def _in_spite_of_score(self) -> bool:
        """Whether a choice of the highest scores would have decided otherwise, or would have kept others."""
        assert self.score is not None
        assert self.rank is not None
        above_a_kept_one = self.last_kept_score is not None and self.score > self.last_kept_score
        return (self.rank <= self.left) != self.kept or (above_a_kept_one and not self.kept)


@dataclass(frozen=True)
class Explanation:
    """What happened to one visual token, stage by stage. `print` shows it in sentences.

    Attributes:
        sample, image, token: which token: batch row, number of the picture in that row, index in the picture.
        tokens: visual tokens the picture has, without LLaVA-NeXT's row separators.
        frame, frames: of a video, the frame that shows the token, and how many there are; None and 0 of a picture.
        time: seconds at which that frame is shown; None if unknown.
        verdicts: of every stage that decided about the token, in order; empty if it was hidden.
        hidden: the call's attention mask hides the token, so that it never entered.
        newlines: row separators of all pictures, which count as text and have no index; and whether they were kept.
    """

    sample: int
    image: int
    token: int
    tokens: int
    verdicts: tuple[Verdict, ...]
    hidden: bool = False
    newlines: int = 0
    newlines_kept: bool = True
    frame: int | None = None
    frames: int = 0
    time: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the token was there until the last layer of the prompt."""
        return not self.hidden and all(verdict.kept for verdict in self.verdicts if verdict.site != "cache")

    @property
    def in_place(self) -> bool:
        """Whether the token's index says where in the picture it is; see `Verdict.in_place`."""
        return all(verdict.in_place for verdict in self.verdicts)

    @property
    def dropped_by(self) -> Verdict | None:
        """The stage that dropped the token, or None."""
        return next((verdict for verdict in self.verdicts if not verdict.kept and verdict.site != "cache"), None)

    def lines(self) -> list[str]:
        """The explanation as lines of text."""
        which = f"Token {self.token} of {self.tokens} (picture {self.image}, sample {self.sample})"
        if self.frame is not None:
            at = "" if self.time is None else f", at {self.time:g} s"
            which = f"Token {self.token} of {self.tokens} (video {self.image}, sample {self.sample}), in frame {self.frame} "
            which += f"of {self.frames}{at},"
        if self.hidden:
            return [f"{which} never entered: the call's attention mask hides it, and no stage may keep it."]
        dropped = self.dropped_by
        happened = "stayed" if dropped is None else "was dropped" if dropped.merged_into is None else "was merged"
        where = "" if dropped is None else f" {dropped.place}"
        separators = f"The prompt's {self.newlines} row separators count as text, have no index, and were "
        separators += "kept." if self.newlines_kept else "dropped."
        return [f"{which} {happened}{where}.", *map(str, self.verdicts), *([separators] if self.newlines else [])]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, texts, dicts and lists, for JSON."""
        found: dict[str, Any] = units.plain(asdict(self))
        for plain_verdict, verdict in zip(found["verdicts"], self.verdicts, strict=True):
            plain_verdict["place"] = verdict.place
        return found | {"kept": self.kept, "lines": self.lines()}

    def __str__(self) -> str:
        return "\n  ".join(self.lines())


def explain(record: Prefill, token: Any, image: Any, sample: Any) -> Explanation:
    """What happened to one token in a prefill.

    Raises:
        UsageError: there is no such token, or nothing was pruned.
    """
    token, image, sample = (_whole(name, value) for name, value in (("token", token), ("image", image), ("sample", sample)))
    stages = _stages_of(record, image, sample)
    tokens = stages[0].original
    if not 0 <= token < tokens:
        kind = "picture" if stages[0].frame is None else "video"
        raise UsageError(
            f"there is no token {token}: {kind} {image} of sample {sample} has {tokens}, numbered 0 to {tokens - 1}."
        )
    frame = None if stages[0].frame is None else int(stages[0].frame[token])
    time = None if frame is None or math.isnan(stages[0].times[frame]) else stages[0].times[frame]
    verdicts: list[Verdict] = []
    for stage in stages:
        if (verdict := _verdict(stage, token, verdicts)) is not None:
            verdicts.append(verdict)
    return Explanation(
        sample=sample,
        image=image,
        token=token,
        tokens=tokens,
        verdicts=tuple(verdicts),
        hidden=not verdicts,
        newlines=record.newlines,
        newlines_kept=record.newlines_kept,
        frame=frame,
        frames=stages[0].frames,
        time=time,
    )


def _whole(name: str, value: Any) -> int:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, found {shown(value)}: numbers begin with 0.")
    return value


def _stages_of(record: Prefill, image: int, sample: int) -> list[Kept]:
    """What all stages did to one picture."""
    if not record.visual:
        raise UsageError("this prompt has no picture, and so no visual token to explain.")
    if not record.kept:
        raise UsageError("the recipe of this prompt drops no visual tokens: all of them stayed.")
    if not 0 <= sample < record.batch:
        raise UsageError(f"there is no sample {sample}: the batch has {record.batch}, numbered 0 to {record.batch - 1}.")
    images = sorted({kept.ordinal for kept in record.kept if kept.sample == sample})
    if image not in images:
        videos = any(kept.frame is not None for kept in record.kept if kept.sample == sample)
        one, more = ("picture or video", "pictures and videos") if videos else ("picture", "pictures")
        held = {0: "no picture", 1: f"1 {one}, numbered 0"}.get(
            len(images), f"{len(images)} {more}, numbered 0 to {len(images) - 1}"
        )
        raise UsageError(f"there is no {one} {image} in sample {sample}: it has {held}.")
    return [kept for kept in record.kept if (kept.sample, kept.ordinal) == (sample, image)]


def _verdict(stage: Kept, token: int, before: Iterable[Verdict]) -> Verdict | None:
    """What a stage decided about a token; None if the token was not there any more."""
    kept = token in stage.index.tolist()
    if stage.site == "cache":  # what earlier layers computed, and a later stage dropped, is forgotten
        computed = [verdict for verdict in before if not verdict.kept and verdict.layer <= stage.layer]
        return None if computed else Verdict(stage.layer, "cache", stage.method, kept, len(stage.index), stage.original)
    for number, part in enumerate(stage.judged):
        there = part.index.tolist()
        if token in there:
            return _of_part(stage, part, there, token, kept, number if len(stage.judged) > 1 else None)
    return None


def _of_part(stage: Kept, part: Judged, there: list[int], token: int, kept: bool, apart: int | None) -> Verdict:
    left = set(stage.index.tolist()).intersection(there)
    score = rank = last = pick = joined = None
    if part.score is not None:
        scores, place = part.score.float(), there.index(token)
        score, rank = float(scores[place]), scores.argsort(descending=True, stable=True).tolist().index(place) + 1
        last = min((float(scores[there.index(other)]) for other in left), default=None)
    if part.order is not None and kept:
        pick = part.order.tolist().index(token) + 1
    if part.joined is not None:
        into = part.joined.tolist()
        joined = into[there.index(token)]
    return Verdict(
        layer=stage.layer,
        site=stage.site,
        method=stage.method,
        kept=kept,
        left=len(left),
        among=len(there),
        score=score,
        rank=rank,
        last_kept_score=last,
        pick=pick,
        merged_into=joined if joined is not None and joined >= 0 and not kept else None,
        merged_from=into.count(token) - 1 if joined is not None and kept else 0,
        crop=apart if stage.frame is None else None,
        crops=len(stage.judged) if stage.frame is None else 1,
        frame=None if stage.frame is None else apart,
        frames=1 if stage.frame is None else len(stage.judged),
        asked=part.asked,
        how=stage.how,
        in_place=stage.in_place,
    )


def _number(value: float, beside: float | None) -> str:
    """Four digits, or as many as tell it from the number beside it."""
    if beside is None or value == beside:
        return f"{value:.4g}"
    return next((text for digits in range(4, 17) if (text := f"{value:.{digits}g}") != f"{beside:.{digits}g}"), repr(value))


def not_asked() -> UsageError:
    """The error for a handle that keeps no scores."""
    return UsageError(
        "scores are kept only when asked for: wrap the model with vlmprune.wrap(model, recipe, explain=True), run the prompt, "
        "and ask again."
    )
