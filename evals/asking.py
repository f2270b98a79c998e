"""The same questions for many recipes: tokenised once, and each image encoded once per recipe, not once per question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.tiny import prompt
from vlmprune.tiny.answers import LONGEST_ANSWER, Record
from vlmprune.tiny.scenes import SPLITS, Scene, make_scene

SCENES_PER_BATCH = 8
"""About 80 questions."""


def scenes_of_seed(seed: int, images: int, split: str = "test") -> list[Scene]:
    """`images` held-out scenes. Other seeds have other scenes; seed 0 has those of `vlmprune eval`."""
    first = SPLITS[split] + seed * images
    return [make_scene(first + number) for number in range(images)]


class Questions:
    """Every question about some scenes, ready to be asked.

    Args:
        processor: the model's.
        scenes: pictures with questions.
        first: number of the first image in the records, so that the images of several seeds can be pooled.
    """

    def __init__(self, processor: Any, scenes: Sequence[Scene], first: int = 0) -> None:
        self._decode: Callable[..., list[str]] = processor.batch_decode
        self.known: list[tuple[int, str, str]] = []  # image, skill and right answer of every question
        self._batches: list[tuple[Any, Tensor, Tensor]] = []  # text, pixels of each image, image of each question
        for start in range(0, len(scenes), SCENES_PER_BATCH):
            group = scenes[start : start + SCENES_PER_BATCH]
            self._batches.append(_batch(processor, group))
            for number, scene in enumerate(group, start=first + start):
                self.known += [(number, question.skill, question.answer) for question in scene.questions]

    def __len__(self) -> int:
        return len(self.known)

    def ask(self, model: Any, after_batch: Callable[[int], None] = lambda questions: None) -> list[str]:
        """The answers of a model, which may be wrapped, by greedy decoding.

        Args:
            model: the model.
            after_batch: called after each batch with its number of questions.
        """
        given: list[str] = []
        for text, pixels, image in self._batches:
            text = text.to(model.device)
            with torch.inference_mode():
                encoded = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype), return_dict=True)
                # Each question gets the features of its image; a method finds by them what it computed in the tower.
                encoded.pooler_output = [encoded.pooler_output[number] for number in image.tolist()]
                tokens = model.generate(
                    **text, mm_encoder_outputs={"image": encoded}, do_sample=False, max_new_tokens=LONGEST_ANSWER
                )
            new = tokens[:, text["input_ids"].shape[1] :]
            given += [answer.strip() for answer in self._decode(new, skip_special_tokens=True)]
            after_batch(len(image))
        return given

    def records(self, given: Sequence[str]) -> list[Record]:
        """The answers with the image, skill and right answer of each question."""
        return [Record(*known, said) for known, said in zip(self.known, given, strict=True)]


def _batch(processor: Any, scenes: Sequence[Scene]) -> tuple[Any, Tensor, Tensor]:
    asked = [(number, question.text) for number, scene in enumerate(scenes) for question in scene.questions]
    inputs = processor(
        images=[scenes[number].image for number, _ in asked],
        text=[prompt(text) for _, text in asked],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    image = torch.tensor([number for number, _ in asked])
    first = [image.tolist().index(number) for number in range(len(scenes))]
    return inputs, inputs.pop("pixel_values")[first], image
