"""Checks of a relevance function (`CDPruner(relevance=…)`): when the method is made, not at the first prompt."""

from __future__ import annotations

from inspect import signature
from typing import Any

from vlmprune.errors import UsageError, shown

CALLED = "relevance(tower_features [image, visual, dim], text_ids [image, text], text_valid [image, text])"


def check_relevance(method: str, relevance: Any) -> None:
    """Refuse what cannot score tokens by the question.

    Args:
        method: name of the method.
        relevance: a function, or an object like `ClipRelevance`.

    Raises:
        UsageError: it cannot be called with these arguments, or one of its parts is of the wrong kind.
    """
    if isinstance(relevance, type) or not callable(relevance):
        raise UsageError(f"{method}: relevance must be a function such as ClipRelevance(…), found {shown(relevance)}.")
    if hasattr(relevance, "get_text_features"):
        raise UsageError(
            f"{method}: relevance must be a function, found the model {type(relevance).__name__}: pass "
            "vlmprune.ClipRelevance(clip, clip_tokenizer, tokenizer)."
        )
    if hasattr(relevance, "clip") and hasattr(relevance, "clip_tokenizer"):
        _check_clip(method, relevance.clip)
        _check_tokenizer(method, relevance.clip_tokenizer)
        tokenizer = getattr(relevance, "tokenizer", None)
        if not callable(getattr(tokenizer, "decode", None)):
            raise UsageError(
                f"{method}: tokenizer must be the vision-language model's own, found {shown(tokenizer)}: pass "
                "processor.tokenizer."
            )
    call = relevance.forward if hasattr(relevance, "forward") else relevance
    try:
        signature(call).bind(None, None, None)
    except TypeError as error:
        raise UsageError(f"{method}: relevance is called as {CALLED}, but the one given cannot be ({error}).") from error
    except ValueError:  # built in: it has no signature
        return


def check_width(method: str, relevance: Any, width: int) -> None:
    """Refuse a CLIP model other than the one the tower was taken from. `width`: numbers of a patch in the tower, 0 if unknown.

    Raises:
        UsageError: their widths differ.
    """
    norm = getattr(getattr(getattr(relevance, "clip", None), "vision_model", None), "post_layernorm", None)
    weight = getattr(norm, "weight", None)
    if width and weight is not None and len(weight) != width:
        raise UsageError(
            f"{method}: relevance compares patches of this model's vision tower, {width} numbers each, with a CLIP model whose "
            f"patches have {len(weight)}: load the CLIP model that the tower was taken from."
        )


def _check_clip(method: str, clip: Any) -> None:
    parts = ("visual_projection", "vision_model.post_layernorm", "get_text_features")
    missing = []
    for part in parts:
        found = clip
        for name in part.split("."):
            found = getattr(found, name, None)
        if not callable(found):
            missing.append(part)
    if missing:
        raise UsageError(
            f"{method}: clip must be a loaded CLIPModel, found {shown(clip) if isinstance(clip, str) else type(clip).__name__} "
            f"without {', '.join(missing)}: pass transformers.CLIPModel.from_pretrained(…)."
        )


def _check_tokenizer(method: str, tokenizer: Any) -> None:
    if hasattr(tokenizer, "image_processor"):
        raise UsageError(
            f"{method}: clip_tokenizer must be a tokenizer, found the processor {type(tokenizer).__name__}: pass its "
            ".tokenizer."
        )
    length = getattr(tokenizer, "model_max_length", None)
    if not callable(tokenizer) or not callable(getattr(tokenizer, "decode", None)) or not isinstance(length, int):
        raise UsageError(
            f"{method}: clip_tokenizer must be the CLIP model's tokenizer, found {shown(tokenizer)}: pass "
            "transformers.AutoTokenizer.from_pretrained(…)."
        )
    if not 2 < length <= 10**6:  # transformers writes 10³⁰ for "no limit"
        raise UsageError(
            f"{method}: clip_tokenizer allows texts of {length} tokens, but long questions must be split for the CLIP model: "
            "set its model_max_length (77)."
        )
