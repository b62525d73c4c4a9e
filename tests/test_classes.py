"""The order of the classes: names decide labels, from the source to a prediction, and num_classes=auto."""

import gzip
import json
import pickle
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import SMALL_NETWORK, config_flags, read_json, refusal, run_command, usage_error
from ml_collections.config_flags.tuple_parser import TupleParser
from PIL import Image

from alexnet_jax.config import apply_overrides, default_config, preset_config, resolve
from alexnet_jax.data import dataset
from alexnet_jax.inference.trained_model import import_weights_as_run
from alexnet_jax.prepare import tfds_source
from alexnet_jax.prepare.classes import order_classes
from alexnet_jax.prepare.raw_sources import FileExamples, Source
from alexnet_jax.prepare.sources import open_source
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.workdir import check_class_names
from alexnet_jax.training.state import build_model
from configs.fashion_mnist import CLASSES

COLORS = {
    'ape': (200, 30, 30),
    'bee': (200, 200, 30),
    'cow': (30, 200, 30),
    'dog': (30, 60, 220),
    'eel': (200, 200, 200),
}
SMALL = SMALL_NETWORK | {
    'data.image_size': 72,
    'data.crop_size': 64,
    'train.batch_size': 10,
    'train.steps': 3,
    'eval.batch_size': 10,
    'eval.views': 1,
}


def write_pictures(folder: Path, names: dict[str, tuple[int, int, int]], count: int = 6) -> Path:
    """Writes `count` training images and two validation images of one color per class; returns `folder`."""
    for name, color in names.items():
        for split, number in (('train', count), ('val', 2)):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new('RGB', (80, 80), tuple(value + i for value in color)).save(folder / split / name / f'{i}.png')
    return folder


def colors_by_label(data_dir: Path, split: str = 'train') -> dict[int, set[tuple]]:
    """Returns the stored colors of each label, rounded, from the records of the only data set in `data_dir`."""
    (folder,) = (path for path in (data_dir / 'prepared').iterdir() if path.is_dir())
    found: dict[int, set[tuple]] = {}
    for record in tfds.builder_from_directory(folder).as_data_source(split):
        color = record['image'].reshape(-1, 3).mean(0).astype(int) // 10 * 10
        found.setdefault(int(record['label']), set()).add(tuple(color.tolist()))
    return found


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('pictures'), COLORS)


