"""Dimensions of the residual that massive activations use, as data, by what the text model's config tells of its base model.

Fine-tuning leaves them where they are, so that the base model is enough: its shape, and what else tells it from others of that
shape (LLaMA-1 and CodeLlama have LLaMA-2's). A config cannot tell more: a model of the same config that was trained from
scratch has other dimensions, and is taken for the known one. `vlmprune sinks` looks at the weights, and says where an entry is
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isclose
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
        facts: what else the config says, by name as in `fact`.
    """

    model: str
    shape: tuple[str, int, int, int, int]
    dims: tuple[int, ...]
    energy: float
    source: str
    trusted: bool = True
    facts: Mapping[str, float] = field(default_factory=dict)


_LLAMA_2 = {"rope_theta": 1e4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_QWEN_2 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
_CODE = "constants of VisAttnSink @ 98e62d6, agreeing with massive-activations @ 6521c05"
_READERS = "appendix A.1 of arXiv:2503.03321, as two readers give it"
_TABLE = "a public repository's table, unchecked"
KNOWN = (
    Known("LLaMA-2-7B (LLaVA-1.5-7B)", ("llama", 4096, 32, 32, 11008), (1415, 2533), 400 / 4096, _CODE, facts=_LLAMA_2),
    Known("LLaMA-2-13B (LLaVA-1.5-13B)", ("llama", 5120, 40, 40, 13824), (2100, 4743), 400 / 5120, _CODE, facts=_LLAMA_2),
    Known("Qwen2-VL-7B", ("qwen2_vl_text", 3584, 28, 4, 18944), (458, 2570), 400 / 3584, _READERS, facts=_QWEN_2),
    Known(
        "SmolLM2-135M",
        ("llama", 576, 30, 3, 1536),
        (507,),
        0.70,
        "benchmarks/sinks_smollm2.py",
        facts={"rope_theta": 1e5, "rms_norm_eps": 1e-5},
    ),
    Known("Qwen2-VL-2B", ("qwen2_vl_text", 1536, 28, 2, 8960), (534, 940, 1073), 400 / 1536, _TABLE, trusted=False),
    Known("Qwen2.5-VL-3B", ("qwen2_5_vl_text", 2048, 36, 2, 11008), (318, 1819, 1874), 400 / 2048, _TABLE, trusted=False),
    Known("Qwen2.5-VL-7B", ("qwen2_5_vl_text", 3584, 28, 4, 18944), (458, 2570), 400 / 3584, _TABLE, trusted=False),
)


def shape_of(text_config: Any) -> tuple[str, int, int, int, int]:
    """What entries are found by."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")
    return tuple(getattr(text_config, name, None) for name in names)  # type: ignore[return-value]


def fact(text_config: Any, name: str) -> float | None:
    """A number of a config; transformers keeps the base of rotary embeddings among their parameters."""
    value = getattr(text_config, name, None)
    return (getattr(text_config, "rope_parameters", None) or {}).get(name) if value is None else value


def differing(known: Known, text_config: Any) -> list[str]:
    """Names of the entry's facts that the config contradicts. Files may hold numbers in fp32."""
    values = {name: fact(text_config, name) for name in known.facts}
    return [name for name, x in known.facts.items() if (found := values[name]) is None or not isclose(found, x, rel_tol=1e-6)]


def entries_of(text_config: Any) -> list[Known]:
    """Entries of the model's shape and facts, trusted or not."""
    return [known for known in KNOWN if known.shape == shape_of(text_config) and not differing(known, text_config)]


def known_or_none(text_config: Any) -> Known | None:
    """The trusted entry of a model, if there is one."""
    return next((known for known in entries_of(text_config) if known.trusted), None)


def known_sinks(text_config: Any) -> Known:
    """What is known of a model.

    Raises:
        UsageError: they are not known; says how to find them.
    """
    if (found := known_or_none(text_config)) is not None:
        return found
    kind, size, layers, *_ = shape_of(text_config)
    told = "".join(
        f"; {known.source}, says {'|'.join(map(str, known.dims))} for {known.model}" for known in entries_of(text_config)
    )
    for known in KNOWN:
        other = differing(known, text_config)
        if known.shape == shape_of(text_config) and other:
            differs = " and ".join(f"{name}={fact(text_config, name)}, there {known.facts[name]:g}" for name in other)
            told += f"; it has the shape of {known.model}, but {differs}"
    raise UsageError(
        f"var: the sink dimensions of this text model ({kind}, {layers} layers, dim {size}) are not known{told}: find them "
        "with `vlmprune sinks --model …` and pass the sink_dims=…,sink_energy=… that it prints, or pass sink_dims=cosine, "
        "which needs none."
    )
