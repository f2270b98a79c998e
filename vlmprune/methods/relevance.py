"""Checks of a relevance (`CDPruner(relevance=…)`): when the method is made, not at the first prompt.

A relevance is a function, an object like `ClipRelevance`, or the name of a model in a recipe:

    open_clip:NAME/PRETRAINED    open_clip:ViT-L-14-336/openai, also open_clip:hf-hub:… and open_clip:local-dir:…
    clip:NAME                    a folder or hub id with a `CLIPModel` of transformers

A model that is named is loaded when a model is wrapped.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from vlmprune.errors import UsageError, shown
from vlmprune.methods.clip_models import check_clip, clip_model

CALLED = "relevance(tower_features [image, visual, dim], text_ids [image, text], text_valid [image, text])"
KINDS = ("open_clip", "clip")
"""What the name of a model begins with."""
_OPENER = "vlmprune.loading.relevances:open_relevance"
"""Loads a relevance by its name. Looked up when one is named: the room that loads models stands above this one."""


def check_relevance(method: str, relevance: Any) -> None:
    """Refuse what cannot score tokens by the question.

    Args:
        method: name of the method.
        relevance: a function, an object like `ClipRelevance`, or the name of a model.

    Raises:
        UsageError: it cannot be called with these arguments, one of its parts is of the wrong kind, or it is no such name.
    """
    if isinstance(relevance, str):
        _check_name(method, relevance)
        return
    if isinstance(relevance, type) or (not callable(relevance) and not hasattr(relevance, "encode_text")):
        raise UsageError(f"{method}: relevance must be a function such as ClipRelevance(…), found {shown(relevance)}.")
    if hasattr(relevance, "get_text_features") or hasattr(relevance, "encode_text"):
        raise UsageError(
            f"{method}: relevance must be a function, found the model {type(relevance).__name__}: pass "
            "vlmprune.ClipRelevance(clip, clip_tokenizer, tokenizer)."
        )
    if hasattr(relevance, "clip") and hasattr(relevance, "clip_tokenizer"):
        check_clip(method, relevance.clip, relevance.clip_tokenizer)
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
    if not width or not (hasattr(relevance, "clip") and hasattr(relevance, "clip_tokenizer")):
        return
    found = clip_model(relevance.clip, relevance.clip_tokenizer).width
    if found != width:
        raise UsageError(
            f"{method}: relevance compares patches of this model's vision tower, {width} numbers each, with a CLIP model whose "
            f"patches have {found}: load the CLIP model that the tower was taken from."
        )


def named_relevance(name: str, model: str, device: Any) -> Any:
    """The relevance that a recipe names, loaded.

    Args:
        name: as in the recipe.
        model: where the vision-language model was loaded from, a folder or hub id: its tokenizer and chat template are there.
        device: where the CLIP model goes.

    Raises:
        UsageError: it cannot be loaded; says why.
    """
    return _opener()(name, model, device)


@cache
def _opener() -> Any:
    return resolve_name(_OPENER)


def _check_name(method: str, name: str) -> None:
    kind, _, place = name.partition(":")
    if kind not in KINDS or not place.strip():
        raise UsageError(
            f"{method}: relevance must be a function or the name of a model, found {shown(name)}: write "
            "open_clip:NAME/PRETRAINED or clip:FOLDER, or pass a function such as ClipRelevance(…)."
        )
