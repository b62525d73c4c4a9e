"""Analytic costs of a training step from the configuration alone: sizes, FLOPs, minimum communication, time."""

import itertools
import math
from collections.abc import Sequence

from alexnet_jax import shapes
from alexnet_jax.audit.hlo_collectives import PARAMETERS, Collective
from alexnet_jax.config import Config
from alexnet_jax.lr_multipliers import frozen_parameters, layers_with_input_gradient

ITEM_SIZES = {'float32': 4, 'bfloat16': 2}


def layers(config: Config) -> list[shapes.LayerShape]:
    """Returns the layers of a resolved configuration, conv1 to fc8."""
    return shapes.layer_table(config.model, config.data.crop_size, config.data.channels)


def flops_per_image(config: Config) -> int:
    """Returns the FLOPs of training on one image: convolutions and matrix products, two FLOPs per multiply-add.

    The forward pass, the weight gradient and the input gradient have equal FLOPs. Frozen kernels have no weight
    gradient; see layers_with_input_gradient() for the other one. The result includes multiplications with padding, but
    no normalization, pooling, dropout or parameter update.
    """
    frozen, with_input_gradient = frozen_parameters(config), layers_with_input_gradient(config)
    return sum(
        2 * layer.multiply_adds * (1 + ((layer.name, 'kernel') not in frozen) + (layer.name in with_input_gradient))
        for layer in layers(config)
    )


def exchange_bytes(config: Config) -> float:
    """Returns the minimum bytes of activations and their gradients that a device sends per step on config.mesh.

    Notation: m devices along `model`, d along `data`, global batch size B, element size from model.dtype. With ring
    algorithms, a gathered or unreduced tensor of S bytes costs S (m-1)/m.

    towers, data: Each of the m devices has 1/m of every layer and B/d images. The inputs of the `cross_tower` layers
      (by default the pooled feature maps before conv3 and fc6, and the units before fc7 and fc8) and the logits are
      all-gathered. The backward pass reduce-scatters the same tensors, except inputs that no trained layer precedes.
    hybrid: Each device has B/(dm) images. Before fc6 an all-to-all turns (B/(dm), inputs) into (B/d, inputs/m). fc6,
      fc7 and fc8 produce m partial sums (B/d, outputs), which are reduce-scattered: along the outputs for fc6 and fc7,
      along the batch for fc8. The backward pass sends the same number of bytes, except for inputs of fc6
      and partial sums that depend on no trained parameter.
    """
    mesh, model = config.mesh, config.model
    table = layers(config)
    # Size per image of the input of each layer, over all towers.
    before = {after.name: math.prod(layer.pooled) for layer, after in itertools.pairwise(table)}
    frozen, with_input_gradient = frozen_parameters(config), layers_with_input_gradient(config)
    if mesh.layout == 'hybrid':
        numbers = before['fc6'] / mesh.model * (1 + ('fc6' in with_input_gradient))
        for layer in table:
            if not layer.spec.kernel:
                has_backward = layer.name in with_input_gradient or (layer.name, 'kernel') not in frozen
                numbers += layer.spec.features * (1 + has_backward)
    else:
        numbers = 2 * model.num_classes + sum(
            before[layer.name] * (1 + (layer.name in with_input_gradient))
            for layer in table[1:]
            if layer.spec.cross_tower
        )
    images = config.train.batch_size / mesh.data
    return ITEM_SIZES[model.dtype] * images * numbers * (mesh.model - 1) / mesh.model


def gradient_bytes(config: Config, platform: str) -> float:
    """Returns the minimum bytes that a device sends per step to reduce gradients and all-gather updated weights.

    Notation: d and m devices along `data` and `model` of config.mesh, g bytes per number in the dtype of
    shapes.grad_allreduce_dtype() on `platform`. An all-reduce of N numbers over n devices costs 2 N g (n-1)/n.

    towers, data: All parameters are sharded over the m devices along `model` and replicated over the d along `data`.
    hybrid: The convolutions and the bias of fc8 are replicated on all dm devices. The other dense parameters are
      sharded over m devices and replicated over d.
    shard_optimizer: Over `data`, gradients are reduce-scattered, N g (d-1)/d, and float32 weights are all-gathered,
      4 N (d-1)/d. The sum equals the all-reduce for g = 4 and exceeds it for bfloat16. Biases, and kernels without a
      dimension divisible by d, keep the all-reduce. For parameters replicated on all dm devices, an all-reduce of the
      shards over `model` follows.

    Frozen parameters cost nothing.
    """
    mesh, frozen = config.mesh, frozen_parameters(config)
    d, m = mesh.data, mesh.model
    total = 0.0
    for layer in layers(config):
        hybrid_copy = mesh.layout == 'hybrid' and layer.spec.kernel > 0
        split = 0 if mesh.layout == 'hybrid' else -1  # dimension sharded over `model`
        kernel = list(layer.kernel)
        if not hybrid_copy:
            kernel[split] //= m
        bias_copy = mesh.layout == 'hybrid' and (hybrid_copy or layer.name == 'fc8')
        bias = [*layer.bias[:-1], layer.bias[-1] // (1 if bias_copy else m)]
        for kind, shape, copied in (('kernel', kernel, hybrid_copy), ('bias', bias, bias_copy)):
            if (layer.name, kind) in frozen:
                continue
            size = ITEM_SIZES[shapes.grad_allreduce_dtype(config, layer.name, kind, platform)]
            numbers, devices = math.prod(shape), d * m if copied else d
            if mesh.shard_optimizer and len(shape) > 1 and any(side % d == 0 for side in shape):
                total += numbers * (size + 4) * (d - 1) / d
                numbers, devices = numbers // d, devices // d
            total += 2 * numbers * size * (devices - 1) / devices
    return total


def lower_bound_bytes(config: Config, platform: str) -> float:
    """Returns the minimum bytes that a device sends per step: exchange_bytes() plus gradient_bytes()."""
    return exchange_bytes(config) + gradient_bytes(config, platform)


def predict(config: Config, collectives: Sequence[Collective], bandwidth: float, flops: float) -> dict[str, float]:
    """Predicts the step time from assumed speeds per device: `bandwidth` in sent bytes/s, `flops` in sustained FLOP/s.

    The model ignores latency, contention and the input pipeline. Exchanges of activations cannot overlap with
    compute. Gradient collectives can overlap with the backward pass.
    The result has two bounds of the step time:
      without_overlap           compute + exchanges + gradients
      with_gradients_overlapped exchanges + max(compute, gradients)
    Efficiency is the throughput divided by that of the same number of devices without communication.
    """
    devices = config.mesh.data * config.mesh.model
    compute = flops_per_image(config) * config.train.batch_size / devices / flops
    hidden = sum(each.bytes for each in collectives if each.layer in PARAMETERS) / bandwidth
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
