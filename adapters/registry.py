"""Every supported family by its `config.model_type`."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.family import Family
from vlmprune.adapters.llava import LLAVA
from vlmprune.adapters.llava_next import LLAVA_NEXT
from vlmprune.adapters.qwen_vl import QWEN2_5_VL, QWEN2_VL
from vlmprune.errors import UsageError

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAVA, LLAVA_NEXT, QWEN2_VL, QWEN2_5_VL)}


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        UsageError: the family is unknown; says what was looked for.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UsageError(
            f"unknown model family: looked for config.model_type among {', '.join(sorted(FAMILIES))}, found {model_type!r}; "
            "a family is one file in adapters/ (CONTRIBUTING.md says how)."
        )
    return FAMILIES[model_type]
