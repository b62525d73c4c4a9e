"""Loads a trained model from a checkpoint, and creates a run from weights.

Loading changes no file in the folder of the run, so the run may still be training.
"""

import dataclasses
import functools
import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, UInt8

from alexnet_jax import parallel
from alexnet_jax.augment import PreprocessParams, eval_crop, make_preprocess_params
from alexnet_jax.config import Config, ConfigError
from alexnet_jax.data.dataset import MANIFEST_FIELDS, PreparedDataset
from alexnet_jax.data.open_or_prepare import open_or_prepare
from alexnet_jax.inference import forward
from alexnet_jax.inference.pictures import (
    ClassProbability,
    Picture,
    is_one_picture,
    list_pictures,
    prepare_picture,
)
from alexnet_jax.metrics import top_k
from alexnet_jax.model import AlexNet
from alexnet_jax.paths import is_url
from alexnet_jax.runtime.checkpoint_ref import (
    CheckpointRef,
    check_new,
    parse_checkpoint_ref,
    with_data_folders,
    with_overrides,
)
from alexnet_jax.runtime.files import read_json, write_json
from alexnet_jax.runtime.preemption import PreemptionHandler
from alexnet_jax.runtime.workdir import (
    check_class_names,
    dataset_statistics_path,
    read_dataset_statistics,
    resolve_written,
    statistics_belong_to,
    statistics_digest,
    with_settings_of_weights,
    write_dataset_statistics,
)
from alexnet_jax.training import checkpointing
from alexnet_jax.training.checkpoint_reader import restore
from alexnet_jax.training.run_state import RunState
from alexnet_jax.training.state import TrainState, abstract_state, build_model, with_average

# A compiled function (state, images (B, S, S, C) uint8, preprocessing) -> (B, ...).
InferenceStep = Callable[[TrainState, jax.Array, PreprocessParams], jax.Array]


def with_mesh(config: Config) -> tuple[Config, parallel.Mesh]:
    """Returns `config` and its mesh; falls back to pure data parallelism if that mesh does not fit the devices."""
    try:
        return config, parallel.make_mesh(config)
    except ConfigError:
        batch_size = 2 * config.train.grad_accum_steps * jax.device_count()  # two: mixup and CutMix need pairs
        all_data = {'mesh.layout': 'data', 'mesh.data': -1, 'mesh.model': 1, 'train.batch_size': batch_size}
        config = with_overrides(config, all_data)
        return config, parallel.make_mesh(config)


def open_eval_dataset(
    refs: Sequence[CheckpointRef], data_dir: str | None, prepared_dir: str | None = None
) -> PreparedDataset:
    """Opens the data set on which all checkpoints were trained, after its preparation if it is missing.

    If all checkpoints have imported weights, the configuration of the first one names the data set.

    Args:
      refs: the checkpoints.
      data_dir, prepared_dir: folders that replace those of the configuration, unless both are None.

    Raises:
      ConfigError: a checkpoint is missing, or the checkpoints were trained on different data or on other data than the
        prepared data.
      CheckpointError: a checkpoint cannot be read.
      DatasetError, SystemExit: see open_or_prepare().
      KeyboardInterrupt: SIGINT arrived meanwhile. Other preemption signals then have their usual effect.
    """
    # A fingerprint covers the settings, class names and images of a data set; it is None for imported weights.
    fingerprints = [(ref, restore(ref, None).run_state.dataset_fingerprint) for ref in refs]
    first, fingerprint = next((pair for pair in fingerprints if pair[1] is not None), (refs[0], None))
    for ref, other in fingerprints:
        if other not in (fingerprint, None):
            theirs, own = first.config.data, ref.config.data
            differ = [name for name in MANIFEST_FIELDS if getattr(own, name) != getattr(theirs, name)]
            why = ', '.join(f'data.{name}={getattr(own, name)!r} and not {getattr(theirs, name)!r}' for name in differ)
            raise ConfigError(
                f'{ref.name}: trained with other classes or images than {first.name}'
                f' ({why or "the same settings, but other images"}); evaluate it separately'
            )
    config = with_data_folders(first.config, data_dir, prepared_dir)
    if config is first.config:
        _check_relative_data_dir(first)
    with PreemptionHandler() as preemption:
        prepared = open_or_prepare(config, preemption, fingerprint)
    if preemption.received is not None:
        signal.raise_signal(preemption.received)
    if prepared is None:
        raise KeyboardInterrupt
    for ref, other in fingerprints:
        if other is None:
            check_class_names(ref.name, ref.workdir, read_dataset_statistics(ref.workdir)[1], prepared.class_names)
    if fingerprint is not None and not prepared.has_fingerprint(fingerprint):
        raise ConfigError(
            f'{first.name}: was trained with other images than those prepared in'
            f' {config.data.prepared_dir or config.data.data_dir}; name their folder with --data_dir'
        )
    return prepared


