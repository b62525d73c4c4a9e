"""Corrupt and missing files of prepared data sets, and of preparations that were interrupted."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import config_flags, refusal, run_command
from PIL import Image

from alexnet_jax.config import ConfigError
from alexnet_jax.data import dataset, loader, split_reader
from alexnet_jax.prepare import writer
from alexnet_jax.prepare.writer import PrepareConfig, prepare

SIZE = 8
MANIFEST_OF_0_1 = (  # the fields of the manifest that versions without digests wrote
    'source',
    'fingerprint',
    'validation_fraction',
    'image_size',
    'channels',
    'encoding',
    'class_names',
    'images',
    'files',
)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pictures')
    for split, count in (('train', 6), ('val', 3)):
        for label, name in enumerate(('cat', 'dog')):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([count, label, number]).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def settings(pictures) -> PrepareConfig:
    return PrepareConfig(f'folder:{pictures}', SIZE, max_corrupt_fraction=1.0, workers=1)


@pytest.fixture(scope='module')
def prepared(settings, tmp_path_factory) -> Path:
    return Path(prepare(settings, str(tmp_path_factory.mktemp('data'))))


@pytest.fixture(params=['new', 'without digests', 'version 1'])
def copy(request, prepared, tmp_path) -> Path:
    """A copy of the data set as prepared now, or as an earlier version prepared it."""
    folder = Path(shutil.copytree(prepared, tmp_path / 'copy'))
    manifest = json.loads((folder / 'prepared.json').read_text())
    old = {name: manifest[name] for name in MANIFEST_OF_0_1}
    if request.param == 'version 1':
        old['digests'] = manifest['digests']
        old['digest'] = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    if request.param != 'new':
        (folder / 'prepared.json').write_text(json.dumps(old, indent=1) + '\n')
    return folder


def content_of(folder: Path, settings: PrepareConfig) -> tuple[dict[str, list], list[str], dict[str, bytes]]:
    """Returns the images and labels of both splits, the class names and the statistics."""
    data = dataset.open_prepared(str(folder), settings)
    splits = {
        name: [example and (example['image'].tobytes(), int(example['label'])) for example in map(split.__getitem__, n)]
        for name, split in (('train', data.train), ('validation', data.validation))
        for n in [range(len(split))]
    }
    return splits, data.class_names, {name: array.tobytes() for name, array in data.statistics.items()}


def corruptions(content: bytes) -> Iterator[bytes | None]:
    """Yields the content with one byte changed at each of 40 places, cut at three places, and None for a removal."""
    rng = np.random.default_rng(len(content))
    filled = np.flatnonzero(np.frombuffer(content, np.uint8))
    for place in rng.choice(filled, min(40, len(filled)), replace=False).tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)
    for length in {0, len(content) // 2, len(content) - 1} - {-1, len(content)}:
        yield content[:length]
    yield None


@pytest.mark.slow
def test_no_corrupt_file_changes_an_image_a_label_or_a_name(copy, settings, capfd):
    """Opening and reading end as one line that names a file, or as corrupt records, or give what was prepared."""
    expected = content_of(copy, settings)
    messages: list[tuple[str, str]] = []
    for file in sorted(copy.iterdir()):
        content = file.read_bytes()
        for corrupt in corruptions(content):
            if corrupt is None:
                file.unlink()
            else:
                file.write_bytes(corrupt)
            try:
                splits, names, statistics = content_of(copy, settings)
            except ConfigError as error:
                messages.append((file.name, str(error)))
                continue
            finally:
                file.write_bytes(content)
            assert (names, statistics) == expected[1:], (file, corrupt)
            for split, examples in splits.items():
                pairs = zip(examples, expected[0][split], strict=True)
                assert all(found in (None, right) for found, right in pairs), (file, corrupt)
    assert {name for name, _ in messages} == {file.name for file in copy.iterdir()}
    assert all('\n' not in message and str(copy) in message for _, message in messages)
    assert 'is corrupt and skipped' in capfd.readouterr().err


@pytest.mark.slow
def test_every_byte_of_the_small_files_is_verified(prepared, settings, tmp_path):
    copy = Path(shutil.copytree(prepared, tmp_path / 'copy'))
    for name in ('prepared.json', 'label.labels.txt', 'dataset_info.json', 'features.json', 'statistics.npz'):
        content = (copy / name).read_bytes()
        for place in range(0, len(content), 7):
            changed = bytearray(content)
            changed[place] ^= 4
            (copy / name).write_bytes(changed)
            message = refusal(dataset.open_prepared, str(copy), settings)
            assert f'{copy}/{name} is ' in message or message.startswith('config.data.')
            assert 'copy the data set again, or remove' in message
        (copy / name).write_bytes(content)


def test_fingerprint_is_that_of_earlier_versions(prepared, copy, settings):
    manifest = json.loads((prepared / 'prepared.json').read_text())
    old = {name: manifest[name] for name in MANIFEST_OF_0_1}
    expected = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    is_old = 'version' not in json.loads((copy / 'prepared.json').read_text())
    assert (dataset.open_prepared(str(copy), settings).fingerprint == expected) == is_old


def test_digests_are_those_of_the_files(prepared):
    manifest = json.loads((prepared / 'prepared.json').read_text())
    assert manifest['digests'].keys() == manifest['files'].keys()
    for name, digests in manifest['digests'].items():
        content = (prepared / name).read_bytes()
        half = min(65536, (len(content) + 1) // 2)
        middle = len(content) // 2
        parts = content[:half], content[middle : middle + half]
        assert digests == [hashlib.sha256(part).hexdigest() for part in parts]
    digest = manifest.pop('digest')
    assert digest == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_digests_of_another_form_are_refused(prepared, settings, tmp_path):
    copy = Path(shutil.copytree(prepared, tmp_path / 'copy'))
    content = json.loads((copy / 'prepared.json').read_text())
    del content['digest']
    content['digests'] = dict.fromkeys(content['digests'], 'f' * 64)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (copy / 'prepared.json').write_text(json.dumps(content | {'digest': digest}))
    assert f'{copy}/prepared.json is missing, corrupt or of' in refusal(dataset.open_prepared, str(copy), settings)


def test_shard_of_another_data_set_is_refused(photos_dir, tmp_path):
    settings = PrepareConfig('photos', image_size=72)
    copy = Path(shutil.copytree(Path(photos_dir) / 'prepared' / 'photos_72px', tmp_path / 'copy'))
    first, second = sorted(copy.glob('*train*'))[:2]
    assert first.stat().st_size == second.stat().st_size  # so only the content differs
    shutil.copy(first, second)
    assert f'{second} is corrupt' in refusal(dataset.open_prepared, str(copy), settings)


@pytest.mark.slow
def test_command_reports_a_corrupt_file_in_one_line(pictures, tmp_path):
    fields = {'data.source': f'folder:{pictures}', 'data.data_dir': tmp_path, 'model.num_classes': 2}
    target = Path(prepare(PrepareConfig(f'folder:{pictures}', 72, workers=1), str(tmp_path)))
    for name in ('dataset_info.json', 'features.json'):
        content = (target / name).read_bytes()
        (target / name).write_bytes(content.replace(b'"', b"'", 1))
        run = run_command('launch.py', *config_flags(fields), f'--workdir={tmp_path}/run')
        assert (run.returncode, run.stdout) == (2, '')
        assert run.stderr == (
            f'alexnet_jax: config.data.data_dir: {target}/{name} is corrupt; copy the data set again, or remove'
            f' {target} to prepare it again\n'
        )
        (target / name).write_bytes(content)


def test_too_many_corrupt_records_stop_every_read(prepared, settings, tmp_path, capfd):
    copy = Path(shutil.copytree(prepared, tmp_path / 'copy'))
    data = dataset.open_prepared(str(copy), settings)
    intact = [data.train[index]['image'].tobytes() for index in range(len(data.train))]
    [file] = copy.glob('prepared-train*')
    content = bytearray(file.read_bytes())
    for index in (2, 5):
        content[content.index(intact[index][:50])] ^= 1
    file.write_bytes(content)
    strict = PrepareConfig(settings.source, SIZE, max_corrupt_fraction=1 / 12)
    split = dataset.open_prepared(str(copy), strict).train
    assert [index for index in range(5) if split[index] is None] == [2]
    for index in (5, 5, 0, 2, 7):
        with pytest.raises(split_reader.DatasetError, match=r'^2 of 12 records of train in .* are corrupt, more than'):
            split[index]
    with pytest.raises(split_reader.DatasetError, match=r'^2 of 12'):
        split.take_cached(np.array([0, 1]))
    with pytest.raises(split_reader.DatasetError, match=r'^2 of 12'):
        next(loader.training_batches(split, seed=0, batch_size=2, first_step=0, threads=1))
    assert capfd.readouterr().err.count(' is corrupt and skipped') == 2


# Preparations that were interrupted.


@pytest.mark.slow
def test_corrupt_files_of_an_interrupted_preparation_are_written_again(prepared, settings, tmp_path, monkeypatch):
    """The preparation ends before the metadata are written; then a file is changed, and the preparation resumes."""
    monkeypatch.setattr(writer, 'SHARD_SIZE', 5)
    whole = Path(prepare(settings, str(tmp_path / 'whole')))
    expected = {file.name: file.read_bytes() for file in whole.iterdir()}

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, '_write_metadata', stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, str(tmp_path / 'half'))
    [staging] = (tmp_path / 'half' / 'prepared').glob('*.incomplete')
    files = [file for file in sorted(staging.rglob('*')) if file.is_file() and '00000' in file.name]
    assert {file.suffix for file in files} == {
        '.json',
        '.npz',
        '.array_record-00000-of-00003',
        '.array_record-00000-of-00002',
    }
    rng = np.random.default_rng(0)
    for number, file in enumerate(path.relative_to(staging) for path in [*files, staging / 'plan.json']):
        folder = tmp_path / f'{number}'
        shutil.copytree(tmp_path / 'half', folder)
        path = folder / staging.relative_to(tmp_path / 'half') / file
        content = bytearray(path.read_bytes())
        # Training finds corrupt records; here the index of the records is changed, in the last 64 KB of a shard.
        is_shard = 'array_record' in file.name
        index = len(content) - (1 << 16) + 30 if is_shard else int(rng.integers(len(content)))
        content[index] ^= 2
        path.write_bytes(content)
        target = Path(prepare(settings, str(folder)))
        assert {found.name: found.read_bytes() for found in target.iterdir()} == expected, file
