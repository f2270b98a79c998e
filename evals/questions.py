"""Open questions of any kind by one name: scenes or clips of the embedded models, a folder of yours, a dataset, a task of
lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError, unknown
from vlmprune.evals.question import Question as Question
from vlmprune.evals.question import QuestionSet as QuestionSet
from vlmprune.evals.question import key_of, opened
from vlmprune.evals.question_datasets import read_dataset
from vlmprune.evals.question_files import FILE, read_folder
from vlmprune.evals.question_tasks import ENDING, read_task
from vlmprune.evals.scorers import check_scored, check_scorer
from vlmprune.loading.datasets import holds_dataset
from vlmprune.loading.pictures import summary
from vlmprune.tiny.answers import LONGEST_ANSWER
from vlmprune.tiny.clips import make_clip
from vlmprune.tiny.scenes import SPLITS, make_scene

if TYPE_CHECKING:
    from PIL import Image

SCENES = "scenes"
"""Name of the built-in questions: held-out scenes of the embedded model."""
CLIPS = "clips"
"""Name of the built-in questions about videos: held-out clips of the embedded model for clips."""
DRAWN = (SCENES, CLIPS)
USUAL_SCENES = 150
NAMED = 3
"""How many broken pictures a refusal names."""


def open_questions(
    spec: str | Path = SCENES,
    images: int | None = None,
    *,
    split: str | None = None,
    seed: int = 0,
    scorer: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs: Collection[str] = ("answer",),
    skip_bad: bool = False,
    max_new_tokens: int | None = None,
) -> QuestionSet:
    """Open questions, and check everything about them before a model is loaded. Every picture is read once.

    Args:
        spec: `scenes` or `clips`; a folder with `questions.jsonl`; a folder with a Hugging Face dataset; the name or the
            YAML file of a task of lmms-eval.
        images: how many scenes or clips (default 150); of other questions, how many at most (default: all).
        split: of scenes and clips, "test" (default) or "dev"; of a dataset, needed where it has several.
        seed: other seeds have other scenes and clips. Other questions are the same for every seed.
        scorer: for all questions that name none. Default: exact for scenes, choice where there are choices, else normalised.
        columns: of a dataset: what the columns mean, where their names are unusual, for example `{"question": "query"}`.
        needs: "answer" and "image", where every question must have one.
        skip_bad: leave out questions with a picture that cannot be read. They are counted and named in `notes`.
        max_new_tokens: the longest answer. Default: what the questions say, else 32.

    Raises:
        UsageError: there are no such questions, or one of them cannot be asked or scored; says why.
    """
    if scorer is not None:
        check_scorer(scorer)
    base = QuestionSet(str(spec), (), "")
    notes: list[str] = []
    if str(spec) in DRAWN:
        drawn = scene_questions if str(spec) == SCENES else clip_questions
        found = drawn(images or USUAL_SCENES, split or "test", seed, scorer or "exact")
        base = replace(base, max_new_tokens=LONGEST_ANSWER)
    elif (folder := Path(spec).expanduser()).is_dir():
        if (folder / FILE).exists() or not holds_dataset(folder):
            found, notes = read_folder(folder, needs, images, scorer)
        else:
            found, notes = read_dataset(folder, split, columns, needs, images, scorer)
    elif looks_like_path(str(spec)) and not str(spec).endswith(ENDING):
        fetch = f"; a dataset of the hub must be fetched first: `hf download --repo-type dataset --local-dir FOLDER {spec}`"
        hub = fetch if str(spec).count("/") == 1 and str(spec)[0] not in "./~" else ""
        raise UsageError(f"there is no folder {spec}: give one that holds {FILE} and the pictures{hub}.")
    else:
        task = read_task(str(spec), images, scorer)
        found = task.questions
        base = replace(base, max_new_tokens=task.max_new_tokens, until=task.until, metric=task.metric)
    if images is not None and str(spec) not in DRAWN and len(found) < images:
        notes.append(f"there are {len(found)} questions, fewer than the {images} asked for")
    _check_ids(found)
    if "answer" in needs:
        for question in found:
            check_scored(question)
    kept, fingerprint, lost, skipped = read_pictures(found, skip_bad)
    return replace(
        base,
        questions=tuple(kept),
        fingerprint=fingerprint,
        max_new_tokens=max_new_tokens or base.max_new_tokens,
        notes=(*notes, *lost),
        skipped=skipped,
    )


def looks_like_path(spec: str) -> bool:
    """Whether a name is meant as a folder, and cannot be a task of lmms-eval."""
    return "/" in spec or "\\" in spec or spec.startswith((".", "~"))


def _check_ids(questions: Sequence[Question]) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UsageError(f"two questions have the id {question.id!r}: give each another one.")
        seen.add(question.id)


def scene_questions(images: int, split: str = "test", seed: int = 0, scorer: str = "exact") -> list[Question]:
    """Every question about held-out scenes of the embedded model, scene after scene.

    Raises:
        UsageError: an unknown split.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    asked = []
    for number in range(seed * images, (seed + 1) * images):
        scene = make_scene(SPLITS[split] + number)
        for ordinal, question in enumerate(scene.questions):
            asked.append(
                Question(
                    id=f"{split} {number} {ordinal}",
                    images=(scene.image,),
                    text=question.text,
                    answers=(question.answer,),
                    group=question.skill,
                    unit=f"{split} {number}",
                    scorer=scorer,
                )
            )
    return asked


