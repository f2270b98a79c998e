"""The rule that chooses an implementation, without a GPU: CUDA tensors are stood in for by what the rule reads of them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import UsageError
from vlmprune.kernels import dispatch
from vlmprune.kernels.attention_mass import attention_mass, attention_rows
from vlmprune.kernels.dispatch import Checked, bytes_of, in_fp32, use_triton
from vlmprune.kernels.flow_score import flow_score
from vlmprune.kernels.gather_tokens import gather_all, gather_tokens
from vlmprune.kernels.grouped_attention import column_means, grouped_attention, scored_attention
from vlmprune.kernels.launching import on_its_device

X = torch.randn(1, 2, 5, 16)
ROWS = torch.tensor([[0, 3]])
OPS = {
    "attention_rows": lambda impl: attention_rows(X, X, 1.0, impl=impl),
    "attention_mass": lambda impl: attention_mass(X, X, 1.0, impl=impl),
    "flow_score": lambda impl: flow_score(X[:, :, 0], X, X, X[:, :, 0], 1.0, 1.0, impl=impl),
    "gather_tokens": lambda impl: gather_tokens(X, ROWS, impl=impl),
    "gather_all": lambda impl: gather_all([X, X], ROWS, impl=impl),
}


def tensor(device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_floating_point=lambda: dtype.is_floating_point)


@pytest.fixture
def compiled(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.mark.parametrize("op", OPS)
def test_auto_on_a_cpu_is_the_reference(op, monkeypatch):
    """Also in the interpreter, where only "triton" reaches the launcher."""
    package = {"attention_rows": "attention_mass", "gather_all": "gather_tokens"}.get(op, op)
    kernel = importlib.import_module(f"vlmprune.kernels.{package}.kernel")
    monkeypatch.setattr(kernel, op, lambda *_: "launched")
    assert OPS[op]("triton") == "launched"
    assert OPS[op]("auto") != "launched"
    assert OPS[op]("reference") != "launched"


@pytest.mark.parametrize("op", OPS)
def test_a_cpu_tensor_outside_the_interpreter_is_refused(op, compiled):
    with pytest.raises(
        UsageError, match=rf"^{op}: impl='triton' needs CUDA tensors, but \w+ is on cpu: pass impl='reference'\.$"
    ):
        OPS[op]("triton")


def test_the_rule_on_cuda(compiled):
    x, double, places = tensor(), tensor(dtype=torch.float64), tensor(dtype=torch.int64)
    for impl in ("auto", "triton"):
        assert use_triton("op", impl, x=x, places=places, nothing=None)
        assert use_triton("op", impl, any_dtype=True, x=double)
        with pytest.raises(
            UsageError, match=r"op: y is torch.float8_e5m2 but kernels take float16, bfloat16 and float32: convert it"
        ):
            use_triton("op", impl, x=x, y=tensor(dtype=torch.float8_e5m2))
    for y in (x, double):
        assert not use_triton("op", "reference", x=y)
    assert not use_triton("op", "auto", x=x, y=double)
    with pytest.raises(UsageError, match=r"op: y is float64 but kernels compute in fp32: pass impl='reference'"):
        use_triton("op", "triton", x=x, y=double)


@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS)
def test_tensors_on_two_devices_are_refused(impl, compiled):
    with pytest.raises(UsageError, match=r"op: y is on cpu but x on cuda:0: move them to one device"):
        use_triton("op", impl, x=tensor(), y=tensor("cpu"))


def test_the_interpreter_is_not_for_cuda_tensors():
    with pytest.raises(
        UsageError, match=r"op: x is on cuda:0 but TRITON_INTERPRET=1, which is for CPU tensors in tests: unset it"
    ):
        use_triton("op", "auto", x=tensor())


def test_without_triton_cuda_tensors_are_refused(compiled, monkeypatch):
    """Not computed by torch in silence."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(
        UsageError, match=r"op on cuda:0 needs Triton: pip install 'vlmprune\[kernels\]', or pass impl='reference'"
    ):
        use_triton("op", "auto", x=tensor())


def test_an_unknown_implementation():
    with pytest.raises(UsageError, match="unknown impl 'tritn': did you mean 'triton'"):
        use_triton("op", "tritn", x=tensor("cpu"))


