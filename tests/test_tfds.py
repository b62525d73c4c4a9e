"""Data sets of TFDS: the versions in a folder, both file formats, corrupt and missing files, and what is rejected."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import read_json, read_lines, run_command, start_command, usage_error, wait_for
from PIL import Image
from test_paths import unprivileged

from alexnet_jax.config import ConfigError, default_config, resolve
from alexnet_jax.data import dataset
from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.prepare import sources
from alexnet_jax.prepare.tfds_folders import TfdsName, parse_name
from alexnet_jax.prepare.tfds_records import TfdsExamples, TfdsShard
from alexnet_jax.prepare.tfds_source import missing_tfds_data
from alexnet_jax.prepare.writer import PrepareConfig, prepare

PICTURES, VALIDATION, SHARDS = 41, 5, 3  # training files of 14, 13 and 14 records


class ZooPictures(tfds.core.GeneratorBasedBuilder):
    """A data set of PNGs with one split and unusual feature names."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('plain', 'boxes', 'floats')]  # noqa: RUF012

    def _info(self):
        features = {
            'photograph': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'species': tfds.features.ClassLabel(names=['ape', 'bee']),
            'mood': tfds.features.ClassLabel(names=['calm', 'wild', 'odd']),
        }
        if self.builder_config.name == 'boxes':
            features['other'] = tfds.features.Image()
        if self.builder_config.name == 'floats':
            features['photograph'] = tfds.features.Image(shape=(None, None, 1), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=('photograph', 'species'),
        )

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            pixels = np.full((8, 8, 3), i, np.uint8)
            yield i, {'photograph': pixels, 'species': i % 2, 'mood': 2}


class NamedPictures(tfds.core.GeneratorBasedBuilder):
    """JPEGs with file names, in two splits."""

    VERSION = tfds.core.Version('2.1.0')

    def _info(self):
        features = {
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(names=['ant', 'bee', 'cow']),
            'file_name': tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {'train': self._pictures(0, PICTURES), 'validation': self._pictures(PICTURES, VALIDATION)}

    def _generate_examples(self):
        raise NotImplementedError

    def _pictures(self, start, count):
        for i in range(start, start + count):
            file = io.BytesIO()
            color = tuple(int(value) for value in np.random.default_rng(i).integers(0, 256, 3))
            Image.new('RGB', (40 + i, 60), color).save(file, 'JPEG')
            file.seek(0)
            yield i, {'image': file, 'label': i % 3, 'file_name': f'picture {i}.jpg'}


def write(data_dir: Path, file_format: str = 'tfrecord', builder=NamedPictures, **options) -> Path:
    """Returns the folder of the version that TFDS, with TensorFlow, prepares in `data_dir`."""
    made = builder(data_dir=str(data_dir), file_format=file_format, **options)
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=SHARDS))
    return Path(made.data_dir)


