"""Figures: the numbers that are drawn, against NumPy loops and hand numbers, the layout of the text, and the files."""

import itertools
import json

import matplotlib
import numpy as np
import pytest
from helpers import run_command
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle
from matplotlib.text import Text

from alexnet_jax.config import ConfigError, apply_overrides, default_config, preset_config, resolve
from alexnet_jax.plots import confusion, curves, feature_maps, kernels, neighbors, network, predictions, style
from alexnet_jax.presets import PRESETS

ODD_NAMES = [
    'cost $5 and $x_{',
    'under_score^2 %d',
    'two\nlines\tand  more',
    '中文 крот \U0001d5a0',
    '\udcff\x00\x1b',
    '$\\frac{1}{$',
    '',
]


def image(seed=0, side=20, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (side, side, channels), np.uint8)


def written(text):
    return text.get_text().replace('\u00d7', 'x')


def texts(figure):
    return [written(text) for text in figure.findobj(Text) if text.get_text()]


def shown_texts(figure):
    """Returns the visible texts, without the labels of ticks beyond the ends of an axis."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not low <= tick.get_loc() <= high or not axes.axison:
                    hidden |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in found if text not in hidden]


def check_print(figure):
    """The figure fits a page, nothing is cut off, no two texts overlap, and letters have 7 points or more."""
    figure.canvas.draw()
    across, up = figure.get_size_inches()
    assert across <= 7.2 + 1e-9
    renderer = figure.canvas.get_renderer()
    left, bottom, right, top = figure.get_tightbbox(renderer).extents
    assert min(left, bottom) >= -0.01
    assert right <= across + 0.01
    assert top <= up + 0.01
    shown = shown_texts(figure)
    assert all(text.get_fontsize() >= 7 for text in shown)
    boxes = [(text, text.get_window_extent(renderer).padded(-1)) for text in shown]
    for (one, box), (other, around) in itertools.combinations(boxes, 2):
        assert not box.overlaps(around), (one.get_text(), other.get_text())


# Kernels


def test_saturation_equals_hand_numbers():
    def saturation_of(*kernels_of_one_weight):
        return kernels.saturation(np.array(kernels_of_one_weight, np.float32).T[None, None], 1)[0]

    assert saturation_of((1, 1, 1)) == 0
    assert saturation_of((1, -1, 0)) == 1
    assert saturation_of((0, 2, 0)) == pytest.approx(2 / 3)
    assert saturation_of((0, 0, 0)) == 0
    assert saturation_of((1, 1, 1), (3, -3, 0)) == pytest.approx(18 / 21)  # Large weights contribute more.
    assert kernels.saturation(np.ones((2, 2, 1, 4), np.float32), 2) == [0, 0]


def test_saturation_matches_a_loop_for_each_tower():
    kernel = np.random.default_rng(1).normal(0.3, 1, (5, 4, 3, 6)).astype(np.float32)
    kernel[..., 3:] *= np.array([1, 0.2, 0.1], np.float32)[:, None]
    for tower, share in enumerate(kernels.saturation(kernel, 2)):
        color = energy = 0.0
        for y, x, n in itertools.product(range(5), range(4), range(3 * tower, 3 * tower + 3)):
            mean = sum(float(kernel[y, x, c, n]) for c in range(3)) / 3
            color += sum((float(kernel[y, x, c, n]) - mean) ** 2 for c in range(3))
            energy += sum(float(kernel[y, x, c, n]) ** 2 for c in range(3))
        assert share == pytest.approx(color / energy, rel=1e-6)


@pytest.mark.parametrize(
    ('shape', 'towers', 'columns'),
    [
        ((11, 11, 3, 96), 2, 16),
        ((11, 11, 3, 24), 2, 12),
        ((11, 11, 1, 34), 2, 9),
        ((5, 5, 3, 64), 1, 16),
        ((3, 3, 3, 40), 4, 10),
        ((7, 7, 3, 1), 1, 1),
    ],
)
def test_kernels_are_scaled_from_minimum_to_maximum(shape, towers, columns):
    """Each weight is a square of equal pixels; each kernel is scaled by itself; white lines separate the kernels."""
    kernel = np.random.default_rng(2).normal(size=shape).astype(np.float32) * np.arange(1, shape[-1] + 1)
    figure = kernels.draw(kernel, towers)
    height, width, _, count = shape
    assert len(figure.axes) == towers
    for tower, axes in enumerate(figure.axes):
        shown = np.asarray(axes.images[0].get_array())
        size = shown.shape[1] // (columns * (width + 1) - 1)
        sheet = shown[::size, ::size]
        np.testing.assert_array_equal(np.repeat(np.repeat(sheet, size, 0), size, 1), shown)
        for i in range(count // towers):
            one = kernel[..., tower * count // towers + i].astype(np.float64)
            expected = (one - one.min()) / (one.max() - one.min())
            y, x = i // columns * (height + 1), i % columns * (width + 1)
            found = sheet[y : y + height, x : x + width]
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)
            assert (sheet[y : y + height, x + width : x + width + 1] == 1).all()
    check_print(figure)


def test_towers_are_apart_with_their_saturation():
    kernel = np.random.default_rng(3).normal(size=(11, 11, 3, 24)).astype(np.float32)
    kernel[..., :12] = kernel[:, :, :1, :12]
    figure = kernels.draw(kernel, 2)
    first, second = figure.axes
    assert first.get_position().y0 > second.get_position().y1
    share = kernels.saturation(kernel, 2)[1]
    for axes, number in ((first, '0.00'), (second, f'{share:.2f}')):
        assert f'saturation {number}' in axes.get_title(loc='left')
    assert not any('saturation' in text.lower() for text in texts(kernels.draw(kernel[:, :, :1], 2)))


@pytest.mark.parametrize('value', [0.0, -3.0, np.nan, np.inf])
def test_kernels_without_a_range_are_gray(value):
    kernel = np.random.default_rng(4).normal(size=(5, 5, 3, 2)).astype(np.float32)
    kernel[..., 0] = value if np.isfinite(value) else kernel[..., 0]
    kernel[2, 1, 0, 0] = value
    sheet = kernels.grid(kernel)
    assert (sheet[:, :5] == 0.5).all()
    assert sheet[:, 6:].min() == 0
    assert sheet[:, 6:].max() == 1
    kernels.draw(kernel, 1)


# Feature maps


@pytest.mark.parametrize(('side', 'gap'), [(1, 1), (6, 1), (13, 1), (27, 2), (55, 3)])
def test_feature_maps_are_in_rows_on_one_scale(side, gap):
    values = np.random.default_rng(5).normal(size=(side, side, 40)).astype(np.float32) ** 2
    figure = feature_maps.draw(image(), values, 'conv3', 2)
    picture, first, second, bar = figure.axes
    np.testing.assert_array_equal(picture.images[0].get_array(), image())
    for tower, axes in enumerate((first, second)):
        sheet = axes.images[0].get_array().filled(np.nan)
        assert sheet.shape == (2 * side + gap, 10 * side + 9 * gap)
        assert axes.images[0].get_clim() == (0, values.max())
        for i in range(20):
            top, left = i // 10 * (side + gap), i % 10 * (side + gap)
            np.testing.assert_array_equal(sheet[top : top + side, left : left + side], values[..., 20 * tower + i])
        assert np.isnan(sheet).sum() == sheet.size - 20 * side * side
    assert bar.get_xlim() == (0, pytest.approx(values.max()))
    check_print(figure)


def test_signed_and_non_finite_feature_maps():
    values = np.array([-1, 3], np.float32).reshape(1, 1, 2)
    figure = feature_maps.draw(image(channels=1), values, 'fc8', 1)
    assert figure.axes[1].images[0].get_clim() == (-3, 3)  # Zero is in the middle of the scale.
    assert 'fc8: 2 units' in texts(figure)
    for odd in (np.zeros((3, 3, 2)), np.full((3, 3, 2), np.nan), np.array([[[np.inf, 1]]])):
        check_print(feature_maps.draw(image(), odd.astype(np.float32), 'conv5', 2))


# Predictions and neighbors


def test_prediction_bars_have_the_probabilities():
    top = [('cat', 0.6), ('dog', 0.25), ('mite', 0.1), ('van', 0.04), ('jay', 0.01)]
    shown = [
        predictions.Prediction(image(), 'one.png', 'dog', top),
        predictions.Prediction(image(channels=1), 'two.png', None, top[:2]),
        predictions.Prediction(image(), 'three.png', 'a class that is not among them', top),
    ]
    figure = predictions.draw(shown)
    for given, bars in zip(shown, figure.axes[1::2], strict=True):
        assert [bar.get_width() for bar in bars.patches] == [probability for _, probability in given.top]
        marked = [name for bar, (name, _) in zip(bars.patches, given.top, strict=True) if bar.get_hatch()]
        assert marked == (['dog'] if given.label == 'dog' else [])
        assert [text.get_text() for text in bars.texts][::2] == [name for name, _ in given.top]
    assert [text.get_text() for text in figure.axes[1].texts][1::2] == ['60 %', '25 %', '10 %', '4 %', '1 %']
    bold = [text.get_text() for text in figure.findobj(Text) if text.get_weight() == 'bold']
    assert bold[0] == 'dog'
    assert bold[1].startswith('a class')
    assert bold[1].endswith('\u2026')
    check_print(figure)


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 4, 9])
def test_predictions_and_neighbors_with_long_names(count):
    long = 'German short-haired pointer, that is a hunting dog of great endurance'
    top = [(long, 0.99), *((f'{long} {i}', 0.0) for i in range(3)), ('x', float('nan'))]
    check_print(predictions.draw([predictions.Prediction(image(), f'{long}.png', long, top)] * count))
    near = neighbors.Neighbors(image(), f'{long}.png', [image()] * 6, [long] * 6, [12345.678] * 6, long)
    check_print(neighbors.draw([near] * count))


def test_neighbors_show_distances_and_frame_the_class():
    found = [image(seed) for seed in range(1, 7)]
    labels = ['dog', 'cat', 'dog', 'dog', 'van', 'cat']
    distances = [0.0, 0.004, 1.5, 22.25, 333.0, 4444.4]
    known = neighbors.Neighbors(image(), 'file.png', found, labels, distances, 'dog')
    unknown = neighbors.Neighbors(image(9), 'other.png', found[:2], labels[:2], distances[:2])
    figure = neighbors.draw([known, unknown])
    query, *rest = figure.axes[:7]
    np.testing.assert_array_equal(query.images[0].get_array(), known.query)
    numbers = ['0.00', '4.0e-03', '1.50', '22.25', '333.00', '4444.40']
    for axes, picture, label, distance in zip(rest, found, labels, numbers, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture)
        assert [text.get_text() for text in axes.texts] == [label, distance]
        assert [type(patch) for patch in axes.patches] == ([Rectangle] if label == 'dog' else [])
    places = [axes.get_position() for axes in (query, *rest)]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(places))
    assert [len(axes.patches) for axes in figure.axes[7:]] == [0, 0, 0]
    assert figure.axes[7].get_position().y1 < query.get_position().y0
    check_print(figure)


@pytest.mark.parametrize(('module', 'most'), [(predictions, 100), (neighbors, 50)])
def test_number_of_images_in_a_figure_is_limited(module, most):
    for rows in ([], [None] * (most + 1)):
        with pytest.raises(ValueError, match=f'{len(rows)} .* 1 to {most}'):
            module.draw(rows)


# The network


def preset(name):
    return resolve(preset_config(name))


def draw_network(config, title='net'):
    return network.draw(config.model, config.data.crop_size, config.data.channels, title)


def arrows(figure):
    """(layer, from tower, to tower) of each arrow."""
    gids = [patch.get_gid().split(':')[1:] for patch in figure.findobj(FancyArrowPatch)]
    return sorted((layer, int(source), int(target)) for layer, source, target in gids)


CROSSING = [(0, 1), (1, 0)]
STRAIGHT = [(0, 0), (1, 1)]
ARROWS = {
    'paper': {'conv3': CROSSING, 'fc6': CROSSING, 'fc7': CROSSING},
    'no_exchange': {},
    'half': None,
    'cifar10_11pct': None,
}


@pytest.mark.parametrize('name', ARROWS)
def test_arrows_show_the_inputs_of_each_tower(name):
    figure = draw_network(preset(name))
    layers = ['conv1', 'conv2', 'conv3', 'conv4', *([] if 'cifar' in name else ['conv5', 'fc6', 'fc7']), 'fc8']
    wanted = []
    for layer in layers:
        if ARROWS[name] is None:
            wanted.append((layer, 0, 0))
        elif layer in ('conv1', 'fc8'):  # from the one image, to the one column of logits
            wanted += [(layer, 0, 0), (layer, *((0, 1) if layer == 'conv1' else (1, 0)))]
        else:
            wanted += [(layer, *pair) for pair in STRAIGHT + ARROWS[name].get(layer, [])]
    assert arrows(figure) == sorted(wanted)


def boxes(figure):
    """By name and tower the bounds in inches of a box's front."""
    found = {}
    for patch in figure.findobj(Polygon):
        if patch.get_gid() and patch.get_gid().startswith('box:'):
            _, name, tower = patch.get_gid().split(':')
            corners = patch.get_xy()
            found[name, int(tower)] = (*corners.min(0), *corners.max(0))
    return found


