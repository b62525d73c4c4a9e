"""Confusions between classes: a matrix for up to 40 classes, otherwise the hardest classes and frequent confusions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alexnet_jax.metrics import Labels, Scores, errors
from alexnet_jax.plots import style

MAX_ROWS = 40  # classes in a matrix
_NUMBERED = 20  # maximum number of classes of a matrix with numbers in its cells
_BARS = 20  # per panel if there are more than MAX_ROWS classes
_MARGIN, _BAR = 0.12, 0.19  # inches
_ARROW = ' \u2192 '
_COLORS = 'Blues'  # its lightness falls monotonically, so it can be printed in gray

Counts = Int[np.ndarray, 'classes classes']  # images by true class (rows) and predicted class (columns)


def count(scores: Scores, labels: Labels) -> Counts:
    """Counts images by true class (rows) and predicted class (columns), as int64.

    The errors are those of metrics.errors(). A misclassified image is omitted if the scores of all other classes are
    -inf or NaN.
    """
    wrong, _ = errors(scores, labels)
    others = np.where(np.isnan(scores), -np.inf, scores)
    np.put_along_axis(others, labels[:, None], -np.inf, -1)
    taken = np.where(wrong, others.argmax(-1), labels)
    known = ~wrong | (others.max(-1) > -np.inf)
    counts = np.zeros((scores.shape[-1],) * 2, np.int64)
    np.add.at(counts, (labels[known], taken[known]), 1)
    return counts


@style.drawing
def draw(counts: Counts, class_names: Sequence[str]) -> Figure:
    """Draws a matrix for up to 40 classes, otherwise the 20 highest class errors and 20 most frequent confusions."""
    return _draw_matrix(counts, class_names) if len(class_names) <= MAX_ROWS else _draw_bars(counts, class_names)


def hardest(counts: Counts, most: int) -> list[tuple[int, float, int]]:
    """Returns (class, error from 0 to 1, images) of at most `most` classes with images, by descending error."""
    images = counts.sum(1)
    shares = 1 - np.diagonal(counts) / np.maximum(images, 1)
    order = [int(row) for row in np.argsort(-shares, kind='stable') if images[row]]
    return [(row, float(shares[row]), int(images[row])) for row in order[:most]]


def confusions(counts: Counts, most: int) -> list[tuple[int, int, int]]:
    """Returns (true class, predicted class, count) of at most `most` confusions that occur, by descending count."""
    wrong = counts - np.diag(np.diagonal(counts))
    order = np.argsort(-wrong, axis=None, kind='stable')[:most]
    found = [divmod(int(place), len(counts)) for place in order]
    return [(row, column, int(wrong[row, column])) for row, column in found if wrong[row, column]]


def _draw_matrix(counts: Counts, class_names: Sequence[str]) -> Figure:
    count = len(class_names)
    names = [style.fit(name, 90) for name in class_names]
    label = max(style.text_width(name) for name in names) / 72 + 0.12
    side = min(style.WIDTH - label - 1.1, max(0.45 * count, 1.0))
    width, height = label + side + 1.1, label + side + 0.5
    figure = style.new_figure(max(width, 3.6), height)
    across = figure.get_size_inches()[0]
    axes = figure.add_axes(((label + 0.25) / across, (label + 0.25) / height, side / across, side / height))
    images = counts.sum(1, keepdims=True)
    shares = np.where(images > 0, 100 * counts / np.maximum(images, 1), np.nan)
    shown = axes.imshow(shares, cmap=_COLORS, vmin=0, vmax=100, interpolation='nearest', aspect='auto')
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.set(xlabel='predicted class', ylabel='true class')
    axes.tick_params(length=0)
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f'{total:,} images, error {_percent(total - right, total)}', loc='left')
    if count <= _NUMBERED:
        for row, column in np.argwhere(counts > 0):
            color = 'white' if shares[row, column] > 60 else 'black'
            axes.text(column, row, f'{counts[row, column]}', ha='center', va='center', color=color)
    bar = figure.add_axes(((label + 0.35 + side) / across, (label + 0.25) / height, 0.1 / across, side / height))
    figure.colorbar(shown, cax=bar).set_label('% of the true class')
    return figure


def _draw_bars(counts: Counts, class_names: Sequence[str]) -> Figure:
    side = (style.WIDTH - 3 * _MARGIN) / 2
    height = _BARS * _BAR
    figure = style.new_figure(style.WIDTH, height + 0.4)
    worst, taken = hardest(counts, _BARS), confusions(counts, _BARS)
    _draw_panel(
        style.blank_axes(figure, _MARGIN, _MARGIN, side, height),
        'hardest classes: top-1 error',
        [class_names[row] for row, _, _ in worst],
        [error for _, error, _ in worst],
        [f'{_percent(error, 1)} of {images:,}' for _, error, images in worst],
    )
    _draw_panel(
        style.blank_axes(figure, 2 * _MARGIN + side, _MARGIN, side, height),
        f'most frequent confusions: true class{_ARROW}predicted class',
        [_pair(class_names[row], class_names[column], side * 72 - 40) for row, column, _ in taken],
        [times / taken[0][2] for _, _, times in taken],
        [f'{times:,}' for _, _, times in taken],
    )
    return figure


def _pair(true: str, taken: str, points: float) -> str:
    """Joins the names with an arrow. A name wider than half of `points` is truncated to what the other name leaves."""
    room = points - style.text_width(_ARROW)
    widths = [style.text_width(style.plain(name)) for name in (true, taken)]
    limits = [max(room / 2, room - other) for other in reversed(widths)]
    return _ARROW.join(style.fit(name, limit) for name, limit in zip((true, taken), limits, strict=True))


def _draw_panel(axes: Axes, title: str, labels: list[str], lengths: list[float], texts: list[str]) -> None:
    """Draws bars of `lengths` from 0 to 1, each with a label on it and a text at the right."""
    axes.set_title(title, loc='left', pad=3)
    axes.set(xlim=(0, 1), ylim=(_BARS - 0.5, -0.5))
    points = axes.get_position().width * style.WIDTH * 72
    for i, (label, length, text) in enumerate(zip(labels, lengths, texts, strict=True)):
        axes.barh(i, length, height=0.84, color=style.SKY)
        label = style.fit(label, points - style.text_width(text) - 14)
        axes.text(0.01, i, label, va='center_baseline', path_effects=style.OUTLINE)
        axes.text(0.99, i, text, va='center_baseline', ha='right', path_effects=style.OUTLINE)
    if not labels:
        axes.text(0, 0, 'none')


def _percent(part: float, whole: float) -> str:
    return f'{100 * part / whole:.1f} %' if whole else 'unknown'
