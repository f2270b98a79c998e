"""From a question to the whole prompt, and from prompt and picture to the inputs of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError, first_line

if TYPE_CHECKING:
    from PIL import Image


def check_prompt(prompt: str) -> None:
    """Refuse an empty prompt.

    Raises:
        UsageError: it is empty.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")


def prompt_text(processor: Any, prompt: str) -> str:
    """The whole prompt of a question about one picture, by the chat template. A prompt with the image token is whole already.

    Raises:
        UsageError: it is empty, has several image tokens, or the template cannot place a picture.
    """
    check_prompt(prompt)
    token = getattr(processor, "image_token", None)
    if token and token in prompt:
        if prompt.count(token) != 1:
            raise UsageError(
                f"image tokens do not match the picture: {prompt.count(token)} {token} for one picture; write one."
            )
        return prompt
    advice = f"put {token or '<image>'} into the prompt, and write it whole"
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(f"the prompt has no image token and the processor no chat template: {advice}.")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    import jinja2

    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"the processor's chat template fails on a picture ({first_line(error)}): {advice}.") from error
    if token and text.count(token) != 1:
        raise UsageError(f"the processor's chat template places {text.count(token)} pictures instead of one: {advice}.")
    return text


def make_inputs(processor: Any, picture: Image.Image, text: str, device: Any) -> Any:
    """The inputs of a model for one picture and its whole prompt.

    Raises:
        UsageError: the processor cannot take the picture or the prompt; says why.
    """
    try:
        return processor(images=picture, text=text, return_tensors="pt").to(device)
    except (ValueError, TypeError) as error:
        size = f"{picture.width} × {picture.height} pixels"
        raise UsageError(f"the processor cannot take this picture of {size} and prompt: {first_line(error)}.") from error