def test_boxes_of_the_paper_are_in_two_rows_with_shapes():
    figure = draw_network(preset('paper'), 'the $paper_')
    found = boxes(figure)
    names = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7']
    assert set(found) == {('image', 0), ('fc8', 0), *itertools.product(names, (0, 1))}
    for name in names:
        assert found[name, 0][0] == found[name, 1][0]
        assert found[name, 0][1] > found[name, 1][3] + 0.3  # the first tower above, with a gap
    order = [found[name, 0][0] for name in ('image', *names, 'fc8')]
    assert order == sorted(order)
    middle = (found['image', 0][1] + found['image', 0][3]) / 2
    assert found['conv1', 0][1] > middle > found['conv1', 1][3]
    height = {name: found[name, 0][3] - found[name, 0][1] for name in ('image', *names)}
    assert height['image'] > height['conv1'] > height['conv2'] > height['conv3'] == height['conv5']
    assert height['conv1'] / height['image'] == pytest.approx((55 / 224) ** 0.4)
    width = {name: found[name, 0][2] - found[name, 0][0] for name in ('conv1', 'conv3')}
    assert width['conv1'] / width['conv3'] == pytest.approx((48 / 192) ** 0.4)
    shapes = {text.get_gid(): written(text) for text in figure.findobj(Text) if text.get_gid()}
    expected = ['55x55x48', '27x27x128', '13x13x192', '13x13x192', '13x13x128', '2048', '2048']
    for name, shape in zip(names, expected, strict=True):
        assert shapes[f'shape:{name}:0'] == shapes[f'shape:{name}:1'] == shape
    assert shapes['shape:image:0'] == '224x224x3'
    assert shapes['shape:fc8:0'] == '1000'
    labels = texts(figure)
    assert 'the $paper_' in labels
    assert {'11x11x3', '3x3x256', '9216x4096', '34,944', '37,752,832', '105,415,200'} <= set(labels)


