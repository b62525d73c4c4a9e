"""Evaluation on other data: NumPy counts over the logits of a network, hand numbers of mCE, kills, and bad input."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import picture_sets
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from helpers import read_json, refusal, run_command, start_command, usage_error
from jax import numpy as jnp
from jax import random
from PIL import Image

from alexnet_jax import metrics
from alexnet_jax.config import apply_overrides, resolve
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.evaluate import corruptions, elsewhere, other_data, own_data, right_labels, stored
from alexnet_jax.evaluate.class_matching import NameIndex, match_classes, read_class_file
from alexnet_jax.evaluate.other_data import Request, open_other_data
from alexnet_jax.inference import trained_model
from alexnet_jax.prepare import sources
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.report import evaluations
from alexnet_jax.report.page import run_page
from alexnet_jax.runtime.checkpoint_ref import parse_checkpoint_ref
from alexnet_jax.runtime.workdir import write_dataset_statistics
from alexnet_jax.training.state import build_model
from configs.quickstart import get_config

pytestmark = pytest.mark.usefixtures('compiled_programs')

SIZE, CROP = 40, 32
NETWORK = {
    'model.preset': 'paper',
    'model.conv1_stride': 8,
    'model.widths': (8, 0, 0, 0, 16, 0, 32),
    'model.kernel_std': (0.3,) * 8,
    'model.conv_ops': ('activation', '', '', '', 'activation'),
    'model.num_classes': 8,
    'data.image_size': SIZE,
    'data.crop_size': CROP,
    'data.std': (64.0,),
    'eval.batch_size': 24,  # divides no number of images here
}
CLASSES = ['ape', 'bee', 'cow', 'dog', 'eel', 'fox', 'gnu', 'hen']
# The folders are in another order than the labels of the run, three classes are missing, and two are unknown.
OTHER = {'gnu': 9, 'Bee': 7, 'cat': 4, 'eel': 11, 'ape': 6, 'yak': 3, 'dog': 8}
KNOWN = {'gnu': 6, 'Bee': 1, 'eel': 4, 'ape': 0, 'dog': 3}
ALL = np.ones(8, bool)


def picture(path: Path, seed: int) -> None:
    """Writes coarse random colors as a PNG of unequal sides."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((48 + seed % 7, 60 - seed % 5)).save(path)


