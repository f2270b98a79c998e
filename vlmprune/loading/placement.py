"""Where a model is, and where its inputs go."""

from __future__ import annotations

from vlmprune.device import execution_device as execution_device
from vlmprune.device import to_model as to_model
