"""Writes the JPEGs of a folder to TFRecord files of TFDS, to parquet files and to tars of WebDataset.

python benchmarks/record_files.py FOLDER
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import runner

FILES = 8  # per split
SPLITS = {'train': 'train', 'validation': 'val'}  # folder of each split


def sources(folder: str) -> dict[str, str]:
    """Returns the value of --source by kind, for the files that write_all() writes."""
    records = f'{folder}.records'
    tars = f'{records}/tars/{{train,validation}}-{{000000..{FILES - 1:06d}}}.tar'
    return {
        'folder': f'folder:{folder}',
        'tfrecord': 'tfds:pictures',
        'parquet': f'hf:{records}/parquet',
        'tars': f'wds:{tars}',
    }


def class_names(folder: str) -> list[str]:
    """Returns the names of the class folders."""
    return sorted(os.listdir(os.path.join(folder, 'train')))


def examples(folder: str, split: str) -> Iterator[tuple[bytes, int]]:
    """Yields the content and the label of each JPEG, in the order of the folder source."""
    for label, name in enumerate(class_names(folder)):
        for path in sorted(Path(folder, SPLITS[split], name).iterdir()):
            yield path.read_bytes(), label


def write_tfrecord(folder: str) -> None:
    """Writes the data set `pictures` of TFDS in its default format, into `folder`.records."""
    import tensorflow_datasets as tfds

    names = class_names(folder)
    features = {'image': tfds.features.Image(encoding_format='jpeg'), 'label': tfds.features.ClassLabel(names=names)}
    tfds.disable_progress_bar()
    tfds.dataset_builders.store_as_tfds_dataset(
        name='pictures',
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [(i, {'image': image, 'label': label}) for i, (image, label) in enumerate(examples(folder, split))]
            for split in SPLITS
        },
        data_dir=f'{folder}.records',
        file_format='tfrecord',
        download_config=tfds.download.DownloadConfig(num_shards=FILES),
        disable_shuffling=True,
    )


def write_parquet(folder: str) -> None:
    """Writes parquet files like those of the Hugging Face Hub: the columns image and label, groups of 100 rows."""
    import pyarrow as pa
    import pyarrow.parquet

    features = {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': class_names(folder)}}
    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    metadata = {b'huggingface': json.dumps({'info': {'features': features}})}
    schema = pa.schema([('image', image), ('label', pa.int64())], metadata)
    os.makedirs(f'{folder}.records/parquet')
    for split in SPLITS:
        rows = [
            {'image': {'bytes': content, 'path': None}, 'label': label} for content, label in examples(folder, split)
        ]
        for number in range(FILES):
            part = rows[len(rows) * number // FILES : len(rows) * (number + 1) // FILES]
            path = f'{folder}.records/parquet/{split}-{number:05d}-of-{FILES:05d}.parquet'
            pyarrow.parquet.write_table(pa.Table.from_pylist(part, schema), path, row_group_size=100)


def write_tars(folder: str) -> None:
    """Writes tars of WebDataset, with a .jpg and a .cls per example."""
    os.makedirs(f'{folder}.records/tars')
    for split in SPLITS:
        numbered = list(enumerate(examples(folder, split)))
        for number in range(FILES):
            with tarfile.open(f'{folder}.records/tars/{split}-{number:06d}.tar', 'w') as tar:
                part = numbered[len(numbered) * number // FILES : len(numbered) * (number + 1) // FILES]
                for index, (content, label) in part:
                    for suffix, member in (('jpg', content), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{index:08d}.{suffix}')
                        info.size = len(member)
                        tar.addfile(info, io.BytesIO(member))


def write_in_child(folder: str) -> None:
    """Writes all forms into `folder`.records, in a child process, because TensorFlow keeps its memory and threads."""
    environment = os.environ | runner.NO_GPU
    if subprocess.run([sys.executable, __file__, folder], env=environment, stdout=subprocess.DEVNULL).returncode:
        runner.fail('the JPEGs could not be written in other forms; see above')


def write_all(folder: str) -> None:
    """Writes all forms into `folder`.records."""
    for write in (write_tfrecord, write_parquet, write_tars):
        write(folder)


if __name__ == '__main__':
    write_all(sys.argv[1])
