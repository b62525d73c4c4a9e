"""What watches a run beside its log: TensorBoard, Weights & Biases, and a profiler's trace of some steps."""

import dataclasses
import importlib.util
import io
import os
import re
import uuid
from typing import Any

import numpy as np

from alexnet_jax.config import ConfigError
from alexnet_jax.monitor import log, read_json, summarize_exception, write_json

SAMPLES, SHOWN = 8, 5  # validation images whose predictions are shown, and classes of each


class TensorBoard:
    """Event files in WORKDIR/tensorboard, written without TensorFlow; what lies after `step` is hidden by a restart."""

    def __init__(self, workdir: str, step: int):
        from tensorboardX import SummaryWriter

        folder = os.path.join(workdir, 'tensorboard')
        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None, flush_secs=10)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, such as 'train/loss'."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """`pixels`: (H, W, 3) uint8."""
        self.writer.add_image(name, pixels, step, dataformats='HWC')

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of `project`, the same one when the run in `workdir` goes on. Raises ConfigError: it cannot be begun."""

    def __init__(self, workdir: str, project: str, config: Any):
        import wandb

        path = os.path.join(workdir, 'wandb.json')
        identity = (read_json(path) or {}).get('id') or uuid.uuid4().hex[:12]
        write_json(path, {'id': identity})
        self.image = wandb.Image
        name = os.path.basename(os.path.abspath(workdir))
        settings = config.to_dict()
        try:
            self.run = wandb.init(project=project, dir=workdir, id=identity, name=name, resume='allow', config=settings)
        except Exception as error:  # of the service and the network, many kinds
            raise ConfigError(
                f'--wandb={project}: {summarize_exception(error)}; WANDB_MODE=offline needs no network'
            ) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, such as 'train/loss'."""
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """`pixels`: (H, W, 3) uint8."""
        self.run.log({name: self.image(pixels)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


def check_wandb(project: str | None) -> None:
    """Raise ConfigError where --wandb is given and the package is not there."""
    if project is not None and importlib.util.find_spec('wandb') is None:
        raise ConfigError(f'--wandb={project}: the package wandb is not installed: pip install "alexnet_jax[wandb]"')


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line asks for: event files, a project of Weights & Biases, a trace; see parse_profile()."""

    tensorboard: bool = False
    wandb: str | None = None
    profile: tuple[int, int] | None = None

    @property
    def pictures(self) -> bool:
        """Whether pictures are shown."""
        return self.tensorboard or self.wandb is not None


class CompositeTracker:
    """Those that are wanted, of process 0; the others have none. Raises ConfigError, see WeightsAndBiases."""

    def __init__(self, wanted: Wanted, workdir: str, step: int, config: Any, first: bool):
        self.each: list[TensorBoard | WeightsAndBiases] = []
        if first and wanted.tensorboard:
            self.each.append(TensorBoard(workdir, step))
        if first and wanted.wandb is not None:
            self.each.append(WeightsAndBiases(workdir, wanted.wandb, config))

    def line(self, values: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl or layers.jsonl."""
        for each in self.each:
            each.scalars(values['step'], as_scalars(values))

    def pictures(
        self,
        step: int,
        kernel: np.ndarray | None,
        towers: int,
        examples: list[dict[str, Any]],
        scores: np.ndarray,
        class_names: list[str],
    ) -> None:
        """Show conv1's `kernel` (h, w, C, N), if any, and `examples` with log probabilities `scores` (n, classes)."""
        if not self.each:
            return
        from alexnet_jax.ensemble import best
        from alexnet_jax.figures import kernels, predictions, style

        drawn = [
            predictions.Prediction(
                image=example['image'],
                name='',
                label=class_names[example['label']],
                top=best(np.exp(row), class_names, SHOWN),
            )
            for example, row in zip(examples, scores, strict=True)
        ]
        figures = {'predictions': predictions.draw(drawn)}
        if kernel is not None:
            figures['kernels'] = kernels.draw(kernel, towers)
        for name, figure in figures.items():
            pixels = as_pixels(style.as_png(figure))
            for each in self.each:
                each.picture(step, name, pixels)

    def close(self) -> None:
        """Write what is left."""
        for each in self.each:
            each.close()


class SamplePredictions:
    """Some validation images, evenly spread over the split, and what a network sees in them.

    Attributes:
      examples: of the split, see data/pipeline.Split; all processes have the same.
    """

    def __init__(self, config: Any, mesh: Any, split: Any):
        from alexnet_jax import parallel
        from alexnet_jax.data import pipeline
        from alexnet_jax.step import make_predict_step

        self.examples = [example for _, example in pipeline.spread(split, SAMPLES)]
        self.sharding = parallel.batch_sharding(mesh, config.mesh.layout)
        self.step = make_predict_step(config, mesh, views=1)

    def scores(self, state: Any, preprocessing: dict[str, np.ndarray]) -> np.ndarray:
        """Log probabilities (n, classes) float32 of the examples' centre views; all processes must call it."""
        from alexnet_jax import parallel, processes

        (share, shares), parts = parallel.process_shard(self.sharding), parallel.num_batch_shards(self.sharding)
        rows = [example['image'] for example in self.examples]
        rows += rows[:1] * (-len(rows) % parts)
        own = np.split(np.stack(rows), shares)[share]
        scores = self.step(state, parallel.make_global_batch(self.sharding, own), preprocessing)
        return processes.gather_to_host(scores)[: len(self.examples)]


def as_scalars(values: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl or layers.jsonl as numbers by name: 'validation/loss', 'layers/conv1/dead'."""
    split, found = values['split'], {}
    for name, value in values.items():
        parts = value if isinstance(value, dict) else {'': value}
        for part, number in parts.items():
            if isinstance(number, int | float) and name != 'step':
                found['/'.join(filter(None, (split, name, part)))] = float(number)
    return found


def as_pixels(png: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """--profile='steps 20:25': the steps that begin after 20 and until 25 steps. Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r'(?:steps\s+)?(\d{1,9}):(\d{1,9})', text.strip())
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--profile: {text!r} is no range of steps; write for example --profile='steps 20:25'")
    return int(match[1]), int(match[2])


class Profile:
    """A trace of JAX's profiler of the steps from `steps[0]` until before `steps[1]`, in WORKDIR/profile."""

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self.steps, self.folder, self.runs, self.begun = steps, os.path.join(workdir, 'profile'), False, False

    def at(self, step: int, state: Any) -> None:
        """`step` steps are taken, and `state` is what they led to. Begins and ends the trace."""
        import jax

        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)  # what came before is not part of it
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.runs = self.begun = True
        elif self.steps and step == self.steps[1]:
            self.end(state)

    def end(self, state: Any) -> None:
        """Write the trace where one was begun; say so where one was wanted and never was."""
        import jax

        if self.steps and not self.begun:
            log(f'no trace: this run did not come to step {self.steps[0]} of --profile')
        if self.runs:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.runs = False
            log(f'{self.folder}: trace for TensorBoard, and perfetto_trace.json.gz for ui.perfetto.dev')
