"""The network's architecture as in figure 2 of the paper: towers, shapes, connections, and the cost of each layer."""

import dataclasses

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon

from alexnet_jax.config import ModelConfig
from alexnet_jax.plots import style
from alexnet_jax.shapes import POOLS, LayerShape, layer_table, pool_window

MAX_TOWERS = 4  # maximum number of towers drawn
# Inches: the widths of a layer's column and of the row names, the heights of a tower, the title and a line.
_SLOT, _NAMES, _TOWER, _TITLE, _LINE = 0.72, 0.7, 1.5, 0.45, 0.14
_HIGHEST, _WIDEST, _BACK = 0.78, 0.3, 0.3  # of boxes, in inches; their depth offset relative to the height
_COLUMN = (0.09, 0.05)  # of dense layers: width and depth offset
_POWER = 0.4  # exponent of the drawn sizes; without it the last maps would be invisible beside the image

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Box:
    """A layer's maps or units in one tower: lower left corner and size of the front, and the offset of its depth."""

    x: float
    y: float
    width: float
    height: float
    back: float

    def on_side(self, across: float, up: float) -> Point:
        """Returns a point of the right side, the plane of the pixels; both coordinates are from 0 to 1."""
        return self.x + self.width + across * self.back, self.y + up * self.height + across * self.back

    @property
    def entry(self) -> Point:
        """The end point of incoming arrows, at the height where outgoing ones begin."""
        return self.x, self.y + (self.height + self.back) / 2


@style.drawing
def draw(model: ModelConfig, crop_size: int, channels: int, title: str) -> Figure:
    """Draws the network as in figure 2 of the paper: one row of boxes per tower, arrows, and a table below.

    The height and depth of a box represent the map size, and its width the number of maps, each to the power of 0.4.
    The window on the side of a box is the receptive field of one kernel of the next layer. Dense layers are columns. At
    most 4 towers are drawn.

    Args:
      model: `model` of a resolved configuration.
      crop_size: height and width of the images, in pixels.
      channels: number of channels of the images.
      title: the name of the network.
    """
    table = layer_table(model, crop_size, channels)
    followers = [_followers(model, table, i) for i in range(len(table))]
    kernels = [_kernel(layer) for layer in table]
    towers = min(model.towers, MAX_TOWERS)
    tower = _TOWER if towers <= 2 else 0.8 * _TOWER
    lines = 3 + max(map(len, kernels)) + max(map(len, followers)) + 1.5
    width, height = _NAMES + (len(table) + 1) * _SLOT, _TITLE + towers * tower + lines * _LINE + 0.15
    figure = style.new_figure(max(width, 4.6), height)
    axes = style.blank_axes(figure, 0, 0, *figure.get_size_inches())
    axes.set(xlim=(0, figure.get_size_inches()[0]), ylim=(0, height))
    _draw_title(axes, title, table, model.towers, height)
    boxes = _draw_boxes(axes, model, table, (crop_size, crop_size, channels), tower, height - _TITLE)
    _draw_windows(axes, table, boxes, crop_size)
    _draw_arrows(axes, table, boxes)
    rows = {
        '': [[layer.name] for layer in table],
        'kernels': kernels,
        'followed by': followers,
        'parameters': [[_short(layer.parameters)] for layer in table],
        'multiply-adds': [[_short(layer.multiply_adds)] for layer in table],
    }
    _draw_table(axes, rows, height - _TITLE - towers * tower - 0.05)
    return figure


def _draw_title(axes: Axes, title: str, table: list[LayerShape], towers: int, top: float) -> None:
    parameters, work = (sum(getattr(layer, name) for layer in table) for name in ('parameters', 'multiply_adds'))
    text = f'{parameters:,} parameters, {work:,} multiply-adds per image'
    if towers > 1:
        text += '; dashed: features of the other tower'
    if towers > MAX_TOWERS:
        text += f'; {MAX_TOWERS} of {towers} towers are drawn'
    axes.text(0.1, top - 0.1, style.plain(title, bold=True), fontsize=style.LARGE, weight='bold', va='top')
    axes.text(0.1, top - 0.28, text, va='top')


def _followers(model: ModelConfig, table: list[LayerShape], i: int) -> list[str]:
    """Returns the operations after table[i], one line each."""
    layer, window = table[i], pool_window(model)
    names = {
        'activation': {'relu': 'ReLU'}.get(model.activation, model.activation),
        'lrn': 'LRN' if model.towers == 1 or not model.lrn_across_towers else 'LRN, all',
        'spatial_lrn': f'LRN {model.spatial_lrn_size}\u00d7{model.spatial_lrn_size}',
        'batch_norm': 'batch norm',
        'pool': f'pool {window}\u00d7{window}',
        'ceil_pool': f'pool {window}\u00d7{window}',
    }
    if i + 1 == len(table):
        return ['softmax']
    lines = [names[op] for op in layer.spec.ops]
    if layer.pooled != layer.output:
        behind = max(j for j, op in enumerate(layer.spec.ops) if op in POOLS) + 1
        lines.insert(behind, f'\u2192 {_shape(layer.pooled[:2])}')
    if model.dropout and table[i + 1].spec.dropout:
        lines.append('dropout')
    return lines


def _kernel(layer: LayerShape) -> list[str]:
    """Describes the weights of a layer, in up to four lines."""
    spec = layer.spec
    if not spec.kernel:
        return [_shape(layer.kernel)]
    inputs = layer.kernel[2] // (spec.kernel**2 if spec.locally_connected else 1)
    lines = [_shape((spec.kernel, spec.kernel, inputs)), f'{spec.features} kernels']
    if spec.stride > 1:
        lines.append(f'stride {spec.stride}')
    return [*lines, 'at each pixel'] if spec.locally_connected else lines


