"""What `gpu.py` measures of every kernel: whether its numbers are those of the reference, and its time against the machine's
limits.

A kernel is right by the rule that tests/kernels/rule.py derives: compared with the reference in fp64, its error is at most
twice that of the reference in the inputs' precision, plus a few roundings. Where probabilities are rounded to 16 bits before
they are multiplied by the values, as in eager attention, half a unit in the last place of every term is added, as in
tests/kernels/test_grouped_attention.py. Fresh memory is full of NaN, and so is the memory around the inputs. A selection is
judged by the value of its picks in fp64, because rounding decides between equal tokens.
"""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_apart import in_a_line
from torch import Tensor
from torch.nn.functional import normalize

import vlmprune
from vlmprune.kernels.attention_mass import attention_mass, attention_rows
from vlmprune.kernels.attention_mass import cost as attention_mass_cost
from vlmprune.kernels.flow_score import cost as flow_score_cost
from vlmprune.kernels.flow_score import flow_score
from vlmprune.kernels.gather_tokens import cost as gather_cost
from vlmprune.kernels.gather_tokens import cost_of_all, gather_all, gather_tokens
from vlmprune.kernels.grouped_attention import column_means, grouped_attention, scored_attention
from vlmprune.kernels.grouped_attention import cost as grouped_cost
from vlmprune.kernels.select_diverse import cost as select_cost
from vlmprune.kernels.select_diverse import determinant_order, greedy_order, select_diverse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
from rule import doubled, of_dots

PEAK = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
"""FLOPs per second of an H200 by its data sheet, dense."""
FLUSH = 256 << 20
"""Bytes that push everything else out of the L2 cache."""
FAR = 1 << 31
"""Elements that an int32 cannot count."""
LARGEST = 10.0
"""No score of standard normal queries and keys of these sizes is larger, after scaling."""
ROUNDED = ("grouped_attention", "scored_attention")
"""Ops whose first output is a product with probabilities in the dtype of the values."""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are.

    Attributes:
        batch, prompt, kept, rows: samples, tokens of a prompt, kept tokens, words after the image.
        heads, grouped: heads, and query and key heads where queries are grouped.
        crops, tower, tower_heads: crops of an image, tokens of one crop, heads of the tower.
        layers: layers whose keys and values are gathered at once.
        visual, picks, widths: of a selection: tokens, how many are picked, and their widths.
        variants: dtypes and head sizes.
        far: keys `[9, 32, far, 128]` hold more than 2³¹ elements; None skips this.
    """

    batch: int
    prompt: int
    kept: int
    rows: int
    heads: int
    grouped: tuple[int, int]
    crops: int
    tower: int
    tower_heads: int
    layers: int
    visual: int
    picks: int
    widths: tuple[int, ...]
    variants: tuple[tuple[torch.dtype, int], ...]
    far: int | None


REAL = Sizes(
    batch=4,
    prompt=2988,
    kept=268,
    rows=60,
    heads=32,
    grouped=(28, 4),
    crops=5,
    tower=577,
    tower_heads=16,
    layers=32,
    visual=2880,
    picks=320,
    widths=(4096, 1024),
    variants=(
        (torch.bfloat16, 128),
        (torch.bfloat16, 64),
        (torch.float32, 128),
        (torch.float16, 128),
        (torch.bfloat16, 80),
        (torch.bfloat16, 72),
        (torch.float32, 64),
        (torch.float16, 80),
        (torch.float32, 72),
    ),
    far=65536,
)
"""A prompt of LLaVA-NeXT (160 of 2,880 visual tokens kept, with separators and words), Qwen's grouped heads, CLIP."""

REHEARSAL = Sizes(
    batch=2,
    prompt=67,
    kept=19,
    rows=3,
    heads=2,
    grouped=(4, 2),
    crops=2,
    tower=37,
    tower_heads=2,
    layers=2,
    visual=45,
    picks=7,
    widths=(40,),
    variants=((torch.bfloat16, 64), (torch.float32, 72)),
    far=None,
)
"""Small enough for Triton's interpreter."""


def sizes_of(rehearsal: bool) -> Sizes:
    return REHEARSAL if rehearsal else REAL


# -- inputs ------------------------------------------------------------------------------------------------------------


