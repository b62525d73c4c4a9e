"""A plain implementation of the preset `paper`, its gradient and its update. The project's step must equal it.

It imports nothing from alexnet_jax. Parameters and velocities are {layer: {'kernel', 'bias'}}. Kernels have the shape
(height, width, inputs, outputs), or (inputs, outputs) in dense layers. In a layer that reads only its own tower,
`inputs` counts the feature maps of one tower. All arrays are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TOWERS = 2
MOMENTUM, DECAY = 0.9, 5e-4  # section 5 of the paper
KEPT = 0.5  # probability that dropout keeps a unit
PURPOSE, DROPPED = 2, (6, 7)  # dropout keys fold in the purpose, the example id and the index of the layer


def convolution(x: jax.Array, layer: dict[str, jax.Array], stride: int = 1, padding: Any = 'SAME') -> jax.Array:
    """Convolution and bias. The layer reads both towers if its kernel has as many inputs as `x` has maps."""
    groups = x.shape[-1] // layer['kernel'].shape[2]
    x = lax.conv_general_dilated(
        x,
        layer['kernel'],
        (stride, stride),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )
    return x + layer['bias'][None, None, None]


def response_norm(x: jax.Array) -> jax.Array:
    """Section 3.3: divides each map by (2 + 1e-4 * s) ** 0.75; s sums the squares of 5 adjacent maps of its tower."""
    towers = x.reshape(*x.shape[:-1], TOWERS, -1)
    maps = towers.shape[-1]
    squares = jnp.pad(towers * towers, [(0, 0)] * 4 + [(2, 2)])
    total = sum((squares[..., i : i + maps] for i in range(5)), jnp.zeros_like(towers))
    return (towers / (2 + 1e-4 * total) ** 0.75).reshape(x.shape)


def max_pool(x: jax.Array) -> jax.Array:
    """Section 3.4: max pooling with windows of 3 x 3 and stride 2."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'VALID')


def logits(parameters: Any, images: jax.Array, masks: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """Returns the logits (B, 1000) of `images` (B, 224, 224, 3).

    Args:
      masks: (B, units) each, the units of fc6 and fc7 that dropout keeps; None: inference.
    """
    x = jax.nn.relu(convolution(images, parameters['conv1'], stride=4, padding=[(0, 3), (0, 3)]))
    x = max_pool(response_norm(x))
    x = jax.nn.relu(convolution(x, parameters['conv2']))
    x = max_pool(response_norm(x))
    x = jax.nn.relu(convolution(x, parameters['conv3']))
    x = jax.nn.relu(convolution(x, parameters['conv4']))
    x = jax.nn.relu(convolution(x, parameters['conv5']))
    x = max_pool(x).reshape(len(x), -1)
    for index, name in enumerate(('fc6', 'fc7')):
        x = jax.nn.relu(x @ parameters[name]['kernel'] + parameters[name]['bias'][None])
        x = x * KEPT if masks is None else jnp.where(masks[index], x, 0.0)
    return x @ parameters['fc8']['kernel'] + parameters['fc8']['bias'][None]


def dropout_masks(seed: int, numbers: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns a training step's dropout masks of fc6 and fc7, (B, width) each; True keeps a unit.

    Args:
      seed: the run's seed.
      numbers: (B,) uint32, the example ids.
      width: units of the layer.
    """

    def masks(number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSE), number)
        return tuple(jax.random.bernoulli(jax.random.fold_in(key, layer), KEPT, (width,)) for layer in DROPPED)

    return jax.vmap(masks)(numbers)


def losses(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross entropies (B,) of logits (B, classes)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], -1)[:, 0]


def train_step(parameters: Any, velocities: Any, images: jax.Array, labels: jax.Array, masks: Any, rate: float) -> Any:
    """Returns (parameters, velocities, loss) after one step. Weight decay applies to kernels and not to biases."""

    def mean_loss(parameters):
        return losses(logits(parameters, images, masks), labels).mean()

    loss, gradients = jax.value_and_grad(mean_loss)(parameters)
    new_parameters: dict[str, Any] = {}
    new_velocities: dict[str, Any] = {}
    for layer in parameters:
        new_parameters[layer], new_velocities[layer] = {}, {}
        for name, decay in (('kernel', DECAY), ('bias', 0.0)):
            weights = parameters[layer][name]
            velocity = MOMENTUM * velocities[layer][name] - rate * (gradients[layer][name] + decay * weights)
            new_velocities[layer][name], new_parameters[layer][name] = velocity, weights + velocity
    return new_parameters, new_velocities, loss
