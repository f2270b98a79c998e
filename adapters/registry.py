"""Every supported family by its `config.model_type`."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.adapters import clip_towers, open_clip
from vlmprune.adapters.cohere import AYA_VISION, COHERE2_VISION
from vlmprune.adapters.family import Family
from vlmprune.adapters.gemma import GEMMA3, GEMMA4, PALIGEMMA
from vlmprune.adapters.glm4v import GLM4V, GLM4V_MOE, GLM46V
from vlmprune.adapters.idefics3 import IDEFICS3, SMOLVLM
from vlmprune.adapters.image_tower import ImageTower
from vlmprune.adapters.internvl import INTERNVL
from vlmprune.adapters.lfm2_vl import LFM2_VL
from vlmprune.adapters.llava import LLAVA
from vlmprune.adapters.llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO
from vlmprune.adapters.llava_onevision import LLAVA_ONEVISION
from vlmprune.adapters.mistral3 import MISTRAL3
from vlmprune.adapters.one_raster import DEEPSEEK_VL, DEEPSEEK_VL_HYBRID, FAST_VLM, JANUS, OVIS2, PERCEPTION_LM
from vlmprune.adapters.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_5, QWEN3_5_MOE, QWEN3_VL, QWEN3_VL_MOE
from vlmprune.adapters.refused import REFUSED
from vlmprune.adapters.video_llama_3 import VIDEO_LLAMA_3
from vlmprune.errors import UsageError

SUPPORTED = (
    *(LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE),
    *(INTERNVL, IDEFICS3, SMOLVLM, MISTRAL3, GLM4V, GLM4V_MOE, GLM46V, VIDEO_LLAMA_3),
    *(QWEN3_5, QWEN3_5_MOE, LFM2_VL, GEMMA3, GEMMA4, PALIGEMMA, AYA_VISION, COHERE2_VISION),
    *(JANUS, DEEPSEEK_VL, DEEPSEEK_VL_HYBRID, FAST_VLM, PERCEPTION_LM, OVIS2),
)
FAMILIES: dict[str, Family] = {family.name: family for family in SUPPORTED}


def image_tower_of(model: nn.Module) -> ImageTower | None:
    """The image tower of a model that has no language model (open_clip, timm, CLIP, SigLIP); None for other models.

    Raises:
        UsageError: it has one in which nothing can be dropped; says why.
    """
    return open_clip.tower_in(model) or clip_towers.tower_in(model)


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        UsageError: the family is unknown, or known and not supported; says what was looked for, or why.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UsageError(f"the model family {model_type!r} is not supported: {REFUSED[model_type]}; run it un-wrapped.")
    raise UsageError(
        f"unknown model family: looked for config.model_type among {', '.join(sorted(FAMILIES))}, found {model_type!r}; "
        "a family is one file in adapters/ (CONTRIBUTING.md says how)."
    )