def _check_relative_data_dir(ref: CheckpointRef) -> None:
    """Raises ConfigError if the data_dir of a run of version 0.1, which kept relative paths, is not there."""
    written = (read_json(os.path.join(ref.workdir, 'config.json')) or {}).get('data')
    recorded = os.path.expanduser(str(written.get('data_dir', '/') if isinstance(written, dict) else '/'))
    if os.path.isabs(recorded) or is_url(recorded) or os.path.isdir(recorded):
        return
    raise ConfigError(
        f'{ref.name}: its data_dir is the relative path {recorded!r}, which does not exist in {os.getcwd()};'
        ' change to the folder where the run was started, or name the folder of the data with --data_dir'
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """A trained network on the devices, as load() and create() return it.

    Attributes:
      name: what the user named: a CHECKPOINT, a file or a preset.
      workdir: absolute path of the run's folder, or '' without a run.
      step: step of the checkpoint; 0 without a run.
      digest: digest of the state, see checkpointing.state_digest().
      config: resolved configuration of the run, with a mesh that fits the available devices.
      mesh: see parallel.make_mesh().
      state: the train state for inference, sharded over the mesh; see TrainState.for_inference().
      statistics: statistics of the training images, see prepare.shards.statistics().
      class_names: one name per label.
    """

    name: str
    workdir: str
    step: int
    digest: str
    config: Config
    mesh: parallel.Mesh
    state: TrainState
    statistics: dict[str, np.ndarray]
    class_names: list[str]

    def __repr__(self) -> str:
        preset, classes = self.config.model.preset, len(self.class_names)
        return f'<TrainedModel {self.name}: preset {preset}, {classes} classes, step {self.step}>'

    @overload
    def predict(  # type: ignore[overload-overlap]  # a text is an iterable of texts, but one path
        self, pictures: Picture, views: int = 10, top: int = 5
    ) -> list[ClassProbability]: ...

    @overload
    def predict(self, pictures: Iterable[Picture], views: int = 10, top: int = 5) -> list[list[ClassProbability]]: ...

    def predict(
        self, pictures: Picture | Iterable[Picture], views: int = 10, top: int = 5
    ) -> list[ClassProbability] | list[list[ClassProbability]]:
        """Returns the most probable classes of pictures, as `alexnet predict` does.

        Args:
          pictures: one picture or several: paths, Pillow images, or NumPy or JAX arrays of uint8, (H, W, 3) RGB or
            (H, W). An array (N, H, W, 3) is N pictures. Pictures of any size are scaled and cropped like the training
            images.
          views: 1, the center crop, or 10 (section 4.1), whose softmax outputs are averaged.
          top: number of classes.

        Returns:
          A list of {'class': name, 'probability': 0 to 1}, most probable first; for several pictures a list of lists.

        Raises:
          UnreadableImage: a picture is not readable; the message names the picture and the reason.
          ConfigError: an argument has another type, dtype, shape or value.

        >>> import alexnet_jax, skimage
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> best, other = network.predict(skimage.data.chelsea())
        >>> round(best['probability'] + other['probability'], 4)
        1.0
        >>> [len(classes) for classes in network.predict([skimage.data.coffee(), skimage.data.camera()], top=1)]
        [1, 1]
        """
        number_of_views, count = forward.as_integer(views), forward.as_integer(top)
        if number_of_views not in (1, 10):
            raise ConfigError(f'views: {views!r} is neither 1 nor 10; give 1 for the center crop')
        if count is None or count < 1:
            raise ConfigError(f'top: {top!r} is not a number of classes from 1')
        scores = forward.predict_log_probabilities(self, list_pictures(pictures), number_of_views)
        records: list[list[ClassProbability]] = [
            [{'class': name, 'probability': value} for name, value in top_k(row, self.class_names, count)]
            for row in np.exp(scores)
        ]
        return records[0] if is_one_picture(pictures) else records

    def images(self, pictures: Picture | Iterable[Picture]) -> UInt8[np.ndarray, 'n s s c']:
        """Returns pictures, scaled and cropped like the training images, (N, image_size, image_size, channels) uint8.

        The argument and the errors are those of predict(). One picture gives an array with N = 1.

        >>> import alexnet_jax, numpy as np
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> network.images(np.zeros((300, 400, 3), np.uint8)).shape
        (1, 256, 256, 3)
        """
        data = self.config.data
        return np.stack([prepare_picture(each, number, data) for number, each in enumerate(list_pictures(pictures))])

    def logits(self, images: Picture | Iterable[Picture]) -> Float32[np.ndarray, 'n classes']:
        """Returns the logits for the center crops of `images`; one picture gives N = 1.

        `images` are an array uint8 (N, image_size, image_size, channels), or pictures of any size as in predict(),
        which are scaled and cropped like the training images. The errors are those of predict().

        >>> import alexnet_jax, skimage
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> network.logits([skimage.data.chelsea(), skimage.data.coffee()]).shape
        (2, 2)
        """
        return self.activations(images, ('fc8',))['fc8']

    def activations(
        self, images: Picture | Iterable[Picture], layers: str | Iterable[str] = ('conv5', 'fc7')
    ) -> dict[str, Float32[np.ndarray, '...']]:
        """Returns the outputs of `layers` for the center crops of `images`, from one forward pass.

        Args:
          images: as in logits().
          layers: names from conv1 to fc8. The outputs are those of the nonlinearity, before normalization and pooling;
            fc8 has no nonlinearity.

        Returns:
          By layer, in the order of `layers`, float32 (N, H, W, C) or (N, units). The features of the first tower
          precede those of the second.

        Raises:
          UnreadableImage: see predict().
          ConfigError: see predict(); or a layer is unknown.

        >>> import alexnet_jax, skimage
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> outputs = network.activations(skimage.data.chelsea(), layers=('conv5', 'fc7'))
        >>> outputs['conv5'].shape, outputs['fc7'].shape
        ((1, 13, 13, 16), (1, 32))
        """
        return forward.layer_outputs(self, list_pictures(images), forward.check_layers(layers, self.config))

    def preprocess(self, pictures: Picture | Iterable[Picture]) -> Float32[jax.Array, 'n crop crop c']:
        """Returns the inputs of `module` for pictures: the center crops, minus the mean, times the scale.

        The argument and the errors are those of predict().

        >>> import alexnet_jax, numpy as np, skimage
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> inputs, logits = network.preprocess(skimage.data.chelsea()), network.logits(skimage.data.chelsea())
        >>> inputs.shape, np.allclose(network.module(inputs), logits, atol=1e-5)
        ((1, 224, 224, 3), True)
        """
        images = jax.device_put(self.images(pictures), jax.local_devices()[0])
        return eval_crop(images, self.preprocessing, self.config.data, 0)

    @property
    def module(self) -> AlexNet:
        """A new Flax NNX module of the network with the weights on one device.

        Its argument is the result of preprocess(), float32 (N, crop_size, crop_size, channels), and its result the
        logits (N, classes). Changes of the module change neither the other methods nor other modules.

        >>> import alexnet_jax, jax, skimage
        >>> small = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}
        >>> network = alexnet_jax.create('torchvision', num_classes=2, settings=small)
        >>> inputs = network.preprocess(skimage.data.chelsea())
        >>> jax.grad(lambda x: network.module(x)[0, 1])(inputs).shape
        (1, 224, 224, 3)
        """
        return nnx.merge(build_model(self.config)[0], *self._weights_on_one_device)

    @functools.cached_property
    def _weights_on_one_device(self) -> tuple[dict[str, dict[str, jax.Array]], dict[str, dict[str, jax.Array]]]:
        """The parameters and the running statistics, as concrete arrays even if the first use is inside jax.jit."""
        with jax.ensure_compile_time_eval():
            weights = self.state.params, self.state.batch_stats
            return jax.device_put(jax.device_get(weights), jax.local_devices()[0])

    @property
    def preprocessing(self) -> PreprocessParams:
        """The preprocessing arrays of the model, see augment.make_preprocess_params()."""
        return make_preprocess_params(self.statistics, self.config.data)

    @property
    def sharding(self) -> parallel.NamedSharding:
        """Sharding of the rows of a batch, see parallel.batch_sharding()."""
        return parallel.batch_sharding(self.mesh, self.config.mesh.layout)

    def batch_size(self, images: int) -> int:
        """Returns min(eval.batch_size, `images`), rounded up to a multiple of the number of batch shards."""
        parts = parallel.num_batch_shards(self.sharding)
        return math.ceil(min(self.config.eval.batch_size, max(images, 1)) / parts) * parts

    def predict_batches(
        self, inference_step: InferenceStep, images: Iterable[UInt8[np.ndarray, 's s c']], batch_size: int
    ) -> Iterator[Float[np.ndarray, '...']]:
        """Yields the output of `inference_step` for each image, in order; `images` is consumed one batch at a time.

        Args:
          inference_step: the result of make_predict_step() or make_activation_fn().
          images: images in the format of the model's data set.
          batch_size: number of images per call of `inference_step`; zeros pad the last batch.
        """
        preprocessing, images = self.preprocessing, iter(images)
        while batch := list(itertools.islice(images, batch_size)):
            filled = np.stack(batch + [np.zeros_like(batch[0])] * (batch_size - len(batch)))
            outputs = inference_step(self.state, parallel.make_global_batch(self.sharding, filled), preprocessing)
            yield from np.asarray(outputs)[: len(batch)]


def load_model(checkpoint: CheckpointRef | str, prepared: PreparedDataset | None = None) -> TrainedModel:
    """Loads a checkpoint onto the available devices.

    Args:
      checkpoint: a CheckpointRef, or the path WORKDIR (newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP.
      prepared: the data set, see open_eval_dataset(); supplies the statistics and class names if the folder of the run
        contains no dataset_statistics.npz.

    Raises:
      ConfigError: there is no such run or checkpoint, or dataset_statistics.npz is missing or corrupt.
      CheckpointError: the checkpoint cannot be read.
    """
    ref = parse_checkpoint_ref(checkpoint) if isinstance(checkpoint, str) else checkpoint
    if prepared is not None and not os.path.exists(dataset_statistics_path(ref.workdir)):
        statistics, class_names = prepared.statistics, prepared.class_names
    else:
        statistics, class_names = read_dataset_statistics(ref.workdir, ref.config)
    config, mesh = with_mesh(ref.config)
    # The velocities are restored too, because the digest that detects corruption covers them.
    restored = restore(ref, abstract_state(config, mesh))
    assert restored.state is not None
    if not statistics_belong_to(ref.workdir, statistics, restored.run_state.statistics_digest):
        raise ConfigError(f'{dataset_statistics_path(ref.workdir)} is of another run; copy that of this run again')
    if restored.config is not None:
        step = restored.run_state.step
        config = with_settings_of_weights(config, resolve_written(restored.config), f'the checkpoint of step {step}')
    return TrainedModel(
        name=ref.name,
        workdir=ref.workdir,
        step=restored.run_state.step,
        digest=restored.state_digest,
        config=config,
        mesh=mesh,
        state=restored.state.for_inference(),
        statistics=statistics,
        class_names=class_names,
    )


def place_weights(
    config: Config,
    mesh: parallel.Mesh,
    params: dict[str, dict[str, np.ndarray]],
    batch_stats: dict[str, dict[str, np.ndarray]],
) -> TrainState:
    """Returns the state of step 0 on `mesh` with these weights and zero velocities; see import_weights_as_run()."""
    abstract = abstract_state(config, mesh)
    velocities = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
    state: TrainState = TrainState(jnp.zeros((), jnp.int32), params, velocities, batch_stats)
    state = with_average(state, config)
    return jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), state, abstract)