def clip_questions(images: int, split: str = "test", seed: int = 0, scorer: str = "exact") -> list[Question]:
    """Every question about held-out clips, clip after clip; their frames are drawn when they are asked about.

    Raises:
        UsageError: an unknown split.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    seeds = {number: SPLITS[split] + number for number in range(seed * images, (seed + 1) * images)}
    clips = {number: (make_clip(own), _Drawn(own)) for number, own in seeds.items()}
    return [
        Question(
            id=f"{split} {number} {ordinal}",
            images=(),
            text=question.text,
            answers=(question.answer,),
            group=question.skill,
            unit=f"{split} {number}",
            scorer=scorer,
            videos=(drawn,),
        )
        for number, (clip, drawn) in clips.items()
        for ordinal, question in enumerate(clip.questions)
    ]


class _Drawn:
    """A clip whose frames are drawn when they are asked for, and kept for the questions that follow."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def frames(self) -> list[Image.Image]:
        return _frames(self.seed)


@lru_cache(maxsize=64)
def _frames(seed: int) -> list[Image.Image]:
    return make_clip(seed).frames()


# -- pictures and fingerprint ------------------------------------------------------------------------------------------------


def read_pictures(
    questions: Sequence[Question], skip_bad: bool = False
) -> tuple[list[Question], str, list[str], tuple[str, ...]]:
    """Read every picture once.

    Returns:
        The questions that can be asked; the hash of everything they ask; what pictures lost and what was left out, as
        sentences; and the ids of the questions that were left out.

    Raises:
        UsageError: a picture cannot be read, and `skip_bad` is not set; or no question is left.
    """
    digests: dict[Any, str] = {}
    broken: dict[Any, str] = {}
    lost: list[str] = []
    kept, skipped = [], []
    for question in questions:
        for image in question.images:
            key = image if isinstance(image, Path) else id(image)
            if key not in digests and key not in broken:
                try:
                    digests[key] = picture_digest(opened(image, lost.append))
                except UsageError as error:
                    broken[key] = str(error)
        if any(key_of(image) in broken for image in question.images):
            skipped.append(question.id)
        else:
            kept.append(question)
    sentences = list(broken.values())
    if sentences and not skip_bad:
        raise UsageError(_refusal(questions, skipped, sentences, len(digests) + len(broken)))
    if not kept:
        raise UsageError(f"no question is left: of {len(broken)} pictures none can be read; the first: {sentences[0]}")
    kept = [replace(question, unit=question.unit or _unit(question, digests)) for question in kept]
    notes = summary(lost)
    if skipped:
        notes.append(
            f"{len(skipped)} of {len(questions)} questions were left out; pictures that cannot be read: {len(broken)}, "
            + "; ".join(sentence.rstrip(".") for sentence in sentences)
        )
    return kept, fingerprint_of(kept, lambda image: digests[key_of(image)]), notes, tuple(skipped)


def _unit(question: Question, digests: Mapping[Any, str]) -> str:
    """Questions about the same pictures belong together; a question without one stands alone."""
    return " ".join(digests[key_of(image)] for image in question.images) or question.id


def _refusal(questions: Sequence[Question], skipped: Sequence[str], sentences: Sequence[str], pictures: int) -> str:
    first = sentences[0].rstrip(".")
    if len(sentences) == 1:
        return f"question {skipped[0]}: {first}; or leave it out with --skip-bad."
    others = "; ".join(sentence.split(": ")[0] for sentence in sentences[1:NAMED])
    more = f"; and {len(sentences) - NAMED} more" if len(sentences) > NAMED else ""
    return (
        f"{len(sentences)} of {pictures} pictures cannot be read, which {len(skipped)} of {len(questions)} questions need: "
        f"{first}; {others}{more}: repair them, or leave these questions out with --skip-bad."
    )


def picture_digest(picture: Any) -> str:
    """A hash of a picture's size and pixels."""
    return blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=12).hexdigest()


def fingerprint_of(questions: Sequence[Question], digest: Callable[[Any], str]) -> str:
    """A hash of everything that is asked."""
    whole = blake2b(digest_size=12)
    seen: dict[int, str] = {}
    for question in questions:
        plain = replace(question, images=tuple(digest(image) for image in question.images))
        whole.update(repr(plain).encode())
        if any(id(video) not in seen for video in question.videos):
            seen |= {
                id(video): " ".join(map(picture_digest, frames))
                for video, frames in zip(question.videos, question.clips(), strict=True)
            }
        whole.update("".join(seen[id(video)] for video in question.videos).encode())
    return whole.hexdigest()
