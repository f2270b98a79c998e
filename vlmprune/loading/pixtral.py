"""The processor of Mistral 3 without torchvision: transformers' own cannot be imported without it, though its tokenizer and its
image processor can. It writes what theirs writes: a placeholder for each square of patches, a break after each row of them."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """Tokenizer and image processor.

    Args:
        image_processor, tokenizer: its parts.
        patch_size: pixels on a side of a patch of the tower.
        spatial_merge_size: patches on a side of the square that becomes a token.
        chat_template: as in the tokenizer, where it is saved apart.
        image_token, image_break_token, image_end_token: a token, the end of a row of them, and the end of the last row.
        kwargs: entries of a saved processor that mean nothing for pictures.
    """

    text_kwargs = {"return_tensors": "pt"}  # noqa: RUF012
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = image_token, image_break_token, image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @property
    def _side(self) -> int:
        """Pixels on a side of a token."""
        return self.patch_size * self.spatial_merge_size

    def _process_images(self, images: Any, **images_kwargs: Any) -> Any:
        return super()._process_images(images, **{**images_kwargs, "patch_size": self._side})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of one `image_token`."""
        height, width = (int(length) for length in image_inputs["image_sizes"][image_idx])
        row = self.image_token * (width // self._side)
        return self.image_break_token.join([row] * (height // self._side)) + self.image_end_token
