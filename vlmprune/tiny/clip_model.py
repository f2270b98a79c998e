"""The embedded model for clips: a stock `LlavaNextVideoForConditionalGeneration` and a processor that needs no torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError
from vlmprune.tiny.architecture import CHAT_TEMPLATE, VOCABULARY, build_tokenizer, finished, parts
from vlmprune.tiny.clip_questions import CLIP_WORDS
from vlmprune.tiny.scenes import GRID, PATCH, SIZE

if TYPE_CHECKING:
    from PIL import Image
    from transformers import LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerFast

POOL = 2
"""Patches along each side of a visual token of a clip."""
CELLS = GRID // POOL
"""Visual tokens along each side of a frame; a frame becomes `CELLS * CELLS` visual tokens."""

VIDEO = "<video>"
CLIP_VOCABULARY: dict[str, int] = {
    word: index for index, word in enumerate((*VOCABULARY, VIDEO, *(word for word in CLIP_WORDS if word not in VOCABULARY)))
}
"""The picture model's words with their numbers, then the words of clips."""


CLIP_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% for part in message['content'] if part['type'] == 'text' %}",
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}",
)


def build_clip_model() -> LlavaNextVideoForConditionalGeneration:
    """A LLaVA-NeXT-Video of the checkpoint's shape with Transformers' own random weights (float32)."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        **parts(CLIP_VOCABULARY),
        image_token_index=CLIP_VOCABULARY["<image>"],
        video_token_index=CLIP_VOCABULARY[VIDEO],
        image_grid_pinpoints=[[SIZE, SIZE]],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        spatial_pool_mode="conv",
        spatial_pool_stride=POOL,
        tie_word_embeddings=False,
    )
    return finished(LlavaNextVideoForConditionalGeneration(config))


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The picture model's word-level tokenizer with the words of clips."""
    return build_tokenizer(CLIP_VOCABULARY, {"image_token": "<image>", "video_token": VIDEO})


def save_clip_processor(folder: Path) -> None:
    """Write what the stock `LlavaNextVideoProcessor` reads: tokenizer, chat template, and settings of pictures and frames."""
    build_clip_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CLIP_CHAT_TEMPLATE)
    (folder / "processor_config.json").write_text(json.dumps(_STOCK_PROCESSOR, indent=2) + "\n")


_PIXELS = {
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_STOCK_PROCESSOR = {
    "processor_class": "LlavaNextVideoProcessor",
    "image_processor": {
        **_PIXELS,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[SIZE, SIZE]],
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_pad": True,
    },
    "video_processor": {
        **_PIXELS,
        "video_processor_type": "LlavaNextVideoVideoProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "do_sample_frames": False,
    },
    "image_token": "<image>",
    "video_token": VIDEO,
    "patch_size": PATCH,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}


def clip_prompt(question: str) -> str:
    """The full prompt for a question about one clip."""
    return f"USER: {VIDEO}\n{question} ASSISTANT:"


def build_clip_processor(tokenizer: Any = None) -> Any:
    """A processor that takes clips as lists of frames, `processor(text=…, videos=[frames, …], return_tensors="pt")`.

    The stock `LlavaNextVideoProcessor` needs torchvision; this one makes the same inputs with PIL.

    Args:
        tokenizer: that of a checkpoint; None for a new one.
    """
    import torch
    from transformers import BatchFeature, ProcessorMixin

    from vlmprune.tiny.architecture import build_picture_processor

    class ClipProcessor(ProcessorMixin):
        """Frames through the picture model's image processor, and one `<video>` for every visual token."""

        image_token, video_token = "<image>", VIDEO

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def __call__(
            self, text: str | Sequence[str], videos: Sequence[Sequence[Image.Image]] = (), images: Any = None, **options: Any
        ) -> BatchFeature:
            if images is not None and not (isinstance(images, Sequence) and not images):
                raise UsageError(
                    "the embedded model for clips was never shown pictures, and its processor takes none: show it a video of "
                    "eight frames, or ask the embedded model for pictures, 'tiny'."
                )
            texts = [text] if isinstance(text, str) else list(text)
            if sum(one.count(VIDEO) for one in texts) != len(videos):
                raise ValueError(f"found {sum(one.count(VIDEO) for one in texts)} {VIDEO} for {len(videos)} clips")
            lengths = iter([len(frames) * CELLS * CELLS for frames in videos])
            whole = ["".join(VIDEO * next(lengths) if part == VIDEO else part for part in _split(one)) for one in texts]
            made = dict(self.tokenizer(whole, **options))
            if len({len(frames) for frames in videos}) > 1:
                counts = ", ".join(str(len(frames)) for frames in videos)
                raise ValueError(
                    f"clips of one batch need the same number of frames, found {counts}; ask one at a time (--batch 1)"
                )
            if videos:
                pixels = [self.image_processor(list(frames), return_tensors="pt")["pixel_values"] for frames in videos]
                made["pixel_values_videos"] = torch.stack(pixels)
            return BatchFeature(made)

    return ClipProcessor(build_picture_processor(), tokenizer or build_clip_tokenizer(), CLIP_CHAT_TEMPLATE)


def _split(text: str) -> list[str]:
    """A text in pieces, of which every `<video>` is one."""
    first, *others = text.split(VIDEO)
    return [first, *(piece for other in others for piece in (VIDEO, other))]
