"""The kernels of the first layer as in figure 3 of the paper, and the color saturation of each tower's kernels."""

import math

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from alexnet_jax.plots import style

_COLUMNS = 16  # maximum, as in the paper
_CELL = 0.8  # maximum inches of a kernel
_LEFT, _HEADING, _GAP, _BELOW = 0.1, 0.28, 0.08, 0.26  # inches


def saturation(kernel: Float[np.ndarray, 'h w c kernels'], towers: int) -> list[float]:
    """Returns the color saturation of each tower's kernels: the share of their energy that differs between channels.

    For kernels k[x, y, c, n] and their mean m[x, y, n] over the channels c, the saturation is sum (k - m)^2 / sum k^2
    over all of x, y, c and n. It is 0 if all channels have the same weights (gray), and 1 if the weights of the
    channels cancel, so that a gray image gives 0. Independent weights of three channels, as before training, give 2/3.
    Kernels with large weights contribute more.

    Args:
      kernel: kernels of conv1, ordered by tower.
      towers: number of equal parts of the kernels.

    Returns:
      One number from 0 to 1 for each tower; 0 if all its weights are 0, NaN if one is not finite.
    """
    shares = []
    for part in np.split(kernel.astype(np.float64), towers, -1):
        with np.errstate(invalid='ignore'):  # non-finite weights: the result is NaN
            color = np.sum((part - part.mean(2, keepdims=True)) ** 2)
        energy = np.sum(part**2)
        shares.append(float(color / energy) if energy else 0.0)
    return shares


def grid(kernel: Float[np.ndarray, 'h w c kernels']) -> Float[np.ndarray, 'rows columns 3']:
    """Arranges kernels as an image from 0 to 1; a single channel becomes gray.

    A row has at most 16 kernels, with a white pixel between them. Each kernel is scaled so that
    its minimum over all channels is 0 and its maximum is 1. A kernel is gray if its weights are equal or not finite.
    """
    height, width, _, count = kernel.shape
    columns = math.ceil(count / math.ceil(count / _COLUMNS))
    least, greatest = kernel.min((0, 1, 2)), kernel.max((0, 1, 2))
    fine = np.isfinite(kernel).all((0, 1, 2)) & (least < greatest)
    least, greatest = np.where(fine, least, 0), np.where(fine, greatest, 1)
    scaled = np.where(fine, (kernel - least) / (greatest - least), 0.5)
    return style.tile(np.broadcast_to(scaled, (height, width, 3, count)), columns, gap=1, background=1.0)


@style.drawing
def draw(kernel: Float[np.ndarray, 'h w c kernels'], towers: int) -> Figure:
    """Draws each tower's kernels and their saturation() as in figure 3 of the paper, with the first tower on top.

    Args:
      kernel: kernels of conv1, with 3 channels (red, green, blue) or 1.
      towers: number of equal parts of the kernels.
    """
    sheets = [grid(part) for part in np.split(kernel, towers, -1)]
    rows, columns = sheets[0].shape[:2]
    # A whole number of pixels per weight at style.DPI, so that all weights are squares of one size.
    pixels = int(min((style.WIDTH - 2 * _LEFT) * style.DPI / columns, _CELL * style.DPI / max(kernel.shape[:2])))
    pixels = max(pixels, 1)
    across, down = columns * pixels / style.DPI, rows * pixels / style.DPI
    block = _HEADING + down + _GAP
    figure = style.new_figure(style.WIDTH, round((towers * block + _BELOW) * style.DPI) / style.DPI)
    top = figure.get_size_inches()[1]
    for i, (sheet, share) in enumerate(zip(sheets, saturation(kernel, towers), strict=True)):
        color = f', color saturation {share:.2f}' if kernel.shape[2] > 1 else ''
        name = f'tower {i + 1}: ' if towers > 1 else ''
        count = kernel.shape[-1] // towers
        heading = f'{name}{count} kernel{"s" * (count > 1)}{color}'
        bottom = round((top - i * block - _HEADING - down) * style.DPI) / style.DPI
        axes = style.blank_axes(figure, _LEFT, bottom, across, down)
        axes.set_title(heading, loc='left', pad=3)
        axes.imshow(np.repeat(np.repeat(sheet, pixels, 0), pixels, 1), interpolation='none', aspect='auto')
    figure.text(
        _LEFT / style.WIDTH,
        0.1 / top,
        f'{kernel.shape[0]}\u00d7{kernel.shape[1]} weights; each kernel is scaled from its minimum to its maximum.'
        + (' Saturation: 0 is gray, 0.67 untrained, 1 pure color.' if kernel.shape[2] > 1 else ''),
    )
    return figure
