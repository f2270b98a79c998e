"""The rule that chooses an implementation, without a GPU: CUDA tensors are stood in for by what the rule reads of them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import UsageError
from vlmprune.kernels import dispatch
from vlmprune.kernels.attention_mass import attention_mass, attention_rows
from vlmprune.kernels.dispatch import bytes_of, use_triton
from vlmprune.kernels.flow_score import flow_score
from vlmprune.kernels.gather_tokens import gather_all, gather_tokens
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