class Inputs:
    """Random tensors in the middle of memory full of NaN."""

    def __init__(self, device: str, sizes: Sizes, dtype: torch.dtype, dim: int, seed: int = 0) -> None:
        self.device, self.sizes, self.dtype, self.dim = device, sizes, dtype, dim
        self.random = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers, with NaN before and after the tokens of every head; rows are aligned as in a model."""
        *outer, tokens, dim = shape
        larger = torch.full((*outer, tokens + 6, dim), torch.nan, device=self.device, dtype=dtype or self.dtype)
        x = larger[..., 3 : 3 + tokens, :]
        return x.normal_(generator=self.random)

    def padded(self, batch: int, tokens: int) -> Tensor:
        """`[batch, token]` bool: sample i begins with some tokens of padding, the first with none."""
        begin = torch.arange(batch, device=self.device) * (tokens // 7)
        return torch.arange(tokens, device=self.device) >= begin[:, None]

    def kept(self, batch: int, tokens: int, kept: int) -> Tensor:
        """`[batch, kept]` rising indices below `tokens`."""
        return torch.rand(batch, tokens, generator=self.random, device=self.device).argsort(1)[:, :kept].sort(1).values

    def marks(self, batch: int, tokens: int) -> Tensor:
        """`[batch, 1, token, 4]` one group for each token: ordinary, visual, visual sink, text sink."""
        code = torch.randint(4, (batch, 1, tokens), generator=self.random, device=self.device)
        return (code[..., None] == torch.arange(4, device=self.device)).float()

    @property
    def scaling(self) -> float:
        return self.dim**-0.5


def smooth(mass: Tensor) -> Tensor:
    """Factors that depend on the masses without a threshold, where rounding could fall on either side."""
    return 1.5 - mass


# -- correctness -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One comparison with the reference.

    Attributes:
        error, allowed: largest difference from fp64, and the rule's limit. Of selections: by how much the worst pick is worse
            than the best.
    """

    op: str
    case: str
    dtype: str
    dim: int
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """NaN is never right."""
        return self.error <= self.allowed


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN (integers: the largest), by torch itself."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not torch.empty(1).isnan().item():
            raise RuntimeError("torch does not fill fresh memory with NaN: torch.utils.deterministic.fill_uninitialized_memory")
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_variant(device: str, rehearsal: bool, dtype: torch.dtype, dim: int) -> tuple[list[Check], list[str]]:
    """Every op in one dtype and head size: comparisons, and what broke."""
    inputs = Inputs(device, sizes_of(rehearsal), dtype, dim)
    found, broken = [], []
    for exact, some in ((False, cases(inputs)), (True, exact_cases(inputs))):
        for op, case, run, arguments in some:
            try:
                found.append(compare(op, case, run, arguments, inputs, exact))
            except Exception as error:  # one op that does not compile must not hide the others
                traceback.print_exc()
                broken.append(f"{op} ({case}): {in_a_line(error)}")
    return found, broken


def cases(inputs: Inputs) -> Iterator[tuple[str, str, Callable[..., Any], tuple[Any, ...]]]:
    """Op, case, the public op, and its arguments."""
    size, dim, scaling = inputs.sizes, inputs.dim, inputs.scaling
    batch, keys, rows = size.batch, size.prompt, size.rows
    heads, kv_heads = size.grouped if dim == 128 else (size.heads, size.heads)
    query, last = inputs.normal(batch, heads, rows, dim), inputs.normal(batch, heads, 1, dim)
    key, value = inputs.normal(batch, kv_heads, keys, dim), inputs.normal(batch, kv_heads, keys, dim)
    valid = inputs.padded(batch, keys)
    position = torch.arange(keys - rows, keys, device=inputs.device)[None]
    causal = (torch.arange(keys, device=inputs.device) <= position[..., None]) & valid[:, None]
    yield "attention_rows", "last row, padded", attention_rows, (last, key, scaling, valid[:, None])
    yield "attention_mass", "last row", attention_mass, (last, key, scaling, None)
    yield "attention_mass", "words, causal and padded", attention_mass, (query, key, scaling, causal)
    marks = inputs.marks(batch, keys - rows)
    yield "grouped_attention", "decoding, padded", grouped_attention, (last, key, value, scaling, None, valid, marks, smooth)
    arguments = (query, key, value, scaling, position, valid, marks, smooth)
    yield "grouped_attention", "words", grouped_attention, arguments
    weight = inputs.normal(batch, 1, keys - rows, dtype=torch.float32)[:, 0].abs()
    yield "scored_attention", "words", scored_attention, (query, key, value, scaling, position, valid, weight)
    counted = torch.ones(batch, rows, dtype=torch.bool, device=inputs.device)
    yield "column_means", "words", column_means, (query, key, scaling, position, valid, counted)
    crops, tokens, tower = size.crops, size.tower, size.tower_heads
    some = inputs.normal(crops, tower, tokens, dim), inputs.normal(crops, tower, tokens, dim)
    anchor, cls = inputs.normal(crops, tower, dim), inputs.normal(crops, tower, 1, dim)
    yield "attention_mass", "CLS token of the tower", attention_mass, (cls, some[0], scaling, None)
    arguments = (cls[:, :, 0], *some, anchor, scaling, scaling, inputs.padded(crops, tokens))
    yield "flow_score", "tower, padded", flow_score, arguments


