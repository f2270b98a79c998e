"""CLIP models as a relevance uses them: what a patch and a text are in the space that both share.

    transformers `CLIPModel`   patch: visual_projection(post_layernorm(x))   text: get_text_features
    open_clip, ViT             patch: ln_post(x) @ proj                      text: encode_text

A patch is embedded as the model embeds its CLS token (or the mean of its patches, where it pools so). Models that pool patches
in another way have no embedding of one patch, and are refused: SigLIP, whose picture is pooled by attention, and open_clip's
models on trunks of timm. Computed in the model's dtype up to its projections, then in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import normalize

from vlmprune.errors import UsageError, shown


class ClipModel(Protocol):
    """Patches and texts of one model.

    Attributes:
        width: numbers of a patch as it leaves the blocks of the tower.
        longest: tokens of a text, its first and last included.
    """

    @property
    def width(self) -> int: ...
    @property
    def longest(self) -> int: ...

    def patches(self, features: Tensor) -> Tensor:
        """`[…, dim]` unit vectors of patches `[…, width]` as they leave the blocks."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without the first and the last token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of such ids."""

    def texts(self, texts: list[str]) -> Tensor:
        """`[text, dim]` unit vectors of texts."""


def clip_model(clip: Any, tokenizer: Any) -> ClipModel:
    """A CLIP model with its tokenizer, of transformers or of open_clip."""
    return OpenClip(clip, tokenizer) if hasattr(clip, "encode_text") else Transformers(clip, tokenizer)


class Transformers:
    """A `CLIPModel` of transformers."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self._clip, self._tokenizer = clip, tokenizer

    @property
    def width(self) -> int:
        return len(self._clip.vision_model.post_layernorm.weight)

    @property
    def longest(self) -> int:
        return int(self._tokenizer.model_max_length)

    def patches(self, features: Tensor) -> Tensor:
        clip = self._clip
        return normalize(clip.visual_projection(clip.vision_model.post_layernorm(features.to(clip.dtype))).float(), dim=-1)

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def texts(self, texts: list[str]) -> Tensor:
        batch = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._clip.device)
        found = self._clip.get_text_features(**batch)
        return normalize(getattr(found, "pooler_output", found).float(), dim=-1)


class OpenClip:
    """A CLIP model of open_clip whose image tower is its own ViT."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self._clip, self._tokenizer = clip, tokenizer
        self._words = getattr(tokenizer, "tokenizer", None)  # of `HFTokenizer`, which wraps one of transformers

    @property
    def width(self) -> int:
        return int(self._clip.visual.proj.shape[0])

    @property
    def longest(self) -> int:
        return int(self._clip.context_length)

    def patches(self, features: Tensor) -> Tensor:
        visual = self._clip.visual
        return normalize((visual.ln_post(features.to(visual.proj.dtype)) @ visual.proj).float(), dim=-1)

    def ids(self, text: str) -> list[int]:
        if self._words is None:
            return list(self._tokenizer.encode(text))
        return list(self._words(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str((self._tokenizer if self._words is None else self._words).decode(ids))

    def texts(self, texts: list[str]) -> Tensor:
        ids = self._tokenizer(texts, context_length=self.longest).to(self._clip.visual.proj.device)
        return normalize(self._clip.encode_text(ids).float(), dim=-1)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_clip(method: str, clip: Any, tokenizer: Any) -> None:
    """Refuse a model that is no CLIP model, or a tokenizer that is not its own.

    Raises:
        UsageError: says what is missing, or what does not fit.
    """
    if hasattr(clip, "encode_text"):
        _check_open_clip(method, clip)
        _check_open_clip_tokenizer(method, tokenizer)
        reads, writes = _vocabulary(clip), _size(getattr(tokenizer, "tokenizer", tokenizer))
    else:
        _check_transformers(method, clip)
        _check_tokenizer(method, tokenizer)
        reads, writes = getattr(getattr(clip.config, "text_config", None), "vocab_size", 0), _size(tokenizer)
    if reads and writes > reads:
        raise UsageError(
            f"{method}: clip_tokenizer knows {writes} tokens, but the CLIP model reads {reads}: pass the tokenizer of this "
            "CLIP model."
        )


def _check_open_clip(method: str, clip: Any) -> None:
    visual = getattr(clip, "visual", None)
    if isinstance(getattr(visual, "proj", None), Tensor) and callable(getattr(visual, "ln_post", None)):
        return
    raise UsageError(
        f"{method}: clip must be a model whose patches can be compared with texts, found {type(clip).__name__} of open_clip "
        f"with the image tower {type(visual).__name__}, which has no visual.ln_post and visual.proj: take the CLIP model (a "
        "ViT of open_clip) that the vision tower was taken from."
    )


def _check_open_clip_tokenizer(method: str, tokenizer: Any) -> None:
    reads = callable(getattr(tokenizer, "encode", None)) or hasattr(tokenizer, "tokenizer")
    if not callable(tokenizer) or not reads or not hasattr(tokenizer, "context_length"):
        raise UsageError(
            f"{method}: clip_tokenizer must be the tokenizer of the open_clip model, found {shown(tokenizer)}: pass "
            "open_clip.get_tokenizer(name)."
        )


def _check_transformers(method: str, clip: Any) -> None:
    if isinstance(getattr(getattr(clip, "vision_model", None), "head", None), nn.Module):
        raise UsageError(
            f"{method}: {type(clip).__name__} pools the patches of a picture by attention, so that one patch has no embedding "
            "to compare with texts: pass a CLIP model, or a function of your own."
        )
    missing = []
    for part in ("visual_projection", "vision_model.post_layernorm", "get_text_features"):
        found = clip
        for name in part.split("."):
            found = getattr(found, name, None)
        if not callable(found):
            missing.append(part)
    if missing:
        raise UsageError(
            f"{method}: clip must be a loaded CLIPModel, found {shown(clip) if isinstance(clip, str) else type(clip).__name__} "
            f"without {', '.join(missing)}: pass transformers.CLIPModel.from_pretrained(…), or a model of open_clip."
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


def _vocabulary(clip: Any) -> int:
    """Tokens that an open_clip model reads; 0 if unknown."""
    found = getattr(clip, "vocab_size", None) or getattr(getattr(clip, "text", None), "vocab_size", 0)
    return found if isinstance(found, int) else 0


def _size(tokenizer: Any) -> int:
    """Tokens that a tokenizer knows; 0 if unknown."""
    if isinstance(found := getattr(tokenizer, "vocab_size", None), int) and not hasattr(tokenizer, "__len__"):
        return found
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0
