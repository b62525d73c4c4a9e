"""Images/s that an input pipeline delivers on a CPU: this project's, tf.data's and a pool of Pillow threads.

    python benchmarks/input.py [--images=4000] [--cores=2] [--rounds=5] [--folder=DIR] [--whole_epoch] [--json]

Every side reads the same JPEGs of 500x375 pixels endlessly and shuffled. They are crops of scikit-image's photographs:
  raw, jpeg    this project's training_batches() from a store that `prepare` made of the JPEGs. Batches are whole images
               of 256x256 in uint8: the train step crops, flips and normalizes them on its device.
  tensorflow   the recipe of Flax's ImageNet example with tf.data: a TFRecord file of the JPEGs; a random crop of each
               decoded, resized bicubically to 224x224, flipped, normalized to float32; parallelism by AUTOTUNE.
  pillow       one thread per core: the file read, decoded, a random crop resized to 224x224 as by torchvision's
               RandomResizedCrop, flipped, normalized to float32.
The project decodes and shrinks each image once, its peers in every epoch. The project augments on the device, its peers
on the host. The preparation of the stores is measured too: images/s of wall time, including startup and shutdown, and
memory. Files come from the page cache as far as memory holds them.

Each side has its own process on the same cores. The sides take turns; waiting ones are stopped. Before each timed
round, prefetched batches are consumed untimed. A ratio is the project's median images/s over the peer's: above 1 the
project is faster.

Peak memory of reading is the process's ru_maxrss, which includes shared libraries and pages of mapped files. Peak
memory of the preparation is the sum of the proportional set sizes of its processes (PSS: a page shared by two counts
half in each), or of their resident set sizes on platforms without PSS, sampled every 0.2 s.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.workers import NO_GPU, ROOT, Worker, machine, serve

PROJECT, PEERS = ('raw', 'jpeg'), ('tensorflow', 'pillow')
MODULES = {'raw': 'grain', 'jpeg': 'grain', 'tensorflow': 'tensorflow', 'pillow': 'PIL'}  # shown with versions
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'hubble_deep_field', 'retina', 'rocket', 'stereo_motorcycle')
SIZE, QUALITY = (500, 375), 93  # of the JPEGs: 53 kB on average
VALIDATION = 32  # number of validation images, which `prepare` requires
CROP, AREA, ASPECT = 224, (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet


@functools.cache
def photograph(name: str) -> Any:
    """Returns the photograph in color as a Pillow image. It is part of the package and never downloaded."""
    import skimage.data
    from PIL import Image

    pixels = getattr(skimage.data, name)()
    return Image.fromarray((pixels[0] if isinstance(pixels, tuple) else pixels)[..., :3])


def make_picture(path: str) -> None:
    """Writes a random crop of the photograph that the folder is named after; it depends only on the file's name."""
    from PIL import Image

    image, generator = photograph(Path(path).parent.name), random.Random(Path(path).name)
    aspect = SIZE[0] / SIZE[1]
    width = min(image.width, image.height * aspect) * generator.uniform(0.5, 1)
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - width / aspect)
    part = image.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + width / aspect))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part.save(path, quality=QUALITY)


def make_pictures(folder: str, images: int, processes: int) -> None:
    """Makes `folder` with train/ and val/, each with one folder per photograph, unless `folder` exists."""
    if os.path.exists(folder):
        return
    names = [f'train/{PHOTOGRAPHS[i % len(PHOTOGRAPHS)]}/{i:06d}.jpg' for i in range(images)]
    names += [f'val/{PHOTOGRAPHS[i % len(PHOTOGRAPHS)]}/v{i:06d}.jpg' for i in range(VALIDATION)]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(make_picture, [f'{folder}.incomplete/{name}' for name in names], chunksize=64))
    os.rename(f'{folder}.incomplete', folder)


def training_files(pictures: str) -> list[Path]:
    """Returns the paths of all training JPEGs, with the photographs in turn."""
    return sorted(Path(pictures, 'train').glob('*/*.jpg'), key=lambda path: path.name)


def project_batches(encoding: str, pictures: str, batch_size: int, threads: int) -> Iterator[Any]:
    """Yields batches of this project's pipeline from its store of `pictures`, with the allocator settings of a run."""
    from alexnet_jax.config import default_config
    from alexnet_jax.data import dataset, loader
    from alexnet_jax.runtime import backend

    backend.configure_cpu_backend()
    data = default_config().data
    data.source, data.data_dir, data.encoding = f'folder:{pictures}', f'{pictures}.stores', encoding
    store = dataset.open_store(dataset.dataset_dir(data.data_dir, data), data)
    batches = loader.training_batches(store.train, seed=0, batch_size=batch_size, first_step=0, threads=threads)
    return (batch['image'] for batch in batches)


