"""Images and the training images nearest to them, as in the right half of figure 4 of the paper."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from alexnet_jax.plots import style

MAX_ROWS = 50  # rows in one figure
_HEADING = 'nearest training images with their Euclidean distances; framed: same class'
_LEFT, _GAP, _QUERY_GAP, _TEXT, _TOP = 0.1, 0.07, 0.22, 0.34, 0.3  # inches


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """An image and its nearest training images, the nearest first.

    Attributes:
      query: an image with 3 channels or 1.
      name: the name of the query, such as its file name.
      images: the training images.
      labels: the classes of `images`.
      distances: Euclidean distances between the activations of the last hidden layer.
      label: the class of the query, or None if unknown.
    """

    query: UInt8[np.ndarray, 's s c']
    name: str
    images: list[UInt8[np.ndarray, 's s c']]
    labels: list[str]
    distances: list[float]
    label: str | None = None


@style.drawing
def draw(rows: Sequence[Neighbors]) -> Figure:
    """Draws one row per query, as in the right half of figure 4 of the paper, with class and distance of each neighbor.

    Neighbors of the query's class have a frame. Raises ValueError: there is no row, or more than MAX_ROWS.
    """
    if not 0 < len(rows) <= MAX_ROWS:
        raise ValueError(f'{len(rows)} rows; a figure has 1 to {MAX_ROWS}')
    count = max(len(row.images) for row in rows)
    side = min((style.WIDTH - 2 * _LEFT - _QUERY_GAP - count * _GAP) / (count + 1), 1.5)
    height = _TOP + len(rows) * (side + _TEXT)
    figure = style.new_figure(2 * _LEFT + _QUERY_GAP + count * _GAP + (count + 1) * side, height)
    for i, row in enumerate(rows):
        bottom = height - _TOP - i * (side + _TEXT) - side
        query = _show(figure, row.query, _LEFT, bottom, side, [row.name, row.label or ''])
        if i == 0:
            query.set_title('image', loc='left', pad=3)
        for j, (image, label, distance) in enumerate(zip(row.images, row.labels, row.distances, strict=True)):
            left = _LEFT + side + _QUERY_GAP + j * (side + _GAP) + _GAP
            same = label == row.label
            axes = _show(figure, image, left, bottom, side, [label, _number(distance)], framed=same)
            if i == j == 0:
                axes.set_title(_HEADING, loc='left', pad=3)
    return figure


def _number(distance: float) -> str:
    return f'{distance:.2f}' if distance == 0 or distance >= 0.1 else f'{distance:.1e}'


def _show(
    figure: Figure, image: np.ndarray, left: float, bottom: float, side: float, lines: list[str], framed: bool = False
) -> Axes:
    axes = style.blank_axes(figure, left, bottom, side, side)
    axes.imshow(style.picture(image), aspect='auto')
    for i, line in enumerate(lines):
        bold = framed and i == 0
        axes.text(
            0.5,
            -0.03 - i * 0.13 / side,
            style.fit(line, side * 72, bold=bold),
            transform=axes.transAxes,
            ha='center',
            va='top',
            weight='bold' if bold else 'normal',
        )
    if framed:
        axes.add_patch(
            Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=style.VERMILLION, linewidth=3)
        )
    return axes
