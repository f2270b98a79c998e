"""Drawings of matplotlib as SVG inside a page: the page's colours and letters, no date, the same bytes every time.

Colours are written as the page's variables, so that one drawing serves light, dark and print: a drawing uses the colours below,
and each becomes a variable of the style sheet. Greys become shares of the colour of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SERIES = ("#0a5fa9", "#b04a09", "#0b7350", "#8a3c7f")
"""Colours of lines; the variables `--s1` to `--s4` of the style sheet, which can be told apart by the colour-blind."""
BAD, QUIET = "#a8231f", "#7a7a7a"
"""Of methods that lose to random; of what stands beside."""
UNITS = 72
"""Units of a drawing per inch: a unit is a pixel of a page that shows it at its own size."""

_VARIABLES = {**{colour: f"var(--s{number})" for number, colour in enumerate(SERIES, start=1)}, BAD: "var(--bad)"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a recipe is a dollar sign
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters are measured everywhere
    "font.size": 11,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}


@contextmanager
def style(name: str) -> Iterator[None]:
    """matplotlib's settings for a drawing, whatever the user's are. No two drawings of a page have the same name."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.use("agg", force=False)
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": name, "axes.prop_cycle": cycler(color=SERIES)})
        yield


def from_figure(figure: Any, says: str) -> str:
    """A figure as an SVG element.

    Args:
        figure: matplotlib's; made and drawn inside `style(name)`.
        says: what it shows, for those who do not see it.
    """
    text = StringIO()
    figure.savefig(text, format="svg")
    return inline(text.getvalue(), says)


def from_drawing(draw: Callable[[Path], None], name: str, says: str) -> str:
    """What a function that writes a figure into a file draws, as an SVG element."""
    with style(name), TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(path)
        return inline(path.read_text(), says)


def inline(text: str, says: str) -> str:
    """An SVG file of matplotlib as an element of a page: only what draws, in the page's colours and letters."""
    body = text[text.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view is not None
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    # The metadata hold a date; the style applies to the whole page.
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)  # a hundredth of a pixel
    body = re.sub(r"font: (?:(\d+|bold) )?([\d.]+px) [^;\"]*", _font, body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda match: _colour(match[0]), body)
    body = _used_ids(body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    width = float(view[1].split()[2])
    return (
        f'<svg class="plot" viewBox="{view[1]}" style="max-width:{1.25 * width:.0f}px" fill="currentColor" role="img" '
        f'aria-label="{escape(says)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n{body}\n</svg>'
    )


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}"


def _colour(code: str) -> str:
    if code in _VARIABLES:
        return _VARIABLES[code]
    red, green, blue = (int(code[start : start + 2], 16) for start in (1, 3, 5))
    if not red == green == blue:
        return code
    if red == 255:
        return "var(--paper)"
    if red == 0:
        return "currentColor"
    return f"color-mix(in srgb, currentColor {100 - round(100 * red / 255)}%, transparent)"


def _used_ids(body: str) -> str:
    """Only ids that something refers to. matplotlib makes them from the drawing's name, so that no other drawing has them."""
    used = set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))
    return re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