def exact_cases(inputs: Inputs) -> Iterator[tuple[str, str, Callable[..., Any], tuple[Any, ...]]]:
    """Cases whose results must be equal bit for bit."""
    size, dim = inputs.sizes, inputs.dim
    rows = inputs.kept(size.batch, size.prompt, size.kept)
    valid = inputs.padded(size.batch, size.kept)
    hidden = inputs.normal(size.batch, size.prompt, size.heads * dim)
    rotary = inputs.normal(1, size.prompt, dim, dtype=torch.float32)
    keys = [inputs.normal(size.batch, size.heads, size.prompt, dim) for _ in range(2)]
    yield "gather_tokens", "hidden states, padded", gather_tokens, (hidden, rows, valid)
    yield "gather_tokens", "keys", gather_tokens, (keys[0], rows, None)
    yield "gather_all", "all of a layer, padded", gather_all, ([hidden, rotary, *keys], rows, valid)


def compare(op: str, case: str, run: Callable[..., Any], arguments: tuple[Any, ...], inputs: Inputs, exact: bool) -> Check:
    """Run an op's kernel on poisoned memory, and judge it."""
    with nan_in_fresh_memory():
        ours = _tensors(run(*arguments, impl="triton"))
    theirs = _tensors(run(*arguments, impl="reference"))
    for own, torchs in zip(ours, theirs, strict=True):
        if own.shape != torchs.shape or own.dtype != torchs.dtype:
            raise RuntimeError(f"{op} gave {own.dtype} {list(own.shape)} instead of {torchs.dtype} {list(torchs.shape)}")
    if exact:
        worst = float(sum((own != torchs).sum() for own, torchs in zip(ours, theirs, strict=True))), 0.0
    else:
        worst = _judged(op, run, arguments, ours, theirs, inputs.dim)
    return Check(op, case, str(inputs.dtype).removeprefix("torch."), inputs.dim, *worst)


