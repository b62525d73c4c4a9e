"""Images/s that an input pipeline delivers on a CPU: this project's, tf.data's and a pool of Pillow threads.

    python benchmarks/input.py [--images=4000] [--cores=2] [--rounds=5] [--folder=DIR] [--whole_epoch] [--json]

Every side reads the same JPEGs of 500x375 pixels, shuffled and repeated. They are crops of scikit-image's photographs:
  raw, jpeg    this project's training_batches() from the data set that `prepare` made of the JPEGs. Batches are whole
               images of 256x256 in uint8: the train step crops, flips and normalizes them on its device.
  tensorflow   the recipe of Flax's ImageNet example with tf.data: it reads a TFRecord file of the JPEGs, decodes a
               random crop of each, resizes it bicubically to 224x224, flips it and normalizes it to float32. AUTOTUNE
               sets the parallelism.
  pillow       one thread per core. It reads and decodes the file, resizes a random crop to 224x224 like torchvision's
               RandomResizedCrop, flips it and normalizes it to float32.
The project decodes and shrinks each image once, the peers in every epoch. The project augments on the device, the peers
on the host. Files that fit into memory are read from the page cache.

The preparation is measured too: images/s of wall time, including startup and shutdown, and memory. Its source is not in
the page cache, as a source that is larger than the memory. Raw images are prepared --rounds times, in turn, from the
folder of the JPEGs and from the same JPEGs as TFRecord files of TFDS, parquet files and tars of WebDataset, which the
script writes. The ratio of such a source is its median images/s over that of the folder: above 1 it is faster than the
folder.

Each side has its own process on the same cores. The sides take turns; waiting ones are stopped. Before each timed
round, prefetched batches are consumed untimed. A ratio is the project's median images/s over the peer's: above 1 the
project is faster.

Peak memory of reading is the process's ru_maxrss, which includes shared libraries and pages of mapped files. Peak
memory of the preparation is the sum of the proportional set sizes of its processes (PSS: a page shared by two counts
half in each), or of their resident set sizes on platforms without PSS, sampled every 0.2 s.
"""

import argparse
import contextlib
import itertools
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import pictures, record_files, runner

