"""The example of docs/image_towers.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

import vlmprune as vp

PAGE = Path(vp.__file__).resolve().parent.parent / "docs/image_towers.md"


def test_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert code.count('pretrained="laion2b_s34b_b88k"') == 1
    without_network = code.replace('pretrained="laion2b_s34b_b88k"', "pretrained=None, load_weights=False")
    space = {"picture": Image.effect_noise((300, 200), 80).convert("RGB")}
    with torch.no_grad():
        exec(compile(without_network, str(PAGE), "exec"), space)
    assert "49 of 196" in capsys.readouterr().out
    assert space["features"].shape == (1, 512)
