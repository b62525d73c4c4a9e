"""ImageNet's path end to end: miniature tars, TFDS's own builder, prepare, three steps at full size, evaluation."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import dataset
from alexnet_jax.prepare.writer import PrepareConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Under these names ImageNet has a PNG and a CMYK file, and TFDS's builder knows them.
PNG, CMYK = 'n02105855_2933.JPEG', 'n01739381_1309.JPEG'
SYNSETS = ('n01440764', 'n01443537', 'n01739381', 'n02105855', 'n02119789')
VALIDATION_IMAGES = 11  # no multiple of the batch


def picture(generator: np.random.Generator, mode: str, format: str = 'JPEG') -> bytes:
    """An image of random size around one colour."""
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
    """ILSVRC2012_img_train.tar (a tar a synset) and ILSVRC2012_img_val.tar with RGB, grey and CMYK images."""
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
    command = [sys.executable, 'launch.py', '--config=configs/imagenet.py', f'--workdir={workdir}']
    command += [f'--config.data.data_dir={data_dir}', '--config.train.steps=3', '--config.train.batch_size=8']
    command += ['--config.model.widths=(16,32,32,32,32,64,64)']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_tars_to_trained_network(tmp_path):
    write_tars(tmp_path / 'data' / 'downloads' / 'manual')
    run = launch(tmp_path / 'data', tmp_path / 'run')
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert (result['status'], result['step']) == ('done', 3)
    assert [result['views'][views]['examples'] for views in ('1', '10')] == [VALIDATION_IMAGES] * 2
    assert '3/3 steps' in run.stderr

    given = PrepareConfig('tfds:imagenet2012')
    store = dataset.open_store(dataset.dataset_dir(str(tmp_path / 'data'), given), given)
    assert len(store.class_names) == 1000
    assert (len(store.train), len(store.validation)) == (4 * len(SYNSETS) + 2, VALIDATION_IMAGES)
    assert store.train[0]['image'].shape == (256, 256, 3)
    assert sorted({int(example['label']) for example in store.train}) == [
        store.class_names.index(synset) for synset in SYNSETS
    ]
    # Whatever its mode, an image keeps its colour: (200, 80, 30), or its luminance where it was grey.
    means = np.array([example['image'].mean((0, 1)) for example in store.train])
    grey = np.ptp(means, axis=1) < 2
    assert grey.sum() == len(SYNSETS)
    np.testing.assert_allclose(means[grey], 110, atol=4)
    np.testing.assert_allclose(means[~grey], np.broadcast_to([200, 80, 30], (3 * len(SYNSETS) + 2, 3)), atol=6)


def test_missing_tars_are_named(tmp_path):
    run = launch(tmp_path / 'data', tmp_path / 'run')
    assert run.returncode == 2
    assert run.stderr.count('\n') == 1, run.stderr
    where = tmp_path / 'data' / 'downloads' / 'manual'
    assert f'put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (ILSVRC2012, from image-net.org) into {where}' in (
        run.stderr
    )
