"""Cache layers that store keys and values quantised: pruned, they store fewer tokens in the same way.

What such a layer does with the entries it is given stays transformers' own, whatever its backend. Which tokens they stand for
is recorded as in any other pruned layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers.cache_utils import DynamicLayer, QuantizedLayer

from vlmprune.errors import UsageError

QUANTISED: Any = next(base for base in reversed(QuantizedLayer.__mro__) if hasattr(base, "_quantize"))
"""What all of them are; transformers 5.22 put a class above `QuantizedLayer`, for one that stores eight bits."""


def taken_over(base: type, layer: DynamicLayer) -> Any:
    """A pruned layer `base` with the settings and entries of a quantised one."""
    kind = _joined(base, type(layer))
    made: Any = object.__new__(kind)
    made.__dict__.update(layer.__dict__)
    return made


def stored_in(layer: Any) -> int:
    """Entries per row of any growing layer; for one of a fixed length, all its places."""
    if isinstance(layer, QUANTISED):
        return int(layer.cumulative_length)
    return 0 if layer.keys is None or layer.keys.numel() == 0 else int(layer.keys.shape[-2])


@cache
def _joined(base: type, kind: type) -> type:
    """A pruned layer `base` that stores as `kind` does."""
    return type(f"{base.__name__}Of{kind.__name__}", (base, kind), {"crop": _crop})


def _crop(self: Any, tokens_to_remove: int) -> None:
    """Refuse to remove tokens.

    Raises:
        UsageError: always, but for none.
    """
    if tokens_to_remove:
        raise UsageError(
            f"cannot crop {abs(tokens_to_remove)} tokens: transformers takes no tokens out of a quantised cache; leave "
            'cache_implementation="quantized" out where tokens are taken back, as in assisted decoding.'
        )
