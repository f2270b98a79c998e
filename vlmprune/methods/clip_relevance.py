"""CDPruner's relevance, from the CLIP model whose vision tower the VLM uses. Zhang et al., arXiv:2506.10967.

    r_j = − mean_p cos( W_v · LN(x_j), t_p )     x_j: patch j as it enters the projector; t_p: CLIP embedding of piece p of the
                                                 question

The paper's scripts pass the bare question. Here the caller gives it, or it is found between the words of the chat template.

CLIP reads 77 tokens; the first and the last mark a text's beginning and end. A longer question is split into pieces of 75
tokens, each with marks of its own. The official code marks the whole question once and splits the result into pieces of 77. All
pieces but the last then lack the end mark, where the embedding is read; CLIP reads the first piece at its beginning mark
instead, which gives the same vector for every text. Up to 77 tokens both agree. Cosines are fp32 (official: in the dtype of
the embeddings). The CLIP model may be transformers' or open_clip's (`clip_models.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.methods.clip_models import clip_model

FIRST, ANSWER, LAST = "FIRSTQUESTION", "ANSWERTOIT", "LASTQUESTION"
"""The words of a conversation that a template is tried on."""

FOREIGN = re.compile(r"\[/?[A-Z]+\]|</?[a-z]+>|<\|[^<>|]+\|>|\b[\w ]+:\s*$")
"""Words that templates write. If a question does not end in words of its own template, these show that another one wrote it."""


class ClipRelevance:
    """A relevance for `CDPruner`.

    Args:
        clip: a loaded `CLIPModel` of transformers, or a CLIP model of open_clip whose image tower is its own ViT: the one that
            the VLM's tower was taken from. Its post-norm and both projections are used, its image tower is not run again.
        clip_tokenizer: its tokenizer. Questions are split into pieces of at most its `model_max_length` tokens (open_clip: the
            model's `context_length`; 77).
        tokenizer: the VLM's tokenizer, or its processor: whichever holds the chat template.
        question: the bare question of every prompt; or a function that makes it from the text after the prompt's last picture.
            If None, it is the user's last question in that text, found between the words that the chat template writes
            ("ASSISTANT:"); without a template it is all of that text. A prompt of another template is refused if it can be
            recognised: its text lacks this template's words, or ends in another's ("[/INST]", "</s>", "Assistant:").

    Raises:
        UsageError: `question` is neither, or the chat template cannot be tried; and at a prompt in which no question is found.
    """

    def __init__(
        self, clip: Any, clip_tokenizer: Any, tokenizer: Any, question: str | Callable[[str], str] | None = None
    ) -> None:
        if question is not None and not callable(question) and not (isinstance(question, str) and question.strip()):
            raise UsageError(
                "ClipRelevance: question must be a text, or a function that makes it from the text after the picture; found "
                f"{question!r}."
            )
        if callable(question):
            try:
                signature(question).bind("")
            except TypeError as error:
                raise UsageError(
                    "ClipRelevance: question is called as question(text after the picture), but the one given cannot be "
                    f"({error})."
                ) from error
            except ValueError:  # built in: it has no signature
                pass
        self.clip, self.clip_tokenizer, self.question = clip, clip_tokenizer, question
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.template = None
        if question is None and getattr(tokenizer, "chat_template", None):
            self.template = Template(tokenizer.apply_chat_template)

    @torch.no_grad()
    def __call__(self, tower_features: Tensor, text_ids: Tensor, text_valid: Tensor) -> Tensor:
        """`[image, visual]`, from `tower_features` `[image, visual, dim]`, `text_ids` `[image, text]` and `text_valid`."""
        patches = clip_model(self.clip, self.clip_tokenizer).patches(tower_features)
        scores = [
            -(image @ self._embed(self.asked(ids[valid])).T).mean(dim=-1)
            for image, ids, valid in zip(patches, text_ids, text_valid, strict=True)
        ]
        return torch.stack(scores)

    def asked(self, ids: Tensor) -> str:
        """The question that is embedded, from the ids `[text]` after the picture.

        Raises:
            UsageError: none is found.
        """
        if isinstance(self.question, str):
            return self.question
        if self.question is None and self.template is None:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False))
        found = self.question(text) if self.question is not None else self.template and self.template.question(text)
        if not isinstance(found, str) or not found.strip():
            where = "the chat template" if self.question is None else "question=…"
            raise UsageError(
                f"ClipRelevance finds no question in the text after the picture by {where}, found {text!r}: put the question "
                "after the picture, or give it as ClipRelevance(…, question='…')."
            )
        return found

    def _embed(self, question: str) -> Tensor:
        """`[piece, dim]` unit embeddings of a question."""
        clip = clip_model(self.clip, self.clip_tokenizer)
        inner, room = clip.ids(question), clip.longest - 2  # its first and last token
        return clip.texts([clip.decode(inner[i : i + room]) for i in range(0, max(len(inner), 1), room)])


class Template:
    """What a chat template writes around a question, found by rendering a conversation of known words. White space is ignored.

    Args:
        render: `apply_chat_template` of a tokenizer or processor.

    Raises:
        UsageError: the questions do not appear in what the template writes.
    """

    def __init__(self, render: Callable[..., Any]) -> None:
        written = _written(render, add_generation_prompt=True)
        self.turn = _words(written.partition(ANSWER)[2].partition(LAST)[0])  # between an answer and the next question
        self.closing = _words(written.partition(LAST)[2])  # after a question that is to be answered
        self.ending = _words(_written(render, add_generation_prompt=False).partition(LAST)[2], r"\s*$")

    def question(self, text: str) -> str | None:
        """The user's last question in the text after a picture, or None."""
        closings = list(self.closing.finditer(text))
        answered = closings[0].end() if closings else len(text)  # a user's next turn can begin only after an answer
        start = max((turn.end() for turn in self.turn.finditer(text) if turn.start() >= answered), default=0)
        end = max((closing.start() for closing in closings if closing.start() >= start), default=None)
        if end is None:  # nothing asks for an answer
            ending = self.ending.search(text, start)
            end = None if ending is None or FOREIGN.search(text[start : ending.start()]) else ending.start()
        return None if end is None else text[start:end].strip()


def _words(text: str, after: str = "") -> re.Pattern[str]:
    """Matches these words with any white space between their letters, then the pattern `after`; nothing if both are empty."""
    return re.compile((r"\s*".join(map(re.escape, "".join(text.split()))) + after) or r"(?!)")


def _written(render: Callable[..., Any], add_generation_prompt: bool) -> str:
    """A conversation as the template writes it, with content in parts (of processors) or in strings (of tokenizers)."""
    parts = [[{"type": "image"}, {"type": "text", "text": FIRST}], *([{"type": "text", "text": t}] for t in (ANSWER, LAST))]
    why: object = "it leaves them out"
    for contents in (parts, [FIRST, ANSWER, LAST]):
        turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant", "user"), contents, strict=True)]
        try:
            written = str(render(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
        except Exception as error:  # a template is a program: whatever it runs into
            why = error
            continue
        if "'type'" not in written and '"type"' not in written and written.count(ANSWER) == written.count(LAST) == 1:
            return written
    raise UsageError(
        f"ClipRelevance cannot find questions by this chat template ({why}): give them as ClipRelevance(…, question='…'), or "
        "as a function of the text after the picture."
    )
