"""Whose conversation, and whose encoded pictures: what is put on a cache and on the output of a vision tower."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import Cache


@dataclass(eq=False)
class Owner:
    """Whose conversation a cache holds: the plan it began under, as long as that is attached to the model.

    Copies of a cache belong to the same plan, so that a copy of an `Owner` is itself. One that comes out of a file has none.
    """

    plan: Any = None

    def __deepcopy__(self, _: object) -> Owner:
        return self

    def __copy__(self) -> Owner:
        return self

    def __reduce__(self) -> Any:
        return Owner, ()


@dataclass(eq=False)
class Encoded:
    """Put on what the vision tower returned: whose pictures these are.

    Attributes:
        owner: of the plan under which they were encoded.
        shortened: patches were dropped inside the tower, with rows of NaN in their places: only that plan can use them.
        used: a prompt has taken them.
        prompts: the prompts that are run with them again for every token, without a cache; the latest.
    """

    owner: Owner | None
    shortened: bool = False
    used: bool = False
    prompts: deque[Any] = field(default_factory=lambda: deque(maxlen=16))


def encoded_of(features: Any) -> Encoded | None:
    """What was put on encoded pictures, or None."""
    return getattr(features, "vlmprune", None)


def features_of(kwargs: Mapping[str, Any]) -> list[Any]:
    """The pictures and the videos that `generate`, or the caller, has encoded for a call."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return [encoded[kind] for kind in ("image", "video") if encoded.get(kind) is not None]


def owner_of(cache: Cache | None) -> Owner | None:
    """The owner of the conversation in a cache, or None."""
    return getattr(cache, "vlmprune", None)
