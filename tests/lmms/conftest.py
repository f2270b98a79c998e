"""Tests that need lmms-eval: `make test-lmms` runs them in an environment of their own."""

from __future__ import annotations

import os
import tempfile

# `datasets` and the hub's client read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LMMS_EVAL_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vlmprune-datasets-")
