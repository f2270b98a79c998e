"""GLM-4.1V, GLM-4.5V and GLM-4.6V (`model_type: glm4v`, `glm4v_moe`, `glm46v`): any resolution and M-RoPE as in Qwen-VL. A
convolution merges squares of 2 × 2 patches after the last block, so that the tower needs all patches. No CLS token. Frames of a
video have the placeholder of pictures; videos are refused."""

from __future__ import annotations

from dataclasses import replace

from vlmprune.adapters.qwen_vl import QWEN2_VL

GLM4V = replace(QWEN2_VL, name="glm4v", facts=replace(QWEN2_VL.facts, whole=True))
GLM4V_MOE = replace(GLM4V, name="glm4v_moe")
GLM46V = replace(GLM4V, name="glm46v")