def rounded(name: str) -> set[tuple]:
    return {tuple(value // 10 * 10 for value in COLORS[name])}


@pytest.mark.parametrize('order', ['eel,dog,cow,bee,ape', 'cow,ape,eel,bee,dog', 'ape,bee,cow,dog,eel'])
def test_label_is_the_position_of_the_name(order, pictures, tmp_path):
    names = order.split(',')
    prepare(PrepareConfig(f'folder:{pictures}', image_size=72, class_names=tuple(names)), str(tmp_path))
    expected = {label: rounded(name) for label, name in enumerate(names)}
    assert colors_by_label(tmp_path) == colors_by_label(tmp_path, 'validation') == expected


def test_flag_orders_two_classes_and_their_counts(tmp_path):
    write_pictures(tmp_path / 'two', {'cats': COLORS['ape']}, 9)
    write_pictures(tmp_path / 'two', {'dogs': COLORS['dog']}, 4)
    flags = [f'--source=folder:{tmp_path}/two', '--image_size=72']
    run = run_command('-m', 'alexnet_jax.prepare', *flags, f'--data_dir={tmp_path}/d', '--class_names=dogs,cats')
    assert run.returncode == 0, run.stderr
    assert colors_by_label(tmp_path / 'd') == {0: rounded('dog'), 1: rounded('ape')}
    (statistics,) = (tmp_path / 'd').glob('prepared/*/statistics.npz')
    assert np.load(statistics)['class_counts'].tolist() == [4, 9]
    assert '2 classes in this order: dogs, cats' in run.stderr
    (tmp_path / 'names.txt').write_text('dogs\n\ncats\n')
    again = [*flags, f'--data_dir={tmp_path}/d', f'--class_names=@{tmp_path}/names.txt']
    assert run_command('-m', 'alexnet_jax.prepare', *again).returncode == 0  # the same data set


def test_order_belongs_to_the_digest_of_a_shard():
    """Otherwise an interrupted preparation could keep shards with other labels."""
    labels = np.array([0, 1, 2, 1], np.int32)
    source = Source({'train': FileExamples('/', list('wxyz'), [1, 2, 3, 4], labels)}, ['a', 'b', 'c'], False)
    turned = order_classes(source, ('c', 'a', 'b'), 'folder:X')
    part = turned.splits['train']
    assert part.labels.tolist() == [1, 2, 0, 2]
    assert [part.name(i) for i in range(4)] == list('wxyz')
    assert part.digest() != source.splits['train'].digest()
    assert part.digest() != order_classes(source, ('b', 'c', 'a'), 'folder:X').splits['train'].digest()
    assert order_classes(source, ('a', 'b', 'c'), 'folder:X') is source
    last = pickle.loads(pickle.dumps(part.subset(range(2, 4))))
    assert (last.labels.tolist(), last.name(1)) == ([0, 2], 'z')
    wrong = FileExamples('/', ['w'], [1], np.array([7], np.int32))  # the writer skips and names such an image
    broken = order_classes(Source({'train': wrong}, ['a', 'b'], False), ('b', 'a'), 'folder:X').splits['train']
    assert broken.labels.tolist() == [7]


@pytest.mark.parametrize(
    ('names', 'reason'),
    [
        ('ape,bee,cow,dog,eal', "'eal' is not a class of folder:.*; the nearest is 'eel'.*rename it in the source"),
        ('Ape,bee,cow,dog,eel', "'Ape' is not a class of folder:.*; the nearest is 'ape'"),
        ('ape,bee,cow,dog,eel,fox', "'fox' is not a class of folder:"),
        ('1,2,3,4,5', "'1' is not a class of folder:"),
        ('ape,bee,cow,dog', "'eel' of folder:.* is missing; name all of its 5 classes"),
        ('dog,ape', "'bee', 'cow', 'eel' of folder:.* is missing"),
        ('ape,bee,cow,dog,eel,ape', "'ape' occurs twice"),
        ('ape', "'ape' is one name"),
        ('@/nowhere/names.txt', 'names.txt cannot be read .No such file'),
    ],
)
def test_other_names_are_refused_before_anything_is_written(names, reason, pictures, tmp_path):
    flags = [f'--source=folder:{pictures}', f'--data_dir={tmp_path}/d', f'--class_names={names}', '--show']
    message = usage_error(run_command('-m', 'alexnet_jax.prepare', *flags))
    assert re.match(f'config.data.class_names: .*{reason}', message)
    assert not (tmp_path / 'd').exists()


def test_numbered_classes_get_names_by_number(tmp_path):
    images = np.repeat(np.array([10, 200], np.uint8), 20).reshape(40, 1, 1) * np.ones((1, 9, 9), np.uint8)
    for split in ('train', 't10k'):
        header = bytes([0, 0, 8, 3]) + np.array([40, 9, 9], '>u4').tobytes()
        (tmp_path / f'{split}-images-idx3-ubyte.gz').write_bytes(gzip.compress(header + images.tobytes()))
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 40]) + bytes([0] * 20 + [1] * 20)
        (tmp_path / f'{split}-labels-idx1-ubyte').write_bytes(labels)
    settings = PrepareConfig(f'idx:{tmp_path}', image_size=72, channels=1, class_names=('dark', 'bright'))
    folder = prepare(settings, str(tmp_path / 'd'))
    assert read_json(Path(folder) / 'prepared.json')['class_names'] == ['dark', 'bright']
    data = dataset.open_prepared(folder, settings)
    assert {int(e['label']): int(e['image'].mean()) for e in (data.train[0], data.train[len(data.train) - 1])} == {
        0: 10,
        1: 200,
    }
    wrong = PrepareConfig(f'idx:{tmp_path}', image_size=72, channels=1, class_names=('a', 'b', 'c'))
    assert refusal(prepare, wrong, str(tmp_path / 'e')).startswith('config.data.class_names: 3 names, but idx:')


class Numbers(tfds.core.GeneratorBasedBuilder):
    """Two classes without names."""

    VERSION = tfds.core.Version('1.0.0')
    LABEL = tfds.features.ClassLabel(num_classes=2)

    def _info(self):
        features = {'image': tfds.features.Image(shape=(8, 8, 3)), 'label': self.LABEL}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(), 'validation': self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield i, {'image': np.full((8, 8, 3), 40 * i, np.uint8), 'label': i % 2}


class Named(Numbers):
    """Two classes with names."""

    VERSION = tfds.core.Version('1.0.0')
    LABEL = tfds.features.ClassLabel(names=['even', 'odd'])