def test_arrows_begin_and_end_at_their_boxes():
    figure = draw_network(preset('paper'))
    found = boxes(figure)
    order = ['image', 'conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    for arrow in figure.findobj(FancyArrowPatch):
        _, layer, source, target = arrow.get_gid().split(':')
        corners = arrow.get_path().vertices
        begin, end = corners[0], corners[corners[:, 0].argmax()]
        before = found[order[order.index(layer) - 1], int(source)]
        after = found[layer, int(target)]
        assert before[2] < begin[0] < before[2] + 0.4
        assert before[1] < begin[1] < before[3] + 0.4
        assert end[0] == pytest.approx(after[0], abs=0.02)
        assert after[1] < end[1] < after[3]


def window(figure, name):
    """Height of the first window for layer `name` and of the side that it is on, in inches."""
    corners = next(patch.get_xy() for patch in figure.findobj(Polygon) if patch.get_gid() == f'window:{name}')
    return corners[3, 1] - corners[0, 1]


def test_windows_have_the_size_of_the_kernels():
    figure = draw_network(preset('paper'))
    found = boxes(figure)
    for name, before, share in (('conv1', 'image', 11 / 224), ('conv2', 'conv1', 5 / 27), ('conv3', 'conv2', 3 / 13)):
        side = found[before, 0][3] - found[before, 0][1]
        assert window(figure, name) == pytest.approx(share * side)
    assert sum((patch.get_gid() or '').startswith('window') for patch in figure.findobj(Polygon)) == 1 + 4 * 2


def table(figure, name):
    """By layer, the lines of the row `name` beneath the boxes."""
    found = figure.findobj(Text)
    first = {text.get_text(): text for text in found if text.get_weight() == 'bold' and text.get_ha() == 'center'}
    rows = ['kernels', 'followed by', 'parameters', 'multiply-adds']
    heights = {text.get_text(): text.get_position()[1] for text in found if text.get_text() in rows}
    below = [height for height in heights.values() if height < heights[name]]
    lowest = max(below, default=0)
    return {
        layer: [
            written(text)
            for text in found
            if text.get_position()[0] == head.get_position()[0] and lowest < text.get_position()[1] <= heights[name]
        ]
        for layer, head in first.items()
    }


def test_operations_after_each_layer_are_listed_in_order():
    rows = table(draw_network(preset('krizhevsky2012')), 'followed by')
    assert rows['conv1'] == ['LRN', 'pool 3x3', '→ 27x27', 'ReLU']
    assert rows['conv2'] == ['ReLU', 'LRN', 'LRN 5x5', 'pool 3x3', '→ 13x13']
    assert rows['conv3'] == ['ReLU']
    assert rows['conv5'] == ['pool 3x3', '→ 6x6', 'ReLU']
    assert rows['fc6'] == rows['fc7'] == ['ReLU', 'dropout']
    assert rows['fc8'] == ['softmax']
    assert table(draw_network(preset('torchvision')), 'followed by')['conv5'][-1] == 'dropout'
    assert table(draw_network(preset('caffenet')), 'followed by')['conv1'] == [
        'ReLU',
        'pool 3x3',
        '→ 27x27',
        'LRN, all',
    ]
    assert table(draw_network(preset('cifar10_13pct')), 'kernels')['conv3'] == ['3x3x64', '32 kernels', 'at each pixel']


def test_pooling_of_removed_layers_is_listed():
    config = default_config()
    apply_overrides(
        config, {'model.widths': (96, 0, 0, 0, 256, 0, 4096), 'model.dropout': 0.0, 'model.activation': 'tanh'}
    )
    figure = draw_network(resolve(config))
    assert {name for name, _ in boxes(figure)} == {'image', 'conv1', 'conv5', 'fc7', 'fc8'}
    rows = table(figure, 'followed by')
    assert rows['conv1'] == ['tanh', 'LRN', 'pool 3x3', 'pool 3x3', '→ 13x13']
    assert rows['fc7'] == ['tanh']


def test_logits_of_one_tower_are_drawn_in_that_tower():
    config = default_config()
    apply_overrides(config, {'model.cross_tower': ('conv3',)})
    figure = draw_network(resolve(config))
    assert {('fc8', 0), ('fc8', 1)} <= set(boxes(figure))
    assert [arrow for arrow in arrows(figure) if arrow[0] == 'fc8'] == [('fc8', 0, 0), ('fc8', 1, 1)]
    shapes = {text.get_gid(): written(text) for text in figure.findobj(Text)}
    assert shapes['shape:fc8:0'] == shapes['shape:fc8:1'] == '500'


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_drawn_completely(name):
    figure = draw_network(preset(name), name)
    check_print(figure)
    published = PRESETS[name].published
    costs = f'{published.parameters:,} parameters, {published.multiply_adds:,} multiply-adds per image'
    assert any(text.startswith(costs) for text in texts(figure))
    renderer = figure.canvas.get_renderer()
    around = [patch.get_window_extent(renderer) for patch in figure.findobj(Polygon)]
    labels = [text for text in figure.findobj(Text) if (text.get_gid() or '').startswith('shape')]
    assert labels
    for label in labels:
        extent = label.get_window_extent(renderer)
        assert not any(extent.overlaps(box) for box in around), label.get_text()


@pytest.mark.parametrize('towers', [3, 6])
def test_more_towers_are_drawn_up_to_four(towers):
    config = default_config()
    apply_overrides(config, {'model.towers': towers, 'model.widths': (96, 192, 384, 384, 192, 4032, 4032)})
    figure = draw_network(resolve(config))
    check_print(figure)
    drawn = min(towers, 4)
    assert sum(name == 'conv2' for name, _ in boxes(figure)) == drawn
    assert len([arrow for arrow in arrows(figure) if arrow[0] == 'conv3']) == drawn**2
    assert any(f'4 of {towers} towers' in text for text in texts(figure)) == (towers > 4)
    shapes = {text.get_gid(): written(text) for text in figure.findobj(Text)}
    assert shapes['shape:conv3:0'] == f'13x13x{384 // towers}'


# Curves


def line(step, split, loss, **values):
    values = {'top1_error': 0.5, 'top5_error': 0.25, 'learning_rate': 0.01} | values
    return {'step': step, 'split': split, 'loss': loss, **values}


def lines_of(figure, panel):
    """Returns (steps, values) of each line in a panel."""
    axes = figure.axes[list(curves.PANELS).index(panel)]
    return [(list(found.get_xdata()), list(found.get_ydata())) for found in axes.lines]


def test_curves_show_the_metrics(tmp_path):
    lines = [
        line(50, 'train', 2.5, top1_error=0.75),
        line(100, 'train', 1.5, learning_rate=0.01),
        line(100, 'validation', 1.75, top5_error=0.125, learning_rate=0.001),
        line(150, 'train', 1.25, learning_rate=0.001),
    ]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(each) + '\n' for each in lines))
    read = curves.read_metrics(str(tmp_path))
    assert read == lines
    figure = curves.draw({'run': read})
    assert lines_of(figure, 'loss') == [([50, 100, 150], [2.5, 1.5, 1.25]), ([100], [1.75])]
    assert lines_of(figure, 'top1_error')[0] == ([50, 100, 150], [75, 50, 50])
    assert lines_of(figure, 'top5_error')[1] == ([100], [12.5])
    assert lines_of(figure, 'learning_rate') == [([50, 100, 100, 150], [0.01, 0.01, 0.001, 0.001])]
    assert [axes.get_yscale() for axes in figure.axes] == ['linear'] * 3 + ['log']
    check_print(figure)


