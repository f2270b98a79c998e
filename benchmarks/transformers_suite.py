"""transformers' own model tests, on wrapped models.

    python benchmarks/transformers_suite.py TESTS [--recipe RECIPE] [--families llava …] [-k EXPRESSION]

TESTS is the folder `tests` of a checkout of transformers near the installed version (its wheel brings none). Every model of a
supported family that a test calls is wrapped at its first call, and stays wrapped. Without a recipe the models are plain: what
passes then must pass with a recipe that keeps everything (`random:layer=0,fraction=1.0`); what fails under a recipe that drops
tokens is either a refusal in one sentence or is listed in docs/limits.md.

This file is outside the library. It replaces `__call__` and `generate` of transformers' classes in its own process.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")


def wrap_at_first_call(recipe: str) -> None:
    """From now on, every model of a supported family is wrapped when it is first called or asked to generate."""
    import transformers

    import vlmprune as vp

    wrapped = "_wrapped_by_the_suite"

    def wrapping(original: Any) -> Any:
        @wraps(original)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            if wrapped not in model.__dict__:
                vp.wrap(model, recipe)
                for part in {model, model.base_model}:
                    part.__dict__[wrapped] = True
            return original(model, *args, **kwargs)

        return call

    for prefix in ("Llava", "LlavaNext", "Qwen2VL", "Qwen2_5_VL"):
        for suffix in ("Model", "ForConditionalGeneration"):
            cls = getattr(transformers, prefix + suffix)
            cls.__call__ = wrapping(cls.__call__)
            if hasattr(cls, "generate"):
                cls.generate = wrapping(cls.generate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", type=Path, help="the folder tests/ of a checkout of transformers")
    parser.add_argument("--recipe", help="what the models are wrapped with; plain if not given")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("-k", dest="only", default="ModelTest", help="pytest's expression of what to run")
    given = parser.parse_args()
    import pytest

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(given.tests.parent)
    sys.path[:0] = [str(given.tests.parent), str(given.tests.parent / "utils")]
    if given.recipe is not None:
        wrap_at_first_call(given.recipe)
    files = [f"tests/models/{family}/test_modeling_{family}.py" for family in given.families]
    options = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rfE", "--tb=line", "-W", "ignore"]
    return int(pytest.main([*options, "-k", given.only, *files]))


if __name__ == "__main__":
    raise SystemExit(main())
