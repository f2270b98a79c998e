"""Vision-language models small enough for a repository and a CPU, with the scenes and clips they were trained on.

The model is an ordinary `LlavaForConditionalGeneration` with about three million parameters. `python -m vlmprune.tiny.train`
trained it from scratch on drawn scenes. It answers questions in seven skills well enough that lost visual tokens cost accuracy.
So it is a test-bed for pruning that needs no download. `load_for_clips` gives a second one, which reads clips of eight frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        LlavaProcessor,
        ProcessorMixin,
    )

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained weights (bfloat16), tokenizer and processor that come with the package."""

CLIPS_CHECKPOINT = Path(__file__).parent / "clips_checkpoint"
"""The same for the model that reads clips of eight frames."""

__all__ = ["CHECKPOINT", "CLIPS_CHECKPOINT", "load", "load_for_clips", "prompt"]


def prompt(question: str) -> str:
    """The full prompt for a question about one picture."""
    return f"USER: <image>\n{question} ASSISTANT:"


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, checkpoint: str | Path = CHECKPOINT, **kwargs: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the tiny model and its processor from disk, without network and without torchvision.

    Args:
        device: where the model goes.
        dtype: float32 if None. The weights are stored in bfloat16, but a CPU computes faster and more accurately in float32.
        checkpoint: folder of the weights.
        kwargs: further arguments of `from_pretrained`, for example `attn_implementation="eager"`.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32 if dtype is None else dtype, local_files_only=True, **kwargs
    )
    model.to(device)  # type: ignore[arg-type]  # Transformers wraps Module.to without its signature
    return model.eval(), AutoProcessor.from_pretrained(checkpoint, local_files_only=True)


def load_for_clips(
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint: str | Path = CLIPS_CHECKPOINT,
    **kwargs: Any,
) -> tuple[LlavaNextVideoForConditionalGeneration, ProcessorMixin]:
    """Load the tiny model for clips and a processor for lists of frames, without network and without torchvision.

    Args:
        device, dtype, kwargs: as in `load`.
        checkpoint: folder of the weights.
    """
    import torch
    from transformers import AutoTokenizer, LlavaNextVideoForConditionalGeneration

    from vlmprune.tiny.clip_model import build_clip_processor

    model = LlavaNextVideoForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32 if dtype is None else dtype, local_files_only=True, **kwargs
    )
    model.to(device)  # type: ignore[arg-type]  # Transformers wraps Module.to without its signature
    return model.eval(), build_clip_processor(AutoTokenizer.from_pretrained(checkpoint, local_files_only=True))
