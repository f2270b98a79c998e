"""What the comparisons of methods with their papers' loops share: views, and what a method chose."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from methods.views import alone, replaced

import vlmprune as vp
from vlmprune.view import View

SIZES = [(0, 20, 7, (5, 3, 1)), (1, 37, 12, (9, 2, 4)), (2, 49, 30, (3, 3, 3)), (3, 16, 1, (1, 6, 2)), (4, 25, 24, (2, 1, 12))]


def select(method: vp.Pruner, see: View, keep: int) -> tuple[list[list[int]], torch.Tensor | None]:
    """Kept indices of every picture, and merged features."""
    chosen = method.select(see, keep)
    if isinstance(chosen, vp.Choice):
        return [row.tolist() for row in chosen.index], chosen.features
    return chosen.tolist(), None


def pictures(see: View) -> list[SimpleNamespace]:
    """Each picture's probes without the axis of pictures and without padding; `project` and `identity` as they are."""
    found = []
    for image in range(see.images):
        own = alone(see, image)
        probes = {k: v if k == "project" else v[0] for k, v in own.probes.items()}
        found.append(SimpleNamespace(**probes))
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


def quantised(see: View, steps: int = 8) -> View:
    """Attention in eighths: many exact ties, in fp32 as in float64."""
    attention = {k: (v * steps).round() / steps for k, v in see.probes.items() if k.startswith("attention")}
    return replaced(see, **attention)


def hots(*shape: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Unit vectors along a few axes, with many duplicates: cosines are exactly 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    return torch.eye(width)[torch.randint(0, width // 2, shape, generator=draw)]


def unit_vectors(*degrees: float) -> torch.Tensor:
    radians = [math.radians(angle) for angle in degrees]
    return torch.tensor([[math.cos(r), math.sin(r)] for r in radians], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sizes = pytest.mark.parametrize(("seed", "visual", "keep", "text"), SIZES, ids=[f"{v}-{k}" for _, v, k, _ in SIZES])
