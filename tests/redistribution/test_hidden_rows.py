"""A row that the mask hides as a whole is left alone, and does not keep its neighbours from running. (Qwen-VL itself cannot
number the positions of such a row.)"""

import pytest
import torch
from gradients import EDITING
from tiny_models import build, make_inputs, make_single

import vlmprune as vp

ROWS = [["text3", "image", "text4"], ["text3", "image", "text4"], ["text9"]]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("hidden", [[1], [2], [1, 2], [0, 2]])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_beside_hidden_ones_equal_themselves_alone(hidden, cached):
    model = build("llava")
    inputs = make_inputs("llava", model, ROWS)
    inputs["attention_mask"][hidden] = 0
    seen = next(row for row in range(3) if row not in hidden)
    alone = make_single("llava", model, ROWS, seen)
    real = inputs["attention_mask"][seen].bool()
    for name, recipe in EDITING.items():
        with vp.wrap(model, recipe):
            found, wanted = model(**inputs, use_cache=cached).logits[seen][real], model(**alone, use_cache=cached).logits[0]
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_vhr_runs_where_every_row_is_hidden():
    model = build("llava")
    inputs = make_inputs("llava", model, ROWS)
    inputs["attention_mask"][:] = 0
    plain = model(**inputs).logits
    with vp.wrap(model, "vhr:layers=2"):
        torch.testing.assert_close(model(**inputs).logits, plain, equal_nan=True, atol=5e-5, rtol=0)


@pytest.mark.parametrize("hides", [True, False])
def test_a_picture_without_words_is_still_refused_by_vhr(hides):
    model = build("llava")
    inputs = make_inputs("llava", model, [["text3", "image", "text4"], ["image", "text4"] if hides else ["image"]])
    words = inputs["input_ids"][1] > 4
    inputs["attention_mask"][1][words] = 0
    told = "row 1 has no text that the mask does not hide" if hides else "row 1 has no text"
    with vp.wrap(model, "vhr:layers=2"), pytest.raises(vp.UsageError, match=told):
        model(**inputs)
