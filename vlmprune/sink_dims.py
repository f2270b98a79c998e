"""Dimensions of the residual that massive activations use, as data, by the shape of the text model.

Fine-tuning leaves them where they are, which is why the shape of a known base model is enough; a model of the same shape that
was trained from scratch has others (`vlmprune sinks` finds them, and says so where a known entry is wrong).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmprune.errors import UsageError


@dataclass(frozen=True)
class Known:
    """One base model.

    Attributes:
        model: for people.
        shape: model type, hidden size, layers, key-value heads, MLP width.
        dims: the dimensions.
        energy: share of a residual's energy in one of them that makes a token a sink; the paper's τ = 20 is 400 / hidden size.
        source: where they are from.
        trusted: read in official code or a paper, or measured here; others are named in errors only.
    """

    model: str
    shape: tuple[str, int, int, int, int]
    dims: tuple[int, ...]
    energy: float
    source: str
    trusted: bool = True


_CODE = "constants of VisAttnSink @ 98e62d6, agreeing with massive-activations @ 6521c05"
_READERS = "appendix A.1 of arXiv:2503.03321, as two readers give it"
_TABLE = "a public repository's table, unchecked"
KNOWN = (
    Known("LLaMA-2-7B (LLaVA-1.5-7B)", ("llama", 4096, 32, 32, 11008), (1415, 2533), 400 / 4096, _CODE),
    Known("LLaMA-2-13B (LLaVA-1.5-13B)", ("llama", 5120, 40, 40, 13824), (2100, 4743), 400 / 5120, _CODE),
    Known("Qwen2-VL-7B", ("qwen2_vl_text", 3584, 28, 4, 18944), (458, 2570), 400 / 3584, _READERS),
    Known("SmolLM2-135M", ("llama", 576, 30, 3, 1536), (507,), 0.73, "benchmarks/sinks_smollm2.py"),
    Known("Qwen2-VL-2B", ("qwen2_vl_text", 1536, 28, 2, 8960), (534, 940, 1073), 400 / 1536, _TABLE, trusted=False),
    Known("Qwen2.5-VL-3B", ("qwen2_5_vl_text", 2048, 36, 2, 11008), (318, 1819, 1874), 400 / 2048, _TABLE, trusted=False),
    Known("Qwen2.5-VL-7B", ("qwen2_5_vl_text", 3584, 28, 4, 18944), (458, 2570), 400 / 3584, _TABLE, trusted=False),
)


def shape_of(text_config: Any) -> tuple[str, int, int, int, int]:
    """What entries are found by."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")
    return tuple(getattr(text_config, name, None) for name in names)  # type: ignore[return-value]


def known_sinks(text_config: Any) -> Known:
    """What is known of a model.

    Raises:
        UsageError: they are not known; says how to find them.
    """
    entries = [known for known in KNOWN if known.shape == shape_of(text_config)]
    for known in entries:
        if known.trusted:
            return known
    kind, size, layers, *_ = shape_of(text_config)
    rumour = "".join(f"; {known.source}, says {'|'.join(map(str, known.dims))} for {known.model}" for known in entries)
    raise UsageError(
        f"var: the sink dimensions of this text model ({kind}, {layers} layers, dim {size}) are not known{rumour}: find them "
        "with `vlmprune sinks --model …` and pass sink_dims=…, or pass sink_dims=cosine, which needs none."
    )
