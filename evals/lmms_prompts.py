"""From the messages of a benchmark to the whole prompt of one question, by the processor's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from PIL import Image

from vlmprune.errors import UsageError, first_line
from vlmprune.loading.pictures import open_picture

Message = Mapping[str, Any]
"""`{"role": …, "content": text}`, or parts instead of a text: `{"type": "text", "text": …}`, `{"type": "image", "url": …}`."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One whole prompt.

    Attributes:
        text: by the chat template.
        images: its pictures, RGB, in the order of the prompt.
        where: the document, for errors.
    """

    text: str
    images: tuple[Image.Image, ...]
    where: str

    def digest(self, *also: object) -> str:
        """A hash of the text and of all pixels, and of what else decides the answer."""
        whole = sha256(repr((self.text, *also)).encode())
        for image in self.images:
            whole.update(repr(image.size).encode() + image.tobytes())
        return whole.hexdigest()


def make_prompt(processor: Any, messages: Sequence[Message], system: str = "", where: str = "") -> Prompt:
    """The prompt of a conversation.

    A text that contains the processor's image token as often as its message has pictures gets its pictures there.

    Args:
        processor: the model's.
        messages: the conversation.
        system: a system text to begin with; replaces one of the conversation.
        where: the document, for errors.

    Raises:
        UsageError: pictures and image tokens do not match, a picture cannot be read, there is a video or a sound, or the chat
            template fails; says in which document.
    """
    if system:
        own = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *own]
    images: list[Image.Image] = []
    turns = [{"role": message["role"], "content": _parts(processor, message, images, where)} for message in messages]
    text = render(processor, turns, where)
    token = getattr(processor, "image_token", None)
    if token and text.count(token) != len(images):
        raise UsageError(
            f"{where}: the chat template places {text.count(token)} pictures instead of {len(images)}: the model cannot be "
            "asked this."
        )
    return Prompt(text, tuple(images), where)


def render(processor: Any, turns: Sequence[Message], where: str = "") -> str:
    """The text of a conversation by the chat template, ready for an answer.

    Raises:
        UsageError: there is no template, or it fails.
    """
    import jinja2

    if getattr(processor, "chat_template", None) is None:
        raise UsageError(
            "the processor has no chat template: save the one of the model's authors (chat_template.jinja) beside it."
        )
    try:
        return processor.apply_chat_template(list(turns), add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"{where or 'a conversation'}: the processor's chat template fails ({first_line(error)}).") from error


def check_system(processor: Any, system: str) -> None:
    """Refuse a system text that the chat template would leave out, or write as words of the assistant.

    Raises:
        UsageError: it would.
    """
    user = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    text = {"content": [{"type": "text", "text": system}]}
    advice = "put it into the questions (pre_prompt of the task) instead"
    written = render(processor, [{"role": "system", **text}, user], "the system text")
    if system not in written:
        raise UsageError(f"the chat template leaves a system text out: {advice}.")
    try:
        as_assistant = render(processor, [{"role": "assistant", **text}, user])
    except UsageError:
        return  # a conversation that begins with the assistant is refused: the template has its own way for a system text
    if written == as_assistant:
        raise UsageError(f"the chat template has no system role, and writes the text as words of the assistant: {advice}.")


def simple_messages(text: str, visuals: Sequence[Any] | None) -> list[Message]:
    """The conversation of a question with its pictures before it, as a simple class of lmms-eval gets it."""
    pictures = [{"type": "image", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _parts(processor: Any, message: Message, images: list[Image.Image], where: str) -> list[dict[str, str]]:
    """The content of a message without its pictures, which are appended to `images`."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if others := sorted({part["type"] for part in content} - {"text", "image"}):
        raise UsageError(f"{where}: it has {' and '.join(others)} beside text, and vlmprune takes pictures only.")
    found = [part["url"] for part in content if part["type"] == "image"]
    images += [_picture(image, where) for image in found]
    parts = [{"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in content]
    token = getattr(processor, "image_token", None)
    written = sum(part.get("text", "").count(token) for part in parts) if token else 0
    if not written:
        return parts
    if written != len(found):
        raise UsageError(
            f"{where}: its text has {written} {token}, which stands for a picture, and there are {len(found)} pictures: change "
            "the text."
        )
    return _placed(parts, str(token))


def _placed(parts: Sequence[Mapping[str, str]], token: str) -> list[dict[str, str]]:
    """The text split at its image tokens, with a picture for each of them."""
    placed: list[dict[str, str]] = []
    for part in parts:
        for number, piece in enumerate(part.get("text", "").split(token)):
            placed += [{"type": "image"}] if number else []
            placed += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return placed


def _picture(image: Any, where: str) -> Image.Image:
    if isinstance(image, str):
        try:
            return open_picture(image, lambda note: None)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    if not isinstance(image, Image.Image):
        raise UsageError(f"{where}: a picture was expected, found {type(image).__name__}; vlmprune takes pictures only.")
    return image if image.mode == "RGB" else image.convert("RGB")
