"""Attention that chosen query rows pay to every key, without the other rows: no n×n map is ever built."""

from vlmprune.kernels.attention_mass.reference import attention_mass, attention_rows

__all__ = ["attention_mass", "attention_rows"]
