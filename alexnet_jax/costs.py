"""What a training step costs, by arithmetic on the configuration alone: sizes, bytes that must travel, time."""

import dataclasses
import math
from typing import Any

from alexnet_jax.config import layer_sizes

ITEM_SIZES = {'float32': 4, 'bfloat16': 2}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with weights. output: (height, width, channels) or (units,), of one image, before pooling.

    kernel: (height, width, inputs of one tower, outputs) or (inputs, outputs); as many biases as outputs.
    """

    name: str
    output: tuple[int, ...]
    kernel: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return math.prod(self.kernel) + self.kernel[-1]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass: every weight once for each pixel of the output."""
        return math.prod(self.kernel) * math.prod(self.output[:-1])


def layers(config: Any) -> list[Layer]:
    """conv1..conv5, fc6, fc7, fc8 of a resolved configuration."""
    model = config.model
    c1, c2, c3, c4, c5, f6, f7 = model.widths
    side1, _, side2, _, side3, side4, side5, last = layer_sizes(config.data.crop_size, model.overlapping_pool)
    towers, classes = model.towers, model.num_classes
    return [
        Layer('conv1', (side1, side1, c1), (11, 11, config.data.channels, c1)),
        Layer('conv2', (side2, side2, c2), (5, 5, c1 // towers, c2)),
        Layer('conv3', (side3, side3, c3), (3, 3, c2, c3)),
        Layer('conv4', (side4, side4, c4), (3, 3, c3 // towers, c4)),
        Layer('conv5', (side5, side5, c5), (3, 3, c4 // towers, c5)),
        Layer('fc6', (f6,), (last * last * c5, f6)),
        Layer('fc7', (f7,), (f6, f7)),
        Layer('fc8', (classes,), (f7, classes)),
    ]


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
    sides = layer_sizes(config.data.crop_size, model.overlapping_pool)
    before_conv3, before_fc6 = sides[3] ** 2 * model.widths[1], sides[7] ** 2 * model.widths[4]
    units = model.widths[5] + model.widths[6] + model.num_classes
    numbers = before_fc6 / mesh.model + units if mesh.layout == 'hybrid' else before_conv3 + before_fc6 + units
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
        for shape, copied in ((kernel, hybrid_copy), ([layer.kernel[-1] // (1 if bias_copy else m)], bias_copy)):
            numbers, devices = math.prod(shape), d * m if copied else d
            if mesh.shard_optimizer and len(shape) > 1 and any(side % d == 0 for side in shape):
                total += numbers * (size + 4) * (d - 1) / d
                numbers, devices = numbers // d, devices // d
            total += 2 * numbers * size * (devices - 1) / devices
    return total


def analytic_minimum(config: Any) -> float:
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