@pytest.fixture(scope='module')
def both(tmp_path_factory) -> dict[str, Path]:
    """A data_dir for each file format, with the same data set."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ('tfrecord', 'array_record')}
    for name, folder in folders.items():
        write(folder, name)
    return folders


@pytest.fixture
def copied(both, tmp_path) -> Path:
    """The folder of a version in TFRecord, which a test may change."""
    return Path(shutil.copytree(both['tfrecord'], tmp_path / 'data')) / 'named_pictures' / '2.1.0'


def opened(data_dir: Path, source: str = 'tfds:named_pictures', **options) -> sources.Source:
    return sources.open_source(source, str(data_dir), 0.25, **options)


def refused(data_dir: Path, source: str = 'tfds:named_pictures', **options) -> str:
    with pytest.raises((sources.SourceError, ConfigError)) as caught:
        opened(data_dir, source, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def content(examples) -> list[tuple]:
    return [(examples.name(i), *examples[i]) for i in range(len(examples))]


def as_tfds_reads(folder: Path, split: str) -> list[tuple]:
    """Returns name, file and label of each record, in order, from TensorFlow's reader."""
    data = tfds.builder_from_directory(folder).as_dataset(
        split=split,
        decoders={'image': tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    return [(one['file_name'].decode(), one['image'], int(one['label'])) for one in data.as_numpy_iterator()]


def test_both_formats_give_what_tensorflow_reads(both):
    splits = {name: opened(folder).splits for name, folder in both.items()}
    for split in ('train', 'validation'):
        expected = as_tfds_reads(both['tfrecord'] / 'named_pictures' / '2.1.0', split)
        assert len(expected) == (PICTURES if split == 'train' else VALIDATION)
        for found in splits.values():
            assert content(found[split]) == expected
            for part in (range(0, 1), range(10, 30), range(len(expected) - 1, len(expected))):
                if part[-1] < len(expected):
                    assert (
                        content(found[split].subset(part).subset(range(len(part)))) == expected[part[0] : part[-1] + 1]
                    )
    source = opened(both['tfrecord'])
    assert source.class_names == ['ant', 'bee', 'cow']
    assert source.roots == (str(both['tfrecord'] / 'named_pictures' / '2.1.0'),)
    assert not source.holds_out_validation


@pytest.mark.slow
def test_both_formats_are_prepared_to_the_same_bytes(both, tmp_path):
    files = []
    for name, folder in both.items():
        target = prepare(PrepareConfig('tfds:named_pictures', 48, workers=1), str(folder), str(tmp_path / name))
        files.append({path.name: path.read_bytes() for path in Path(target).iterdir() if path.name != 'prepared.json'})
    assert files[0] == files[1]
    assert len(files[0]) == 7


def test_files_are_checked_before_they_are_read(copied):
    shard = copied / f'named_pictures-train.tfrecord-00001-of-0000{SHARDS}'
    data_dir, original = copied.parent.parent, shard.read_bytes()
    shard.unlink()
    assert refused(data_dir) == f'{shard} is missing; copy {copied} again'
    shard.mkdir()
    assert refused(data_dir) == f'{shard} is not a file; copy {copied} again'
    shard.rmdir()
    shard.touch()
    assert f'{shard} is truncated: it has 0 bytes and 13 records' in refused(data_dir)
    shard.write_bytes(original)
    first = copied / f'named_pictures-train.tfrecord-00000-of-0000{SHARDS}'
    first.write_bytes(gzip.compress(first.read_bytes()))
    assert f'{first} is compressed with GZIP' in refused(data_dir)


@pytest.mark.parametrize(
    ('old', 'new', 'reason'),
    [
        ('"tfrecord"', '"riegeli"', r'has the file format riegeli, but only tfrecord and array_record are read'),
        ('"tfrecord"', '"smoke"', r'dataset_info.json or features.json is corrupt'),
        ('"shardLengths"', '"shardLength"', r'dataset_info.json or features.json is corrupt'),
        ('{DATASET}-{SPLIT}', '../{DATASET}-{SPLIT}', r'dataset_info.json is corrupt: it lists 14 records in'),
        ('{DATASET}-{SPLIT}', '/etc/{DATASET}-{SPLIT}', r'dataset_info.json is corrupt: it lists 14 records in'),
        ('{DATASET}', '{CAT}', r'dataset_info.json or features.json is corrupt'),
        ('"13"', '"1152921504606846976"', r'is truncated: it has \d+ bytes and 1152921504606846976 records'),
        ('"13"', '"-3"', r'dataset_info.json is corrupt: it lists -3 records in'),
        ('"train"', '"all"', r'no training split'),
    ],
)
def test_unusable_metadata_is_refused(copied, old, new, reason):
    info = copied / 'dataset_info.json'
    assert old in info.read_text()
    info.write_text(info.read_text().replace(old, new))
    with pytest.raises(sources.SourceError, match=reason) as caught:
        opened(copied.parent.parent)
    assert '\n' not in str(caught.value)


def test_missing_features_are_refused(copied):
    (copied / 'features.json').write_text('{"pythonClassName": "os.system"}')
    assert 'features.json is corrupt' in refused(copied.parent.parent)
    (copied / 'features.json').unlink()
    other = copied.parent.parent / 'other_pictures' / '2.1.0'
    shutil.copytree(copied, other)
    assert f'{other}: features.json is missing' in refused(copied.parent.parent, 'tfds:other_pictures')
    # The code of the data set replaces features.json, which versions of TFDS before 4 did not write.
    assert len(opened(copied.parent.parent).splits['train']) == PICTURES


def damage(file: Path, offset: int) -> None:
    changed = bytearray(file.read_bytes())
    changed[offset] ^= 1
    file.write_bytes(changed)


@pytest.mark.slow
def test_corrupt_records_are_skipped_by_name(copied, tmp_path):
    names = [f'named_pictures-train.tfrecord-0000{i}-of-0000{SHARDS}' for i in range(SHARDS)]
    damage(copied / names[0], 100)
    damage(copied / names[1], 0)
    os.truncate(copied / names[2], (copied / names[2]).stat().st_size - 1)
    settings = PrepareConfig('tfds:named_pictures', 48, max_corrupt_fraction=0.5, workers=1)
    target = prepare(settings, str(tmp_path / 'data'))
    expected = [('record 0', names[0], 'the checksum of the record does not match')]
    expected += [('record 14', names[1], 'the length of the record is corrupt')]
    expected += [(f'record {i}', names[1], 'the file is corrupt before the record') for i in range(15, 27)]
    expected += [('record 40', names[2], 'the file is truncated in the record')]
    skipped = [(line['name'], line['reason']) for line in read_lines(Path(target) / 'skipped.jsonl')]
    assert skipped == [(f'{record} of train in {name}', reason) for record, name, reason in expected]
    assert len(dataset.open_prepared(target, settings).train) == PICTURES - len(expected)
    with pytest.raises(DatasetError, match=f'the first is record 0 of train in {names[0]}'):
        prepare(PrepareConfig('tfds:named_pictures', 49, workers=1), str(tmp_path / 'data'))


def test_shard_of_another_data_set_is_not_read(copied):
    first, second = (copied / f'named_pictures-train.tfrecord-0000{i}-of-0000{SHARDS}' for i in (0, 1))
    shutil.copy(first, second)  # 14 records in the place of 13
    examples = opened(copied.parent.parent).splits['train']
    for index in (14, 26):
        with pytest.raises(UnreadableImage, match='more records than'):
            examples[index]
    assert examples[27][0][:2] == b'\xff\xd8'


def test_corrupt_array_record_files(both, tmp_path):
    folder = Path(shutil.copytree(both['array_record'], tmp_path / 'data')) / 'named_pictures' / '2.1.0'
    first, second, third = sorted(folder.glob('*-train.*'))
    shutil.copy(first, second)  # 14 records in the place of 13
    third.write_bytes(third.read_bytes()[:-1])
    examples = opened(tmp_path / 'data').splits['train']
    for index, reason in {14: '14 records, but dataset_info.json lists 13', 27: None, 40: None}.items():
        with pytest.raises((UnreadableImage, RuntimeError), match=reason):
            examples[index]
        assert examples.name(index) == f'record {index} of train in {(second if index == 14 else third).name}'
    assert examples[13][0][:2] == b'\xff\xd8'


def test_records_that_are_no_images(copied):
    import tensorflow as tf

    path = copied / f'named_pictures-validation.tfrecord-00000-of-0000{SHARDS}'
    paths = sorted(copied.glob('*validation*'))
    info = read_json(copied / 'dataset_info.json')
    info['splits'][1]['shardLengths'] = ['5', *['0'] * (len(paths) - 1)]
    (copied / 'dataset_info.json').write_text(json.dumps(info))

    def feature(**kinds):
        return tf.train.Features(feature={name: tf.train.Feature(**{kind: v}) for name, (kind, v) in kinds.items()})

    image = ('bytes_list', tf.train.BytesList(value=[b'a']))
    label = ('int64_list', tf.train.Int64List(value=[1]))
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b'\xff\xff')
        for values in (
            {'image': image},
            {'image': ('bytes_list', tf.train.BytesList(value=[b'a', b'b'])), 'label': label},
            {'image': image, 'label': ('float_list', tf.train.FloatList(value=[1]))},
            {'image': image, 'label': label, 'file_name': ('bytes_list', tf.train.BytesList(value=[b'\xff\n']))},
        ):
            writer.write(tf.train.Example(features=feature(**values)).SerializeToString())
    examples = opened(copied.parent.parent).splits['validation']
    reasons = ['is not a tf.train.Example', '0 values of label', '2 values of image', '0 values of label']
    for index, reason in enumerate(reasons):
        with pytest.raises(UnreadableImage, match=reason):
            examples[index]
        assert examples.name(index) == f'record {index} of validation in {path.name}'
    assert examples[4] == (b'a', 1)
    assert examples.name(4) == repr('\ufffd\n')


def test_newest_version_is_read_and_named(copied):
    data_dir = copied.parent.parent
    assert opened(data_dir).notes == ()
    for version in ('2.0.9', '2.0.10', '1.9.9'):
        shutil.copytree(copied, copied.parent / version)
        info = copied.parent / version / 'dataset_info.json'
        info.write_text(info.read_text().replace('"2.1.0"', f'"{version}"'))
    (copied.parent / '3.0.0').mkdir()  # not complete
    (copied.parent / 'incomplete.ABCDEF_9.0.0').mkdir()
    (copied.parent / '9.0.0.bak').mkdir()
    for source, version in {
        'tfds:named_pictures': '2.1.0',
        'tfds:NamedPictures': '2.1.0',
        'tfds:named_pictures:2.*.*': '2.1.0',
        'tfds:named_pictures:2.0.*': '2.0.10',
        'tfds:named_pictures/2.0.9': '2.0.9',
        'tfds:named_pictures:1.*.*': '1.9.9',
    }.items():
        found = opened(data_dir, source)
        assert found.roots == (str(copied.parent / version),)
        assert len(found.splits['train']) == PICTURES
    note = f'2.1.0 is the newest of the versions 1.9.9, 2.0.9, 2.0.10, 2.1.0 in {copied.parent}'
    assert opened(data_dir).notes == (note,)
    assert opened(data_dir, 'tfds:named_pictures:1.*.*').notes == ()
    message = refused(data_dir, 'tfds:named_pictures:4.0.0')
    for word in ('1.9.9', '2.0.10', '3.0.0 (incomplete)', 'incomplete.ABCDEF_9.0.0 (incomplete)'):
        assert word in message
    shutil.rmtree(copied.parent / '2.1.0')
    assert opened(data_dir).roots == (str(copied.parent / '2.0.10'),)


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('a', ('a', None, None)),
        ('a:1.0.0', ('a', None, '1.0.0')),
        ('a:5.*.*', ('a', None, '5.*.*')),
        ('a/1.0.0', ('a', None, '1.0.0')),
        ('imagenette:320px-v2', ('imagenette', '320px-v2', None)),
        ('imagenette/320px-v2:1.*.*', ('imagenette', '320px-v2', '1.*.*')),
        ('a:b:1.0.0', ('a', 'b', '1.0.0')),
        ('a/20200301.en', ('a', '20200301.en', None)),
        ('a:1.0', ('a', '1.0', None)),
        ('a:1.0.0.0', ('a', '1.0.0.0', None)),
        *((name, None) for name in ('', ':', 'a:', '../a', '/a', 'a/..', 'a:../b', 'a b', 'a:b:c', 'a/b:1.0', 'a/./b')),
    ],
)
def test_names_configurations_and_versions(source, expected):
    if expected is None:
        with pytest.raises(sources.SourceError, match=r'is not tfds:NAME'):
            parse_name(f'tfds:{source}')
    else:
        assert parse_name(f'tfds:{source}') == TfdsName(*expected)
        config = default_config()
        config.data.source = f'tfds:{source}'
        assert resolve(config).data.source == f'tfds:{source}'