@pytest.mark.parametrize(('builder', 'names_classes'), [(Numbers, False), (Named, True)])
def test_tfds_names_classes_or_numbers_them(builder, names_classes, tmp_path, monkeypatch):
    made = builder(data_dir=tmp_path, file_format='array_record')
    made.download_and_prepare()
    monkeypatch.setattr(tfds_source, '_builder', lambda *_: made)
    source = open_source(f'tfds:{builder.name}', str(tmp_path), 0.1)
    assert source.names_classes == names_classes
    if names_classes:
        turned = order_classes(source, ('odd', 'even'), 'tfds:named').splits['train']
        assert [(turned[i][1], source.splits['train'][i][1]) for i in range(2)] in ([(1, 0), (0, 1)], [(0, 1), (1, 0)])
        assert {turned[i][1] for i in range(6)} == {0, 1}
    else:
        named = order_classes(source, ('even', 'odd'), 'tfds:numbers')
        assert (named.class_names, named.splits) == (['even', 'odd'], source.splits)


def test_names_of_fashion_mnist_are_those_of_tfds():
    assert tuple(tfds.builder('fashion_mnist').info.features['label'].names) == CLASSES


LEARNS = SMALL | {  # learns the colors in some seconds
    'model.widths': (8, 0, 0, 0, 16, 0, 32),
    'model.num_classes': 5,
    'model.kernel_std': (0.05,) * 8,
    'model.dropout': 0.0,
    'train.steps': 150,
    'optimizer.schedule': 'constant',
    'optimizer.learning_rate': 0.02,
    'data.color': 'none',
    'data.class_weights': 'balanced',
    'data.std': (64.0,),
}


def imported_run(workdir: Path, source: Path, names: list[str]) -> None:
    """Writes a run at step 0 with random weights whose classes are `names`, on the images in `source`."""
    config = default_config()
    apply_overrides(config, LEARNS | {'data.source': f'folder:{source}'})
    resolved = resolve(config)
    params, batch_statistics = jax.device_get(build_model(resolved)[1](jax.random.key(0)))
    statistics = {
        'mean_image': np.full((72, 72, 3), 120.0),
        'mean_rgb': np.full(3, 120.0),
        'eigenvalues': np.zeros(3),
        'eigenvectors': np.eye(3),
        'class_counts': np.zeros(len(names), np.int64),
    }
    import_weights_as_run(str(workdir), resolved, params, batch_statistics, statistics, names)


@pytest.mark.slow
def test_advice_for_weights_with_another_order_is_right(pictures, tmp_path, compiled_programs):
    """Follows the advice of the refusal to the letter; then stored labels and predictions are right."""
    names, workdir = ['eel', 'dog', 'cow', 'bee', 'ape'], tmp_path / 'im ported'
    imported_run(workdir, pictures, names)
    fields = LEARNS | {'data.source': f'folder:{pictures}'}
    flags = ['--config=imagenet', *config_flags(fields), f'--workdir={workdir}']
    refused = run_command('launch.py', *flags, f'--config.data.data_dir={tmp_path}/d')
    assert refused.returncode == 2, refused.stderr
    message = refused.stderr.splitlines()[-1]
    assert "label 0 is 'eel', but 'ape' in the data" in message
    advice = next(word for word in shlex.split(message.partition('another data_dir: ')[2]) if word.startswith('--'))
    run = run_command('launch.py', *flags, f'--config.data.data_dir={tmp_path}/e', advice)
    assert run.returncode == 0, run.stderr
    assert 'class_weights=balanced: 1 (eel) to 1 (eel)' in run.stderr  # the counts of the data, not of the weights
    assert read_json(workdir / 'config.json')['data']['class_names'] == names
    assert colors_by_label(tmp_path / 'e') == {label: rounded(name) for label, name in enumerate(names)}
    files = [pictures / 'val' / name / '0.png' for name in COLORS]
    shown = run_command('-m', 'alexnet_jax.predict', workdir, *files, '--json')
    assert shown.returncode == 0, shown.stderr
    assert [json.loads(line)['top'][0]['class'] for line in shown.stdout.splitlines()] == list(COLORS)


@pytest.mark.parametrize('folder', ['/r/run_1', "/r/a run's", '/r/a,b'])
def test_advice_can_be_pasted_into_a_shell(folder):
    text = refusal(check_class_names, 'W', folder, ['b', 'a'], ['a', 'b'])
    words = shlex.split(text.partition('another data_dir: ')[2].replace(' for training, or', ''))
    assert TupleParser().parse(words[0].partition('=')[2]) == (f'@{folder}/dataset_statistics.npz',)
    assert words[1:] == ['alexnet', 'prepare', f'--class_names=@{folder}/dataset_statistics.npz']


