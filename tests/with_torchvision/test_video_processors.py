"""`FramesProcessor` against transformers' own video processors, which need torchvision: the same numbers, to the last bit.

`make test-open_clip` runs this, in whose environment torchvision is installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

from vlmprune.loading.frames import KINDS, FramesProcessor

THEIRS = {
    "qwen2_vl": tf.Qwen2VLVideoProcessor,
    "qwen3_vl": tf.Qwen3VLVideoProcessor,
    "glm4v": tf.Glm4vVideoProcessor,
    "llava_onevision": tf.LlavaOnevisionVideoProcessor,
    "llava_next_video": tf.LlavaNextVideoVideoProcessor,
}
PACKED = {"patch_size": 8, "size": {"shortest_edge": 64 * 64, "longest_edge": 200 * 200 * 4}}
OTHER = {
    "qwen2_vl": {**PACKED, "merge_size": 1},
    "qwen3_vl": {**PACKED, "temporal_patch_size": 3},
    "glm4v": PACKED,
    "llava_onevision": {"size": {"height": 48, "width": 40}, "resample": 2, "do_normalize": False},
    "llava_next_video": {"size": {"shortest_edge": 48}, "crop_size": {"height": 64, "width": 56}},
}


def test_every_kind_is_compared():
    assert {id(KINDS[name]) for name in THEIRS} == {id(kind) for kind in KINDS.values()}


@pytest.mark.parametrize("shape", [(4, 96, 128), (5, 133, 217), (3, 400, 300), (3, 60, 70)])
@pytest.mark.parametrize("name", THEIRS)
def test_the_same_numbers(name, shape):
    video = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    known = [{"total_num_frames": shape[0], "fps": 2.0, "frames_indices": list(range(shape[0]))}]
    for settings in ({}, OTHER[name]):
        own = THEIRS[name](**settings)
        expected = own(videos=[video], video_metadata=known, do_sample_frames=False, return_tensors="pt")
        found = FramesProcessor(KINDS[name], lambda own=own: own.to_dict())([video], video_metadata=known)
        bare = FramesProcessor(KINDS[name], lambda settings=settings: settings)([video], video_metadata=known)
        for key in ("pixel_values_videos", "video_grid_thw"):
            assert (key in found) == (key in expected)
            if key in found:
                assert torch.equal(found[key], expected[key])
                assert torch.equal(bare[key], expected[key]), "a default differs"
