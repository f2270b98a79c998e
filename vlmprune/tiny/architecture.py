"""The untrained model and its processor, built from stock Transformers classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from vlmprune.tiny.questions import COLUMNS, COUNTS, ROWS
from vlmprune.tiny.scenes import COLOURS, GRID, PATCH, SHAPES, SIZE

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Model = TypeVar("Model", bound="PreTrainedModel")

VISION_WIDTH = 128
TEXT_WIDTH = 128
TEXT_LAYERS = 8
HEADS = 4

SPECIAL: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_PLURALS = tuple("crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES)
_GRAMMAR = (
    "USER: ASSISTANT: ? is there a an the what colour shape object objects number how many are where or of above below yes no"
)
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys([*_GRAMMAR.split(), *COLOURS, *SHAPES, *_PLURALS, *COLUMNS, *ROWS, *map(str, range(max(10, COUNTS)))])
)
VOCABULARY: dict[str, int] = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_model() -> LlavaForConditionalGeneration:
    """A LLaVA of the checkpoint's shape with Transformers' own random weights (float32)."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        **parts(VOCABULARY),
        image_token_index=VOCABULARY["<image>"],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return finished(LlavaForConditionalGeneration(config))


def parts(vocabulary: dict[str, int]) -> dict[str, Any]:
    """The configs of the vision tower and of the language model, by the names that a LLaVA's config has for them."""
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        tie_word_embeddings=False,
    )
    return {"vision_config": vision, "text_config": text}


def finished(model: Model) -> Model:
    """The model in float32, out of training, which generates with its language model's special tokens."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(model.config.text_config, name))
    return model.float().eval()


def build_tokenizer(vocabulary: dict[str, int], extra: dict[str, str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits numbers into digits; `extra` names further special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True), _split_question_mark()]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=extra,
        padding_side="left",
        model_max_length=1024,
    )


def build_picture_processor() -> CLIPImageProcessorPil:
    """The PIL image processor of the model; needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def build_processor() -> LlavaProcessor:
    """The tokenizer and the image processor of the model; needs no torchvision."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        build_picture_processor(),
        build_tokenizer(VOCABULARY, {"image_token": "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _split_question_mark():
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r"\?"), "isolated")
