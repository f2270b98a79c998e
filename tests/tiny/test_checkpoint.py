"""The shipped checkpoint is small, loads without network, and answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vlmprune.tiny import CHECKPOINT, load, prompt
from vlmprune.tiny.answers import Record, accuracy, accuracy_by_skill, answer, mean_over_skills
from vlmprune.tiny.evaluate import records, shifted
from vlmprune.tiny.scenes import GRID, held_out, make_scene


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def scenes():
    return list(held_out(40, "dev"))


def test_it_fits_into_the_repository() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 15_000_000
    assert (CHECKPOINT / "PROVENANCE.json").exists()


def test_it_loads_offline_without_torchvision_or_training_code() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import vlmprune.tiny\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "model, processor = vlmprune.tiny.load()\n"
        "assert not any(name.startswith('vlmprune.tiny.train') for name in sys.modules)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=offline, timeout=120)


def test_it_is_a_stock_llava(loaded) -> None:
    model, processor = loaded
    assert type(model).__module__.startswith("transformers.models.llava")
    scene = make_scene(3)
    text = scene.questions[0].text
    inputs = processor(images=scene.image, text=prompt(text), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == GRID * GRID
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == prompt(text)


def test_every_word_of_every_question_is_known(loaded, scenes) -> None:
    tokenizer = loaded[1].tokenizer
    for scene in scenes:
        for question in scene.questions:
            assert tokenizer.unk_token_id not in tokenizer(f"{question.text} {question.answer}")["input_ids"]


def test_it_answers_well_above_chance_also_when_the_picture_moves(loaded, scenes) -> None:
    for shift in (0, 1):
        reached = accuracy_by_skill(records(*loaded, scenes, shift))
        assert mean_over_skills(reached) > 0.8
        for skill in ("existence", "colour", "shape", "reading"):
            assert reached[skill].value > 0.85, (skill, shift)


def test_batching_and_padding_do_not_change_answers(loaded, scenes) -> None:
    pairs = [(scene.image, question.text) for scene in scenes[:3] for question in scene.questions]
    assert answer(*loaded, pairs, batch_size=1) == answer(*loaded, pairs, batch_size=16)


def test_shifting_moves_the_picture() -> None:
    picture = make_scene(5).image
    assert shifted(picture, 0) is picture
    assert shifted(picture, 1).getpixel((11, 21)) == picture.getpixel((10, 20))


def test_intervals_resample_pictures_not_questions() -> None:
    together = [Record(image, "colour", "red", "red" if image % 2 else "blue") for image in range(20) for _ in range(10)]
    apart = [Record(index, *vars_of) for index, vars_of in enumerate((r.skill, r.expected, r.given) for r in together)]
    wide, narrow = accuracy(together), accuracy(apart)
    assert wide.value == narrow.value == 0.5
    assert wide.n == narrow.n == 200
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert accuracy(together) == accuracy(together)


def test_the_model_runs_in_bfloat16(scenes) -> None:
    model, processor = load(dtype=torch.bfloat16)
    question = scenes[0].questions[0]
    assert answer(model, processor, [(scenes[0].image, question.text)])[0]
