"""Exports a trained network: the weights as safetensors, or the inference program as StableHLO or ONNX.

The programs map any number of uint8 images of crop_size x crop_size pixels to logits. They contain the weights and the
preprocessing of the run's center crop. They run on one device, regardless of the mesh in training.
"""

import importlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from alexnet_jax.config import ConfigError, default_config, get_by_path
from alexnet_jax.runtime.files import atomic_write
from alexnet_jax.runtime.workdir import PATH_FIELDS, read_config
from alexnet_jax.weights.weight_layouts import Parameters

if TYPE_CHECKING:  # convert checks its flags before it imports jax
    from alexnet_jax.inference.trained_model import TrainedModel

PLATFORMS = ('cpu', 'cuda', 'tpu')
LIBRARIES = {'.safetensors': 'safetensors', '.stablehlo': 'flatbuffers', '.onnx': 'onnx'}
_LIMIT = 2**31 - 2**20  # maximum bytes of weights in a program, with room for the other content


def validate_target(path: str) -> str:
    """Returns the file extension of `path`, which selects the format: .safetensors, .stablehlo or .onnx.

    Raises ConfigError: unknown extension, `path` is not writable, or the required library is not installed.
    """
    path = os.path.expanduser(path)
    ending = os.path.splitext(path)[1].lower()
    if ending not in LIBRARIES:
        raise ConfigError(f'{path}: its suffix must be .safetensors, .stablehlo or .onnx')
    if os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise ConfigError(f'{path} cannot be written; name a file in a writable folder')
    library = LIBRARIES[ending]
    try:
        importlib.import_module(library)
    except ImportError:
        raise ConfigError(f'{path}: {library} is not installed: pip install "alexnet_jax[export]"') from None
    return ending


def write(network: 'TrainedModel', path: str) -> None:
    """Writes `network` to `path` atomically.

    .safetensors: Float32 arrays 'conv1.kernel', 'conv1.bias', 'conv1_norm.mean', ... in this project's layout, and the
      training image statistics 'statistics.mean_image', ... with unchanged dtypes. Metadata: format ('alexnet_jax'),
      config (JSON, of the run), class_names (JSON), step.
    .stablehlo: Serialized jax.export of a function from images (b, crop_size, crop_size, channels) uint8 to logits
      (b, num_classes) float32, for CPU, CUDA and TPU. The function computes in the dtype of the network.
    .onnx: The same function with input `images` and output `logits`, computed in float32. Metadata: class_names (JSON),
      preset, step.

    Raises:
      ConfigError: See validate_target(), or the weights exceed the size limit of the format.
      OSError: Writing failed.
    """
    import jax

    ending = validate_target(path)
    params, batch_statistics = jax.device_get((network.state.params, network.state.batch_stats))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if ending != '.safetensors' and size > _LIMIT:
        raise ConfigError(
            f'{path}: the format is limited to 2 GB, but the weights take {size / 1e9:.1f} GB; write .safetensors'
        )
    convert = {'.safetensors': _safetensors, '.stablehlo': _stablehlo, '.onnx': _onnx}[ending]
    content = convert(network, params, batch_statistics)
    with atomic_write(os.path.expanduser(path), 'wb') as file:
        file.write(content)


def _safetensors(network: 'TrainedModel', params: Parameters, batch_statistics: Parameters) -> bytes:
    import safetensors.numpy

    groups = {**params, **batch_statistics, 'statistics': network.statistics}
    # safetensors ignores strides and writes the raw buffer, so arrays must be C-contiguous.
    arrays = {
        f'{group}.{name}': np.ascontiguousarray(array)
        for group, members in groups.items()
        for name, array in members.items()
    }
    config = read_config(network.workdir).to_dict()  # network.config has the mesh of this machine
    for field in PATH_FIELDS:  # folders of this machine
        group, name = field.split('.')
        config[group][name] = get_by_path(default_config(), field)
    metadata = {'format': 'alexnet_jax', 'config': json.dumps(config), **_labels(network)}
    return safetensors.numpy.save(arrays, metadata)


def _stablehlo(network: 'TrainedModel', params: Parameters, batch_statistics: Parameters) -> bytes | bytearray:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax import export

    from alexnet_jax.training.state import build_model

    graph, data = build_model(network.config)[0], network.config.data
    mean, scale = _preprocessing(network)

    def logits(images):
        inputs = (images.astype(jnp.float32) - mean[None]) * scale[None, None, None]
        return nnx.merge(graph, params, batch_statistics)(inputs)

    (batch,) = export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, data.crop_size, data.crop_size, data.channels), jnp.uint8)
    setting = 'jax_hlo_source_file_canonicalization_regex'
    before = getattr(jax.config, setting)
    jax.config.update(setting, '.*/')  # removes local folder names from the exported file
    try:
        return export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize()
    finally:
        jax.config.update(setting, before)


def _onnx(network: 'TrainedModel', params: Parameters, batch_statistics: Parameters) -> bytes:
    import onnx

    from alexnet_jax.convert import onnx_graph

    model = onnx_graph.build(network.config, params, batch_statistics, *_preprocessing(network))
    onnx.helper.set_model_props(model, {'preset': network.config.model.preset, **_labels(network)})
    return model.SerializeToString()


def _labels(network: 'TrainedModel') -> dict[str, str]:
    return {'class_names': json.dumps(network.class_names), 'step': str(network.step)}


def _preprocessing(network: 'TrainedModel') -> tuple[Float32[np.ndarray, 'crop crop c'], Float32[np.ndarray, ' c']]:
    """Returns the mean of the center crop, and the factor of each channel after the subtraction of the mean."""
    preprocessing, crop = network.preprocessing, network.config.data.crop_size
    start = (preprocessing['mean'].shape[0] - crop) // 2
    mean = preprocessing['mean'][start : start + crop, start : start + crop]
    return np.asarray(mean), np.asarray(preprocessing['scale'])
