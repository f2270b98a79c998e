"""Tests named `test_open_clip…` need open_clip: `make test-open_clip` runs them in an environment of their own."""

from __future__ import annotations

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("open_clip") else ["test_open_clip*.py"]
assert find_spec("open_clip") or "VLMPRUNE_OPEN_CLIP" not in os.environ, "this environment was made for open_clip, and lacks it"
