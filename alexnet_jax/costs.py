"""What a training step costs, by arithmetic on the configuration alone: sizes, bytes that must travel, time."""

import itertools
import math
from typing import Any

from alexnet_jax import shapes

ITEM_SIZES = {'float32': 4, 'bfloat16': 2}


def layers(config: Any) -> list[shapes.Layer]:
    """The layers of a resolved configuration, conv1 to fc8."""
    return shapes.layers(config.model, config.data.crop_size, config.data.channels)


def flops_per_image(config: Any) -> int:
    """Floating-point operations of training on one image: the convolutions' and matrix products', two a multiply-add.

    Forward, gradient by the weights and gradient by the inputs take as many each; conv1 needs none by its inputs.
    Products with padding count, normalisation, pooling, dropout and the update do not.
    """
    table = layers(config)
    return 2 * (3 * sum(layer.multiply_adds for layer in table) - table[0].multiply_adds)


def exchange_bytes(config: Any) -> float:
    """The least that a device sends of activations and their gradients in a step; the mesh is that of `config`.

    m devices along `model`, d along `data`, B images in all, a bytes a number in model.dtype; rings, so a gathered or
    unreduced tensor of S bytes costs S (m-1)/m.

    towers, data: B/d images on each of the m devices, which have 1/m of every layer. Before conv3 and fc6 the pooled
      maps are gathered, before fc7 and fc8 the units, and at the end the logits; backward the same tensors are summed
      and scattered.
    hybrid: B/(dm) images on a device. Before fc6 an all-to-all turns (B/(dm), inputs) into (B/d, inputs/m); fc6, fc7
      and fc8 give (B/d, outputs) in m parts, summed and scattered, the last one by examples. Backward the same bytes.
    """
    mesh, model = config.mesh, config.model
    table = layers(config)
    # What stands before each layer: the maps or units that it takes, which those that see all towers gather.
    before = {after.name: math.prod(layer.pooled) for layer, after in itertools.pairwise(table)}
    if mesh.layout == 'hybrid':
        numbers = before['fc6'] / mesh.model + model.widths[5] + model.widths[6] + model.num_classes
    else:
        numbers = sum(size for name, size in before.items() if name in model.exchange) + model.num_classes
    images = config.train.batch_size / mesh.data
    return 2 * ITEM_SIZES[model.dtype] * images * numbers * (mesh.model - 1) / mesh.model


def gradient_bytes(config: Any) -> float:
    """The least that a device sends to sum gradients and share new weights in a step; the mesh is that of `config`.

    d, m: devices along `data` and `model`; g: bytes a number in mesh.gradient_dtype.

    An all-reduce of N numbers over n devices costs 2 N g (n-1)/n. towers, data: a device has 1/m of all parameters, and
    d devices have the same. hybrid: all dm devices have the convolutions and the biases of fc8; of the other dense
    parameters a device has 1/m, and d devices have the same.
    shard_optimizer: over `data` a reduce-scatter of gradients, N g (d-1)/d, and an all-gather of float32 weights,
    4 N (d-1)/d: as much in float32, more in bfloat16. Kernels that no dimension lets split into d stay with the
    all-reduce, as do biases. Over `model` what is left of a sum over all goes on as an all-reduce of the shares.
    """
    mesh = config.mesh
    d, m, size = mesh.data, mesh.model, ITEM_SIZES[mesh.gradient_dtype]
    total = 0.0
    for layer in layers(config):
        hybrid_copy = mesh.layout == 'hybrid' and layer.name.startswith('conv')
        split = 0 if mesh.layout == 'hybrid' else -1  # the dimension that `model` splits
        kernel = list(layer.kernel)
        if not hybrid_copy:
            kernel[split] //= m
        bias_copy = mesh.layout == 'hybrid' and (hybrid_copy or layer.name == 'fc8')
        bias = [*layer.bias[:-1], layer.bias[-1] // (1 if bias_copy else m)]
        for shape, copied in ((kernel, hybrid_copy), (bias, bias_copy)):
            numbers, devices = math.prod(shape), d * m if copied else d
            if mesh.shard_optimizer and len(shape) > 1 and any(side % d == 0 for side in shape):
                total += numbers * (size + 4) * (d - 1) / d
                numbers, devices = numbers // d, devices // d
            total += 2 * numbers * size * (devices - 1) / devices
    return total


def lower_bound_bytes(config: Any) -> float:
    """The least bytes that a device sends in a step of this layout, see exchange_bytes() and gradient_bytes()."""
    return exchange_bytes(config) + gradient_bytes(config)


def predict(config: Any, collectives: list, bandwidth: float, flops: float) -> dict[str, float]:
    """Times of a step from assumed speeds of one device: `bandwidth` in bytes/s sent, `flops` in FLOP/s sustained.

    Nothing is modelled but volume: no latency, no contention, no input pipeline. Exchanges of activations stand between
    layers, so nothing hides them; gradients can travel while the backward pass computes. The two bounds:
      without_overlap           compute + exchanges + gradients
      with_gradients_overlapped exchanges + max(compute, gradients)
    Efficiency is the rate of images over that of as many devices that send nothing.
    """
    devices = config.mesh.data * config.mesh.model
    compute = flops_per_image(config) * config.train.batch_size / devices / flops
    hidden = sum(each.bytes for each in collectives if each.layer in ('gradients', 'update')) / bandwidth
    shown = sum(each.bytes for each in collectives) / bandwidth - hidden
    times = {
        'without_overlap': compute + shown + hidden,
        'with_gradients_overlapped': shown + max(compute, hidden),
    }
    prediction = {'bandwidth': bandwidth, 'flops': flops, 'compute_seconds': compute, 'wire_seconds': shown + hidden}
    for name, seconds in times.items():
        prediction |= {
            f'step_seconds_{name}': seconds,
            f'images_per_second_{name}': config.train.batch_size / seconds,
            f'efficiency_{name}': compute / seconds,
        }
    return prediction
