"""ImageNet end to end: miniature tars, the builder of TFDS, prepare, three steps at full image size, evaluation.

The same from the TFRecord files that TFDS wrote, without the tars and without TensorFlow.
"""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import config_flags, read_json, read_result, run_command, usage_error
from PIL import Image

from alexnet_jax.data import dataset
from alexnet_jax.prepare.writer import PrepareConfig

pytestmark = pytest.mark.slow

# ImageNet has a PNG and a CMYK file under these names, and the builder of TFDS converts them.
PNG, CMYK = 'n02105855_2933.JPEG', 'n01739381_1309.JPEG'
SYNSETS = ('n01440764', 'n01443537', 'n01739381', 'n02105855', 'n02119789')
VALIDATION_IMAGES = 11  # not a multiple of the batch size


def picture(generator: np.random.Generator, mode: str, format: str = 'JPEG') -> bytes:
    """Returns an image of random size whose pixels are near one color."""
    height, width = (int(side) for side in generator.integers(40, 400, 2))
    pixels = generator.normal((200, 80, 30), 10, (height, width, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, quality=95)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tars(folder: Path) -> None:
    """Writes ILSVRC2012_img_train.tar (one tar per synset) and ILSVRC2012_img_val.tar: RGB, gray and CMYK images."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    modes = ('RGB', 'L', 'CMYK', 'RGB')
    with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as outer:
        for synset in SYNSETS:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for i, mode in enumerate(modes):
                    add(tar, f'{synset}_{i}.JPEG', picture(generator, mode))
                for name, mode, format in ((PNG, 'RGB', 'PNG'), (CMYK, 'CMYK', 'JPEG')):
                    if name.startswith(synset):
                        add(tar, name, picture(generator, mode, format))
            add(outer, f'{synset}.tar', inner.getvalue())
    with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for i in range(VALIDATION_IMAGES):
            add(tar, f'ILSVRC2012_val_{i + 1:08d}.JPEG', picture(generator, modes[i % 4]))


def launch(data_dir: Path, workdir: Path) -> subprocess.CompletedProcess:
    fields = {'data.data_dir': data_dir, 'train.steps': 3, 'train.batch_size': 8}
    fields['model.widths'] = '(16,32,32,32,32,64,64)'
    flags = config_flags(fields)
    return run_command(
        'launch.py', '--config=configs/imagenet.py', f'--workdir={workdir}', *flags, JAX_NUM_CPU_DEVICES='8'
    )


def check_training(tmp_path: Path) -> None:
    """Trains on the data set in `tmp_path`/data, and checks result, labels and colors."""
    run = launch(tmp_path / 'data', tmp_path / 'run')
    assert run.returncode == 0, run.stderr
    result = read_result(tmp_path / 'run')
    assert (result['status'], result['step']) == ('done', 3)
    assert [result['views'][views]['examples'] for views in ('1', '10')] == [VALIDATION_IMAGES] * 2
    assert '3/3 steps' in run.stderr

    given = PrepareConfig('tfds:imagenet2012')
    data = dataset.open_prepared(dataset.dataset_dir(str(tmp_path / 'data'), given), given)
    assert len(data.class_names) == 1000
    assert (len(data.train), len(data.validation)) == (4 * len(SYNSETS) + 2, VALIDATION_IMAGES)
    assert data.train[0]['image'].shape == (256, 256, 3)
    assert sorted({int(example['label']) for example in data.train}) == [
        data.class_names.index(synset) for synset in SYNSETS
    ]
    # An image of any mode keeps its color (200, 80, 30), or its luminance if it was gray.
    means = np.array([example['image'].mean((0, 1)) for example in data.train])
    gray = np.ptp(means, axis=1) < 2
    assert gray.sum() == len(SYNSETS)
    np.testing.assert_allclose(means[gray], 110, atol=4)
    np.testing.assert_allclose(means[~gray], np.broadcast_to([200, 80, 30], (3 * len(SYNSETS) + 2, 3)), atol=6)


def test_tars_to_trained_network(tmp_path):
    write_tars(tmp_path / 'data' / 'downloads' / 'manual')
    check_training(tmp_path)


# A user's script, which gets the default file format of TFDS.
TFDS_SCRIPT = """
import sys
import tensorflow_datasets as tfds
tfds.core.DatasetInfo.initialize_from_bucket = lambda info: None
config = tfds.download.DownloadConfig(manual_dir=sys.argv[1])
tfds.builder('imagenet2012', data_dir=sys.argv[2]).download_and_prepare(download_config=config)
"""


@pytest.fixture(scope='module')
def prepared_by_tfds(tmp_path_factory) -> Path:
    """A data_dir with ImageNet as TFRecord files, without the tar files."""
    folder = tmp_path_factory.mktemp('imagenet')
    write_tars(folder / 'tars')
    run = run_command('-c', TFDS_SCRIPT, folder / 'tars', folder / 'data')
    assert run.returncode == 0, run.stderr
    shutil.rmtree(folder / 'tars')
    assert list((folder / 'data' / 'imagenet2012' / '5.1.0').glob('imagenet2012-train.tfrecord-00000-of-*'))
    return folder / 'data'


def test_tfrecords_to_trained_network_without_tensorflow(prepared_by_tfds, tmp_path, without_tensorflow):
    shutil.copytree(prepared_by_tfds, tmp_path / 'data')
    check_training(tmp_path)


def test_version_of_an_old_tfds(prepared_by_tfds, tmp_path, without_tensorflow):
    """Versions of TFDS before 4 wrote no features.json and no file format."""
    folder = tmp_path / 'data' / 'imagenet2012' / '5.0.0'
    shutil.copytree(prepared_by_tfds / 'imagenet2012' / '5.1.0', folder)
    (folder / 'features.json').unlink()
    info = read_json(folder / 'dataset_info.json')
    del info['fileFormat']
    for split in info['splits']:
        del split['filepathTemplate']
    (folder / 'dataset_info.json').write_text(json.dumps(info | {'version': '5.0.0'}))
    source, data_dir = '--source=tfds:imagenet2012', f'--data_dir={tmp_path}/data'
    run = run_command('-m', 'alexnet_jax.prepare', source, data_dir, '--image_size=32', '--workers=1')
    assert run.returncode == 0, run.stderr
    assert f'{4 * len(SYNSETS) + 2 + VALIDATION_IMAGES} images' in run.stderr


def test_missing_tars_are_named(tmp_path):
    message = usage_error(launch(tmp_path / 'data', tmp_path / 'run'))
    for word in ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar', f'{tmp_path}/data/downloads/manual'):
        assert word in message
    (tmp_path / 'data' / 'imagenet2012' / '5.1.0.incompleteABCDEF').mkdir(parents=True)
    assert usage_error(launch(tmp_path / 'data', tmp_path / 'run')) == (
        f'{message}; {tmp_path}/data/imagenet2012 has only 5.1.0.incompleteABCDEF (incomplete)'
    )