def tensorflow_batches(pictures: str, batch_size: int) -> Iterator[Any]:
    """Yields batches by the recipe of Flax's ImageNet example from a TFRecord file, which is written if missing."""
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    records = f'{pictures}.tfrecord'
    if not os.path.exists(records):
        with tf.io.TFRecordWriter(f'{records}.incomplete') as writer:
            for path in training_files(pictures):
                writer.write(path.read_bytes())
        os.rename(f'{records}.incomplete', records)

    def window(content):
        shape = tf.image.extract_jpeg_shape(content)
        bounds = {'area_range': AREA, 'aspect_ratio_range': ASPECT, 'min_object_covered': 0.1, 'max_attempts': 10}
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), **bounds, use_image_if_no_bounding_boxes=True
        )
        side = tf.cast(CROP / (CROP + 32) * tf.cast(tf.reduce_min(shape[:2]), tf.float32), tf.int32)
        centre = tf.concat([(shape[:2] - side + 1) // 2, [side, side]], 0)
        found = tf.concat([begin[:2], size[:2]], 0)
        return tf.where(tf.reduce_all(size[:2] == shape[:2]), centre, found)  # center crop if no random box was found

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


def pillow_batches(pictures: str, batch_size: int, threads: int) -> Iterator[Any]:
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

    files, pool = training_files(pictures), ThreadPoolExecutor(threads)
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


def start(side: str, pictures: str, batch_size: int, cores: int) -> tuple[dict[str, str], Callable[[Any], Any]]:
    """Runs in a worker. Returns the side's description, and a function of (untimed, timed) numbers of batches.

    The function reads the untimed batches, then the timed ones, and returns (seconds, peak memory in bytes).
    """
    if side in PROJECT:
        batches = project_batches(side, pictures, batch_size, cores)
    elif side == 'tensorflow':
        batches = tensorflow_batches(pictures, batch_size)
    else:
        batches = pillow_batches(pictures, batch_size, cores)
    batch = next(batches)
    about = {'version': sys.modules[MODULES[side]].__version__, 'batch': f'{batch.dtype} {batch.shape}'}

    def read(request: tuple[int, int]) -> tuple[float, int]:
        untimed, timed = request
        for _ in range(untimed):
            next(batches)
        begin = time.perf_counter()
        for _ in range(timed):
            next(batches)
        seconds = time.perf_counter() - begin
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    return about, read


def memory_of(process: Any) -> int:
    """Returns the bytes of memory of a process and its descendants."""
    family = [process, *process.children(recursive=True)]
    if sys.platform == 'linux':
        return sum(member.memory_full_info().pss for member in family)
    return sum(member.memory_info().rss for member in family)


def prepare(pictures: str, encoding: str, workers: int) -> tuple[float, int]:
    """Prepares the store. Returns images/s and the peak memory in bytes."""
    images = sum(1 for _ in Path(pictures).glob('*/*/*.jpg'))
    command = [sys.executable, '-m', 'alexnet_jax.prepare', f'--source=folder:{pictures}']
    command += [f'--data_dir={pictures}.stores', f'--encoding={encoding}', f'--workers={workers}']
    with tempfile.TemporaryFile('w+') as messages:
        start, memory = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | NO_GPU, stdout=messages, stderr=messages)
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
            messages.seek(0)
            sys.exit(f'{messages.read()}\ninput: prepare ended with exit code {process.returncode}; see above')
    return images / seconds, memory


def report(result: dict[str, Any]) -> str:
    """Formats the table as text."""
    versions, speeds = result['versions'], result['images_per_second']
    size = f'{SIZE[0]}x{SIZE[1]} pixels, {result["bytes_a_picture"] / 1e3:.0f} kB'
    lines = [result['machine']]
    lines += [f'{result["images"]:,} JPEGs of {size}; batches of {result["batch_size"]}', '']
    lines += [f'{"":<31}{"images/s":>18}{"project/peer":>18}{"peak":>9}']
    lines += [f'{"side":<12}{"version":<19}{"median":>9}{"best":>9}{"raw":>9}{"jpeg":>9}{"MB":>9}  a batch']
    for side in (*PROJECT, *PEERS):
        version, best = f'{MODULES[side]} {versions[MODULES[side]]}', result['best_images_per_second'][side]
        row = f'{side:<12}{version:<19}{speeds[side]:>9.0f}{best:>9.0f}'
        row += ''.join(f'{speeds[own] / speeds[side]:>9.2f}' if side in PEERS else f'{"":>9}' for own in PROJECT)
        lines.append(f'{row}{result["read_memory"][side] / 1e6:>9.0f}  {result["batch"][side]}')
    for side in PROJECT:
        speed, memory = result['prepare_images_per_second'][side], result['prepare_memory'][side]
        lines.append(f'{f"preparing {side}":<31}{speed:>9.0f}{memory / 1e6:>36.0f}')
    lines += ['', 'The project crops, flips and normalises later, on the device; its peers have done it, on the host.']
    return '\n'.join(lines)


def main() -> None:
    """Makes the JPEGs and stores, runs the sides and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=4000, help='to train on')
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--batches', type=int, default=20, help='timed, a round')
    parser.add_argument('--rounds', type=int, default=5, help='timed, after one that is not')
    parser.add_argument('--cores', type=int, default=2, help='to run on; threads a side, and processes that prepare')
    parser.add_argument('--folder', help='kept, with pictures to use again; else a temporary one')
    parser.add_argument('--whole_epoch', action='store_true', help='raw and jpeg read all images before their memory')
    parser.add_argument('--json', action='store_true', help='one JSON object in place of the table')
    parser.add_argument('--worker', choices=(*PROJECT, *PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.batches, arguments.rounds, arguments.cores) < 1:
        parser.error('--batch_size, --batches, --rounds and --cores are at least 1')
    if arguments.images < arguments.batch_size:
        parser.error('--images is at least --batch_size')
    cores = arguments.cores
    if arguments.worker:
        return serve(lambda: start(arguments.worker, arguments.folder, arguments.batch_size, cores))
    if hasattr(os, 'sched_setaffinity'):  # otherwise libraries may use more cores
        there = sorted(os.sched_getaffinity(0))
        cores = min(cores, len(there))
        os.sched_setaffinity(0, there[:cores])  # inherited

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack below is cleaned up
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix='input_'))
        pictures = os.path.join(os.path.abspath(folder), f'pictures_{arguments.images}')
        make_pictures(pictures, arguments.images, cores)
        sizes = [path.stat().st_size for path in training_files(pictures)]
        shutil.rmtree(f'{pictures}.stores', ignore_errors=True)  # because the preparation is measured
        prepared = {side: prepare(pictures, side, cores) for side in PROJECT}
        command = [sys.executable, os.path.abspath(__file__), f'--folder={pictures}', f'--cores={cores}']
        command += [f'--batch_size={arguments.batch_size}']
        workers = [Worker(side, [*command, f'--worker={side}'], NO_GPU, stack) for side in (*PROJECT, *PEERS)]
        untimed = 12 + 2 * cores  # more than any side prefetches: tensorflow 10, the project 2 per thread
        table = [[w.ask((untimed, arguments.batches)) for w in workers] for _ in range(1 + arguments.rounds)]
        memory = {worker.side: peak for worker, (_, peak) in zip(workers, table[-1], strict=True)}
        if arguments.whole_epoch:
            rest = math.ceil(arguments.images / arguments.batch_size) - len(table) * (untimed + arguments.batches)
            for worker in workers[: len(PROJECT)]:
                memory[worker.side] = worker.ask((max(rest, 0), 0))[1]

    result: dict[str, Any] = {'images_per_second': {}, 'best_images_per_second': {}, 'read_memory': {}, 'batch': {}}
    for worker, answers in zip(workers, zip(*table[1:], strict=True), strict=True):
        seconds = [each for each, _ in answers]
        read = arguments.batches * arguments.batch_size
        result['images_per_second'][worker.side] = read / statistics.median(seconds)
        result['best_images_per_second'][worker.side] = read / min(seconds)
        result['read_memory'][worker.side], result['batch'][worker.side] = memory[worker.side], worker.about['batch']
    for prefix, peer in zip(('', 'pillow_'), PEERS, strict=True):
        speeds = result['images_per_second']
        result |= {f'{side}_{prefix}ratio': speeds[side] / speeds[peer] for side in PROJECT}
    result['prepare_images_per_second'] = {side: speed for side, (speed, _) in prepared.items()}
    result['prepare_memory'] = {side: memory for side, (_, memory) in prepared.items()}
    result |= {name: getattr(arguments, name) for name in ('images', 'batch_size', 'batches', 'rounds', 'whole_epoch')}
    result |= {'bytes_a_picture': statistics.mean(sizes), 'cores': cores}
    versions = {MODULES[worker.side]: worker.about['version'] for worker in workers}
    result['versions'] = {'python': platform.python_version()} | versions
    result |= {'machine': machine(), 'date': datetime.date.today().isoformat()}
    print(json.dumps(result) if arguments.json else report(result))
    return None


if __name__ == '__main__':
    main()
