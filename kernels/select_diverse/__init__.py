"""Greedy max-min diverse subset of the tokens of each picture."""

from vlmprune.kernels.select_diverse.reference import greedy_order, select_diverse

__all__ = ["greedy_order", "select_diverse"]