def test_truncated_or_missing_metrics(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(line(1, 'train', 1.0)) + '\n[1]\n{"step": 2}\n{"step": 3, "spl')
    assert [each['step'] for each in curves.read_metrics(str(tmp_path))] == [1]
    (tmp_path / 'metrics.jsonl').write_text('')
    assert curves.read_metrics(str(tmp_path)) == []
    with pytest.raises(ConfigError, match=r'none/metrics\.jsonl'):
        curves.read_metrics(str(tmp_path / 'none'))


def test_values_that_are_not_finite_are_gaps():
    lines = [line(1, 'train', float('nan')), line(2, 'train', 2.0, learning_rate=0), line(3, 'train', float('inf'))]
    lines += [{'step': 4, 'split': 'train'}, line(5, 'train', None, top1_error='x'), line(6, 'train', 1.0)]
    figure = curves.draw({'$\\odd_{name}\n中': lines, 'without any': []})
    steps, losses = lines_of(figure, 'loss')[0]
    assert steps == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(losses, [np.nan, 2, np.nan, np.nan, np.nan, 1])
    check_print(figure)
    check_print(curves.draw({'empty': []}))
    point = curves.draw({'short': lines[-1:]}).axes[0].lines[0]
    assert point.get_marker() == '.'  # A line with one point is invisible without a marker.
    with pytest.raises(ValueError, match='no run'):
        curves.draw({})