def _judged(
    op: str, run: Callable[..., Any], arguments: tuple[Any, ...], ours: list[Tensor], theirs: list[Tensor], dim: int
) -> tuple[float, float]:
    """Error and limit of the number that is nearest to its limit, or farthest beyond it; NaN is beyond any limit."""
    wide = tuple(map(doubled, arguments))
    exact = _tensors(run(*wide, impl="reference"))
    pairs = []
    for output, (own, torchs, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        limit = torch.full_like(right, 2 * _distance(torchs, right) + of_dots(dim, LARGEST) * 2**-24 * float(right.abs().max()))
        if op in ROUNDED and output == 0 and arguments[2].dtype != torch.float32:
            limit += _rounding_of_probabilities(run, wide, arguments[2], float(exact[1].max()) if len(exact) > 1 else 1.0)
        error = (own.double() - right).abs()
        excess = (error / limit).nan_to_num(nan=torch.inf)
        worst = excess.argmax()
        pairs.append((float(excess.flatten()[worst]), float(error.flatten()[worst]), float(limit.flatten()[worst])))
    return max(pairs)[1:]


def _rounding_of_probabilities(run: Callable[..., Any], wide: tuple[Any, ...], value: Tensor, factor: float) -> Tensor:
    """Half a unit in the last place of every term, and half the smallest number for terms that vanish.

    Triton's interpreter truncates bf16 where a GPU rounds to nearest: a whole unit there.
    """
    query, key, wide_value, *rest = wide
    sizes = _tensors(run(query, key, wide_value.abs(), *rest, impl="reference"))[0]
    kind = torch.finfo(value.dtype)
    vanishing = value.shape[2] * factor * float(value.abs().max()) * kind.smallest_normal * kind.eps / 2
    truncated = value.device.type == "cpu" and value.dtype == torch.bfloat16
    return kind.eps / (1 if truncated else 2) * sizes + vanishing


def check_selection(device: str, rehearsal: bool, width: int) -> list[Check]:
    """DivPrune's and CDPruner's picks, each compared in fp64 with the best pick at that point."""
    size = sizes_of(rehearsal)
    inputs = Inputs(device, size, size.variants[0][0], 0)
    features = inputs.normal(2, size.visual, width)
    weight = inputs.normal(2, size.visual, 1, dtype=torch.float32)[..., 0].sigmoid()
    # A cosine of unit vectors of d numbers is off by at most (d + 4) · 2⁻²⁴, and a pick may be worse by the error of both.
    rounding = 2 * (width + 4) * 2**-24
    checks = []
    for op, run, arguments, shortfall in (
        ("greedy_order", greedy_order, (features,), _short_of_max_min),
        ("determinant_order", determinant_order, (features, weight), _short_of_determinant),
    ):
        with nan_in_fresh_memory():
            ours = run(*arguments, size.picks, impl="triton")
        theirs = run(*arguments, size.picks, impl="reference")
        error = shortfall(ours, *arguments)
        allowed = 2 * shortfall(theirs, *arguments) + rounding
        dtype = str(inputs.dtype).removeprefix("torch.")
        checks.append(Check(op, f"{size.picks} of {size.visual}", dtype, width, error, allowed))
    return checks


def _short_of_max_min(order: Tensor, features: Tensor) -> float:
    """By how much the worst pick is nearer to the others than the best pick would have been; NaN if one is picked twice."""
    unit = normalize(features.double(), dim=-1)
    if any(len(set(row)) != len(row) or not 0 <= min(row) <= max(row) < unit.shape[1] for row in order.tolist()):
        return torch.nan
    worst = 0.0
    for x, picks in zip(unit, order.tolist(), strict=True):
        apart = 1 - x @ x.T
        apart.fill_diagonal_(torch.inf)
        first = apart.amin(dim=1)
        worst = max(worst, float(first.max() - first[picks[0]]))
        nearest = apart[picks[0]].clone()
        nearest[picks[0]] = -torch.inf
        short = []
        for pick in picks[1:]:
            short.append(nearest.max() - nearest[pick])
            nearest = torch.minimum(nearest, apart[pick])
            nearest[pick] = -torch.inf
        worst = max(worst, float(torch.stack(short).max()))
    return worst


def _short_of_determinant(order: Tensor, features: Tensor, weight: Tensor) -> float:
    """By how much the worst pick adds less, in squared length, than the best pick would have; NaN if one is picked twice."""
    rows = normalize(features.double(), dim=-1) * weight.double()[..., None]
    if any(len(set(row)) != len(row) or not 0 <= min(row) <= max(row) < rows.shape[1] for row in order.tolist()):
        return torch.nan
    worst = 0.0
    for x, picks in zip(rows, order.tolist(), strict=True):
        left, short = x.clone(), []
        for pick in picks:
            gain = left.square().sum(dim=-1)
            short.append(gain.max() - gain[pick])
            new = left[pick] / gain[pick].sqrt().clamp_min(1e-30)
            left = left - (left @ new)[:, None] * new
        worst = max(worst, float(torch.stack(short).max()))
    return worst


def check_far(device: str, keys: int) -> list[Check]:
    """Tensors with more elements than an int32 counts. The last sample, which is beyond 2³¹, is compared."""
    batch, heads, dim = 9, 32, 128
    random = torch.Generator(device).manual_seed(0)
    key = torch.empty(batch, heads, keys, dim, device=device, dtype=torch.bfloat16).normal_(generator=random)
    assert key[:-1].numel() >= FAR
    query = torch.empty(batch, heads, 1, dim, device=device, dtype=torch.bfloat16).normal_(generator=random)
    checks = []
    for op, run, arguments in (
        ("attention_rows", attention_rows, lambda x, q: (q, x, dim**-0.5)),
        ("attention_mass", attention_mass, lambda x, q: (q, x, dim**-0.5)),
        ("grouped_attention", grouped_attention, _far_grouped),
        ("flow_score", flow_score, lambda x, q: (q[:, :, 0], x, x, q[:, :, 0], dim**-0.5, dim**-0.5)),
    ):
        ours = _tensors(run(*arguments(key, query), impl="triton"))
        theirs = _tensors(run(*arguments(key[-1:], query[-1:]), impl="reference"))
        worst = _judged(op, run, arguments(key[-1:], query[-1:]), [x[-1:] for x in ours], theirs, dim)
        checks.append(Check(op, f"{keys} keys, 2³¹ elements", "bfloat16", dim, *worst))
    rows = torch.randint(keys - 500, keys, (batch, 300), generator=random, device=device)
    ours, theirs = (gather_tokens(key, rows, impl=impl) for impl in ("triton", "reference"))
    wrong = float((ours != theirs).sum())
    return [*checks, Check("gather_tokens", f"{keys} keys, 2³¹ elements", "bfloat16", dim, wrong, 0.0)]


def _far_grouped(key: Tensor, query: Tensor) -> tuple[Any, ...]:
    marks = torch.zeros(len(key), 1, 1000, 2, device=key.device)
    marks[:, :, ::3, 1] = 1
    marks[..., 0] = 1 - marks[..., 1]
    return query, key, key, key.shape[-1] ** -0.5, None, None, marks, smooth


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max())


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """How long one piece of work takes.

    Attributes:
        ms: median, launches by the host included; None in a rehearsal.
        reference_ms: the torch reference.
        bytes_moved, flops: what must be moved and computed at least.
        roofline_ms: time of that at the copy bandwidth of this run, or at the data sheet's peak, whichever is longer.
        graph_ms: `ms` replayed from a CUDA graph, without the host's launches; None if it was not captured.
        note: why it was not captured.
    """

    name: str
    ms: float | None
    reference_ms: float | None
    bytes_moved: int
    flops: int
    roofline_ms: float | None
    graph_ms: float | None = None
    note: str = ""

    @property
    def bandwidth_share(self) -> float | None:
        """The roofline's share of the time."""
        return None if self.ms is None or self.roofline_ms is None else self.roofline_ms / self.ms