def write_folders(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f'{i}.png', seed + 100 * number + i)
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run with random weights and the classes CLASSES, which was trained on no data here."""
    config = get_config()
    apply_overrides(config, NETWORK)
    config = resolve(config)
    params, batch_statistics = build_model(config)[1](random.key(5))
    generator = np.random.default_rng(1)
    statistics = {
        'mean_image': generator.uniform(90, 160, (SIZE, SIZE, 3)),
        'mean_rgb': np.full(3, 120.0),
        'eigenvalues': np.ones(3),
        'eigenvectors': np.eye(3),
        'class_counts': np.zeros(8, np.int64),
    }
    folder = tmp_path_factory.mktemp('runs') / 'run'
    trained_model.import_weights_as_run(str(folder), config, params, batch_statistics, statistics, CLASSES)
    return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> Path:
    """Folders of splits; `test` has the classes OTHER."""
    root = tmp_path_factory.mktemp('folders')
    write_folders(root / 'test', OTHER)
    write_folders(root / 'val', {'hen': 3, 'cow': 4}, 5000)
    return root


@pytest.fixture(scope='module')
def network(run):
    """Returns the model as a function of preprocessed crops, and the mean image."""
    loaded = trained_model.load_model(str(run))
    module = nnx.merge(build_model(loaded.config)[0], loaded.state.params, loaded.state.batch_stats)
    return module, loaded.statistics['mean_image'].astype(np.float32)


def views_of(path: Path, mean: np.ndarray, views: int) -> np.ndarray:
    """Returns the crops of an image in network units, prepared by Pillow and NumPy: (views, CROP, CROP, 3)."""
    image = Image.open(path)
    scale = SIZE / min(image.size)
    width, height = (max(SIZE, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    pixels = pixels[top : top + SIZE, left : left + SIZE].astype(np.float32) - mean
    far, half = SIZE - CROP, (SIZE - CROP) // 2
    places = [(half, half), (0, 0), (0, far), (far, 0), (far, far)][:views]
    crops = [pixels[y : y + CROP, x : x + CROP] for y, x in places]
    crops += [crop[:, ::-1] for crop in crops] if views > 1 else []
    return np.stack(crops) / 64


def probabilities(network, paths: list[Path], views: int, ranked: np.ndarray) -> np.ndarray:
    """Returns the mean over the views of the softmax of the logits of the `ranked` classes; others have 0."""
    module, mean = network
    logits = np.asarray(
        module(jnp.asarray(np.concatenate([views_of(path, mean, views) for path in paths]))), np.float64
    )
    powers = np.where(ranked, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    softmax = powers / powers.sum(-1, keepdims=True)
    return softmax.reshape(len(paths), -1, 8).mean(1)


def images_of(folder: Path, labels: dict[str, int]) -> tuple[list[Path], list[int]]:
    found = [(path, labels[path.parent.name]) for path in sorted(folder.glob('*/*.png')) if path.parent.name in labels]
    return [path for path, _ in found], [label for _, label in found]


def request(source: str, **options) -> Request:
    return Request(source, options.pop('split', None), options.pop('data_dir', '/nowhere'), **options)


def evaluate(run: Path, asked: Request, views: int = 1, per_class: bool = False) -> dict:
    return elsewhere.evaluate_elsewhere([parse_checkpoint_ref(str(run))], asked, views, [1.0], per_class)[0]


def figures(report: dict) -> tuple[float, float, float]:
    (member,) = report['members']
    return member['loss'], member['top1_error'], member['top5_error']


def counted(scores: np.ndarray, right: list) -> tuple[float, float, float]:
    """Returns loss and errors by a loop; `right` has the right label, or the set of the right labels, of each image."""
    loss = top1 = top5 = 0.0
    for row, given in zip(scores.tolist(), right, strict=True):
        labels = given if isinstance(given, set) else {given}
        best = max(row[label] for label in labels)
        better = sum(value >= best for label, value in enumerate(row) if label not in labels)
        loss, top1, top5 = loss - np.log(best), top1 + (better > 0), top5 + (better > 4)
    return loss / len(right), top1 / len(right), top5 / len(right)


# Counts.


@pytest.mark.slow
@pytest.mark.parametrize('views', [1, 10])
def test_permuted_missing_and_extra_classes_equal_a_numpy_count(run, folders, network, views, tmp_path):
    source = f'folder:{folders}'
    command = ['-m', 'alexnet_jax', 'evaluate', run, f'--source={source}', '--split=test', f'--views={views}', '--json']
    done = run_command(*command, '--per_class', f'--predictions={tmp_path / "p.npz"}')
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    paths, labels = images_of(folders / 'test', KNOWN)
    ranked = np.isin(np.arange(8), labels)
    scores = probabilities(network, paths, views, ranked)
    assert len(set(scores.argmax(-1))) > 1
    expected = counted(scores, labels)
    assert figures(report) == pytest.approx(expected, rel=1e-4)
    assert 0.2 < expected[1] < 1
    everything = counted(probabilities(network, paths, views, ALL), labels)
    assert expected[:2] != pytest.approx(everything[:2], rel=1e-3)  # the restriction matters
    assert (report['images'], report['ranked_classes'], report['model_classes']) == (41, 5, 8)
    assert report['left_out'] == {'of_other_classes': 7, 'other_classes': ['cat', 'yak'], 'unreadable': 0}
    assert 'restricted to the 5 of 8 classes' in done.stderr
    assert 'left out: 7 images of 2 classes' in done.stderr
    assert 'cat and yak' in done.stderr
    rows = {row['name']: row for row in report['classes']}
    assert {name: row['images'] for name, row in rows.items()} == {CLASSES[KNOWN[n]]: OTHER[n] for n in KNOWN}
    wrong = [label for row, label in zip(scores, labels, strict=True) if row.argmax() != label]
    assert rows['eel']['top1_error'] == wrong.count(4) / OTHER['eel']
    with np.load(tmp_path / 'p.npz') as saved:
        np.testing.assert_allclose(saved['probabilities'], scores, atol=1e-5)
        assert saved['labels'].tolist() == labels
        assert saved['images'].tolist() == [f'test/{path.relative_to(folders / "test")}' for path in paths]
    kept = read_json(run / 'evaluations' / f'{stored.result_name(source, "test", views)}.json')
    checkpoint = trained_model.load_model(str(run))
    assert (kept['loss'], kept['top1_error'], kept['top5_error']) == figures(report)
    assert (kept['digest'], kept['step'], kept['views']) == (checkpoint.digest, 0, views)
    assert (kept['source'], kept['split'], kept['images']) == (source, 'test', 41)
    assert kept['left_out'] == report['left_out']
    assert f'--views={views}' in kept['command']
    assert kept['versions']['numpy'] == np.__version__


def test_all_classes_ranks_all(run, folders, network):
    report = evaluate(run, request(f'folder:{folders}', split='test', all_classes=True))
    paths, labels = images_of(folders / 'test', KNOWN)
    assert figures(report) == pytest.approx(counted(probabilities(network, paths, 1, ALL), labels), rel=1e-4)
    assert report['ranked_classes'] == 8


def test_default_split_is_validation_and_rerun_replaces(run, folders, network):
    source = f'folder:{folders}'
    for _ in range(2):
        report = evaluate(run, request(source))
    paths, labels = images_of(folders / 'val', {'hen': 7, 'cow': 2})
    ranked = np.isin(np.arange(8), labels)
    assert figures(report) == pytest.approx(counted(probabilities(network, paths, 1, ranked), labels), rel=1e-4)
    assert report['split'] == 'val'
    name = stored.result_name(source, 'val', 1)
    assert [file for file in os.listdir(run / 'evaluations') if file.startswith(name)] == [f'{name}.json']


@pytest.mark.slow
def test_mesh_of_eight_devices_gives_the_same_numbers(run, folders, tmp_path):
    copies = {}
    for name, mesh in {'one': {'data': 1, 'model': 1}, 'towers': {'data': 4, 'model': 2}}.items():
        copies[name] = tmp_path / name
        shutil.copytree(run, copies[name])
        config = read_json(run / 'config.json')
        config['mesh'] |= mesh
        (copies[name] / 'config.json').write_text(json.dumps(config))
    flags = [f'--source=folder:{folders}', '--split=test', '--json']
    done = [
        run_command('-m', 'alexnet_jax', 'evaluate', copies[name], *flags, JAX_NUM_CPU_DEVICES=devices)
        for name, devices in (('one', '1'), ('towers', '8'))
    ]
    assert [each.returncode for each in done] == [0, 0], done[1].stderr
    one, towers = (json.loads(each.stdout) for each in done)
    assert figures(towers) == pytest.approx(figures(one), rel=1e-5)
    assert towers['images'] == one['images'] == 41


def test_members_with_other_orders_of_classes(run, folders, network, tmp_path):
    other = tmp_path / 'reversed'
    shutil.copytree(run, other)
    write_dataset_statistics(str(other), trained_model.load_model(str(run)).statistics, CLASSES[::-1])
    refs = [parse_checkpoint_ref(str(each)) for each in (run, other)]
    report, arrays = elsewhere.evaluate_elsewhere(
        refs, request(f'folder:{folders}', split='test', all_classes=True), 1, [0.25, 0.75], False
    )
    paths, labels = images_of(folders / 'test', KNOWN)
    scores = probabilities(network, paths, 1, ALL)
    mixed = 0.25 * scores + 0.75 * scores[:, ::-1]
    np.testing.assert_allclose(arrays['probabilities'], mixed, atol=1e-5)
    ensemble = report['ensemble']
    found = ensemble['loss'], ensemble['top1_error'], ensemble['top5_error']
    assert found == pytest.approx(counted(mixed, labels), rel=1e-4)
    name = stored.result_name(f'folder:{folders}', 'test', 1, 'all_classes')
    kept = read_json(other / 'evaluations' / f'{name}.json')
    assert kept['top1_error'] == counted(scores[:, ::-1], labels)[1]
    write_dataset_statistics(str(other), trained_model.load_model(str(run)).statistics, ['axe', *CLASSES[1:]])
    assert 'has other classes' in refusal(
        lambda: elsewhere.evaluate_elsewhere(refs, request(f'folder:{folders}'), 1, [0.5, 0.5], False)
    )


# Several right labels.


@pytest.mark.parametrize('form', ['list', 'object'])
def test_any_of_several_right_labels_counts(run, network, tmp_path, form):
    root, right = tmp_path / 'val', [[0], [1, 2], [], [7, 3, 4], [2], [6, 5], [0, 1, 2, 3], [5], [], [4, 6]]
    for number in range(1, 11):
        picture(root / f'ILSVRC2012_val_{number:08d}.png', number)
    file = tmp_path / 'real.json'
    if form == 'list':
        file.write_text(json.dumps(right))
    else:
        names = [f'ILSVRC2012_val_{number:08d}.png' for number in range(1, 11)]
        by_name = {name: [CLASSES[label] for label in labels] for name, labels in zip(names, right, strict=True)}
        by_name[names[1]].append('unknown')
        file.write_text(json.dumps(by_name))
    report = evaluate(run, request(f'folder:{root}', real_labels=str(file), class_numbers=form == 'list'))
    kept = [i for i, labels in enumerate(right) if labels]
    paths = [root / f'ILSVRC2012_val_{i + 1:08d}.png' for i in kept]
    expected = counted(probabilities(network, paths, 1, ALL), [set(right[i]) for i in kept])
    assert figures(report) == pytest.approx(expected, rel=1e-4)
    assert (report['images'], report['left_out']['without_right_label']) == (8, 2)
    first = counted(probabilities(network, paths, 1, ALL), [right[i][0] for i in kept])
    assert first[1] > expected[1]  # the further labels matter


def test_right_labels_that_tie_are_right():
    scores = np.log(np.array([[0.4, 0.4, 0.2], [0.3, 0.2, 0.5], [np.nan, 0.4, 0.3]], np.float32))
    right = np.array([[True, True, False], [True, True, False], [True, True, False]])
    found, labels = metrics.with_best_label(scores, np.array([0, 0, 0]), right)
    assert labels.tolist() == [0, 0, 1]
    assert metrics.errors(found, labels)[0].tolist() == [False, True, False]


def test_numbers_of_real_labels_are_those_of_the_sorted_wordnet_ids(tmp_path):
    file, names = tmp_path / 'real.json', ['ILSVRC2012_val_00000002.JPEG', 'a/ILSVRC2012_val_00000001.JPEG']
    file.write_text('[[0, 2], [1]]')
    run_names = ['n01484850 great white shark', 'n01443537', 'n01440764']  # numbers 2, 1 and 0
    right = right_labels.read_right_labels(str(file), names, run_names, 'RUN', None, False)
    assert right.tolist() == [[False, True, False], [True, False, True]]
    assert 'has other classes; add --class_numbers' in refusal(
        lambda: right_labels.read_right_labels(str(file), names, ['tench', 'shark'], 'RUN', None, False)
    )


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('[[0], [1], [2]]', '3 entries, but there must be one for each of the 50,000'),
        ('[[0]]', 'and an image is ILSVRC2012_val_00000002'),
        ('[0, 1]', 'must be a list with a list of numbers'),
        ('[[0], [-1]]', 'must be a list with a list of numbers'),
        ('{"b.JPEG": ["ape"]}', 'has no labels for the images'),
        ('{"ILSVRC2012_val_00000001.JPEG": ["yak"]}', 'no class of'),
        ('{"ILSVRC2012_val_00000001.JPEG": "ape"}', 'must be a list'),
        ('{', 'not JSON'),
        ('[[], []]', 'no image has a right label'),
        ('[[8], []]', 'the largest label of RUN is 7'),
    ],
)
def test_wrong_files_of_real_labels_are_refused(tmp_path, content, message):
    file, names = tmp_path / 'real.json', [f'ILSVRC2012_val_0000000{number}.JPEG' for number in (1, 2)]
    file.write_text(content)
    assert message in refusal(
        lambda: right_labels.read_right_labels(str(file), names, CLASSES, 'RUN', None, content.startswith('['))
    )


# Classes.

TENCH, SHARK = 'n01440764 tench, Tinca tinca', 'n01484850'


@pytest.mark.parametrize(
    ('data', 'run', 'labels'),
    [
        (['b', 'a'], ['a', 'b'], [1, 0]),
        (['n01440764'], ['goldfish', TENCH], [1]),
        ([TENCH, 'n01484850_shark'], [SHARK, 'n01440764'], [1, 0]),
        (['Tench', 'GOLD-FISH'], ['gold fish', TENCH], [1, 0]),
        (['tinca TINCA'], [TENCH, SHARK], [0]),
        (['n02012849 crane', 'a'], ['n03126707 crane', 'a'], [-1, 1]),  # other ids are other classes
        (['crane', 'a'], ['crane', 'Crane', 'a'], [0, 2]),
        (['7', '0'], ['0', '7', '1'], [1, 0]),  # the same names, not label numbers
        (['a', 'z'], ['a', 'b'], [0, -1]),
    ],
)
def test_classes_match_by_name_or_id(data, run, labels):
    assert list(match_classes(data, run, 'DATA', 'RUN').labels) == labels


@pytest.mark.parametrize(
    ('data', 'run', 'message'),
    [
        (['x', 'y'], ['a', 'b', 'c', 'd', 'e', 'f'], 'x, y in the data, a, b, c, d, e, ... (6 classes) in the run'),
        (['0', '1'], ['a', 'b'], '--class_numbers takes the numbers'),
        (['ape', 'bee'], ['class 0', 'class 1'], '--classes=FILE names the classes of the run'),
        (['0', '1'], ['class 0', 'class 1'], '--class_numbers'),
        (['CRANE'], ['crane', 'Crane'], 'may be several classes of RUN: crane and Crane'),
        (['n01440764'], ['tench', 'shark'], '--classes=FILE connects WordNet ids and names'),
        (['Ape', 'APE'], ['ape'], 'Ape and APE are both the class ape'),
    ],
)
def test_classes_that_do_not_match_are_refused(data, run, message):
    assert message in refusal(lambda: match_classes(data, run, 'DATA', 'RUN'))


def test_numbers_are_labels_only_if_a_flag_says_so():
    run = ['eel', 'dog', 'cow']
    assert match_classes(['2', '0'], run, 'DATA', 'RUN', class_numbers=True).labels == (2, 0)
    assert match_classes(['class 2', '001'], run, 'DATA', 'RUN', class_numbers=True).labels == (2, 1)
    assert 'the largest label of RUN is 2' in refusal(
        lambda: match_classes(['3'], run, 'DATA', 'RUN', class_numbers=True)
    )
    assert '1 and 01 are both the class dog' in refusal(
        lambda: match_classes(['1', '01'], run, 'DATA', 'RUN', class_numbers=True)
    )
    assert 'is not a number' in refusal(lambda: match_classes(['0', 'x'], run, 'DATA', 'RUN', class_numbers=True))


@pytest.mark.parametrize(
    ('text', 'data', 'run', 'labels'),
    [
        ('cow\ndog\neel\n', ['0', '1', '10', '2'], ['eel', 'dog', 'cow'], None),
        ('cow\ndog\neel\n', ['0', '1', '2'], ['eel', 'dog', 'cow'], [2, 1, 0]),
        ('cow\ndog\neel\n', ['eel', 'cow'], ['class 0', 'class 1', 'class 2'], [2, 0]),
        ('cow\ndog\neel\n', ['2', '1'], ['class 0', 'class 1', 'class 2'], [2, 1]),
        ('cow\ndog\n', ['eel', 'cow'], ['class 0', 'class 1', 'class 2'], None),
        (f'{TENCH}\n{SHARK} shark\n', ['shark', 'tench'], ['n01440764', SHARK], [1, 0]),
        ('vache\tcow\nchien\tdog\n', ['chien', 'eel', 'vache'], ['eel', 'dog', 'cow'], [1, 0, 2]),
        ('calf\tcow\nbull\tcow\n', ['bull', 'calf'], ['eel', 'cow'], [1, 1]),
        ('calf\tyak\n', ['calf'], ['eel', 'cow'], None),
        ('pig\tcow\n', ['calf'], ['eel', 'cow'], None),
    ],
)
def test_file_of_classes(tmp_path, text, data, run, labels):
    file = tmp_path / 'classes.txt'
    file.write_text(text)

    def match():
        return match_classes(data, run, 'DATA', 'RUN', read_class_file(str(file)))

    if labels is None:
        assert refusal(match).startswith(f'--classes={file}: ')
    else:
        assert list(match().labels) == labels


@pytest.mark.parametrize('text', ['', 'a\tb\nc\n', 'a\tb\tc\n', 'a\tb\na\tc\n'])
def test_wrong_files_of_classes_are_refused(tmp_path, text):
    file = tmp_path / 'classes.txt'
    file.write_text(text)
    assert str(file) in refusal(lambda: read_class_file(str(file)))


def test_every_imagenet_class_finds_itself():
    ids = right_labels.class_names(None, 1000)
    index = NameIndex([f'{name} word' for name in ids], 'RUN')
    assert [index.find(name)[0] for name in ids] == list(range(1000))


# Sources without a training split.


class OnlyTest(tfds.core.GeneratorBasedBuilder):
    """A data set of TFDS with one split, whose class feature has more names than images have, as ImageNet-A."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = {'image': tfds.features.Image(), 'label': tfds.features.ClassLabel(names=['yak', *CLASSES[::-1]])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'test': self._generate_examples()}

    def _generate_examples(self):
        for i, name in enumerate(['hen', 'yak', 'ape', 'ape', 'hen', 'bee']):
            yield i, {'image': np.full((50, 44, 3), 40 * i, np.uint8), 'label': name}