def test_eight_runs_have_different_colors_and_markers():
    each = {f'run {i}': [line(1, split, i) for split in ('train', 'validation')] for i in range(8)}
    figure = curves.draw(each)
    losses = figure.axes[0].lines
    assert len(losses) == 16
    assert len({found.get_color() for found in losses}) == 8
    assert len({found.get_marker() for found in losses} - {'.', '', 'None'}) == 8
    assert [text for text in texts(figure) if text.startswith('run')] == list(each)
    check_print(figure)


def test_runs_of_a_group_share_a_color_and_a_mean():
    random = np.random.default_rng(6)
    each = {
        f'{name}/seed_{i}': [line(step, 'validation', float(random.random())) for step in range(10, 40 + 10 * i, 10)]
        for name in ('a_$', 'b', 'c')
        for i in range(3)
    }
    figure = curves.draw(each)
    assert curves.groups(list(each)) == {name: [f'{name}/seed_{i}' for i in range(3)] for name in ('a_$', 'b', 'c')}
    for name in ('a_$', 'b', 'c'):
        expected = [np.mean([each[f'{name}/seed_{i}'][j]['loss'] for i in range(3)]) for j in range(3)]
        found = [values for steps, values in lines_of(figure, 'loss') if steps == [10, 20, 30]]
        assert any(np.allclose(values, expected, rtol=1e-12, atol=0) for values in found)
        assert f'{name}, mean of 3' in texts(figure)
    assert len({axis.get_color() for axis in figure.axes[0].lines}) == 3
    check_print(figure)


