"""Folders with a small model and its processor, random weights, as `save_pretrained` leaves them: what a user points at."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AddedToken,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vlmprune import tiny

SIDE, PATCH = 48, 8
PINPOINTS = [[48, 96], [96, 48], [96, 96]]
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
)


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )


def _text(words: int, layers: int = 4) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _processor():
    return AutoProcessor.from_pretrained(tiny.CHECKPOINT, local_files_only=True)


def llava(folder: Path, layers: int = 4) -> Path:
    """LLaVA-1.5 with the embedded model's processor, which makes 144 tokens of 96 × 96 pixels."""
    processor = _processor()
    vision = _vision()
    vision.image_size = 96
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text(len(processor.tokenizer), layers),
        image_token_id=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=144,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_next(folder: Path, layers: int = 4) -> Path:
    """LLaVA-NeXT: a base view of 36 tokens and up to four crops."""
    base = _processor()
    config = LlavaNextConfig(
        vision_config=_vision(),
        text_config=_text(len(base.tokenizer), layers),
        image_token_id=base.tokenizer.convert_tokens_to_ids(base.image_token),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=36,
    )
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=base.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=base.image_token,
        chat_template=base.chat_template,
    ).save_pretrained(folder)
    return folder


def qwen2_5_vl(folder: Path, layers: int = 4) -> Path:
    """Qwen2.5-VL, with the files of a published repository: its processor is to have a part for videos."""
    base = _processor().tokenizer  # its words, not its special names, of which Qwen has others
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, pad_token="<pad>", unk_token="<unk>")
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    tokenizer.chat_template = QWEN_TEMPLATE
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 32,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 32 * 32,
        "max_pixels": 128 * 128,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def llava_onevision(folder: Path, layers: int = 4) -> Path:
    """LLaVA-OneVision: frames of 6 × 6 patches, of which 3 × 3 tokens are left."""
    base = _processor()
    base.tokenizer.add_tokens([AddedToken("<video>", special=True)])
    tokenizer = base.tokenizer
    image, video = tokenizer.convert_tokens_to_ids([base.image_token, "<video>"])
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(len(tokenizer), layers),
        image_token_id=image,
        video_token_id=video,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    parts = {
        "image_processor": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": size,
            "image_grid_pinpoints": PINPOINTS,
        },
        "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size},
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (SIDE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "image_token": base.image_token,
        "video_token": "<video>",
    }
    (folder / "processor_config.json").write_text(json.dumps(parts))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}<{{ part['type'] }}> {% endif %}{% endfor %}{% endfor %}"
    )
    return folder


FOLDERS = {"llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl}

OF_VIDEOS = {"qwen2_5_vl": qwen2_5_vl, "llava_onevision": llava_onevision}
