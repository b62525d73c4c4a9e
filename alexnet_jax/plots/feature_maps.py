"""The feature maps of one layer for an image, grouped by tower."""

import math

import numpy as np
from jaxtyping import Float, Float64, UInt8
from matplotlib.figure import Figure

from alexnet_jax.plots import style

_PICTURE, _LEFT, _GAP = 1.1, 0.1, 0.2  # inches: the image's side, the left margin, the gap before the maps
_HEADING, _BELOW, _CELL = 0.28, 0.55, 0.55
_COLORS = 'viridis'  # its lightness grows monotonically, so it can be printed in gray


def grid(maps: Float[np.ndarray, 'h w c'], columns: int) -> Float64[np.ndarray, 'rows columns']:
    """Arranges maps in rows of `columns`, separated by 1 pixel of NaN, or 3 pixels for maps of 55 pixels."""
    return style.tile(maps, columns, gap=max(1, round(len(maps) / 18)), background=np.nan)


def _columns(count: int) -> int:
    """Returns the number of maps per row: up to 16, or up to 64 for more than 256 maps, to limit the height."""
    most = 16 if count <= 256 else 64
    return math.ceil(count / math.ceil(count / most))


@style.drawing
def draw(image: UInt8[np.ndarray, 's s c'], maps: Float[np.ndarray, 'h w maps'], layer: str, towers: int) -> Figure:
    """Draws the image and the feature maps of `layer`, with a common color scale and its color bar.

    Args:
      image: the network's input before the mean is subtracted, with 3 channels or 1.
      maps: the feature maps; the units of a dense layer are maps of one pixel, (1, 1, units).
      layer: the name of the layer.
      towers: number of equal, consecutive parts of the maps.
    """
    parts = np.split(maps, towers, -1)
    columns = _columns(parts[0].shape[-1])
    sheets = [grid(part, columns) for part in parts]
    rows, width = sheets[0].shape
    room = style.WIDTH - 2 * _LEFT - _PICTURE - _GAP
    scale = min(room / width, _CELL / max(maps.shape[:2]))
    across, down = width * scale, rows * scale
    block = _HEADING + down
    height = max(towers * block, _HEADING + _PICTURE) + _BELOW
    figure = style.new_figure(style.WIDTH, height)
    shown = style.blank_axes(figure, _LEFT, height - _HEADING - _PICTURE, _PICTURE, _PICTURE)
    shown.imshow(style.picture(image), aspect='auto')
    shown.set_title('image', loc='left', pad=3)
    finite = maps[np.isfinite(maps)]
    greatest = float(np.abs(finite).max()) if finite.size else 0.0
    least = -greatest if finite.size and finite.min() < 0 else 0.0
    for i, sheet in enumerate(sheets):
        axes = style.blank_axes(figure, _LEFT + _PICTURE + _GAP, height - i * block - block, across, down)
        mappable = axes.imshow(sheet, _COLORS, aspect='auto', interpolation='nearest', vmin=least, vmax=greatest or 1.0)
        size = 'units' if maps.shape[:2] == (1, 1) else f'maps of {maps.shape[0]}\u00d7{maps.shape[1]}'
        tower = f', tower {i + 1}' if towers > 1 else ''
        axes.set_title(f'{layer}{tower}: {parts[0].shape[-1]} {size}', loc='left', pad=3)
    bar = figure.add_axes(((_LEFT + _PICTURE + _GAP) / style.WIDTH, 0.32 / height, 1.5 / style.WIDTH, 0.09 / height))
    figure.colorbar(mappable, cax=bar, orientation='horizontal')
    figure.text((_LEFT + _PICTURE + _GAP + 1.65) / style.WIDTH, 0.32 / height, 'all maps share one scale')
    return figure