# Confusion


def test_confusion_counts_match_a_loop():
    random = np.random.default_rng(7)
    scores = random.integers(-3, 0, (300, 6)).astype(np.float32)  # with ties
    scores[:5] = np.nan
    scores[5:10, 2] = np.nan
    labels = random.integers(0, 6, 300).astype(np.int32)
    expected = np.zeros((6, 6), int)
    for row, label in zip(scores, labels, strict=True):
        others = [(-row[c], c) for c in range(6) if c != label and not np.isnan(row[c])]
        right = all(row[c] < row[label] for c in range(6) if c != label)
        if right or others:
            expected[label, label if right else min(others)[1]] += 1
    found = confusion.count(scores, labels)
    np.testing.assert_array_equal(found, expected)
    assert found.sum() == 295


def some_counts(classes, seed=8):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, (classes, classes)) * (random.random((classes, classes)) < 0.2)
    counts += np.diag(random.integers(1, 30, classes))
    if classes > 2:
        counts[2] = 0
    return counts


@pytest.mark.parametrize('classes', [1, 2, 16, 40])
def test_confusion_matrix_of_few_classes(classes):
    counts = some_counts(classes)
    names = [f'class {i} of {classes}' for i in range(classes)]
    figure = confusion.draw(counts, names)
    shares = figure.axes[0].images[0].get_array().filled(np.nan)
    for row in range(classes):
        total = counts[row].sum()
        expected = [100 * counts[row, column] / total if total else np.nan for column in range(classes)]
        np.testing.assert_allclose(shares[row], expected)
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        assert [text.get_text() for text in axis.get_ticklabels()] == names
    error = 100 * (1 - np.trace(counts) / counts.sum())
    assert any(f'{counts.sum():,} images' in text and f'{error:.1f} %' in text for text in texts(figure))
    numbers = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    if classes <= 20:
        assert numbers == {(j, i): str(counts[i, j]) for i in range(classes) for j in range(classes) if counts[i, j]}
    check_print(figure)