def _shape(sizes: tuple[int, ...]) -> str:
    return '\u00d7'.join(map(str, sizes))


def _short(number: int) -> str:
    """Formats a number; numbers from 1e9 on are abbreviated to the width of a column."""
    return f'{number:,}' if number < 1e9 else f'{number / 1e9:.2f}e9'


def _draw_boxes(
    axes: Axes, model: ModelConfig, table: list[LayerShape], image: tuple[int, int, int], tower: float, top: float
) -> list[list[Box]]:
    """Draws boxes with shapes below: one for the image, one per layer and tower, and one for logits of all towers."""
    shapes = [image, *((*layer.output[:-1], layer.output[-1] // model.towers) for layer in table)]
    whole = [0]
    if table[-1].spec.cross_tower:
        whole.append(len(table))
        shapes[-1] = table[-1].output
    most_maps = max(shape[-1] for shape in shapes if len(shape) == 3)
    most_units = max(shape[-1] for shape in shapes if len(shape) == 1)
    room = tower / _TOWER * _HIGHEST
    towers = min(model.towers, MAX_TOWERS)
    boxes: list[list[Box]] = []
    for i, shape in enumerate(shapes):
        if len(shape) == 3:
            height, width = room * (shape[0] / image[0]) ** _POWER, _WIDEST * (shape[-1] / most_maps) ** _POWER
            back, color = _BACK * height, style.SKY if i else style.GRAY
        else:
            height, (width, back), color = room * (shape[0] / most_units) ** _POWER, _COLUMN, style.ORANGE
        middle, name = _NAMES + (i + 0.5) * _SLOT, table[i - 1].name if i else 'image'
        boxes.append([])
        for j in [(towers - 1) / 2] if i in whole else range(towers):
            center = top - (j + 0.43) * tower
            box = Box(middle - (width + back) / 2, center - (height + back) / 2, width, height, back)
            gid = f'{name}:{len(boxes[i])}'
            _draw_box(axes, box, color, f'box:{gid}')
            label = center - 0.5 * tower + 0.16
            text = axes.text(middle, label, _shape(shape), ha='center', va='center', gid=f'shape:{gid}', zorder=5)
            text.set_path_effects([*style.OUTLINE])
            boxes[i].append(box)
    if model.towers > 1:
        for j in range(towers):
            axes.text(0.1, top - (j + 0.43) * tower, f'tower {j + 1}', va='center')
    return boxes


def _draw_box(axes: Axes, box: Box, color: str, gid: str) -> None:
    """Draws the front, top and side in different shades. The front has the gid `gid`."""
    left, right, low, high = box.x, box.x + box.width, box.y, box.y + box.height
    faces: list[tuple[list[Point], float, str | None]] = [
        ([(left, low), (right, low), (right, high), (left, high)], 0.45, gid),
        ([(left, high), (right, high), box.on_side(1, 1), (left + box.back, high + box.back)], 0.2, None),
        ([box.on_side(0, 0), box.on_side(1, 0), box.on_side(1, 1), box.on_side(0, 1)], 0.7, None),
    ]
    for corners, strength, name in faces:
        shade = [1 - strength * (1 - part) for part in to_rgb(color)]
        axes.add_patch(Polygon(corners, facecolor=shade, edgecolor='black', linewidth=0.5, gid=name, zorder=2))


def _draw_windows(axes: Axes, table: list[LayerShape], boxes: list[list[Box]], crop_size: int) -> None:
    """Draws the receptive field of one kernel of the next convolution on the side of each box, in pooled pixels."""
    for i, layer in enumerate(table):
        if layer.spec.kernel:
            pixels = table[i - 1].pooled[0] if i else crop_size
            share = min(layer.spec.kernel / pixels, 1)
            low, high = (1 - share) / 2, (1 + share) / 2
            for box in boxes[i]:
                corners = [box.on_side(*corner) for corner in ((low, low), (high, low), (high, high), (low, high))]
                axes.add_patch(Polygon(corners, facecolor='black', linewidth=0, gid=f'window:{layer.name}', zorder=3))


def _draw_arrows(axes: Axes, table: list[LayerShape], boxes: list[list[Box]]) -> None:
    """Draws arrows from each box to the boxes that take its output. Arrows across towers are dashed."""
    for layer, sources, targets in zip(table, boxes, boxes[1:], strict=False):
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                apart = i != j and len(sources) == len(targets)
                if apart and not layer.spec.cross_tower:
                    continue
                arrow = FancyArrowPatch(
                    source.on_side(0.5, 0.5),
                    target.entry,
                    arrowstyle='-|>',
                    mutation_scale=5,
                    shrinkA=0,
                    shrinkB=0,
                    color=style.VERMILLION if apart else style.BLACK,
                    linewidth=0.7,
                    linestyle=(0, (3, 2)) if apart else '-',
                    gid=f'arrow:{layer.name}:{i}:{j}',
                    zorder=4,
                )
                axes.add_patch(arrow)


def _draw_table(axes: Axes, rows: dict[str, list[list[str]]], top: float) -> None:
    """Draws a table with a column below each layer and the names of the rows at the left."""
    line = top - _LINE / 2
    for name, cells in rows.items():
        axes.text(0.1, line, name, va='center')
        for i, cell in enumerate(cells):
            for j, text in enumerate(cell):
                place = (_NAMES + (i + 1.5) * _SLOT, line - j * _LINE)
                axes.text(*place, text, ha='center', va='center', weight='normal' if name else 'bold')
        line -= max(map(len, cells)) * _LINE + _LINE / 4
        axes.plot([0.1, _NAMES + (len(cells) + 1) * _SLOT], [line + 0.6 * _LINE] * 2, color=style.GRAY, linewidth=0.4)
