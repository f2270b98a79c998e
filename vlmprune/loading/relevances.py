"""Load a relevance that a recipe names: the CLIP model, and the tokenizer of the vision-language model that it scores for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.loading.config import read_config
from vlmprune.loading.image_text import load_image_text
from vlmprune.loading.processor import load_processor
from vlmprune.loading.source import find
from vlmprune.methods.clip_models import check_clip
from vlmprune.methods.clip_relevance import ClipRelevance
from vlmprune.names import OPEN_CLIP


def open_relevance(name: str, model: str, device: Any) -> ClipRelevance:
    """A relevance by its name in a recipe.

    Args:
        name: open_clip:NAME/PRETRAINED, or clip:FOLDER with a `CLIPModel` of transformers.
        model: where the vision-language model was loaded from.
        device: where the CLIP model goes.

    Raises:
        UsageError: the CLIP model, or the vision-language model's own processor, cannot be loaded; says why.
    """
    if not model:
        raise UsageError(
            f"the relevance {name!r} needs the tokenizer of the wrapped model, which was not loaded from a folder or the hub: "
            "pass relevance=vlmprune.ClipRelevance(clip, clip_tokenizer, processor) in Python."
        )
    return _opened(name, model, "cpu" if str(device) == "meta" else str(device))


@lru_cache(maxsize=1)  # a command wraps the same model with the same recipe several times
def _opened(name: str, model: str, device: str) -> ClipRelevance:
    source = find(model)
    processor = load_processor(source, read_config(source))
    found = load_image_text(name if name.startswith(OPEN_CLIP) else name.removeprefix("clip:"), device)
    check_clip("cdpruner", found.model, found.tokenizer)
    return ClipRelevance(found.model, found.tokenizer, processor)