@pytest.mark.parametrize('classes', [41, 1000])
def test_confusion_bars_of_many_classes(classes):
    counts = some_counts(classes)
    names = [f'a class with a rather long name, number {i}' for i in range(classes)]
    figure = confusion.draw(counts, names)
    left, right = figure.axes
    errors = {i: 1 - counts[i, i] / counts[i].sum() for i in range(classes) if counts[i].sum()}
    hardest = sorted(errors, key=lambda i: -errors[i])[:20]
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [errors[i] for i in hardest])
    for text, i in zip(left.texts[1::2], hardest, strict=True):
        assert text.get_text() == f'{100 * errors[i]:.1f} % of {counts[i].sum():,}'
    pairs = [(i, j) for i in range(classes) for j in range(classes) if i != j and counts[i, j]]
    pairs = sorted(pairs, key=lambda pair: -counts[pair])[:20]
    assert confusion.confusions(counts, 20) == [(*pair, counts[pair]) for pair in pairs]
    assert [text.get_text() for text in right.texts][1::2] == [str(counts[pair]) for pair in pairs]
    check_print(figure)


def test_pairs_of_long_names_are_shortened_to_fit():
    long, short = 'a class with a rather long name that goes on and on and does not want to end', 'b'
    for true, taken in ((long, long), (long, short), (short, long), (short, short)):
        figure = confusion.draw(np.eye(41, dtype=int)[::-1], [true] * 20 + ['-'] + [taken] * 20)
        first, second = figure.axes[1].texts[0].get_text().split(' \u2192 ')
        for found, name in ((first, true), (second, taken)):
            assert found == name or (found.endswith('\u2026') and name.startswith(found[:-1]))
        check_print(figure)


def test_confusion_without_errors_or_images():
    figure = confusion.draw(np.diag(np.arange(50)), [str(i) for i in range(50)])
    assert 'none' in texts(figure)
    check_print(confusion.draw(np.zeros((3, 3), int), list('abc')))


# Text and files


def test_plain_replaces_letters_that_the_font_lacks():
    assert style.plain('two\nlines\tand  more ') == 'two lines and more'
    assert style.plain('中 a\x00\udcff') == '\u25a1 a\u25a1\u25a1'
    assert style.plain('каток → ß $5_{x} 100%') == 'каток → ß $5_{x} 100%'
    assert style.plain('a\u202eb\u200bc') == 'a\u25a1b\u25a1c'  # right-to-left override and zero-width space
    assert style.plain('\U0001d5a0') == '\U0001d5a0'
    assert style.plain('\U0001d5a0', bold=True) == '\u25a1'  # The bold font has fewer letters.