def test_configurations(copied):
    data_dir, folder = copied.parent.parent, copied.parent.parent / 'of_mine'
    for config in ('one', 'two'):
        shutil.copytree(copied, folder / config / '1.0.0')
    message = refused(data_dir, 'tfds:of_mine')
    assert (
        message
        == f'config.data.source: {folder} has the configurations one, two; add one of them, such as tfds:of_mine:one'
    )
    assert opened(data_dir, 'tfds:of_mine:two').roots == (str(folder / 'two' / '1.0.0'),)
    assert opened(data_dir, 'tfds:of_mine/two:1.0.0').roots == (str(folder / 'two' / '1.0.0'),)
    (folder / '.config').mkdir()
    (folder / '.config' / 'metadata.json').write_text('{"default_config_name": "two"}')
    assert opened(data_dir, 'tfds:of_mine').roots == (str(folder / 'two' / '1.0.0'),)
    shutil.rmtree(folder / 'two')
    assert f'{folder} has only one/1.0.0' in refused(data_dir, 'tfds:of_mine')  # two is the default
    shutil.rmtree(folder / '.config')
    source = opened(data_dir, 'tfds:of_mine')
    assert (source.roots, source.notes) == (
        (str(folder / 'one' / '1.0.0'),),
        ('one is the only prepared configuration of of_mine',),
    )