PROJECT, PEERS = ('raw', 'jpeg'), ('tensorflow', 'pillow')
MODULES = {'raw': 'grain', 'jpeg': 'grain', 'tensorflow': 'tensorflow', 'pillow': 'PIL'}  # shown with versions
SIZE = (500, 375)  # of the JPEGs
CROP, AREA, ASPECT = 224, (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet


def prepared_dir(folder: str, kind: str, encoding: str) -> str:
    """Returns the folder of the data set that prepare() makes from the source `kind`."""
    return f'{folder}.prepared/{kind}_{encoding}'


def project_batches(encoding: str, folder: str, batch_size: int, threads: int) -> Iterator[Any]:
    """Yields batches of this project's pipeline from its data set of `folder`, with the allocator settings of a run."""
    from alexnet_jax.config import default_config
    from alexnet_jax.data import dataset, loader
    from alexnet_jax.runtime import backend

    backend.configure_cpu_backend()
    data = default_config().data
    data.source, data.data_dir, data.encoding = f'folder:{folder}', f'{folder}.records', encoding
    directory = dataset.dataset_dir(data.data_dir, data, prepared_dir(folder, 'folder', encoding))
    prepared = dataset.open_prepared(directory, data)
    batches = loader.training_batches(prepared.train, seed=0, batch_size=batch_size, first_step=0, threads=threads)
    return (batch['image'] for batch in batches)


def tensorflow_batches(folder: str, batch_size: int) -> Iterator[Any]:
    """Yields batches by the recipe of Flax's ImageNet example from a TFRecord file, which is written if missing."""
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    records = f'{folder}.tfrecord'
    if not os.path.exists(records):
        with tf.io.TFRecordWriter(f'{records}.incomplete') as writer:
            for path in pictures.training_files(folder):
                writer.write(path.read_bytes())
        os.rename(f'{records}.incomplete', records)

    def window(content):
        shape = tf.image.extract_jpeg_shape(content)
        bounds = {'area_range': AREA, 'aspect_ratio_range': ASPECT, 'min_object_covered': 0.1, 'max_attempts': 10}
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), **bounds, use_image_if_no_bounding_boxes=True
        )
        side = tf.cast(CROP / (CROP + 32) * tf.cast(tf.reduce_min(shape[:2]), tf.float32), tf.int32)
        center = tf.concat([(shape[:2] - side + 1) // 2, [side, side]], 0)
        found = tf.concat([begin[:2], size[:2]], 0)
        return tf.where(tf.reduce_all(size[:2] == shape[:2]), center, found)  # center crop if no random box was found

    def example(content):
        image = tf.image.decode_and_crop_jpeg(content, window(content), channels=3)
        image = tf.ensure_shape(tf.image.resize(image, (CROP, CROP), 'bicubic'), (CROP, CROP, 3))
        return (tf.image.random_flip_left_right(image) - MEAN) / DEVIATION

    data = tf.data.TFRecordDataset(records).repeat().shuffle(16 * batch_size, seed=0)
    data = data.map(example, tf.data.AUTOTUNE).batch(batch_size, drop_remainder=True).prefetch(10)
    options = tf.data.Options()
    options.threading.private_threadpool_size, options.threading.max_intra_op_parallelism = 48, 1
    return data.with_options(options).as_numpy_iterator()


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Returns a box (left, top, right, bottom) of random area and aspect ratio, or the whole image after ten misses."""
    for _ in range(10):
        area = width * height * random.uniform(*AREA)
        aspect = math.exp(random.uniform(*map(math.log, ASPECT)))
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if part_width <= width and part_height <= height:
            left, top = random.randint(0, width - part_width), random.randint(0, height - part_height)
            return left, top, left + part_width, top + part_height
    return 0, 0, width, height


def pillow_batches(folder: str, batch_size: int, threads: int) -> Iterator[Any]:
    """Yields batches that a pool of threads fills, three of them in progress."""
    import numpy as np
    from PIL import Image

    mean, deviation = np.array(MEAN, np.float32), np.array(DEVIATION, np.float32)

    def fill(row: np.ndarray, path: Path) -> None:
        with Image.open(path) as file:
            image = file.convert('RGB')
        image = image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=random_box(*image.size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.divide(np.asarray(image) - mean, deviation, out=row)

    files, pool = pictures.training_files(folder), ThreadPoolExecutor(threads)
    paths = (path for _ in itertools.count() for path in random.sample(files, len(files)))
    begun: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
    while True:
        while len(begun) < 3:
            batch = np.empty((batch_size, CROP, CROP, 3), np.float32)
            begun.append((batch, [pool.submit(fill, row, next(paths)) for row in batch]))
        batch, futures = begun.popleft()
        for future in futures:
            future.result()
        yield batch


def start(side: str, folder: str, batch_size: int, cores: int) -> tuple[dict[str, str], Callable[[Any], Any]]:
    """Runs in a worker. Returns the side's description, and a function of (untimed, timed) numbers of batches.

    The function reads the untimed batches, then the timed ones, and returns (seconds, peak memory in bytes).
    """
    if side in PROJECT:
        batches = project_batches(side, folder, batch_size, cores)
    elif side == 'tensorflow':
        batches = tensorflow_batches(folder, batch_size)
    else:
        batches = pillow_batches(folder, batch_size, cores)
    batch = next(batches)
    about = {'version': sys.modules[MODULES[side]].__version__, 'batch': f'{batch.dtype} {batch.shape}'}

    def read(request: tuple[int, int]) -> tuple[float, int]:
        untimed, timed = request
        for _ in range(untimed):
            next(batches)
        begin = time.perf_counter()
        for _ in range(timed):
            next(batches)
        return time.perf_counter() - begin, runner.peak_memory()

    return about, read


def memory_of(process: psutil.Process) -> int:
    """Returns the bytes of memory of a process and its descendants."""
    family = [process, *process.children(recursive=True)]
    if sys.platform == 'linux':
        return sum(member.memory_full_info().pss for member in family)
    return sum(member.memory_info().rss for member in family)


def evict(folder: str) -> None:
    """Removes the content of all files in `folder` from the page cache, if the platform can."""
    if not hasattr(os, 'posix_fadvise'):
        return
    for path in Path(folder).rglob('*'):
        if path.is_file():
            with path.open('rb') as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(folder: str, kind: str, encoding: str, workers: int) -> tuple[float, int]:
    """Prepares the data set anew from a source of record_files. Returns images/s and the peak memory in bytes."""
    images = sum(1 for _ in Path(folder).glob('*/*/*.jpg'))
    for part in (folder, f'{folder}.records'):
        evict(part)
    target = prepared_dir(folder, kind, encoding)
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--source={record_files.sources(folder)[kind]}']
    command += [f'--data_dir={folder}.records', f'--prepared_dir={target}', f'--encoding={encoding}']
    command += [f'--workers={workers}', f'--class_names={",".join(record_files.class_names(folder))}']
    with tempfile.TemporaryFile('w+') as log:
        start, memory = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=runner.ROOT, env=os.environ | runner.NO_GPU, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory = max(memory, memory_of(psutil.Process(process.pid)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            seconds = time.perf_counter() - start
        finally:
            process.kill()  # its workers exit with it
        if process.returncode:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            runner.fail(f'prepare ended with exit code {process.returncode}; see above')
    return images / seconds, memory


def measure_preparation(folder: str, cores: int, rounds: int) -> dict[str, Any]:
    """Measures the preparation from each source in turn. Returns images/s, ratios and memory."""
    runs: dict[str, list[tuple[float, int]]] = {kind: [] for kind in record_files.sources(folder)}
    for _, (kind, measured) in itertools.product(range(rounds), runs.items()):
        measured.append(prepare(folder, kind, 'raw', cores))
    speeds = {kind: statistics.median(speed for speed, _ in measured) for kind, measured in runs.items()}
    memories = {kind: max(memory for _, memory in measured) for kind, measured in runs.items()}
    jpeg_speed, jpeg_memory = prepare(folder, 'folder', 'jpeg', cores)
    return {
        'prepare_images_per_second': {'raw': speeds['folder'], 'jpeg': jpeg_speed},
        'prepare_memory': {'raw': memories['folder'], 'jpeg': jpeg_memory},
        'prepare_from': speeds,
        'prepare_from_ratio': {kind: speed / speeds['folder'] for kind, speed in speeds.items() if kind != 'folder'},
        'prepare_from_memory': memories,
    }


def measure(folder: str, cores: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the sides in turn. Returns images/s and memory of each side, and the descriptions of the sides."""
    result: dict[str, Any] = {'images_per_second': {}, 'best_images_per_second': {}, 'read_memory': {}, 'batch': {}}
    result['versions'] = {'python': platform.python_version()}
    flags = f'--folder={folder}', f'--cores={cores}'
    with contextlib.ExitStack() as stack:
        sides = (*PROJECT, *PEERS)
        workers = [runner.Worker(side, runner.command_of(side, *flags), runner.NO_GPU, stack) for side in sides]
        untimed = 12 + 2 * cores  # more than any side prefetches: tensorflow 10, the project 2 per thread
        columns = runner.take_turns(workers, (untimed, arguments.batches), arguments.rounds, warmup=1)
        read_before = (1 + arguments.rounds) * (untimed + arguments.batches)
        rest = max(math.ceil(arguments.images / arguments.batch_size) - read_before, 0)
        for worker, answers in zip(workers, columns, strict=True):
            side, memory = worker.side, answers[-1][1]
            if arguments.whole_epoch and side in PROJECT:
                memory = worker.ask((rest, 0))[1]
            each = [arguments.batches * arguments.batch_size / seconds for seconds, _ in answers]
            result['images_per_second'][side] = statistics.median(each)
            result['best_images_per_second'][side] = max(each)
            result['read_memory'][side], result['batch'][side] = memory, worker.about['batch']
            result['versions'][MODULES[side]] = worker.about['version']
    speeds = result['images_per_second']
    for prefix, peer in zip(('', 'pillow_'), PEERS, strict=True):
        result |= {f'{side}_{prefix}ratio': speeds[side] / speeds[peer] for side in PROJECT}
    return result


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    speeds = result['images_per_second']
    rows = [('side', 'version', 'images/s', 'best', 'raw/side', 'jpeg/side', 'peak, MB', 'batch')]
    for side in (*PROJECT, *PEERS):
        ratios = (f'{speeds[own] / speeds[side]:.2f}' if side in PEERS else '' for own in PROJECT)
        version, best = f'{MODULES[side]} {result["versions"][MODULES[side]]}', result['best_images_per_second'][side]
        memory = f'{result["read_memory"][side] / 1e6:.0f}'
        rows.append((side, version, f'{speeds[side]:.0f}', f'{best:.0f}', *ratios, memory, result['batch'][side]))
    for side in PROJECT:
        speed, memory = result['prepare_images_per_second'][side], result['prepare_memory'][side]
        rows.append((f'preparing {side}', '', f'{speed:.0f}', '', '', '', f'{memory / 1e6:.0f}', ''))
    for kind, ratio in result['prepare_from_ratio'].items():
        speed, memory = result['prepare_from'][kind], result['prepare_from_memory'][kind]
        what = f'preparing raw from {kind}'
        rows.append((what, '', f'{speed:.0f}', '', f'{ratio:.2f} of folder', '', f'{memory / 1e6:.0f}', ''))
    size = f'{SIZE[0]}x{SIZE[1]} pixels, {result["bytes_a_picture"] / 1e3:.0f} kB'
    return '\n'.join(
        (
            result['machine'],
            f'{result["images"]:,} JPEGs of {size}; batches of {result["batch_size"]}',
            *('', *runner.text_table(*rows), ''),
            'The batches of the project are not yet cropped, flipped and normalized; the device does that.',
        )
    )


def main() -> None:
    """Makes the JPEGs and data sets, runs the sides and prints the results."""
    parser = runner.make_parser(__doc__, 5)
    parser.add_argument('--images', type=runner.positive, default=4000, help='number of training images')
    parser.add_argument('--batch_size', type=runner.positive, default=128)
    parser.add_argument('--batches', type=runner.positive, default=20, help='timed, per round')
    parser.add_argument('--cores', type=runner.positive, default=2, help='also threads per side, and of preparation')
    parser.add_argument('--folder', help='where to keep the JPEGs for the next run; otherwise a temporary folder')
    parser.add_argument('--whole_epoch', action='store_true', help='raw and jpeg read all images before their memory')
    arguments = parser.parse_args()
    cores = arguments.cores
    if arguments.images < arguments.batch_size:
        parser.error(f'--images={arguments.images} is less than --batch_size={arguments.batch_size}')
    if arguments.worker:
        return runner.serve(lambda: start(arguments.worker, arguments.folder, arguments.batch_size, cores))
    if hasattr(os, 'sched_setaffinity'):  # otherwise libraries may use more cores
        available = sorted(os.sched_getaffinity(0))
        cores = min(cores, len(available))
        os.sched_setaffinity(0, available[:cores])  # inherited
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix='input_'))
        folder = os.path.join(os.path.abspath(folder), f'pictures_{arguments.images}')
        pictures.make_pictures(folder, arguments.images, len(pictures.PHOTOGRAPHS), SIZE, processes=cores)
        sizes = [path.stat().st_size for path in pictures.training_files(folder)]
        shutil.rmtree(f'{folder}.prepared', ignore_errors=True)  # because the preparation is measured
        shutil.rmtree(f'{folder}.records', ignore_errors=True)
        record_files.write_in_child(folder)
        result = measure_preparation(folder, cores, arguments.rounds) | measure(folder, cores, arguments)
    result |= {name: getattr(arguments, name) for name in ('images', 'batch_size', 'batches', 'rounds', 'whole_epoch')}
    result |= {'bytes_a_picture': statistics.mean(sizes), 'cores': cores}
    return runner.print_result(result, report, arguments.json)


if __name__ == '__main__':
    main()
