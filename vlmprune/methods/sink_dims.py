"""Dimensions of the residual in which massive activations occur, as data, found by the language model's config.

Fine-tuning does not move them, so it is enough to recognise the base model: by its shape, and by further numbers where several
base models have one shape (LLaMA-1 and CodeLlama have LLaMA-2's). A config cannot tell apart a model with the same config that
was trained from scratch: that one has other dimensions, but is taken for the known one. `vlmprune sinks` looks at the weights,
and reports an entry that is wrong.
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
        model: name of the model, for reports.
        shape: model type, hidden size, layers, key-value heads, MLP width.
        dims: the dimensions.
        energy: share of a residual's energy in one of them from which a token is a sink; τ = 20 is 400 / hidden size.
        source: where the dimensions are published.
        trusted: True if they are from official code, from a paper, or measured here; others only appear in error sentences.
        facts: further numbers of the config by name, see `fact`.
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
_READERS = "appendix A.1 of arXiv:2503.03321, quoted at second hand"
_TABLE = "a table of unknown origin, unchecked"
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
    """The numbers by which entries are found."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")
    return tuple(_number(text_config, name) for name in names)


def _number(text_config: Any, name: str) -> Any:
    """A number of a config; None if there is none, or if it differs between layers, for which transformers has an error."""
    try:
        return getattr(text_config, name, None)
    except RuntimeError:
        return None


def fact(text_config: Any, name: str) -> float | None:
    """A number in a config; transformers keeps the base of rotary embeddings in `rope_parameters`."""
    value = getattr(text_config, name, None)
    return (getattr(text_config, "rope_parameters", None) or {}).get(name) if value is None else value


def differing(known: Known, text_config: Any) -> list[str]:
    """Names of the entry's facts that the config contradicts. Numbers in a file may be rounded to fp32."""
    values = {name: fact(text_config, name) for name in known.facts}
    return [name for name, x in known.facts.items() if (found := values[name]) is None or not isclose(found, x, rel_tol=1e-6)]


def entries_of(text_config: Any) -> list[Known]:
    """Entries with the model's shape and facts, trusted or not."""
    return [known for known in KNOWN if known.shape == shape_of(text_config) and not differing(known, text_config)]


def known_or_none(text_config: Any) -> Known | None:
    """The trusted entry of a model, if there is one."""
    return next((known for known in entries_of(text_config) if known.trusted), None)


def known_sinks(text_config: Any) -> Known:
    """The trusted entry of a model.

    Raises:
        UsageError: there is none; says how to find the dimensions.
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


def sinks_for(
    text_config: Any, size: int, given: tuple[int, ...] | None, tau: float | None
) -> tuple[tuple[int, ...], float | None]:
    """Sink dimensions to use in a model, and the share of energy that is known for them, or None.

    Args:
        text_config: the language model's config.
        size: its hidden size.
        given: dimensions that the user chose; None for the known ones.
        tau: threshold on φ that the user chose, or None.

    Raises:
        UsageError: the dimensions are not known, the model has fewer, or the threshold cannot be reached.
    """
    dims, energy = given, None
    if dims is None:
        known = known_sinks(text_config)
        dims, energy = known.dims, known.energy
    elif (here := known_or_none(text_config)) is not None and set(dims) <= set(here.dims):
        energy = here.energy
    if max(dims) >= size:
        raise UsageError(f"var: sink_dims has {max(dims)}, but the model has dimensions 0 to {size - 1}.")
    if tau is not None and tau >= size**0.5:
        raise UsageError(
            f"var: tau={tau:g} is never reached: in a residual of {size} numbers φ stays below √{size} = {size**0.5:.1f}."
        )
    return dims, energy
