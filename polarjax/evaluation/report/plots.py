"""Plots of a report, as SVG text whose ink is the colour of the text around it.

Drawn again from the same numbers, a plot is the same text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Each has a contrast of 3 on white and on the dark page, and any two are told apart
# with each kind of colour blindness; markers differ besides.
COLOURS = ("#3388dd", "#dd7711", "#997777", "#7733ff", "#995522", "#7788aa")
_MARKERS = "osD^vPX*"
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_DASHES = (0, (4, 3))
# Stands for currentColor, which matplotlib does not know.
_INK = "#010203"
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
_WIDE = 10.6  # inches
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "polarjax",
    "text.parse_math": False,  # a label is text, dollar signs included
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color"), _INK
    ),
    "ytick.color": _INK,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
}
_TINY = -7  # decades: what float32 logits make of no difference at all
# In a file of its own there is no page to take a colour from.
_ALONE = (
    "<style>svg{color:#1b1f24}"
    "@media(prefers-color-scheme:dark){svg{color:#e6e9ee}}</style>"
)


class Series(NamedTuple):
    """Whose points these are.

    Attributes:
      name: in the legend.
      order: its colour and marker, from 0.
      line: its kind of line, from 0.
    """

    name: str
    order: int = 0
    line: int = 0


class Point(NamedTuple):
    """A value with its 95 % interval, of which a bound may be unknown."""

    x: float
    y: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes with points of several series."""

    title: str
    series: Mapping[Series, Sequence[Point]]


class Axes(NamedTuple):
    """What a plot of quality says on its axes.

    Attributes:
      x: label.
      y: label.
      dense: where on y a value equals the dense model's.
      speed: whether x is a speed, of which dense has 1.
    """

    x: str
    y: str
    dense: float
    speed: bool


