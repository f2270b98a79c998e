"""What holds for all tests."""

from __future__ import annotations

import os

# Triton reads this when a kernel is decorated, so it is set before any test imports one, whatever folder comes first. Only the
# tests of kernels depend on it: on a CPU, impl="auto" takes no kernel.
os.environ["TRITON_INTERPRET"] = "1"

from importlib.util import find_spec

import pytest
import torch

# They run in an environment of their own (`make test-lmms`): lmms-eval does not fit into this one.
collect_ignore = [] if find_spec("lmms_eval") else ["lmms"]
# Video processors of transformers need torchvision, which is installed in that environment.
collect_ignore += [] if find_spec("torchvision") else ["with_torchvision"]


@pytest.fixture
def no_grad():
    """For whole files: `pytestmark = pytest.mark.usefixtures("no_grad")`."""
    with torch.no_grad():
        yield