def import_weights_as_run(
    workdir: str,
    config: Config,
    params: dict[str, dict[str, np.ndarray]],
    batch_statistics: dict[str, dict[str, np.ndarray]],
    statistics: dict[str, np.ndarray],
    class_names: list[str],
) -> None:
    """Atomically creates the folder of a run at step 0 with the weights `params` and zero velocities.

    Args:
      workdir: the folder to create.
      config: a resolved configuration.
      params: float32, as in TrainState.
      batch_statistics: float32 running means and variances, as in TrainState; {} without batch normalization.
      statistics, class_names: see TrainedModel.

    Raises:
      ConfigError: `workdir` is not a new or empty folder, or cannot be written.
      CheckpointError: the checkpoint cannot be written, for example on a full disk.
    """
    check_new(workdir)
    staging_dir = f'{os.path.abspath(os.path.expanduser(workdir))}.{os.getpid()}.tmp'
    try:
        one_device = with_overrides(config, {'mesh.layout': 'data', 'mesh.data': 1, 'mesh.model': 1})
        state = place_weights(one_device, parallel.make_mesh(one_device), params, batch_statistics)
        os.makedirs(staging_dir)
        checkpoints = checkpointing.Checkpointer(os.path.join(staging_dir, 'checkpoints'), keep=1, config=config)
        checkpoints.save(state, RunState(statistics_digest=statistics_digest(statistics)), None)
        checkpoints.close()
        write_dataset_statistics(staging_dir, statistics, class_names)
        write_json(os.path.join(staging_dir, 'config.json'), config.to_dict())
        os.rename(staging_dir, os.path.expanduser(workdir))
    except OSError as error:
        raise ConfigError(f'{workdir} cannot be written: {error.strerror}; name another folder') from None
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
