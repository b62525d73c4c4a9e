"""The same 200 pictures in every form that people have: folders, label files, TFDS, parquet and tars.

    python tests/picture_sets.py FORMAT DIR    # writes the pictures with TFDS itself, in a process of its own

The pictures of every form are in the order of folders: by class, then by name.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import random
import struct
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ('n01440764', 'n01443537', 'n01484850', 'n01491361', 'n01494475')
NAMES = ('tench, Tinca tinca', 'goldfish', 'great white shark', 'tiger shark, Galeocerdo cuvieri', 'hammerhead')
IDS = (3, 1, 5, 2, 4)  # numbers of the classes in the development kit; their order differs from that of the names
KAGGLE_IMAGES = 'ILSVRC/Data/CLS-LOC'
PER_CLASS = {'train': (40, 36, 32, 28, 24), 'val': (10, 9, 8, 7, 6)}


@dataclass(frozen=True)
class Picture:
    """A JPEG file with its label; `number` is its place in a flat folder, from 1."""

    content: bytes
    label: int
    number: int

    @property
    def wnid(self) -> str:
        return CLASSES[self.label]

    @property
    def train_name(self) -> str:
        return f'{self.wnid}_{self.number:05d}.JPEG'

    @property
    def val_name(self) -> str:
        return f'ILSVRC2012_val_{self.number:08d}.JPEG'


@functools.cache
def pictures(split: str) -> list[Picture]:
    """Returns the pictures of 'train' or 'val' by class, with ascending numbers in each class."""
    generator, chance = np.random.default_rng(split == 'val'), random.Random(split)
    labels = [label for label, count in enumerate(PER_CLASS[split]) for _ in range(count)]
    numbers = list(range(1, len(labels) + 1))
    chance.shuffle(numbers)
    of_class = [sorted(n for n, other in zip(numbers, labels, strict=True) if other == label) for label in range(5)]
    return [Picture(jpeg(generator), label, of_class[label].pop(0)) for label in labels]


def jpeg(generator: np.random.Generator, least: int = 72, most: int = 120) -> bytes:
    """Returns a JPEG of random colors, whose sides are `least` to `most` - 1 pixels."""
    height, width = (int(side) for side in generator.integers(least, most, 2))
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
    file = io.BytesIO()
    coarse.save(file, 'JPEG', quality=90)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD = 9  # index of the training picture that Form.corrupt() overwrites


@dataclass(frozen=True)
class Form:
    """A form that the pictures have on a disk.

    Attributes:
      write: function that writes the pictures into a folder.
      source: value of --source, in which {root} stands for the folder.
      corrupt: function that overwrites the training picture BAD in a folder, and returns its name.
      settings: further settings of the preparation.
    """

    write: Callable[[Path], None]
    source: str
    corrupt: Callable[[Path], str]
    settings: dict[str, Any] = field(default_factory=dict)

    def settings_of(self, root: Path) -> dict[str, Any]:
        """Returns the settings for the pictures in the folder `root`."""
        return {'source': self.source.replace('{root}', str(root)), **self.settings}


def overwrite(root: Path, name: str) -> str:
    """Overwrites a picture with bytes that are no image, without a change of the size of the file."""
    (root / name).write_bytes(bytes((root / name).stat().st_size))
    return name


def bad_train_name() -> str:
    """Returns the path of the training picture BAD in class folders."""
    return f'train/{CLASSES[0]}/{pictures("train")[BAD].train_name}'


def write_folders(root: Path) -> None:
    for split in PER_CLASS:
        for picture in pictures(split):
            name = picture.train_name if split == 'train' else picture.val_name
            write(root / split / picture.wnid / name, picture.content)


def write_kaggle(root: Path) -> None:
    """Writes the tree of Kaggle's competition `imagenet-object-localization-challenge`, with a test folder."""
    images = root / KAGGLE_IMAGES
    write_flat(images, val_name=lambda picture: picture.val_name)
    for i in range(3):
        write(images / 'test' / f'ILSVRC2012_test_{i + 1:08d}.JPEG', pictures('val')[i].content)
    lines = [f'{picture.val_name.removesuffix(".JPEG")},{picture.wnid} 1 2 30 40 ' for picture in shuffled('val')]
    write(root / 'LOC_val_solution.csv', '\n'.join(['ImageId,PredictionString', *lines, '']))
    words = [f'{wnid} {name}' for wnid, name in zip(CLASSES, NAMES, strict=True)]
    write(root / 'LOC_synset_mapping.txt', '\n'.join([*words, '']))


def write_devkit(root: Path) -> None:
    """Writes a flat folder of validation images beside the development kit of ILSVRC2012."""
    write_flat(root, val_name=lambda picture: picture.val_name)
    write_devkit_labels(root / 'ILSVRC2012_devkit_t12' / 'data')


