"""A little SVG: shapes appended to a drawing, fills that also read without colour.

Lengths are in pixels of a canvas `WIDTH` wide. Every fill differs from the others in lightness or in its hatching.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

WIDTH = 960
INK = "#1a1a1a"
FAINT = "#d0d0d0"
LABEL_PX = 10.5
FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """`hatching` is drawn over `colour` in 8 by 8 pixel tiles; `text` is the colour that reads on it."""

    name: str
    colour: str
    hatching: str
    text: str = INK


SOLID = Fill(name="solid", colour="#24527a", hatching="", text="#ffffff")
STRIPES = Fill(
    name="stripes",
    colour="#f3c25b",
    hatching='<path d="M-2,2 l4,-4 M0,8 l8,-8 M6,10 l4,-4" stroke="#8a5a00" stroke-width="1.2"/>',
)
DOTS = Fill(
    name="dots",
    colour="#bfe3f2",
    hatching='<circle cx="2" cy="2" r="1.1" fill="#2b6f8f"/><circle cx="6" cy="6" r="1.1" fill="#2b6f8f"/>',
)
CROSSES = Fill(
    name="crosses",
    colour="#c9c9c9",
    hatching='<path d="M0,0 l8,8 M0,8 l8,-8" stroke="#6e6e6e" stroke-width="0.9"/>',
)
LINES = Fill(
    name="lines",
    colour="#d9ecd0",
    hatching='<path d="M0,2 h8 M0,6 h8" stroke="#4a7a2f" stroke-width="1.2"/>',
)
BLANK = Fill(name="blank", colour="#ffffff", hatching="")
FILLS = (SOLID, STRIPES, DOTS, LINES, CROSSES, BLANK)


@dataclass(slots=True)
class Drawing:
    """Grows downwards: whoever draws moves `y_px` on."""

    y_px: float = 0.0
    _shapes: list[str] = field(default_factory=list[str])

    def rect(
        self, x: float, y: float, width: float, height: float, fill: Fill, data: Mapping[str, object]
    ) -> None:
        """`data` becomes data- attributes, which the page and the tests read."""
        named = "".join(f" data-{key}={quoteattr(str(value))}" for key, value in data.items())
        paint = f"url(#{fill.name})" if fill.hatching else fill.colour
        self._shapes.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{paint}" '
            f'stroke="{INK}" stroke-width="0.8"{named}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size_px: float = 12,
        anchor: str = "start",
        bold: bool = False,
        colour: str = INK,
    ) -> None:
        """`y` is the baseline."""
        weight = ' font-weight="bold"' if bold else ""
        self._shapes.append(
            f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size_px:g}" text-anchor="{anchor}" '
            f'fill="{colour}"{weight}>{escape(words)}</text>'
        )

    def label(self, centre_x: float, y: float, words: str, fill: Fill) -> None:
        """Small words in the middle of a bar, on a plate where the bar is hatched."""
        width = text_width_px(words, LABEL_PX)
        if fill.hatching and words:
            self._shapes.append(
                f'<rect x="{centre_x - width / 2:.2f}" y="{y - LABEL_PX:.2f}" width="{width:.2f}" '
                f'height="{LABEL_PX + 3:.2f}" rx="2" fill="{fill.colour}"/>'
            )
        self.text(centre_x, y, words, size_px=LABEL_PX, anchor="middle", colour=fill.text)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> None:
        self._shapes.append(
            f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}" '
            'stroke-width="0.8"/>'
        )

    def document(self, title: str) -> str:
        patterns = "".join(
            f'<pattern id="{fill.name}" width="8" height="8" patternUnits="userSpaceOnUse">'
            f'<rect width="8" height="8" fill="{fill.colour}"/>{fill.hatching}</pattern>'
            for fill in FILLS
            if fill.hatching
        )
        height = round(self.y_px)
        shapes = "\n".join(self._shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(title)}</title>\n<defs>{patterns}</defs>\n"
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{shapes}\n</svg>\n'
        )


def text_width_px(words: str, size_px: float) -> float:
    """An upper estimate for a sans-serif face: a letter is at most 0.62 of the size wide on average."""
    return 0.62 * size_px * len(words)


def shortened(words: str, width_px: float, size_px: float) -> str:
    """Cut to `width_px` with an ellipsis."""
    most = int(width_px / (0.62 * size_px))
    return words if len(words) <= most else words[: most - 1] + "…"


def wrapped(names: Sequence[str], width_px: float, size_px: float) -> list[str]:
    """Names joined by " + " in lines of at most `width_px`, each name whole unless it alone is longer."""
    lines: list[str] = []
    for name in names:
        longer = f"{lines[-1]} + {name}" if lines else name
        if lines and text_width_px(f"{longer} +", size_px) > width_px:
            lines[-1] += " +"
            lines.append(name)
        else:
            lines[-1:] = [longer]
    return [shortened(line, width_px, size_px) for line in lines]
