"""Images with the five most probable classes of each, as in the left half of figure 4 of the paper."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from alexnet_jax.plots import style

MAX_IMAGES = 100  # images in one figure
_COLUMNS = 4
_PICTURE, _BAR, _LABEL, _GAP = 1.5, 0.17, 0.24, 0.2  # inches


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's prediction for an image.

    Attributes:
      image: an image with 3 channels or 1.
      name: the name of the image, such as its file name.
      label: the true class, or None if unknown.
      top: classes with their probabilities (0 to 1), the most probable first.
    """

    image: UInt8[np.ndarray, 's s c']
    name: str
    label: str | None
    top: list[tuple[str, float]]


@style.drawing
def draw(pictures: Sequence[Prediction]) -> Figure:
    """Draws each image with its true class and a bar per class in `top`, as in the left half of figure 4 of the paper.

    The bar of the true class has another color and is hatched. Long names are truncated.

    Raises ValueError: there is no image, or more than MAX_IMAGES.
    """
    if not 0 < len(pictures) <= MAX_IMAGES:
        raise ValueError(f'{len(pictures)} images; a figure has 1 to {MAX_IMAGES}')
    columns = min(_COLUMNS, len(pictures))
    bars = max(len(picture.top) for picture in pictures)
    cell = (_PICTURE + _GAP, 2 * _LABEL + _PICTURE + bars * _BAR + _GAP)
    rows = math.ceil(len(pictures) / columns)
    figure = style.new_figure(columns * cell[0] + _GAP, rows * cell[1])
    for i, picture in enumerate(pictures):
        left = _GAP + i % columns * cell[0]
        top = (rows - i // columns) * cell[1]
        _draw_one(figure, picture, left, top, bars)
    return figure


def _draw_one(figure: Figure, picture: Prediction, left: float, top: float, bars: int) -> None:
    points = _PICTURE * 72
    axes = style.blank_axes(figure, left, top - _LABEL - _PICTURE, _PICTURE, _PICTURE)
    axes.imshow(style.picture(picture.image), aspect='auto')
    axes.set_title(style.fit(picture.name, points), fontsize=style.SMALL, color='#555555', pad=2)
    if picture.label is not None:
        label = style.fit(picture.label, points, style.LARGE, bold=True)
        axes.text(
            0.5, -0.03, label, transform=axes.transAxes, fontsize=style.LARGE, weight='bold', ha='center', va='top'
        )
    below = style.blank_axes(figure, left, top - 2 * _LABEL - _PICTURE - bars * _BAR, _PICTURE, bars * _BAR)
    below.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    for i, (name, probability) in enumerate(picture.top):
        true = name == picture.label
        below.barh(
            i,
            probability if math.isfinite(probability) else 0.0,
            height=0.86,
            color=style.ORANGE if true else style.SKY,
            hatch='////' if true else None,
            edgecolor='white',
            linewidth=0,
        )
        percent = f'{100 * probability:.0f} %'
        name = style.fit(name, points - style.text_width(percent) - 8)
        below.text(0.02, i, name, va='center_baseline', path_effects=style.OUTLINE)
        below.text(0.99, i, percent, va='center_baseline', ha='right', path_effects=style.OUTLINE)