class Stopwatch:
    """Medians of CUDA events around cold runs: the L2 cache is flushed before each. In a rehearsal, work runs once, untimed."""

    def __init__(self, device: str, repeats: int = 20) -> None:
        self.on_gpu, self.repeats = device.startswith("cuda"), repeats
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if self.on_gpu else None

    def __call__(self, work: Callable[[], Any]) -> float | None:
        """Milliseconds, or None."""
        work()
        if self.flush is None:
            return None
        work()
        pairs = []
        for _ in range(self.repeats):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    def replayed(self, work: Callable[[], Any]) -> tuple[float | None, str]:
        """Milliseconds from a CUDA graph; or None, and why it cannot be captured."""
        if self.flush is None:
            return None, "rehearsal"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:  # it waits for the GPU, or allocates in a way that a graph may not
            torch.cuda.synchronize()
            return None, str(error).splitlines()[0]
        return self(graph.replay), ""


Work = list[tuple[str, Callable[..., Any], tuple[Any, ...], Callable[..., Any]]]
"""Name, public op, its arguments, and the function that gives its cost."""


def replay_kernels(device: str, rehearsal: bool, timings: list[Timing]) -> list[Timing]:
    """The same timings, each with that of its work replayed from a CUDA graph."""
    clock = Stopwatch(device)
    work = work_to_time(device, rehearsal)
    replayed = [clock.replayed(partial(run, *arguments, impl="triton")) for _, run, arguments, _ in work]
    return [replace(timing, graph_ms=ms, note=note) for timing, (ms, note) in zip(timings, replayed, strict=True)]


