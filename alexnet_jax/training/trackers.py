"""Trackers of a run besides the log: TensorBoard, and Weights & Biases."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8

from alexnet_jax.config import Config, ConfigError
from alexnet_jax.metrics import Scores, top_k
from alexnet_jax.runtime.console import log, summarize_exception
from alexnet_jax.runtime.files import JsonObject, read_json, write_json

if TYPE_CHECKING:  # launch.py imports this module before jax
    from alexnet_jax.augment import PreprocessParams
    from alexnet_jax.data.split_reader import Example, SplitReader
    from alexnet_jax.parallel import Mesh
    from alexnet_jax.training.state import TrainState

FLUSH_SECS = 10.0  # between flushes of event files
NUM_SAMPLES, TOP_K = 8, 5  # number of sample images, and of top classes shown for each


class TensorBoard:
    """Writes event files to WORKDIR/tensorboard without TensorFlow, and hides older events after `step`.

    The methods raise OSError if a file cannot be written. tensorboardX's SummaryWriter would raise the error in a
    thread, and then wait forever for that thread.
    """

    def __init__(self, workdir: str, step: int):
        from tensorboardX import RecordWriter

        folder, self.flushed = os.path.join(workdir, 'tensorboard'), time.monotonic()
        os.makedirs(folder, exist_ok=True)
        name = f'events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}'
        self.file = RecordWriter(os.path.join(folder, name))
        self._write(0, file_version='brain.Event:2')
        if step:
            self._write(step + 1, session_log={'status': 'START'})

    def _write(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        if time.monotonic() - self.flushed > FLUSH_SECS:
            self.file.flush()
            self.flushed = time.monotonic()

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers by name, such as 'train/loss'."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, value))

    def log_image(self, step: int, name: str, pixels: UInt8[np.ndarray, 'h w 3']) -> None:
        """Logs an image."""
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, pixels, dataformats='HWC'))

    def close(self) -> None:
        """Flushes and closes the event file."""
        self.file.close()


class WeightsAndBiases:
    """Logs to a Weights & Biases run in `project`; a resumed run in `workdir` continues the same Weights & Biases run.

    Raises ConfigError: the Weights & Biases run cannot be started.
    """

    def __init__(self, workdir: str, project: str, config: Config):
        import wandb

        path = os.path.join(workdir, 'wandb.json')
        identity = (read_json(path) or {}).get('id')
        if not isinstance(identity, str) or not re.fullmatch(r'[\w-]{1,64}', identity, re.ASCII):
            identity = uuid.uuid4().hex[:12]
        write_json(path, {'id': identity})
        self.image = wandb.Image
        name = os.path.basename(os.path.abspath(workdir))
        settings = config.to_dict()
        try:
            self.run = wandb.init(project=project, dir=workdir, id=identity, name=name, resume='allow', config=settings)
        except Exception as error:  # wandb raises many types for the service and the network
            raise ConfigError(
                f'--wandb={project}: {summarize_exception(error)}; WANDB_MODE=offline needs no network'
            ) from None

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers by name, such as 'train/loss'."""
        self.run.log(values, step=step)

    def log_image(self, step: int, name: str, pixels: UInt8[np.ndarray, 'h w 3']) -> None:
        """Logs an image."""
        self.run.log({name: self.image(pixels)}, step=step)

    def close(self) -> None:
        """Sends the remaining data and ends the Weights & Biases run."""
        self.run.finish()


def check_wandb(project: str | None) -> None:
    """Raises ConfigError if --wandb is given and the package wandb is not installed."""
    if project is not None and importlib.util.find_spec('wandb') is None:
        raise ConfigError(f'--wandb={project}: the package wandb is not installed: pip install "alexnet_jax[wandb]"')


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """The trackers requested on the command line.

    Attributes:
      tensorboard: whether to write event files.
      wandb: the Weights & Biases project, or None.
      profile: the range of steps to trace, see parse_profile(), or None.
    """

    tensorboard: bool = False
    wandb: str | None = None
    profile: tuple[int, int] | None = None

    @property
    def images(self) -> bool:
        """Whether a tracker logs images."""
        return self.tensorboard or self.wandb is not None


