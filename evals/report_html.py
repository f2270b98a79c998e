"""A report as one HTML file, from the template and the style sheet in `evals/templates/`."""

from __future__ import annotations

import re
from importlib.resources import files

from vlmprune.evals.report_parts import MARKS, Document


def html(page: Document) -> str:
    """The report as one HTML file, without script and without other files."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def prose(text: str) -> Markup:
        """Text whose backticks enclose code, with minus signs and unbroken intervals."""
        parts = str(escape(text)).split("`")
        return Markup("".join(f"<code>{part}</code>" if n % 2 else typeset(part) for n, part in enumerate(parts)))

    templates = files("vlmprune.evals") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(prose=prose, typeset=typeset)
    environment.globals.update(MARKS=MARKS, Markup=Markup, kind=lambda part: type(part).__name__)
    template = environment.from_string((templates / "report.html").read_text(encoding="utf-8"))
    style = (templates / "report.css").read_text(encoding="utf-8")
    return template.render(page=page, style=Markup(style)) + "\n"


def typeset(text: str) -> str:
    """Text with minus signs before numbers, and with intervals that are not broken at the end of a line."""
    text = re.sub(r"(^|(?<=[\s\[(]))-(?=\d)", "−", text)
    text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)
    return re.sub(r"\[[^\[\]]{1,40}\]", lambda interval: interval[0].replace(" ", "\u00a0"), text)