def test_tfds_data_set_with_only_a_test_split(tmp_path):
    OnlyTest(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
    data = open_other_data(request('tfds:only_test', data_dir=str(tmp_path)), 'RUN', CLASSES)
    assert data.split == 'test'
    pixels = [np.asarray(Image.open(io.BytesIO(data.examples[i][0]))) for i in data.indices.tolist()]
    label_of = {0: 7, 2: 0, 3: 0, 4: 7, 5: 1}  # by the number that the pixels are a multiple of
    assert data.labels.tolist() == [label_of[image[0, 0, 0] // 40] for image in pixels]
    assert len(data) == 5
    assert data.ranked.tolist() == [name in ('ape', 'bee', 'hen') for name in CLASSES]
    assert data.left_out['other_classes'] == ['yak']


@pytest.mark.parametrize(
    ('splits', 'wanted', 'expected'),
    [
        (['test'], None, 'test'),
        (['train'], None, 'train'),
        (['train', 'val', 'test'], None, 'val'),
        (['train', 'Testing'], 'test', 'Testing'),
        (['train', 'test'], None, '--split: {} has the splits test, train; name one of them'),
        (['train', 'test'], 'val', "--split: 'val' is not a split of {}; its splits are test, train"),
    ],
)
def test_split_of_folders(tmp_path, splits, wanted, expected):
    for split in splits:
        write_folders(tmp_path / split, {'ape': 1, 'bee': 2})
    source = f'folder:{tmp_path}'
    if expected.startswith('--'):
        with pytest.raises(SourceError) as error:
            sources.open_split(source, '/nowhere', wanted)
        assert expected.format(tmp_path) in str(error.value)
    else:
        (found,) = sources.open_split(source, '/nowhere', wanted).splits.items()
        assert (found[0], found[1].labels.tolist()) == (expected, [0, 1, 1])


def test_forms_of_folders(tmp_path):
    write_folders(tmp_path / 'plain', {'ape': 1, 'bee': 2})
    opened = sources.open_split(f'folder:{tmp_path / "plain"}', '/nowhere', None)
    assert (list(opened.splits), opened.class_names) == (['all'], ['ape', 'bee'])
    with pytest.raises(SourceError, match=r"--split: 'test', but .*plain has no splits"):
        sources.open_split(f'folder:{tmp_path / "plain"}', '/nowhere', 'test')
    (tmp_path / 'plain' / 'labels.csv').write_text('path,label,split\nape/0.png,x,test\nbee/0.png,y,train\n')
    opened = sources.open_split(f'folder:{tmp_path / "plain"}', '/nowhere', 'test')
    assert (opened.class_names, opened.splits['test'].names) == (['x'], ['ape/0.png'])
    flat = tmp_path / 'flat'
    picture(flat / 'ILSVRC2012_val_00000001.png', 1)  # its class is in TFDS's list of ImageNet's labels
    assert sources.open_split(f'folder:{flat}', '/nowhere', None).class_names == ['n01751748']
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path / 'empty', tmp_path / 'missing'):
        with pytest.raises(SourceError, match='--source: '):
            open_other_data(request(f'folder:{folder}'), 'RUN', CLASSES)


@pytest.mark.parametrize('kind', ['hf', 'wds', 'idx'])
def test_other_forms_with_only_validation_images(tmp_path, kind):
    expected = picture_sets.pictures('val')
    names: tuple[str, ...] = picture_sets.CLASSES if kind == 'hf' else ('0', '1', '2', '3', '4')
    if kind == 'hf':
        picture_sets.write_tables(tmp_path, {'val': expected})
    elif kind == 'wds':
        picture_sets.write_tars(tmp_path / 'tars')
        for file in tmp_path.rglob('*train*.tar'):
            file.unlink()
    else:
        generator = np.random.default_rng(0)
        pixels, labels = generator.integers(0, 256, (40, 28, 28), np.uint8), generator.integers(0, 5, 40, np.uint8)
        for what, array in (('images-idx3', pixels), ('labels-idx1', labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
            (tmp_path / f't10k-{what}-ubyte').write_bytes(header + array.tobytes())
    data = open_other_data(request(f'{kind}:{tmp_path}'), 'RUN', names[::-1])
    assert data.split == {'idx': 't10k'}.get(kind, data.split)
    found = [data.examples[index][0] for index in data.indices.tolist()]
    if kind == 'idx':
        np.testing.assert_array_equal(found, pixels)
        assert data.labels.tolist() == (4 - labels).tolist()
    else:
        label_of = {picture.content: 4 - picture.label for picture in expected}
        assert sorted(found) == sorted(label_of)
        assert data.labels.tolist() == [label_of[content] for content in found]


# Unusable images, and folders that cannot be written.


def test_unreadable_images_are_counted_named_and_left_out(run, network, tmp_path, capfd):
    root = write_folders(tmp_path / 'set', {'ape': 4, 'dog': 5})
    (root / 'dog' / '1.png').write_bytes(b'no image')
    (root / 'ape' / '3.png').write_bytes((root / 'ape' / '3.png').read_bytes()[:-40])
    report = evaluate(run, request(f'folder:{root}'))
    paths, labels = images_of(root, {'ape': 0, 'dog': 3})
    bad = {root / 'dog' / '1.png', root / 'ape' / '3.png'}
    kept = [(path, label) for path, label in zip(paths, labels, strict=True) if path not in bad]
    ranked = np.isin(np.arange(8), [0, 3])
    scores = probabilities(network, [path for path, _ in kept], 1, ranked)
    assert figures(report) == pytest.approx(counted(scores, [label for _, label in kept]), rel=1e-4)
    assert (report['images'], report['left_out']['unreadable']) == (7, 2)
    assert report['left_out']['first_unreadable']['name'] == 'ape/3.png'
    assert 'left out: 2 unreadable images; the first is ape/3.png (' in capfd.readouterr().err
    for path in paths:
        path.write_bytes(b'no image')
    with pytest.raises(DatasetError, match='none of the 9 images can be read'):
        evaluate(run, request(f'folder:{root}'))


def test_result_is_printed_if_the_folder_of_the_run_cannot_be_written(run, folders, tmp_path, capfd):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    shutil.rmtree(copy / 'evaluations', True)
    (copy / 'evaluations').write_text('in the way')
    assert evaluate(copy, request(f'folder:{folders}'))['images'] == 7
    lines = [line for line in capfd.readouterr().err.splitlines() if 'not kept' in line]
    assert len(lines) == 1
    assert 'cannot be written' in lines[0]


def test_images_are_read_in_order_and_not_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(other_data, '_READ_AHEAD', 8)
    root = write_folders(tmp_path, {'ape': 40})
    data = open_other_data(request(f'folder:{root}'), 'RUN', CLASSES)
    read = []

    class Counting:
        def __getitem__(self, index):
            read.append(index)
            return data.examples[index]

    config = get_config().data
    config.image_size, config.channels = SIZE, 3
    images = other_data.read_images(dataclasses.replace(data, examples=Counting()), config)
    order = []
    for position, pixels in images:
        order.append(position)
        file = Image.open(root / data.examples.name(position))
        assert pixels.shape == (SIZE, SIZE, 3)
        assert abs(pixels.mean() - np.asarray(file).mean()) < 12
        assert len(read) <= position + 8 + 1
    assert order == list(range(40))


# Imported weights.


@pytest.mark.slow
def test_imported_weights_without_images_name_the_flag(run, folders, tmp_path):
    for flags in ([], [f'--data_dir={folders}']):
        error = usage_error(run_command('-m', 'alexnet_jax', 'evaluate', prepared_for_imagenet(run, tmp_path), *flags))
        assert 'has imported weights without images; name the images to evaluate on, such as --source=' in error
        assert (f'--source=folder:{folders}' in error) == bool(flags)


def prepared_for_imagenet(run: Path, tmp_path: Path) -> Path:
    """Returns a copy of the run with the source of ImageNet's presets, as `alexnet convert` writes it."""
    copy = tmp_path / 'imported'
    if not copy.exists():
        shutil.copytree(run, copy)
        config = read_json(copy / 'config.json')
        config['data'] |= {'source': 'tfds:imagenet2012', 'data_dir': str(tmp_path / 'data')}
        (copy / 'config.json').write_text(json.dumps(config))
    return copy


def test_data_of_imported_weights_that_can_be_prepared_is_not_refused(run, tmp_path):
    copy = prepared_for_imagenet(run, tmp_path)
    config = read_json(copy / 'config.json')
    config['data']['source'] = f'folder:{write_folders(tmp_path / "set", dict.fromkeys(CLASSES, 12))}'
    (copy / 'config.json').write_text(json.dumps(config))
    own_data.check_own_data([parse_checkpoint_ref(str(copy))], None, None)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--classes=x'], '--classes: is for other images'),
        (['--source=folder:x', '--prepared_dir=d'], '--prepared_dir: '),
        (['--source=folder:x', '--classes=x', '--class_numbers'], 'omit one of them'),
        (['--corruptions=x', '--source=folder:y'], '--corruptions: takes no --source'),
        (['--clean_error=0.5'], '--clean_error: is for --corruptions'),
    ],
)
def test_flags_that_contradict_each_other_are_refused(run, flags, message):
    assert message in usage_error(run_command('-m', 'alexnet_jax', 'evaluate', run, *flags))


# Corruptions.


def test_mean_corruption_errors_equal_hand_numbers():
    sets = {(name, level): 0.8 + 0.02 * level for name in corruptions.ALEXNET_ERRORS for level in range(1, 6)}
    sets |= {('fog', level): 0.0 for level in range(1, 6)}
    report = corruptions.summarize_corruptions(sets, 0.4)
    rows = {row['corruption']: row for row in report['corruptions']}
    assert rows['snow']['ce'] == pytest.approx(0.86 / 0.866816)
    assert rows['jpeg_compression']['relative_ce'] == pytest.approx((0.86 - 0.4) / (0.6065 - 0.435))
    published = [
        *(0.886428, 0.894468, 0.92264, 0.81988, 0.826268, 0.785948, 0.79836, 0.866816, 0.826572),
        *(0.564592, 0.853204, 0.646056, 0.71784, 0.6065),
    ]
    assert report['mce'] == pytest.approx(sum(0.86 / error for error in published) / 15)
    relative = [0.46 / (error - 0.435) for error in published] + [-0.4 / (0.819324 - 0.435)]
    assert report['relative_mce'] == pytest.approx(sum(relative) / 15)
    # The network of the denominators has 100 %.
    own = {(name, level): error for name, error in corruptions.ALEXNET_ERRORS.items() for level in range(1, 6)}
    report = corruptions.summarize_corruptions(own, 0.435)
    assert (report['mce'], report['relative_mce']) == pytest.approx((1, 1))
    del own['fog', 3]
    report = corruptions.summarize_corruptions(own, None)
    assert (report['mce'], report['missing']) == (None, ['fog/3'])
    assert 'no mCE: 1 of the 75 sets are missing: fog/3' in corruptions.corruptions_as_text(report)


@pytest.mark.slow
def test_killed_evaluation_of_corruptions_resumes(run, network, tmp_path, capfd):
    root = tmp_path / 'C'
    for number, name in enumerate(corruptions.ALEXNET_ERRORS):
        group = 'noise' if name.endswith('noise') else '.'  # the downloads are grouped
        for level in range(1, 6):
            write_folders(root / group / name / str(level), {'ape': 2, 'dog': 3}, 1000 * number + 10 * level)
    write_folders(root / 'spatter' / '2', {'ape': 2, 'dog': 4}, 7)
    command = ['-m', 'alexnet_jax', 'evaluate', run, f'--corruptions={root}', '--views=1', '--json']
    results = run / 'evaluations' / stored.result_name(f'folder:{root}', 'corruptions', 1)

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in results.glob('*.json')} if results.exists() else {}

    process = start_command(*command)
    while len(finished()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished()
    done = run_command(*command, '--clean_error=0.25')
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert f'{len(before)} of the 76 sets were evaluated by an earlier command' in done.stderr
    assert before.items() <= finished().items()
    assert f'gaussian_noise/1 has 5 images that count, but folder:{root}/spatter/2 has 6' in done.stderr
    ces = []
    for name, published in corruptions.ALEXNET_ERRORS.items():
        errors = []
        for level in range(1, 6):
            folder = next(path for path in root.glob(f'**/{name}/{level}'))
            paths, labels = images_of(folder, {'ape': 0, 'dog': 3})
            ranked = np.isin(np.arange(8), [0, 3])
            errors.append(counted(probabilities(network, paths, 1, ranked), labels)[1])
        (row,) = [row for row in report['corruptions'] if row['corruption'] == name]
        assert row['top1_errors'] == pytest.approx(errors)
        ces.append(np.mean(errors) / published)
    assert report['mce'] == pytest.approx(np.mean(ces))
    assert 0.2 < report['mce'] < 1.2
    assert report['relative_mce'] is not None
    # A result for other weights, images or names of classes is not used again.
    for name, field in (('fog_1.json', 'digest'), ('fog_2.json', 'data_digest'), ('fog_3.json', 'classes_digest')):
        (results / name).write_text(json.dumps(read_json(results / name) | {field: 'x', 'top1_error': 0.5}))
    ref, again = parse_checkpoint_ref(str(run)), request('photos')
    assert elsewhere.evaluate_corruptions(ref, again, str(root), 1, 0.25)['corruptions'] == report['corruptions']
    assert '73 of the 76 sets were evaluated by an earlier command' in capfd.readouterr().err
    text = evaluations.evaluation_lines(str(run))
    assert any(f'mCE {100 * report["mce"]:.2f} %' in line for line in text)


def test_places_without_sets_are_refused(tmp_path):
    assert 'is not a folder' in refusal(lambda: corruptions.find_sets(str(tmp_path / 'no'), ''))
    (tmp_path / 'fog' / '6').mkdir(parents=True)
    assert 'has none of the sets' in refusal(lambda: corruptions.find_sets(str(tmp_path), ''))
    (tmp_path / 'imagenet2012_corrupted' / 'fog_3').mkdir(parents=True)
    found = corruptions.find_sets('tfds:imagenet2012_corrupted', str(tmp_path))
    assert found == {('fog', 3): 'tfds:imagenet2012_corrupted:fog_3'}


# The report.


def test_report_shows_results_and_escapes_names(run, folders, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    shutil.rmtree(copy / 'evaluations', True)
    assert evaluations.evaluation_sections(str(copy)) == []
    report = evaluate(copy, request(f'folder:{folders}', split='test'))
    (kept,) = (copy / 'evaluations').iterdir()
    hostile = read_json(kept) | {'source': '<script>alert(1)</script> `x', 'loss': 'x', 'views': [], 'left_out': 7}
    (copy / 'evaluations' / 'hostile.json').write_text(json.dumps(hostile))
    missing = {'kind': hostile['kind'], 'corruptions': [{'corruption': '<b>'}, 3], 'missing': ['<i>'], 'mce': 'x'}
    (copy / 'evaluations' / 'c.json').write_text(json.dumps(missing))
    (copy / 'evaluations' / 'corrupt.json').write_text('{')
    page = run_page(str(copy), None, False, 'alexnet report').decode()
    row = [f'folder:{folders}, test', f'{100 * figures(report)[1]:.2f} %', '5 of 8', '7 of other classes', '41']
    assert [text for text in row if text not in page] == []
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert '<script>alert' not in page
    assert '<b>' not in page
    text = run_command('-m', 'alexnet_jax', 'report', copy).stdout
    assert f'folder:{folders}, test, 5 of 8 classes, 1 view, step 0: loss {figures(report)[0]:.4f}' in text


def test_results_with_other_names_of_the_classes_are_kept_apart(run, folders, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run, copy)
    shutil.rmtree(copy / 'evaluations', True)
    for content in ('\n'.join(CLASSES), '\n'.join(reversed(CLASSES))):
        (tmp_path / 'classes.txt').write_text(content)
        asked = request(f'folder:{folders}', split='test')
        evaluate(copy, dataclasses.replace(asked, class_file=read_class_file(str(tmp_path / 'classes.txt'))))
    evaluate(copy, request(f'folder:{folders}', split='test'))
    assert len(list((copy / 'evaluations').iterdir())) == 3


def test_names_of_results_do_not_collide():
    names = [
        stored.result_name('folder:/a/set', 'all', 1),
        stored.result_name('folder:/b/set', 'all', 1),
        stored.result_name('folder:/a/set', 'test', 1),
        stored.result_name('folder:/a/set', 'test', 10),
        stored.result_name('folder:/a/set', 'test', 10, 'real_labels'),
        stored.result_name('tfds:imagenet_v2', 'test', 10),
        stored.result_name('folder:/' + 'é/' * 300 + 'x' * 255, 'y' * 255, 10),
    ]
    assert len(set(names)) == len(names)
    assert all(len(f'{name}.json'.encode()) < 255 and '/' not in name for name in names)
