"""From a question to the whole prompt, and from prompt and picture to the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError, first_line
from vlmprune.loading.videos import video_arguments

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.loading.videos import Video


def check_prompt(prompt: str) -> None:
    """Refuse an empty prompt.

    Raises:
        UsageError: it is empty.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")


def prompt_text(processor: Any, prompt: str, pictures: int = 1, videos: int = 0) -> str:
    """The whole prompt of a question, by the chat template. A prompt with the image token is whole already.

    Args:
        pictures: how many the question is about; may be 0.
        videos: the same.

    Raises:
        UsageError: it is empty, has another number of image or video tokens, or the template cannot place the pictures or
            videos.
    """
    check_prompt(prompt)
    token, sign = getattr(processor, "image_token", None), getattr(processor, "video_token", None)
    if any(one and one in prompt for one in (token, sign)):
        for one, kind, what, count in ((token, "image", "picture", pictures), (sign, "video", "video", videos)):
            if one and prompt.count(one) != count:
                which = f"the {what}" if count == 1 else f"the {count} {what}s"
                wanted = "one" if count == 1 else str(count)
                raise UsageError(
                    f"{kind} tokens do not match {which}: {prompt.count(one)} {one} for {wanted} {what}"
                    f"{'' if count == 1 else 's'}; write {wanted}."
                )
        return prompt
    advice = f"put {token or '<image>'} into the prompt, and write it whole"
    if getattr(processor, "chat_template", None) is None:
        if not pictures:
            raise UsageError("the processor has no chat template, which a question without a picture needs: set one.")
        raise UsageError(f"the prompt has no image token and the processor no chat template: {advice}.")
    shown = [*({"type": "image"} for _ in range(pictures)), *({"type": "video"} for _ in range(videos))]
    content = [*shown, {"type": "text", "text": prompt}]
    import jinja2

    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"the processor's chat template fails on a picture ({first_line(error)}): {advice}.") from error
    if token and text.count(token) != pictures:
        wanted = "one" if pictures == 1 else str(pictures)
        raise UsageError(f"the processor's chat template places {text.count(token)} pictures instead of {wanted}: {advice}.")
    if videos and not sign:
        raise UsageError("the model reads no videos: its processor has no video token; take one that does.")
    if videos and text.count(sign) != videos:
        raise UsageError(f"the processor's chat template places {text.count(sign)} videos instead of {videos}: write {sign}.")
    return text


def make_inputs(processor: Any, picture: Image.Image | None, text: str, device: Any, video: Video | None = None) -> Any:
    """The inputs of a model for one picture, one video or both, and their whole prompt.

    Raises:
        UsageError: the processor cannot take them; says why.
    """
    seen: dict[str, Any] = {} if picture is None else {"images": picture}
    if video is not None:
        seen |= video_arguments(processor, [video])
    try:
        return processor(text=text, return_tensors="pt", **seen).to(device)
    except (ValueError, TypeError) as error:
        shown = [f"this picture of {picture.width} × {picture.height} pixels"] if picture is not None else []
        if video is not None:
            width, height = video.frames[0].size
            shown.append(f"this video of {len(video)} frames with {width} × {height} pixels")
        raise UsageError(f"the processor cannot take {' and '.join(shown)} and prompt: {first_line(error)}.") from error


def make_batch(
    processor: Any,
    pictures: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    videos: Sequence[Sequence[Any]] = (),
) -> Any:
    """The inputs of a model for several whole prompts, padded on the left.

    Args:
        pictures: of each prompt; either every prompt has some, or none has.
        texts: the prompts.
        videos: those of each prompt, each a `Video` or a list of frames; either every prompt has some, or none has.

    Raises:
        UsageError: the processor cannot pad, or cannot take the pictures or the prompts; says why.
    """
    if len(texts) > 1 and getattr(processor.tokenizer, "pad_token", None) is None:
        raise UsageError(
            "the tokenizer has no padding token, which a batch needs: set processor.tokenizer.pad_token and save the "
            "processor, or ask one question at a time (--batch 1)."
        )
    seen: dict[str, Any] = {"images": [list(own) for own in pictures]} if any(pictures) else {}
    if any(videos):
        seen |= video_arguments(processor, [video for own in videos for video in own])
    try:
        return processor(text=list(texts), padding=True, padding_side="left", return_tensors="pt", **seen)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the processor cannot take these {len(texts)} prompts: {first_line(error)}.") from error


def placeholders(model: Any, inputs: Any) -> list[int]:
    """Of each row of a batch, how many tokens stand for pictures or videos."""
    import torch

    from vlmprune.adapters.registry import family_of

    family = family_of(model.config)
    tokens = [family.image_token(model.config)]
    if family.videos is not None:
        tokens.append(family.videos.token(model.config))
    ids = inputs["input_ids"]
    return torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(dim=1).tolist()
