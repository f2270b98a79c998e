"""Write docs/methods.md: what every method computes, from the docstrings of its file.

    python docs/methods.py

`tests/test_docs.py` compares. `vlmprune methods NAME` prints a method's parameters, ranges and an example.
"""

from __future__ import annotations

import ast
from pathlib import Path

import vlmprune

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# What every method computes

Written by `python docs/methods.py` from the docstrings. `vlmprune methods NAME` prints a method's parameters, their ranges and
an example. The [glossary](architecture.md#glossary) explains the words.
"""


def section(name: str, method: type) -> str:
    """One method: its name, paper and file, and the docstring of the file."""
    path = Path(*method.__module__.split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    return f"### {name}\n\n[`{path}`](../{path})\n\n{text}\n"  # what is indented, the equations, is code in Markdown


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, methods in (("Pruning", vlmprune.METHODS), ("Redistribution", vlmprune.REDISTRIBUTORS)):
        parts += [f"## {title}\n", *(section(name, methods[name]) for name in sorted(methods))]
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs/methods.md").write_text(markdown())