class CompositeTracker:
    """The trackers of `tracking` on the primary process, and no trackers on other processes.

    A tracker that fails is closed, and the log says so; training continues without that tracker.

    Raises ConfigError: see WeightsAndBiases.
    """

    def __init__(self, tracking: TrackingConfig, workdir: str, step: int, config: Config, is_primary: bool):
        self.trackers: list[TensorBoard | WeightsAndBiases] = []
        opened: list[Callable[[], TensorBoard | WeightsAndBiases]] = []
        if is_primary and tracking.tensorboard:
            opened.append(lambda: TensorBoard(workdir, step))
        if is_primary and (project := tracking.wandb) is not None:
            opened.append(lambda: WeightsAndBiases(workdir, project, config))
        for open_tracker in opened:
            try:
                self.trackers.append(open_tracker())
            except OSError as error:
                log(f'training continues without a tracker, which cannot be opened: {summarize_exception(error)}')

    def _call(self, method: str, *arguments: object) -> None:
        """Calls `method` of each tracker, and removes the trackers that raise an exception."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # of any type: files, network, or the service
                self.trackers.remove(tracker)
                log(f'training continues without {type(tracker).__name__}: {summarize_exception(error)}')
                with contextlib.suppress(Exception):
                    tracker.close()

    def log(self, values: JsonObject) -> None:
        """Logs the numbers of a line of metrics.jsonl or layers.jsonl."""
        self._call('log_scalars', values['step'], as_scalars(values))

    def log_images(
        self,
        step: int,
        kernel: Float32[np.ndarray, 'h w c n'] | None,
        towers: int,
        examples: 'Sequence[Example]',
        scores: Scores,
        class_names: list[str],
    ) -> None:
        """Logs plots of conv1's `kernel`, unless it is None, and of the predictions for `examples`.

        `scores`: log probabilities of the examples.
        """
        if not self.trackers:
            return
        from alexnet_jax.plots import kernels, predictions, style

        drawn = [
            predictions.Prediction(
                image=example['image'],
                name='',
                label=class_names[example['label']],
                top=top_k(np.exp(row), class_names, TOP_K),
            )
            for example, row in zip(examples, scores, strict=True)
        ]
        figures = {'predictions': predictions.draw(drawn)}
        if kernel is not None:
            figures['kernels'] = kernels.draw(kernel, towers)
        for name, figure in figures.items():
            pixels = as_pixels(style.as_png(figure))
            self._call('log_image', step, name, pixels)

    def close(self) -> None:
        """Closes all trackers."""
        self._call('close')


class SamplePredictions:
    """Predicts a few validation images that are evenly spaced over the split.

    Attributes:
      examples: records of the split, see split_reader.SplitReader; the same on all processes.
    """

    def __init__(self, config: Config, mesh: 'Mesh', split: 'SplitReader'):
        from alexnet_jax import parallel
        from alexnet_jax.data import split_reader
        from alexnet_jax.training.eval_step import make_predict_step

        self.examples = [example for _, example in split_reader.evenly_spaced(split, NUM_SAMPLES)]
        self.sharding = parallel.batch_sharding(mesh, config.mesh.layout)
        self.predict_step = make_predict_step(config, mesh, views=1)

    def scores(self, state: 'TrainState', preprocessing: 'PreprocessParams') -> Scores:
        """Returns log probabilities for the center crops of the examples. Collective."""
        from alexnet_jax import parallel
        from alexnet_jax.runtime import distributed

        shard_index, shard_count = parallel.process_shard(self.sharding)
        rows = [example['image'] for example in self.examples]
        rows += rows[:1] * (-len(rows) % parallel.num_batch_shards(self.sharding))
        local_rows = np.split(np.stack(rows), shard_count)[shard_index]
        scores = self.predict_step(state, parallel.make_global_batch(self.sharding, local_rows), preprocessing)
        return distributed.gather_to_host(scores)[: len(self.examples)]


def as_scalars(values: JsonObject) -> dict[str, float]:
    """Flattens a line of metrics.jsonl or layers.jsonl to numbers by name: 'validation/loss', 'layers/conv1/dead'."""
    split, found = values['split'], {}
    for name, value in values.items():
        parts = value if isinstance(value, dict) else {'': value}
        for part, number in parts.items():
            if isinstance(number, int | float) and name != 'step':
                found['/'.join(filter(None, (split, name, part)))] = float(number)
    return found


def as_pixels(png: bytes) -> UInt8[np.ndarray, 'h w 3']:
    """Decodes a PNG file."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))
