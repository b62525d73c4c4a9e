"""Helpers for all figures: sizes for print, colors safe for color-blind readers, text fitting, and file formats.

Drawing functions return a matplotlib Figure at most 7.2 inches wide, with fonts of 7 points or more. No function needs
a display.
"""

import bisect
import io
import math
import os

import matplotlib.style
import numpy as np
from jaxtyping import Float, Float64, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

from alexnet_jax.runtime.files import atomic_write

WIDTH = 7.2  # inches: the text width of a page
DPI = 150
SMALL, LARGE = 7.0, 8.5  # points

# The palette of Okabe and Ito without yellow, which is too light for lines, and with gray.
BLACK, ORANGE, SKY, GREEN = '#000000', '#E69F00', '#56B4E9', '#009E73'
BLUE, VERMILLION, PURPLE, GRAY = '#0072B2', '#D55E00', '#CC79A7', '#8C8C8C'
SERIES = (BLUE, VERMILLION, GREEN, BLACK, SKY, ORANGE, PURPLE, GRAY)

OUTLINE = (patheffects.withStroke(linewidth=1.8, foreground='white'),)  # of text on bars

_FAMILY = 'DejaVu Sans'  # comes with matplotlib
_SETTINGS = {
    'font.family': _FAMILY,
    'font.size': SMALL,
    'axes.titlesize': LARGE,
    'axes.labelsize': SMALL,
    'xtick.labelsize': SMALL,
    'ytick.labelsize': SMALL,
    'legend.fontsize': SMALL,
    'axes.linewidth': 0.6,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.axisbelow': True,
    'legend.frameon': False,
    'hatch.linewidth': 0.6,
    'text.parse_math': False,  # names of classes and files are not formulas
    'pdf.fonttype': 42,
}
# Decorates drawing functions, so that a user's own matplotlib settings do not change the figures.
drawing = matplotlib.style.context(_SETTINGS, after_reset=True)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure with a size in inches, which needs no display."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def blank_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Adds axes without frame and ticks, positioned in inches from the lower left corner of `figure`."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.set_axis_off()
    return axes


@drawing
def as_png(figure: Figure, dpi: float = DPI) -> bytes:
    """Returns the figure as a PNG file, with the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=dpi, metadata={'Software': None})
    return file.getvalue()


@drawing
def as_pdf(figure: Figure) -> bytes:
    """Returns the figure as a PDF file with searchable text, with the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format='pdf', dpi=2 * DPI, metadata={'CreationDate': None})
    return file.getvalue()


def save(figure: Figure, path: str) -> None:
    """Writes `figure` atomically as a .png or .pdf file, with the same bytes each time. Raises OSError."""
    content = {'.png': as_png, '.pdf': as_pdf}[os.path.splitext(path)[1].lower()](figure)
    with atomic_write(path, 'wb') as file:
        file.write(content)


def _font(size: float, bold: bool) -> FontProperties:
    return FontProperties(family=_FAMILY, size=size, weight='bold' if bold else 'normal')


def plain(text: str, bold: bool = False) -> str:
    """Returns `text` in one line, with a box for each character that the font lacks."""
    font = get_font(findfont(_font(SMALL, bold)))
    return ''.join(
        letter if letter.isprintable() and font.get_char_index(ord(letter)) else '\u25a1'
        for letter in ' '.join(text.split())
    )


def text_width(text: str, size: float = SMALL, bold: bool = False) -> float:
    """Returns the width of plain `text` in one line, in points."""
    return text_to_path.get_text_width_height_descent(text, _font(size, bold), ismath=False)[0]


def fit(text: str, points: float, size: float = SMALL, bold: bool = False) -> str:
    """Returns plain() text, truncated with an ellipsis if it is wider than `points`."""
    text = plain(text, bold)
    if text_width(text, size, bold) <= points:
        return text
    cuts = [f'{text[:kept].rstrip()}\u2026' for kept in range(len(text))]
    fitting = bisect.bisect(cuts, points, key=lambda cut: text_width(cut, size, bold))
    return cuts[max(fitting - 1, 0)]


def tile(
    cells: Float[np.ndarray, 'h w ... cells'], columns: int, gap: int, background: float
) -> Float64[np.ndarray, 'rows columns ...']:
    """Arranges `cells` in rows of `columns`, separated by `gap` pixels of `background`."""
    height, width, *channels, count = cells.shape
    down, across = height + gap, width + gap
    sheet = np.full((math.ceil(count / columns) * down - gap, columns * across - gap, *channels), background)
    for i in range(count):
        top, left = i // columns * down, i % columns * across
        sheet[top : top + height, left : left + width] = cells[..., i]
    return sheet


def picture(image: UInt8[np.ndarray, 'h w c']) -> UInt8[np.ndarray, 'h w 3']:
    """Broadcasts an image (H, W, 3) or (H, W, 1) to (H, W, 3): a single channel becomes gray."""
    return np.broadcast_to(image, (*image.shape[:2], 3))