def quality(name: str, label: str, panels: Sequence[Panel], axes: Axes) -> str:
    """Points with intervals, by density or by speed.

    Args:
      name: of the plot, for its ids.
      label: what it shows, for those who do not see it.
      panels: at least one.
      axes: what they mean.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    with _drawing() as matplotlib:
        figure, cells = _panels(matplotlib, len(panels))
        every = [s for p in panels for points in p.series.values() for s in points]
        left, right = _limits([p.x for p in every] + [1.0] * axes.speed)
        # Side by side where they would hide each other; a speed must stay exact.
        apart = 0 if axes.speed else (right - left) * 0.025
        shown = list(dict.fromkeys(s for panel in panels for s in panel.series))
        for cell, panel in zip(cells, panels, strict=True):
            cell.set_title(_short(panel.title, 30))
            cell.grid()
            cell.set_xlim(left, right)
            line = {"color": _INK, "linewidth": 1, "alpha": 0.55}
            cell.axhline(axes.dense, linestyle=_DASHES, **line)
            if axes.speed:
                cell.axvline(1, linestyle=_DASHES, **line)
            for series, points in panel.series.items():
                shift = (shown.index(series) - (len(shown) - 1) / 2) * apart
                _errorbars(cell, series, sorted(points, key=lambda p: p.x), shift)
            if axes.dense > 0:
                _scale(
                    matplotlib, cell, [p.y for s in panel.series.values() for p in s]
                )
            cell.locator_params(axis="x", nbins=6)
        figure.supxlabel(axes.x, fontsize=9)
        figure.supylabel(axes.y, fontsize=9)
        _legend(matplotlib, figure, shown)
        return _svg(figure, name, label)


def heat_maps(name: str, label: str, panels: Mapping[str, np.ndarray]) -> str:
    """How often each KV group of each layer was read.

    Args:
      name: of the plot, for its ids.
      label: what it shows, for those who do not see it.
      panels: by policy, float[layers, groups], from 0 to 1; all of one size.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    layers, groups = next(iter(panels.values())).shape
    wide = min(max(0.6 + 0.075 * groups, 1.7), 2.9)
    across = min(len(panels), int((_WIDE - 0.8) // wide))
    high = min(max(0.075 * layers, 1.2), 4.5) + 0.5
    with _drawing() as matplotlib:
        size = wide * across + 0.9, high
        figure, cells = _panels(matplotlib, len(panels), across, size)
        image = None
        for cell, (title, use) in zip(cells, panels.items(), strict=True):
            image = cell.imshow(
                use,
                matplotlib.colormaps["cividis"].resampled(20),
                vmin=0,
                vmax=1,
                aspect="auto",
                interpolation="none",
            )
            cell.set_title(_short(title, int(wide * 11)), fontsize=9)
            for axis in (cell.xaxis, cell.yaxis):
                axis.set_major_locator(matplotlib.ticker.MaxNLocator(7, integer=True))
        figure.supxlabel("KV group", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        bar = figure.colorbar(image, ax=cells, fraction=0.03, pad=0.02, aspect=28)
        bar.set_label("share of positions that read it")
        return _svg(figure, name, label)


def recall(name: str, label: str, panels: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Recall of routers by layer, beside that of chance.

    Args:
      name: of the plot, for its ids.
      label: what it shows, for those who do not see it.
      panels: by title, layers, the routers' recall there, and that of chance.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    with _drawing() as matplotlib:
        figure, cells = _panels(matplotlib, len(panels))
        for cell, (title, (layers, routers, chance)) in zip(
            cells, panels.items(), strict=True
        ):
            cell.set_title(_short(title, 30))
            cell.grid()
            cell.plot(layers, routers, color=COLOURS[0], marker="o", markersize=4)
            cell.plot(layers, chance, color=_INK, linestyle=_DASHES, linewidth=1.2)
            cell.set_ylim(0, 1.03)
            integers = matplotlib.ticker.MaxNLocator(8, integer=True)
            cell.xaxis.set_major_locator(integers)
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("recall", fontsize=9)
        line = matplotlib.lines.Line2D
        handles = [
            line([], [], color=COLOURS[0], marker="o", markersize=4, label="routers"),
            line([], [], color=_INK, linestyle=_DASHES, label="chance"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return _svg(figure, name, label)


def histograms(
    name: str, label: str, panels: Sequence[tuple[Series, np.ndarray, float]]
) -> str:
    """How the divergences of tokens are distributed, in half decades.

    Args:
      name: of the plot, for its ids.
      label: what it shows, for those who do not see it.
      panels: series, float[tokens], their mean.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    top = max(values.max() for _, values, _ in panels)
    last = max(_TINY + 2, math.ceil(math.log10(top)) if top > 0 else 0)
    edges = np.arange(2 * _TINY, 2 * last + 1) / 2
    with _drawing() as matplotlib:
        figure, cells = _panels(matplotlib, len(panels))
        highest = 0.0
        for cell, (series, values, mean) in zip(cells, panels, strict=True):
            shares = _shares(values, edges)
            highest = max(highest, float(shares.max()))
            centres = np.concatenate([[_TINY - 0.75], edges[:-1] + 0.25])
            colour = COLOURS[series.order % len(COLOURS)]
            cell.bar(centres, shares, width=0.46, color=colour)
            if mean > 10.0**_TINY:
                at = math.log10(mean)
                cell.axvline(at, color=_INK, linestyle=_DASHES, linewidth=1)
            # A policy, and its file where there are several.
            lines = [_short(part, 36) for part in series.name.split(" · ", 1)]
            cell.set_title("\n".join(lines))
            cell.grid(axis="y")
            decades = range(_TINY + 1, last + 1, 2)
            names = [_power(_TINY, "≤"), *map(_power, decades)]
            cell.set_xticks([_TINY - 0.75, *decades], names)
            cell.set_xlim(_TINY - 1.2, last + 0.2)
        for cell in cells:
            cell.set_ylim(0, highest * 1.05 or 1)
        figure.supxlabel("Kullback-Leibler divergence of a token, nats", fontsize=9)
        figure.supylabel("tokens, %", fontsize=9)
        return _svg(figure, name, label)


def as_file(svg: str) -> str:
    """What stands in a page, as a file that finds its own ink.

    Args:
      svg: from one of the functions above.
    """
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{_ALONE}{rest}'


@contextlib.contextmanager
def _drawing() -> Iterator[Any]:
    """Matplotlib with our settings alone, whatever its user's are."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        importlib.import_module("matplotlib.figure")  # and all that it needs
    except ImportError:
        raise ValueError(
            "the report needs matplotlib: pip install 'polarjax[plot]'"
        ) from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Which letters a font has is the browser's affair.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield matplotlib


def _panels(
    matplotlib: Any,
    count: int,
    across: int | None = None,
    size: tuple[float, float] | None = None,
) -> tuple[Any, list[Any]]:
    """A figure and as many axes as asked for; the size is that of one row."""
    # Four stand better two by two.
    across = across or {1: 1, 2: 2, 4: 2}.get(count, 3)
    down = -(-count // across)
    wide, high = size or ((6.4, 3.4) if count == 1 else (_WIDE, 2.75))
    figure = matplotlib.figure.Figure((wide, high * down + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    cells = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for spare in cells[count:]:
        spare.remove()
    return figure, cells[:count]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.07 or max(abs(high), 1e-3) * 0.1
    return low - room, high + room


def _errorbars(
    cell: Any, series: Series, points: Sequence[Point], shift: float
) -> None:
    low = [math.nan if p.low is None else max(p.y - p.low, 0) for p in points]
    high = [math.nan if p.high is None else max(p.high - p.y, 0) for p in points]
    cell.errorbar(
        [p.x + shift for p in points],
        [p.y for p in points],
        yerr=[low, high],
        elinewidth=1.1,
        capsize=2.5,
        **_look(series),
    )


def _look(series: Series) -> dict[str, Any]:
    return {
        "color": COLOURS[series.order % len(COLOURS)],
        "marker": _MARKERS[series.order % len(_MARKERS)],
        "linestyle": _LINES[series.line % len(_LINES)],
        "linewidth": 1.4,
        "markersize": 5,
    }


def _scale(matplotlib: Any, cell: Any, ratios: Sequence[float]) -> None:
    """Ratios that span much get a logarithmic scale, lest the best ones look alike."""
    if min(ratios) > 0 and max(ratios) > 4 * min(*ratios, 1):
        cell.set_yscale("log")
        ticks = matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=8)
        cell.yaxis.set_major_locator(ticks)
        cell.yaxis.set_major_formatter("{x:g}")


def _legend(matplotlib: Any, figure: Any, shown: Sequence[Series]) -> None:
    line = matplotlib.lines.Line2D
    names = [_short(series.name, 48) for series in shown]
    handles = [
        line([], [], label=name, **_look(series))
        for series, name in zip(shown, names, strict=True)
    ]
    style = {"color": _INK, "linewidth": 1, "linestyle": _DASHES, "alpha": 0.55}
    handles.append(line([], [], label="dense", **style))
    wide = 0.75 + 0.085 * max(5, *map(len, names))
    columns = max(1, min(int(figure.get_figwidth() / wide), len(handles)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Per cent of the values that are tiny, zero or below, then those of each bin."""
    large = values[values > 10.0 ** edges[0]]
    counts = np.histogram(np.log10(large), edges)[0]
    counts = np.concatenate([[len(values) - len(large)], counts])
    return 100 * counts / max(len(values), 1)


def _power(exponent: int, before: str = "") -> str:
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{before}10{str(exponent).translate(digits)}"


def _short(text: str, most: int) -> str:
    text = text if len(text) <= most else text[: most - 1] + "…"
    # Before 3.10, matplotlib leaves out of a legend what starts with an underscore.
    return f" {text}" if text.startswith("_") else text


def _svg(figure: Any, name: str, label: str) -> str:
    """Text of the figure to stand in a page."""
    # No date and no version: the same numbers make the same file.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # This one would hold for the whole page; the first tag gets what it says.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub("<[^>]+>", lambda tag: _tag(tag[0], name), text)
    wide = round(figure.get_figwidth() * 72)
    head = (
        f'<svg role="img" aria-label="{html.escape(label)}" stroke-linejoin="round" '
        # Narrow screens scroll it rather than make its letters too small.
        f'stroke-linecap="butt" style="min-width:min(46rem,{wide}pt)"'
    )
    return head + text.removeprefix("<svg").rstrip()


def _tag(tag: str, name: str) -> str:
    """A tag with our ink and font, and ids that no other plot of the page has."""
    tag = tag.replace(_INK, "currentColor")
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", _FONT, tag)
    if tag.startswith(("<path", "<clipPath")):
        tag = re.sub(r"\bid=\"", f'id="{name}-', tag)
    else:  # nothing refers to it
        tag = re.sub(r" id=\"[^\"]*\"", "", tag)
    return re.sub(r"(xlink:href=\"#|url\(#)", rf"\g<1>{name}-", tag)