def test_long_text_ends_with_an_ellipsis():
    name = 'German short-haired pointer'
    assert style.fit(name, style.text_width(name)) == name
    assert style.fit(name, style.text_width(name) - 0.1).endswith('\u2026')
    for points in (0, 5, 20, 60):
        cut = style.fit(name, points)
        assert cut == '\u2026' or style.text_width(cut) <= points
        assert style.text_width(name[: len(cut)] + '\u2026') > points  # One more letter does not fit.
    assert style.text_width(name, bold=True) > style.text_width(name)


def odd_figures():
    """Returns one figure of each kind, with names that mathematical notation or a font could fail on."""
    many = [*ODD_NAMES, *map(str, range(40))]
    top = [(name, 0.2) for name in ODD_NAMES]
    return {
        'kernels': kernels.draw(np.ones((3, 3, 3, 4), np.float32), 2),
        'maps': feature_maps.draw(image(), np.ones((3, 3, 4), np.float32), 'conv1', 2),
        'predictions': predictions.draw([predictions.Prediction(image(), name, name, top) for name in ODD_NAMES]),
        'neighbors': neighbors.draw(
            [neighbors.Neighbors(image(), name, [image()] * 7, ODD_NAMES, [1.0] * 7, name) for name in ODD_NAMES[2:4]]
        ),
        'network': draw_network(preset('paper'), ' '.join(ODD_NAMES)),
        'curves': curves.draw({name: [line(1, 'train', 1.0)] for name in ODD_NAMES}),
        'matrix': confusion.draw(np.arange(49).reshape(7, 7), ODD_NAMES),
        'confusion': confusion.draw(np.ones((len(many),) * 2, int), many),
    }


def save_all(folder):
    """Saves each of odd_figures() as a PNG and as a PDF."""
    for name, figure in odd_figures().items():
        for ending in ('png', 'pdf'):
            style.save(figure, f'{folder}/{name}.{ending}')


@pytest.mark.slow
def test_odd_names_are_drawn_literally():
    figures = odd_figures()
    assert {style.fit(name, 90) for name in ODD_NAMES[:6]} <= set(texts(figures['matrix']))
    assert 'cost $5 and $x_{' in texts(figures['curves'])
    check_print(figures['neighbors'])


@pytest.mark.slow
def test_figure_files_are_reproducible(tmp_path):
    """Another hash seed, another time and the matplotlibrc of the reader do not change a byte of a file."""
    (tmp_path / 'matplotlibrc').write_text('font.size: 20\naxes.grid: True\ntext.parse_math: True\nsavefig.dpi: 50\n')
    (tmp_path / 'here').mkdir()
    (tmp_path / 'there').mkdir()
    save_all(tmp_path / 'here')
    program = "import sys; sys.path.insert(0, 'tests'); import test_figures; test_figures.save_all(sys.argv[1])"
    run = run_command('-c', program, tmp_path / 'there', PYTHONHASHSEED='7', MATPLOTLIBRC=str(tmp_path))
    assert run.returncode == 0, run.stderr
    names = sorted(path.name for path in (tmp_path / 'here').iterdir())
    assert len(names) == 16
    for name in names:
        content = (tmp_path / 'here' / name).read_bytes()
        assert content == (tmp_path / 'there' / name).read_bytes(), name
        assert content.startswith(b'\x89PNG\r\n\x1a\n' if name.endswith('png') else b'%PDF-')
        assert b'CreationDate' not in content


def test_drawing_keeps_matplotlib_settings():
    with matplotlib.rc_context({'font.size': 21, 'axes.grid': True}):
        before = dict(matplotlib.rcParams)
        style.as_png(kernels.draw(np.ones((3, 3, 3, 4), np.float32), 2))
        assert dict(matplotlib.rcParams) == before


def test_failed_save_leaves_no_file(tmp_path):
    (tmp_path / 'taken.png').mkdir()
    figure = kernels.draw(np.ones((3, 3, 3, 4), np.float32), 2)
    for name, error in (('taken.png', OSError), ('figure.jpg', KeyError)):
        with pytest.raises(error):
            style.save(figure, str(tmp_path / name))
        assert [path.name for path in tmp_path.iterdir()] == ['taken.png']