def work_to_time(device: str, rehearsal: bool) -> Work:
    """The work to time: shapes of LLaVA-NeXT-7B in bf16, the same numbers in every process."""
    sizes, dtype = sizes_of(rehearsal), torch.bfloat16
    inputs = Inputs(device, sizes, dtype, sizes.variants[0][1])
    batch, heads, keys, dim, scaling = sizes.batch, sizes.heads, sizes.prompt, inputs.dim, inputs.scaling

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=inputs.random)

    key, value, last = normal(batch, heads, keys, dim), normal(batch, heads, keys, dim), normal(batch, heads, 1, dim)
    words, marks = normal(batch, heads, sizes.rows, dim), inputs.marks(batch, keys - sizes.rows)
    position = torch.arange(keys - sizes.rows, keys, device=device)[None]
    causal = (torch.arange(keys, device=device) <= position[..., None]).expand(batch, -1, -1)
    crops = [normal(sizes.crops * batch, sizes.tower_heads, sizes.tower, 64) for _ in range(2)]
    cls, anchor = normal(sizes.crops * batch, sizes.tower_heads, 64), normal(sizes.crops * batch, sizes.tower_heads, 64)
    kept = inputs.kept(batch, keys, sizes.kept)
    half = inputs.kept(batch, keys, keys // 2)
    hidden = normal(batch, keys, heads * dim)
    var = vlmprune.VAR()
    decoding = (last, key, value, scaling, None, None, marks, var.coefficients)
    after = (words, key, value, scaling, position, None, marks, var.coefficients)
    cache = [normal(batch, heads, keys, dim) for _ in range(2 * sizes.layers)]
    return [
        ("attention_mass, last row", attention_mass, (last, key, scaling), attention_mass_cost),
        ("attention_mass, words", attention_mass, (words, key, scaling, causal), attention_mass_cost),
        ("flow_score, tower", flow_score, (cls, *crops, anchor, 0.125, 1.0), flow_score_cost),
        ("gather_tokens, hidden states", gather_tokens, (hidden, kept), gather_cost),
        ("gather_tokens, half of the keys", gather_tokens, (key, half), gather_cost),
        ("grouped_attention, VAR decoding", grouped_attention, decoding, _grouped_cost),
        ("grouped_attention, VAR words", grouped_attention, after, _grouped_cost),
        *(
            (f"select_diverse, width {width}", select_diverse, (normal(1, sizes.visual, width), sizes.picks), select_cost)
            for width in sizes.widths
        ),
        ("gather_all, keys and values", gather_all, (cache, kept), cost_of_all),
    ]


def measure_kernels(device: str, rehearsal: bool) -> dict[str, Any]:
    """Times of every op, and the figures for their goals.

    Returns:
        "timings"; "copy_gb_s", the bandwidth of a copy; "read_keys_ms", one reading of the keys; "sdpa_row_ms", stock attention
        of one row. Times are None in a rehearsal.
    """
    clock, dtype = Stopwatch(device), torch.bfloat16
    bandwidth = _copy_bandwidth(clock, device, 1 << 10 if rehearsal else 1 << 30)
    work = work_to_time(device, rehearsal)
    last, key, value = next(arguments[:3] for name, _, arguments, _ in work if name == "grouped_attention, VAR decoding")
    summed = clock(lambda: key.view(-1).sum())
    return {
        "timings": [_timed(clock, bandwidth, dtype, *piece) for piece in work],
        "copy_gb_s": None if bandwidth is None else bandwidth / 1e9,
        "read_keys_ms": None if summed is None or bandwidth is None else min(summed, key.nbytes / bandwidth * 1e3),
        "sdpa_row_ms": clock(lambda: torch.nn.functional.scaled_dot_product_attention(last, key, value)),
    }


def _grouped_cost(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor, valid: Tensor, marks: Tensor, _: Any
) -> Any:
    """The cost of a call of `grouped_attention`."""
    return grouped_cost(query, key, value, valid, marks)


def _copy_bandwidth(clock: Stopwatch, device: str, size: int) -> float | None:
    """Bytes per second, read and written, of a copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copied = clock(partial(target.copy_, source))
    return None if copied is None else 2 * size / copied * 1e3


def _timed(
    clock: Stopwatch,
    bandwidth: float | None,
    dtype: torch.dtype,
    name: str,
    run: Callable[..., Any],
    arguments: tuple[Any, ...],
    cost: Callable[..., Any],
) -> Timing:
    least = cost(*arguments)
    return Timing(
        name,
        clock(partial(run, *arguments, impl="triton")),
        clock(partial(run, *arguments, impl="reference")),
        least.bytes_moved,
        least.flops,
        None if bandwidth is None else max(least.bytes_moved / bandwidth, least.flops / PEAK[dtype]) * 1e3,
    )
