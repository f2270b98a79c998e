"""Every pruning method with a budget of a few tokens."""

from __future__ import annotations

from cases import PRUNING

RECIPES = {row.name: row.few.replace(",cache_layer=3", "") for row in PRUNING}
"""Arguments by name. Nothing is forgotten after prefill."""