@pytest.mark.parametrize('level', ['named_pictures', 'named_pictures/2.1.0'])
def test_wrong_level_of_the_data_folder_is_named(both, level):
    root = both['tfrecord']
    assert f'set the field to {root}, which contains' in refused(root / level)


def test_no_network_or_code_is_needed(both):
    assert missing_tfds_data('tfds:named_pictures', str(both['tfrecord'])) is None
    assert missing_tfds_data('hf:pictures', str(both['tfrecord'])) is None


@pytest.mark.slow
def test_read_only_data_set_without_its_code_and_tensorflow(both, tmp_path, without_tensorflow):
    data_dir = Path(shutil.copytree(both['tfrecord'], tmp_path / 'data'))
    paths = [data_dir, *data_dir.rglob('*')]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    flags = ['prepare', '--source=tfds:named_pictures', f'--data_dir={data_dir}', '--image_size=48', '--workers=1']
    run = unprivileged(*flags, f'--prepared_dir={tmp_path}/prepared', cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f'{PICTURES + VALIDATION} images' in run.stderr
    assert [data_dir, *data_dir.rglob('*')] == paths
    for path in paths:
        path.chmod(0o755)


def test_unknown_data_set_in_a_read_only_folder(both, tmp_path):
    message = usage_error(run_command('-m', 'alexnet_jax.prepare', '--source=tfds:of_mine', f'--data_dir={tmp_path}'))
    assert "TFDS has no data set 'of_mine'" in message
    (tmp_path / 'of_mine' / '1.0.0').mkdir(parents=True)
    assert f'{tmp_path}/of_mine has only 1.0.0 (incomplete)' in refused(tmp_path, 'tfds:of_mine')


PROGRAM = """
import sys
from alexnet_jax.prepare import writer
if __name__ == '__main__':
    writer.SHARD_SIZE = 4
    writer.prepare(writer.PrepareConfig('tfds:named_pictures', 48, workers=1), *sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_preparation_resumes(both, tmp_path):
    def start(prepared_dir: Path) -> subprocess.Popen:
        return start_command('-c', PROGRAM, both['tfrecord'], prepared_dir)

    with start(tmp_path / 'a') as whole:
        assert whole.wait() == 0, whole.stderr.read()
    reports = tmp_path / 'b' / 'named_pictures_48px.incomplete' / 'reports'
    with start(tmp_path / 'b') as killed:
        wait_for(lambda: len(list(reports.glob('*.json'))) > 1 or killed.poll() is not None)
        killed.kill()
    with start(tmp_path / 'b') as resumed:
        log = resumed.stderr.read()
    assert resumed.returncode == 0, log
    assert f'of {PICTURES + VALIDATION} images were prepared by an earlier run' in log
    folders = [tmp_path / name / 'named_pictures_48px' for name in ('a', 'b')]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]


def test_part_for_a_worker_is_small():
    shards = tuple(TfdsShard(f'/folder/of/the/data/set/{i}', 1281 * i, 1281, 140_000_000) for i in range(1024))
    whole = TfdsExamples(shards, 'tfrecord', 'train', 'image', 'label', 'file_name', 0, 1281 * 1024, '')
    part = whole.subset(range(10_000, 11_024))
    assert [shard.first // 1281 for shard in part.shards] == [7, 8]
    assert len(part) == 1024
    assert len(pickle.dumps(part)) < 1000
    assert whole.subset(range(1280, 1282)).shards == shards[:2]
    assert whole.subset(range(1281, 2562)).shards == shards[1:2]


@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_one_split_and_unusual_feature_names(tmp_path, file_format):
    if file_format == 'tfrecord':
        write(tmp_path, builder=ZooPictures, config='plain')
    source = opened(tmp_path, 'tfds:zoo_pictures:plain')
    assert source.class_names == ['ape', 'bee']
    assert source.holds_out_validation
    assert source.origins == {'train': 'train', 'validation': 'the last 25% of train'}
    assert {split: len(examples) for split, examples in source.splits.items()} == {'train': 15, 'validation': 5}
    seen, numbers = [], []
    for examples in source.splits.values():
        for part in (examples.subset(range(0, 2)), examples.subset(range(2, len(examples)))):
            for name, file, label in content(part):
                assert f'zoo_pictures-train.{file_format}-0000' in name
                numbers.append(int(name.split()[1]))
                value = int(np.asarray(Image.open(io.BytesIO(file)))[0, 0, 0])
                assert label == value % 2
                seen.append(value)
    assert sorted(seen) == numbers == list(range(20))


@pytest.mark.parametrize(
    ('source', 'reason'),
    [
        ('tfds:zoo_pictures:boxes', 'other: Image'),
        ('tfds:zoo_pictures:floats', 'are float32, not uint8'),
        ('tfds:zoo_pictures:round', "'zoo_pictures/round': ValueError: .*BuilderConfig"),
        ('tfds:imagenet2013', "'imagenet2013'"),
    ],
)
def test_unsuitable_data_sets_are_rejected(tmp_path, source, reason):
    with pytest.raises(sources.SourceError, match=reason) as caught:
        opened(tmp_path, source)
    assert '\n' not in str(caught.value)