@pytest.mark.slow
def test_wrong_number_of_classes_is_refused_before_the_preparation(pictures, tmp_path):
    flags = [*config_flags(SMALL | {'data.source': f'folder:{pictures}', 'data.data_dir': tmp_path / 'd'})]
    flags += [f'--workdir={tmp_path}/w']
    run = run_command('launch.py', *flags)  # 16 classes of the quickstart
    expected = (
        f'config.model.num_classes: 16, but folder:{pictures} has 5 classes (ape, bee, cow, dog, eel);'
        ' the nearest is 5, and --config.model.num_classes=auto takes the number of the data'
    )
    assert usage_error(run) == expected
    assert [path for path in (tmp_path / 'd').rglob('*') if path.is_file() and path.suffix != '.lock'] == []
    assert usage_error(run_command('launch.py', *flags, '--dry_run')) == expected


def test_number_of_classes_is_refused_before_a_download(tmp_path):
    flags = ['--config.model.num_classes=12', f'--config.data.data_dir={tmp_path}/d', f'--workdir={tmp_path}/w']
    message = usage_error(run_command('launch.py', '--config=fashion_mnist', *flags))
    assert message.startswith('config.model.num_classes: 12, but tfds:fashion_mnist has 10 classes (T-shirt/top, ')
    assert not list((tmp_path / 'd').rglob('*.gz'))


@pytest.mark.slow
def test_auto_is_the_number_of_classes_of_the_data(pictures, tmp_path, compiled_programs):
    fields = SMALL | {'data.source': f'folder:{pictures}', 'data.data_dir': tmp_path / 'd', 'model.num_classes': 'auto'}
    flags = [*config_flags(fields), f'--workdir={tmp_path}/w']
    plan = run_command('launch.py', *flags, '--dry_run')
    assert (plan.returncode, plan.stderr) == (0, '')
    # fc8 has 32 x 5 weights and 5 biases; the weights and velocities of all layers have four bytes per number.
    values = 11 * 11 * 3 * 8 + 8 + 3 * 3 * 8 * 16 + 16 + 16 * 32 + 32 + 32 * 5 + 5
    assert f'a checkpoint takes up to {2 * 4 * values / 1e3:.0f} kB' in plan.stdout
    assert "config.model.num_classes = 'auto'" in run_command('launch.py', *flags, '--print_config').stdout
    run = run_command('launch.py', *flags)
    assert run.returncode == 0, run.stderr
    assert ' config.model.num_classes=auto: 5 classes' in run.stderr
    assert read_json(tmp_path / 'w' / 'config.json')['model']['num_classes'] == 5
    finished = run_command('launch.py', *flags)
    assert (finished.returncode, finished.stderr) == (0, '')
    assert 'is done' in finished.stdout
    resumed = run_command('launch.py', *flags, '--config.train.steps=4')
    assert (resumed.returncode, 'resuming' in resumed.stderr, 'num_classes' in resumed.stderr) == (0, True, False)


def test_auto_needs_data_and_fits_the_mesh(tmp_path):
    message = usage_error(run_command('-m', 'alexnet_jax.audit', '--config.model.num_classes=auto'))
    assert message.startswith('config.model.num_classes: auto is the number of classes of the data, which audit')
    config = preset_config('paper')
    config.model.num_classes = 'auto'
    assert resolve(config).model.num_classes == 0
    config.mesh.layout, config.mesh.model = 'hybrid', 2
    assert resolve(config).mesh.layout == 'hybrid'  # the classes do not matter to its dense layers
    config.mesh.layout, config.mesh.model = 'towers', 1
    wrong = {0: 'neither auto nor', 'all': 'is str, not int or auto', 2.5: 'is float', 1: 'is outside'}
    for value, reason in wrong.items():
        config.model.num_classes = value
        assert reason in refusal(resolve, config)


@pytest.mark.slow
def test_auto_is_refused_if_the_mesh_does_not_divide_the_classes(pictures, tmp_path):
    fields = SMALL | {'data.source': f'folder:{pictures}', 'data.data_dir': tmp_path / 'd', 'model.num_classes': 'auto'}
    fields |= {'mesh.model': 2, 'model.towers': 2}
    command = ['launch.py', *config_flags(fields), f'--workdir={tmp_path}/w']
    expected = 'config.mesh.model: 2 does not divide model.num_classes=5; the nearest is 1'
    for more in ([], ['--dry_run']):
        run = run_command(*command, *more, JAX_NUM_CPU_DEVICES='2')
        assert (run.returncode, run.stderr.splitlines()[-1]) == (2, f'alexnet_jax: {expected}')