def write_devkit_labels(folder: Path) -> None:
    """Writes meta.mat, also with a synset that is no class, and the number of the class of each validation image."""
    import scipy.io

    fields = ('ILSVRC2012_ID', 'WNID', 'words', 'num_children', 'children')
    rows = [(float(number), wnid, words, 0.0, []) for number, wnid, words in zip(IDS, CLASSES, NAMES, strict=True)]
    rows = [*sorted(rows), (6.0, 'n02512053', 'fish', 5.0, [1.0, 2.0, 3.0, 4.0, 5.0])]
    synsets = np.zeros((len(rows), 1), [(name, object) for name in fields])
    for i, row in enumerate(rows):
        for name, value in zip(fields, row, strict=True):
            synsets[name][i, 0] = value if isinstance(value, str) else np.atleast_2d(value)
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / 'meta.mat', {'synsets': synsets})
    by_number = sorted(pictures('val'), key=lambda picture: picture.number)
    truth = ''.join(f'{IDS[picture.label]}\n' for picture in by_number)
    write(folder / 'ILSVRC2012_validation_ground_truth.txt', truth)


def write_tiny(root: Path) -> None:
    """Writes the tree of Tiny ImageNet, with its flat validation folder and a test folder."""
    for picture in pictures('train'):
        write(root / 'train' / picture.wnid / 'images' / picture.train_name, picture.content)
        with open(root / 'train' / picture.wnid / f'{picture.wnid}_boxes.txt', 'a') as file:
            file.write(f'{picture.train_name}\t0\t0\t62\t62\n')
    name = 'val_{:04d}.JPEG'.format
    for picture in pictures('val'):
        write(root / 'val' / 'images' / name(picture.number), picture.content)
    lines = [f'{name(picture.number)}\t{picture.wnid}\t0\t32\t44\t62\n' for picture in shuffled('val')]
    write(root / 'val' / 'val_annotations.txt', ''.join(lines))
    write(root / 'test' / 'images' / 'test_0.JPEG', pictures('val')[0].content)
    write(root / 'wnids.txt', '\n'.join([*reversed(CLASSES), '']))
    write(root / 'words.txt', ''.join(f'{wnid}\t{words}\n' for wnid, words in zip(CLASSES, NAMES, strict=True)))


def write_unlabeled_val(root: Path) -> None:
    """Writes a flat folder of validation images without a file of labels; their numbers have these classes in TFDS."""
    package = resources.files('tensorflow_datasets')
    labels = (package / 'datasets' / 'imagenet2012' / 'validation_labels.txt').read_text().split()
    numbers = {wnid: [i + 1 for i, other in enumerate(labels) if other == wnid] for wnid in CLASSES}
    write_flat(root, lambda picture: f'ILSVRC2012_val_{numbers[picture.wnid].pop(0):08d}.JPEG')


def write_flat(root: Path, val_name: Callable[[Picture], str]) -> None:
    """Writes train/WNID/ and a flat val/."""
    for picture in pictures('train'):
        write(root / 'train' / picture.wnid / picture.train_name, picture.content)
    for picture in pictures('val'):
        write(root / 'val' / val_name(picture), picture.content)


