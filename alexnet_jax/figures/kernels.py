"""The kernels of the first layer as figure 3 of the paper shows them, and how much colour each tower's have."""

import math

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.figures import style

_COLUMNS = 16  # at most, as in the paper
_CELL = 0.8  # inches a kernel takes at most
_LEFT, _HEADING, _GAP, _BELOW = 0.1, 0.28, 0.08, 0.26  # inches


def saturation(kernel: np.ndarray, towers: int) -> list[float]:
    """How much colour the kernels of each tower see: the share of their energy that is not common to the channels.

    With k[x, y, c, n] a tower's kernels and m[x, y, n] their mean over the channels c it is
    sum (k - m)^2 / sum k^2 over all of x, y, c and n. 0: grey, all channels have the same weights; 1: colours only, the
    weights of the channels cancel each other and a grey picture gives nothing. Independent weights, such as those
    before training, give 2/3 with three channels. Large kernels count for more than faint ones.

    Args:
      kernel: (height, width, channels, kernels) float, the towers side by side.
      towers: into how many equal parts the kernels are divided.

    Returns:
      One number from 0 to 1 for each tower, 0 where all its weights are 0, NaN where one is not finite.
    """
    shares = []
    for part in np.split(kernel.astype(np.float64), towers, -1):
        with np.errstate(invalid='ignore'):  # weights that are not finite: the share is no number
            colour = np.sum((part - part.mean(2, keepdims=True)) ** 2)
        energy = np.sum(part**2)
        shares.append(float(colour / energy) if energy else 0.0)
    return shares


def grid(kernel: np.ndarray) -> np.ndarray:
    """One tower's kernels (h, w, C, N) as a picture (rows * (h + 1) - 1, columns * (w + 1) - 1, 3) float, 0 to 1.

    At most 16 are in a row, with a white pixel between them. Each is scaled from its own least weight, of all channels,
    to its greatest; one whose weights are all the same is grey, and so is one with a weight that is not finite.
    """
    height, width, _, count = kernel.shape
    rows = math.ceil(count / _COLUMNS)
    columns = math.ceil(count / rows)
    least, greatest = kernel.min((0, 1, 2)), kernel.max((0, 1, 2))
    fine = np.isfinite(kernel).all((0, 1, 2)) & (least < greatest)
    least, greatest = np.where(fine, least, 0), np.where(fine, greatest, 1)
    scaled = np.where(fine, (kernel - least) / (greatest - least), 0.5)
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    for i in range(count):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = scaled[..., i]
    return sheet


@style.drawing
def draw(kernel: np.ndarray, towers: int) -> Figure:
    """Figure 3 of the paper: the first tower's kernels above, the others below, with the saturation() of each.

    Args:
      kernel: of conv1, (height, width, channels, kernels) float32; channels are 3, shown as red, green and blue, or 1.
      towers: that share out the kernels.
    """
    sheets = [grid(part) for part in np.split(kernel, towers, -1)]
    rows, columns = sheets[0].shape[:2]
    # Whole pixels for a weight at style.DPI, so that all are squares of one size.
    pixels = int(min((style.WIDTH - 2 * _LEFT) * style.DPI / columns, _CELL * style.DPI / max(kernel.shape[:2])))
    pixels = max(pixels, 1)
    across, down = columns * pixels / style.DPI, rows * pixels / style.DPI
    block = _HEADING + down + _GAP
    figure = style.new_figure(style.WIDTH, round((towers * block + _BELOW) * style.DPI) / style.DPI)
    top = figure.get_size_inches()[1]
    for i, (sheet, share) in enumerate(zip(sheets, saturation(kernel, towers), strict=True)):
        colour = f', colour saturation {share:.2f}' if kernel.shape[2] > 1 else ''
        name = f'tower {i + 1}: ' if towers > 1 else ''
        count = kernel.shape[-1] // towers
        heading = f'{name}{count} kernel{"s" * (count > 1)}{colour}'
        bottom = round((top - i * block - _HEADING - down) * style.DPI) / style.DPI
        axes = style.blank_axes(figure, _LEFT, bottom, across, down)
        axes.set_title(heading, loc='left', pad=3)
        axes.imshow(np.repeat(np.repeat(sheet, pixels, 0), pixels, 1), interpolation='none', aspect='auto')
    figure.text(
        _LEFT / style.WIDTH,
        0.1 / top,
        f'{kernel.shape[0]}\u00d7{kernel.shape[1]} weights, each kernel scaled from its own minimum to its maximum.'
        + (' Saturation: 0 grey, 0.67 untrained, 1 colours only.' if kernel.shape[2] > 1 else ''),
    )
    return figure
