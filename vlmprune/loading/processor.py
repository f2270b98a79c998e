"""Load the processor of a model, and check that the two belong together."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.loading.config import IMAGE_PART
from vlmprune.loading.frames import KINDS, FramesProcessor
from vlmprune.loading.source import Source

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_processor(source: Source, config: Any) -> Any:
    """The processor. Where torchvision is missing, its part for videos, which needs it, is ours (`loading.frames`), or is left
    out.

    Raises:
        UsageError: there is none, a part of it is missing or broken, or it belongs to another model.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

    if absent := [names[0] for names in (IMAGE_PART, TOKENIZER) if not source.files & set(names)]:
        lacks = " and ".join(absent)
        raise source.lacking(lacks, source.without_processor(f"it lacks {lacks}"))
    reader: Any = AutoProcessor
    if find_spec("torchvision") is None:
        if PROCESSOR_MAPPING_NAMES.get(config.model_type) == "PixtralProcessor":
            from vlmprune.loading.pixtral import PixtralProcessor

            reader = PixtralProcessor
        else:
            usual: Any = PROCESSOR_MAPPING.get(type(config), None)
            if usual is not None and "video_processor" in usual.get_attributes():
                reader = _for_images(usual)
    processor = source.load("processor", lambda: reader.from_pretrained(source.place, **source.options))
    _check_fits(source, processor, config)
    if reader is not AutoProcessor and (kind := KINDS.get(config.model_type)) is not None:
        processor.video_processor = FramesProcessor(kind, partial(_video_settings, source))
    return processor


def _video_settings(source: Source) -> dict[str, Any]:
    """What the files of a model say about its video processor."""
    from transformers.video_processing_utils import VideoProcessorMixin

    read = VideoProcessorMixin.get_video_processor_dict
    found: dict[str, Any] = source.load("video processor", lambda: read(source.place, **source.options)[0])
    return found


def _check_fits(source: Source, processor: Any, config: Any) -> None:
    """Refuse a processor without its parts, or one that writes another image token than the model reads."""
    from vlmprune.adapters.registry import family_of

    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise source.without_processor(f"found only {type(processor).__name__}")
    token, wanted_id = processor.image_token, family_of(config).image_token(config)
    found_id = processor.tokenizer.convert_tokens_to_ids(token)
    # Of some families the token in a prompt stands for others that the processor puts there (Gemma 3, Aya Vision).
    others = (getattr(processor, "img_patch_token", None), getattr(processor.tokenizer, "image_token", None))
    ids = {found_id, *(processor.tokenizer.convert_tokens_to_ids(other) for other in others if other is not None)}
    if wanted_id not in ids:
        raise UsageError(
            f"the processor and the model of {source.name!r} do not belong together: {token} is token {found_id} in the "
            f"processor, and {wanted_id} in config.json; save the base model's processor into the same folder."
        )
    if getattr(processor, "patch_size", 0) is None:
        raise UsageError(
            f"the processor of {source.name!r} has no patch_size (an old transformers saved it): set processor.patch_size = "
            f"{getattr(config.vision_config, 'patch_size', 14)} and save it again."
        )


def _for_images(processor: Any) -> Any:
    """The class of a processor, without its part for videos."""
    from transformers import ProcessorMixin

    class WithoutVideos(ProcessorMixin):
        """Comes after the processor itself in the order of its classes, and is given the parts that it takes."""

        def __init__(self, *parts: Any, **settings: Any) -> None:
            settings.pop("video_processor", None)
            super().__init__(*[part for part in parts if part is not None], **settings)

    class ForImages(processor, WithoutVideos):
        lacks_torchvision = True
        apply_chat_template = ProcessorMixin.apply_chat_template  # a processor has one of its own for the sake of videos

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def to_dict(self) -> dict[str, Any]:
            return {key: value for key, value in super().to_dict().items() if key != "video_processor"}

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            parts = dict(zip(cls.get_attributes(), args, strict=True))
            return super().from_args_and_dict([], processor_dict, **parts, video_processor=None, **kwargs)

    ForImages.__name__ = ForImages.__qualname__ = processor.__name__  # saved folders name the class
    return ForImages
