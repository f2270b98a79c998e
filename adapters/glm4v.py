"""GLM-4.1V, GLM-4.5V and GLM-4.6V (`model_type: glm4v`, `glm4v_moe`, `glm46v`): any resolution and M-RoPE as in Qwen-VL. A
convolution merges squares of 2 × 2 patches after the last block, so that the tower needs all patches. No CLS token. Every
frame of a video is written apart, with its time behind it, in the placeholder of pictures: transformers cannot take both in one
call."""

from __future__ import annotations

from dataclasses import replace

from vlmprune.adapters.qwen_vl import QWEN2_VL
from vlmprune.adapters.videos import Videos, packed_grids, packed_tokens, written_apart

GLM4V = replace(
    QWEN2_VL,
    name="glm4v",
    facts=replace(QWEN2_VL.facts, whole=True),
    videos=Videos(token=lambda config: config.image_token_id, tokens=packed_tokens, grids=packed_grids, frame=written_apart),
)
GLM4V_MOE = replace(GLM4V, name="glm4v_moe")
GLM46V = replace(GLM4V, name="glm46v")
