"""Worker processes of `prepare`, which convert examples to shards of square images and exit with their parent.

The shards are byte-identical for any number of processes.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.prepare.shards import ContentDigest, ImageSpec, RunningMoments, Shard
from alexnet_jax.runtime.files import JsonObject, json_digest, read_json, write_json

T = TypeVar('T')


class SkippedImage(TypedDict):
    """An unreadable image: its split, its name in the source, and the reason."""

    split: str
    name: str
    reason: str


class ShardReport(TypedDict):
    """The report of a complete shard: stored examples, file size, skipped images, and SHA-256 digests.

    `digest` is that of the raw examples, `sums` that of the file of sums, and `report` that of the other fields.
    `content` and `order` are those of ContentDigest; earlier versions wrote reports without them.
    """

    examples: int
    bytes: int
    skipped: list[SkippedImage]
    digest: str
    content: str
    order: str
    sums: str
    report: str


def read_report(shard: Shard, folder: str, reports: str) -> ShardReport | None:
    """Returns the report of `shard`, or None if the shard is incomplete or contains other images, or a file is corrupt.

    The function does not read the records; training detects corrupt ones.
    """
    report = read_json(os.path.join(reports, shard.report)) or {}
    content = {name: value for name, value in report.items() if name != 'report'}
    if report.get('report') != json_digest(content) or report['digest'] != shard.examples.digest():
        return None
    if 'content' not in report:  # of an earlier version
        return None
    try:
        whole = report['bytes'] == os.path.getsize(os.path.join(folder, shard.file))
        whole &= report['sums'] == file_digest(os.path.join(reports, shard.sums))
        ArrayRecordReader(os.path.join(folder, shard.file)).close()  # reads the index of the records
    except (OSError, RuntimeError):  # RuntimeError: the index is corrupt
        return None
    return cast('ShardReport', report) if whole else None


def write_shards(
    shards: list[Shard], format: ImageSpec, folder: str, reports: str, workers: int
) -> Generator[tuple[Shard, ShardReport], None, None]:
    """Writes `shards` with `workers` processes, and yields each shard with its report when the shard is complete.

    Closing the generator terminates the processes at once. `folder` and `reports` are those of write_shard().

    Raises:
      DatasetError: a process was killed.
      OSError: see write_shard().
    """
    # Spawn, because TFDS may have loaded TensorFlow, which starts threads, and a fork of threads is unsafe.
    pool = ProcessPoolExecutor(
        min(workers, max(len(shards), 1)), multiprocessing.get_context('spawn'), initializer=_exit_with_parent
    )
    try:
        with _interrupts_blocked():  # workers inherit the mask; only this process handles Ctrl-C
            futures = {pool.submit(write_shard, shard, format, folder, reports): shard for shard in shards}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise DatasetError(
            'a worker process was killed, perhaps because memory ran out; rerun the same command to resume'
            f' (fewer --workers than {workers} need less memory)'
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():  # safe, because shards are written atomically
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def call_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Returns function(*arguments), called in a child process that exits with this process.

    Raises the exceptions of `function`. Raises DatasetError: the process was killed.
    """
    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), initializer=_exit_with_parent)
    try:
        with _interrupts_blocked():
            future = pool.submit(function, *arguments)
        return future.result()
    except BrokenProcessPool:
        raise DatasetError('a child process was killed, perhaps because memory ran out; rerun the command') from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Defers SIGINT to the end of the context. Processes started in the context keep SIGINT blocked."""
    interrupts = []
    # The mask alone is not enough: another thread may receive SIGINT, and Python runs the handler in the main thread.
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            signal.raise_signal(signal.SIGINT)  # pending until the mask is restored
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    """Initializes a worker: starts a thread that exits the process as soon as the parent has exited."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _writer_errors_as_oserror(folder: str) -> Iterator[None]:
    """Converts the RuntimeError that ArrayRecord's writer raises, for example on a full disk, to OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'{folder}: {str(error).splitlines()[0]}') from None


def write_shard(shard: Shard, format: ImageSpec, folder: str, reports: str) -> ShardReport:
    """Writes the examples of `shard` to a file in `folder`, atomically, and returns the report.

    The function also writes the report and the sums of RunningMoments to the folder `reports`.

    Raises OSError: a file cannot be written.
    """
    features, sums = format.features(), RunningMoments(format)
    content_digest = ContentDigest(shard.split, format.class_names)
    skipped: list[SkippedImage] = []
    serializer = ExampleSerializer(features.get_serialized_info())
    temporary = os.path.join(folder, f'.{shard.file}.{os.getpid()}')  # by pid: a worker may briefly outlive its parent
    # Uncompressed, because compression makes reading three times as slow; one record per group for random access.
    writer = ArrayRecordWriter(temporary, 'group_size:1,uncompressed')
    try:
        for index in range(len(shard.examples)):
            try:
                content, label = shard.examples[index]
                if not 0 <= label < len(format.class_names):
                    raise UnreadableImage(f'its label {label} is not a class')
                pixels = resize_and_center_crop(read_image(content), format.image_size, format.channels)
            except (UnreadableImage, OSError, RuntimeError) as error:  # RuntimeError: corrupt TFDS record
                reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [type(error).__name__])[0]
                skipped.append({'split': shard.split, 'name': shard.examples.name(index), 'reason': reason})
                continue
            stored, read_back = format.encode(pixels)
            sums.add(read_back, label)
            content_digest.add(stored, label)
            example = serializer.get_tf_example(features.encode_example({'image': stored, 'label': label}))
            record = example.SerializeToString(deterministic=True)  # otherwise the order of features varies
            with _writer_errors_as_oserror(folder):
                writer.write(record)
    finally:
        with _writer_errors_as_oserror(folder):
            writer.close()
    _fsync(temporary)
    os.replace(temporary, os.path.join(folder, shard.file))
    _save_npz(os.path.join(reports, shard.sums), vars(sums))
    fields: JsonObject = {
        'examples': int(sums.class_counts.sum()),
        'bytes': os.path.getsize(os.path.join(folder, shard.file)),
        'skipped': skipped,
        'digest': shard.examples.digest(),
        'content': f'{content_digest.total:064x}',
        'order': content_digest.order.hexdigest(),
        'sums': file_digest(os.path.join(reports, shard.sums)),
    }
    report = fields | {'report': json_digest(fields)}
    write_json(os.path.join(reports, shard.report), report)
    return cast('ShardReport', report)


def file_digest(path: str) -> str:
    """Returns the SHA-256 hex digest of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _save_npz(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes `arrays` as .npz atomically."""
    temporary = f'{path}.{os.getpid()}'
    with open(temporary, 'wb') as file:
        np.savez(file, allow_pickle=False, **arrays)
    _fsync(temporary)
    os.replace(temporary, path)