def test_importing_ops_loads_no_triton():
    code = (
        "import sys; from vlmprune.kernels import attention_mass, flow_score, gather_tokens; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_of():
    """What is expanded is read once; None is nothing."""
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert bytes_of(x, None, x[:1].expand(5, -1), x[:, :1]) == 12 + 6 + 4


def test_a_launcher_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, which need not be theirs."""
    held = []

    @contextmanager
    def device_of(x):
        held.append(x)
        yield
        held.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launcher = on_its_device(lambda tensors, rows, number=1: (held[0], number))
    assert launcher([X], ROWS, number=2) == (ROWS, 2)
    assert launcher(tensors=[X], rows=ROWS) == (ROWS, 1)
    assert not held


def test_every_public_launcher_does():
    """Outermost, so that whatever it allocates or launches is there."""
    found = []
    for path in sorted(Path(dispatch.__file__).parent.glob("*/kernel.py")):
        asked = ast.parse((path.parent / "__init__.py").read_text())
        attributes = [node for node in ast.walk(asked) if isinstance(node, ast.Attribute)]
        called = {node.attr for node in attributes if ast.unparse(node.value) == "kernel"}
        for function in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)):
            if function.name in called:
                found.append(function.name)
                first = ast.unparse(function.decorator_list[0]) if function.decorator_list else None
                assert first == "on_its_device", f"{path}: {function.name}"
    assert set(found) == {*OPS, "greedy_order", "determinant_order", "grouped_attention", "scored_attention", "column_means"}


# -- checks are made once for each kind of arguments ---------------------------------------------------------------------------

MARKS, HEADS = torch.ones(1, 1, 4, 2), torch.ones(1, 2, 5, 16)
COUNTED, PLACES = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
GIVEN = {  # an op, and arguments that it takes
    "attention_rows": (attention_rows, (X, X, 1.0, torch.ones(1, 5, 5, dtype=torch.bool))),
    "attention_mass": (attention_mass, (X, X, 1.0, None)),
    "flow_score": (flow_score, (X[:, :, 0], X, X, X[:, :, 0], 1.0, 1.0, COUNTED)),
    "gather_tokens": (gather_tokens, (X, ROWS, torch.ones(1, 2, dtype=torch.bool))),
    "gather_all": (lambda *tensors, impl="auto": gather_all(tensors[:2], *tensors[2:], impl=impl), (X, HEADS, ROWS, None)),
    "grouped_attention": (grouped_attention, (X, X, X, 1.0, PLACES, COUNTED, MARKS, lambda mass: mass)),
    "scored_attention": (scored_attention, (X, X, X, 1.0, PLACES, COUNTED, MARKS[:, 0, :, 0])),
    "column_means": (column_means, (X, X, 1.0, PLACES, COUNTED, COUNTED)),
}


def memos() -> list[Checked]:
    """Of all ops."""
    packages = ("attention_mass", "flow_score", "gather_tokens", "grouped_attention")
    modules = (importlib.import_module(f"vlmprune.kernels.{name}") for name in packages)
    return [x for module in modules for x in vars(module).values() if isinstance(x, Checked)]


def outcome(op, arguments, **more) -> str:
    try:
        op(*arguments, **more)
    except (UsageError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def spoiled(arguments) -> list[tuple]:
    """Arguments of which one is of another rank, size, dtype or device, one at a time; and with one given that was None."""
    found = []
    for place, x in enumerate(arguments):
        if not isinstance(x, torch.Tensor):
            continue
        others = [x[None], x[0], x[..., :-1], torch.cat((x, x)), x.to("meta")]
        others += [x.double(), x.half(), x.long(), x.bool()]
        others += [x[:, :1], x[:0], torch.cat((x, x), dim=-1)]
        found += [(*arguments[:place], other, *arguments[place + 1 :]) for other in others]
    return found


def forget(monkeypatch) -> None:
    for memo in memos():
        monkeypatch.setattr(memo, "_passed", {})


@pytest.mark.parametrize("op", GIVEN)
def test_bad_input_is_refused_alike_before_and_after_good_input(op, monkeypatch):
    """What passed once vouches for equal kinds only: one sentence for one fault, whatever ran before."""
    call, arguments = GIVEN[op]
    bad = spoiled(arguments)
    fresh = []
    for given in bad:
        forget(monkeypatch)
        fresh.append(outcome(call, given))
    assert sum(found.startswith("UsageError") for found in fresh) >= len(bad) // 3
    forget(monkeypatch)
    for _ in range(2):  # the second time with all that passed in mind
        assert outcome(call, arguments) == "taken"
        assert [outcome(call, given) for given in bad] == fresh
    assert outcome(call, arguments, impl="tritn").startswith("UsageError: unknown impl 'tritn'")
    assert outcome(call, arguments, impl=["auto"]).startswith("UsageError: unknown impl \"['auto']\"")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "impl='triton' needs CUDA tensors" in outcome(call, arguments, impl="triton")


@pytest.mark.parametrize("op", GIVEN)
def test_equal_kinds_are_checked_once(op, monkeypatch):
    """Also for other tensors of the same kind; other sizes, and other implementations, are checked."""
    forget(monkeypatch)
    call, arguments = GIVEN[op]
    asked = []
    for memo in memos():
        monkeypatch.setattr(memo, "_choose", lambda *given, own=memo._choose: asked.append(given[1]) or own(*given))
    for _ in range(3):
        call(*arguments)
    call(*(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments))
    assert asked == ["auto"]
    call(*arguments, impl="reference")
    assert asked == ["auto", "reference"]


def test_a_kernel_that_passed_is_refused_where_its_environment_changed(monkeypatch):
    """And a kind that passed without gradients is refused with them."""
    call, arguments = GIVEN["scored_attention"]
    call(*arguments, impl="triton")
    needing = (arguments[0].clone().requires_grad_(), *arguments[1:])
    with pytest.raises(UsageError, match="scored_attention: kernels have no gradients, but query, key or value needs one"):
        call(*needing, impl="triton")
    with torch.no_grad():
        call(*needing, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    for _ in range(2):
        with pytest.raises(UsageError, match="impl='triton' needs CUDA tensors, but query is on cpu"):
            call(*arguments, impl="triton")


def test_what_is_remembered_is_bounded_and_shared_by_threads():
    """As many kinds as decoding makes: one for each length."""
    asked = []
    memo = Checked("op", lambda op, impl, gradients, x: asked.append(x.shape[0]) or x.shape[0] % 2 == 1)
    sizes = [torch.empty(size) for size in range(3 * Checked.MOST)]

    def ask(_) -> bool:
        return all(memo("auto", False, x) == (x.shape[0] % 2 == 1) for x in sizes)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))
    assert len(memo._passed) <= Checked.MOST + 8, "each of the threads may add one that another made room for"
    assert len(set(asked)) == 3 * Checked.MOST


def test_symbolic_sizes_are_checked_every_time():
    """A graph that is traced for any size has sizes without a hash."""
    asked = []
    memo = Checked("op", lambda op, impl, gradients, x: asked.append(1) or False)
    unhashable = SimpleNamespace(shape=[2], dtype=torch.float32, device=torch.device("cpu"))
    assert [memo("auto", False, unhashable) for _ in range(3)] == [False] * 3
    assert len(asked) == 3


def test_a_decoding_step_asks_one_python_call_of_the_checks():
    """Red: ranks, dtypes and devices are looked at anew for every token and layer."""
    call, arguments = GIVEN["grouped_attention"]
    call(*arguments)
    seen = []
    root = str(Path(dispatch.__file__).parent)
    sys.setprofile(lambda frame, event, _: event == "call" and seen.append((frame.f_code.co_filename, frame.f_code.co_name)))
    try:
        call(*arguments)
    finally:
        sys.setprofile(None)
    own = [name for file, name in seen if file.startswith(root)]
    assert own == ["grouped_attention", "checked_grouped", "__call__", "grouped_attention", "_seen"]


def test_in_fp32_is_free_where_no_autocast_runs(monkeypatch):
    """And computes in fp32 where one does."""
    product = in_fp32(lambda x: (x @ x).dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 2)) == torch.float32
    monkeypatch.setattr(torch, "autocast", None)
    assert product(torch.ones(2, 2)) == torch.float32