def write_csv(root: Path) -> None:
    """Writes all pictures into one folder and their labels into labels.csv, in random order."""
    rows = []
    for split, number in (('train', 1), ('val', 2)):
        for i, picture in enumerate(pictures(split)):
            path = f'images/{number}_{i:04d}.jpg'
            write(root / path, picture.content)
            rows.append((path, picture.wnid, split))
    random.Random(0).shuffle(rows)
    with open(root / 'labels.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('path', 'label', 'split'), *rows])


def shuffled(split: str) -> list[Picture]:
    return random.Random(1).sample(pictures(split), len(pictures(split)))


def write_tfds(format: str, root: Path) -> None:
    """Writes a data set of TFDS in three files per split; TFDS needs TensorFlow for TFRecord."""
    from helpers import run_command

    done = run_command(__file__, format, root, TF_CPP_MIN_LOG_LEVEL='3')
    assert done.returncode == 0, done.stderr


def corrupt_tfds(root: Path) -> str:
    """Changes one bit in the middle of the picture, which both formats store as it is."""
    content = pictures('train')[BAD].content
    middle = content[len(content) // 2 :][:30]
    [path] = [path for path in root.glob('fishes/1.0.0/fishes-train*') if middle in path.read_bytes()]
    found = path.read_bytes()
    path.write_bytes(found.replace(middle, bytes([middle[0] ^ 1]) + middle[1:]))
    return f'record {BAD} of train'


def write_with_tfds(format: str, root: str) -> None:
    """Writes the pictures with TFDS, without a builder that another process could import."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    features = {'image': tfds.features.Image(encoding_format='jpeg'), 'label': tfds.features.ClassLabel(names=CLASSES)}
    tfds.dataset_builders.store_as_tfds_dataset(
        name='fishes',
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [(i, {'image': one.content, 'label': one.label}) for i, one in enumerate(pictures(name))]
            for split, name in (('train', 'train'), ('validation', 'val'))
        },
        data_dir=root,
        file_format=format,
        download_config=tfds.download.DownloadConfig(num_shards=3),
        disable_shuffling=True,
    )


def write_parquet(root: Path) -> None:
    """Writes parquet as the Hub has it: several files, small row groups, class names in the metadata of the schema."""
    write_tables(root, {split: pictures(split) for split in PER_CLASS})


def corrupt_parquet(root: Path) -> str:
    """Replaces the bytes of one cell; the rest of the file is as it was."""
    examples = list(pictures('train'))
    examples[BAD] = dataclasses.replace(examples[BAD], content=bytes(99))
    write_tables(root, {'train': examples})
    return f'data/train-00000-of-00003.parquet row {BAD}'


def write_tables(root: Path, splits: dict[str, list[Picture]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    features = {'image': {'_type': 'Image'}, 'label': {'names': list(CLASSES), '_type': 'ClassLabel'}}
    metadata = {b'huggingface': json.dumps({'info': {'features': features}})}
    schema = pa.schema([('image', image), ('label', pa.int64())], metadata)
    (root / 'data').mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        long, files = {'train': 'train', 'val': 'validation'}[split], 3 if split == 'train' else 1
        for number, part in enumerate(parts(examples, files)):
            rows = [{'image': {'bytes': one.content, 'path': one.train_name}, 'label': one.label} for _, one in part]
            path = root / 'data' / f'{long}-{number:05d}-of-{files:05d}.parquet'
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=16)


def parts(examples: list[Picture], count: int) -> list[list[tuple[int, Picture]]]:
    """Returns `count` contiguous parts of `examples` with their positions."""
    numbered = list(enumerate(examples))
    edges = [len(numbered) * i // count for i in range(count + 1)]
    return [numbered[begin:end] for begin, end in itertools.pairwise(edges)]


def write_tars(root: Path) -> None:
    """Writes tars of WebDataset: one .jpg and one .cls per example, and two tars per split."""
    root.mkdir(parents=True)
    for split in PER_CLASS:
        for number, part in enumerate(parts(pictures(split), 2)):
            with tarfile.open(root / f'{split}-{number:06d}.tar', 'w') as tar:
                for i, one in part:
                    add(tar, f'{split}_{i:06d}.jpg', one.content)
                    add(tar, f'{split}_{i:06d}.cls', str(one.label).encode())


def corrupt_tar(root: Path) -> str:
    path, content = root / 'train-000000.tar', pictures('train')[BAD].content
    path.write_bytes(path.read_bytes().replace(content, bytes(len(content))))
    return f'train_{BAD:06d}.jpg'


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields) -> None:
    """Adds a member with any fields of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in fields.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(content))


def tfrecord(content: bytes, length: int | None = None) -> bytes:
    """Returns a record of TFRecord; `length` replaces its length, with a correct checksum."""
    header = struct.pack('<Q', len(content) if length is None else length)
    return header + struct.pack('<I', masked_crc32c(header)) + content + struct.pack('<I', masked_crc32c(content))


def tf_example(**features: list[bytes] | list[int]) -> bytes:
    """Returns a serialized tf.train.Example, which is a message of protobuf, written by hand."""
    entries = []
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            feature = field_of(1, b''.join(field_of(1, value) for value in values))  # bytes_list
        else:
            feature = field_of(3, field_of(1, b''.join(varint(value) for value in values)))  # int64_list
        entries.append(field_of(1, field_of(1, name.encode()) + field_of(2, feature)))
    return field_of(1, b''.join(entries))


def field_of(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    septets = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(septet | 128 for septet in septets[:-1]), septets[-1]])


def masked_crc32c(content: bytes) -> int:
    """Returns the checksum of TFRecord: CRC-32C, rotated by 15 bits, plus a constant."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


FOLDER, TFDS = 'folder:{root}', {'source': 'tfds:fishes', 'corrupt': corrupt_tfds}
FORMS = {
    'folders': Form(write_folders, FOLDER, lambda root: overwrite(root, bad_train_name())),
    'kaggle': Form(write_kaggle, FOLDER, lambda root: overwrite(root / KAGGLE_IMAGES, bad_train_name())),
    'devkit': Form(write_devkit, FOLDER, lambda root: overwrite(root, bad_train_name())),
    'tiny': Form(write_tiny, FOLDER, lambda root: overwrite(root, bad_train_name().replace('4/n', '4/images/n'))),
    'unlabeled': Form(write_unlabeled_val, FOLDER, lambda root: overwrite(root, bad_train_name())),
    'csv': Form(write_csv, FOLDER, lambda root: overwrite(root, f'images/1_{BAD:04d}.jpg')),
    'array_record': Form(functools.partial(write_tfds, 'array_record'), **TFDS),
    'tfrecord': Form(functools.partial(write_tfds, 'tfrecord'), **TFDS),
    'parquet': Form(write_parquet, 'hf:{root}', corrupt_parquet),
    'tars': Form(write_tars, 'wds:{root}/{train,val}-{000000..000001}.tar', corrupt_tar, {'class_names': CLASSES}),
}


if __name__ == '__main__':
    write_with_tfds(*sys.argv[1:])
