"""Exports a trained network: the weights as safetensors or a folder, or the inference program as StableHLO or ONNX.

The programs map any number of uint8 images of crop_size x crop_size pixels to logits. They contain the weights and the
preprocessing of the run's center crop. They run on one device, regardless of the mesh in training.
"""

import importlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from alexnet_jax import __version__
from alexnet_jax.config import ConfigError, default_config, get_by_path
from alexnet_jax.convert import hub_folder
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.files import JsonObject, atomic_write
from alexnet_jax.runtime.workdir import PATH_FIELDS, read_config
from alexnet_jax.weights.weight_layouts import Parameters

if TYPE_CHECKING:  # convert checks its flags before it imports jax
    from alexnet_jax.inference.trained_model import TrainedModel

PLATFORMS = ('cpu', 'cuda', 'tpu')
LIBRARIES = {'.safetensors': 'safetensors', '.stablehlo': 'flatbuffers', '.onnx': 'onnx'}
_LIMIT = 2**31 - 2**20  # maximum bytes of weights in a program, with room for the other content


def validate_target(path: str) -> str:
    """Returns what selects the format: the extension .safetensors, .stablehlo or .onnx of `path`, or / of a folder.

    `path` is a folder if it ends with a slash, or exists and has none of the extensions.

    Raises ConfigError: unknown extension, `path` is not writable, or the required library is not installed.
    """
    is_folder = os.path.isdir(os.path.expanduser(path)) and os.path.splitext(path)[1].lower() not in LIBRARIES
    if path.endswith('/') or is_folder:
        hub_folder.check_target(path)
        return '/'
    path = os.path.expanduser(path)
    ending = os.path.splitext(path)[1].lower()
    if ending not in LIBRARIES:
        raise ConfigError(
            f'{path}: its suffix must be .safetensors, .stablehlo or .onnx; the name of a folder ends with a slash'
        )
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
    .onnx: The same function with input `images` and output `logits`, computed in float32. Metadata: those of
      .safetensors, preset, and input_metadata().
    A folder: See hub_folder.write().

    Raises:
      ConfigError: See validate_target(), or the weights exceed the size limit of the format.
      OSError: Writing failed.
    """
    import jax

    ending = validate_target(path)
    if ending == '/':
        hub_folder.write(network, path, settings_of(network), input_metadata(network), safetensors_of(network))
        return
    params, batch_statistics = jax.device_get((network.state.params, network.state.batch_stats))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if ending != '.safetensors' and size > _LIMIT:
        raise ConfigError(
            f'{path}: the format is limited to 2 GB, but the weights take {size / 1e9:.1f} GB; write .safetensors'
        )
    content: bytes | bytearray
    if ending == '.safetensors':
        content = safetensors_of(network)
    else:
        content = {'.stablehlo': _stablehlo, '.onnx': _onnx}[ending](network, params, batch_statistics)
    with atomic_write(os.path.expanduser(path), 'wb') as file:
        file.write(content)
    if ending != '.safetensors':
        log(f'{path}: {input_metadata(network)["preparation"]}')


def safetensors_of(network: 'TrainedModel') -> bytes:
    """Returns the content of the .safetensors file that write() describes."""
    import jax
    import safetensors.numpy

    params, batch_statistics = jax.device_get((network.state.params, network.state.batch_stats))
    groups = {**params, **batch_statistics, 'statistics': network.statistics}
    # safetensors ignores strides and writes the raw buffer, so arrays must be C-contiguous.
    arrays = {
        f'{group}.{name}': np.ascontiguousarray(array)
        for group, members in groups.items()
        for name, array in members.items()
    }
    return safetensors.numpy.save(arrays, _metadata(network))


def settings_of(network: 'TrainedModel') -> JsonObject:
    """Returns the settings of the run, without the folders of this machine; of a path in data.source the name remains.

    The mesh is that of the run; `network.config` has the mesh of this machine.
    """
    config = (read_config(network.workdir) if network.workdir else network.config).to_dict()
    for field in (*PATH_FIELDS, 'train.init'):
        group, name = field.split('.')
        config[group][name] = get_by_path(default_config(), field)
    config['data']['source'] = hub_folder.without_folder(config['data']['source'])
    return config


def input_metadata(network: 'TrainedModel') -> dict[str, str]:
    """Returns the description of the input of a program, by name, for people who have only its file.

    Keys: image_size, crop_size (pixels), color_order ('RGB' or 'gray'), value_range, dtype, layout, resize_filter;
    mean and scale (JSON, by channel), which the program applies itself; preparation (text).
    """
    data = network.config.data
    mean, scale = _preprocessing(network)
    size, crop, is_rgb = data.image_size, data.crop_size, data.channels == 3
    middle = '' if crop == size else f', and of this square the {crop} x {crop} pixels in its center'
    return {
        'image_size': str(size),
        'crop_size': str(crop),
        'color_order': 'RGB' if is_rgb else 'gray',
        'value_range': '0 to 255',
        'dtype': 'uint8',
        'layout': 'NHWC: (images, height, width, channels)',
        'resize_filter': 'bicubic with antialiasing, as in Pillow',
        'mean': json.dumps(np.round(mean.mean((0, 1), dtype=np.float64), 4).tolist()),
        'scale': json.dumps([float(f'{value:.6g}') for value in scale]),
        'preparation': f'The input is uint8 images of {crop} x {crop} pixels with values from 0 to 255, in the layout'
        f' (images, height, width, channels), with {"the channels red, green, blue" if is_rgb else "one gray channel"}.'
        f' To prepare a picture: scale it with a bicubic filter so that the shorter side has {size} pixels, take the'
        f' {size} x {size} pixels in its center{middle}. The mean of the training images is subtracted and the values'
        ' are scaled by the network itself.',
    }


def _metadata(network: 'TrainedModel') -> dict[str, str]:
    return {
        'format': 'alexnet_jax',
        'config': json.dumps(settings_of(network)),
        'class_names': json.dumps(network.class_names),
        'step': str(network.step),
    }


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
    described, classes = input_metadata(network), network.config.model.num_classes
    model.graph.input[0].doc_string = described['preparation']
    model.graph.output[
        0
    ].doc_string = (
        f'Logits of {classes} classes, in the order of class_names in the metadata. Their softmax is the probabilities.'
    )
    model.doc_string = (
        f'AlexNet ({network.config.model.preset}), exported by alexnet_jax {__version__} at step {network.step}.'
        f' {described["preparation"]} {model.graph.output[0].doc_string}'
    )
    onnx.helper.set_model_props(model, {**_metadata(network), 'preset': network.config.model.preset, **described})
    return model.SerializeToString()


def _preprocessing(network: 'TrainedModel') -> tuple[Float32[np.ndarray, 'crop crop c'], Float32[np.ndarray, ' c']]:
    """Returns the mean of the center crop, and the factor of each channel after the subtraction of the mean."""
    preprocessing, crop = network.preprocessing, network.config.data.crop_size
    start = (preprocessing['mean'].shape[0] - crop) // 2
    mean = preprocessing['mean'][start : start + crop, start : start + crop]
    return np.asarray(mean), np.asarray(preprocessing['scale'])
