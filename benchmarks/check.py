"""Compares one step of this project with the plain implementation on the same images, parameters and dropout masks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import plain
from benchmarks.project import Project

# Scale of the velocities before the step, and a learning rate that makes the step's contribution larger than that.
VELOCITY, RATE = 1e-5, 1.0

# Tolerances for rounding errors. In float32, sums of thousands of terms in another order differ by 1e-7 to 1e-6 of
# their size. This difference flips the ReLU sign or the pooling argmax of one unit in 300,000. The gradient
# then flows through another unit, which changes the norm by sqrt(2 / 300,000) = 2.6e-3. No such unit lies between the
# dense layers and the loss. bfloat16, and float32 on GPUs and TPUs without model.precision=float32, round 2 ** 13 to
# 2 ** 16 times as coarsely.
FLOAT32 = {'dense': 1e-5, 'conv': 1e-2}
COARSE = {'dense': 0.1, 'conv': 0.5}


def differences(project: Project) -> dict[str, float]:
    """Returns the relative differences of the preset `paper` on one device, as Euclidean norms over whole arrays.

    The compared values are the logits of an evaluation, the losses of the evaluation and of the training step, each
    kernel and bias after the training step, and the velocities. A difference of velocities is relative to the norm of
    the step's own contribution to them. The benchmark times the same steps. The initial kernels are
    larger than the paper's, so that few units have nearly the same values.
    """
    from alexnet_jax import augment
    from alexnet_jax.training.eval_step import make_activation_fn
    from alexnet_jax.training.state import TrainState
    from alexnet_jax.training.train_step import RngStream, example_keys

    config, batch = project.config, project.batch
    keys = example_keys(config.seed, batch['example_id'], RngStream.AUGMENTATION)
    inputs = _images(lambda images, rest: augment.augment(images, keys, keys, rest, config.data), project)
    center = _images(lambda images, rest: augment.eval_crop(images, rest, config.data, 0), project)
    random, state = np.random.default_rng(1), project.state
    parameters = jax.tree_util.tree_map_with_path(lambda path, w: _weights(random, path, w.shape), state.params)
    velocities = jax.tree.map(lambda w: VELOCITY * random.standard_normal(w.shape, np.float32), parameters)
    params, opt_state = _replaced(state.params, parameters), _replaced(state.opt_state, velocities)
    state = TrainState(jnp.copy(state.step), params, opt_state, state.batch_stats)  # the step donates its state

    logits = make_activation_fn(config, project.mesh, 'fc8')(state, batch['image'], project.preprocessing)
    loss = project.eval_step(state, batch, project.preprocessing)[0]
    plain_logits = _exact(plain.logits)(parameters, center)
    found = {'logits': distance(logits, plain_logits)}
    found['loss of the evaluation'] = distance(loss, plain.losses(plain_logits, batch['label']).sum())

    masks = plain.dropout_masks(config.seed, batch['example_id'], config.model.widths[-1])
    results = _exact(plain.train_step)(parameters, velocities, inputs, batch['label'], masks, jnp.float32(RATE))
    plain_parameters, plain_velocities, plain_loss = jax.tree.map(np.asarray, results)
    state, metrics = project.train_step(state, batch, project.rates(RATE), project.preprocessing)
    found['loss'] = distance(metrics['loss'], plain_loss)
    new_velocities = _velocities(state.opt_state)
    for layer, kinds in parameters.items():
        for kind in kinds:
            wanted = plain_velocities[layer][kind]
            added = wanted - plain.MOMENTUM * velocities[layer][kind]
            found[f'velocity of {layer}/{kind}'] = distance(new_velocities[layer, kind], wanted, np.linalg.norm(added))
            found[f'{layer}/{kind}'] = distance(state.params[layer][kind], plain_parameters[layer][kind])
    return found


def distance(found: Any, wanted: Any, size: Any = None) -> float:
    """Returns the Euclidean norm of the difference, divided by `size` or, by default, by the norm of `wanted`."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) if size is None else size))


def worst(distances: dict[str, float], exact: bool) -> tuple[str, float, float]:
    """Returns (name, distance, tolerance) of the difference that is largest relative to its tolerance.

    Args:
      distances: the result of differences(). A NaN exceeds every tolerance.
      exact: whether both sides compute in float32, without rounding the operands of products.
    """
    tolerances = FLOAT32 if exact else COARSE

    def judge(name: str) -> tuple[float, str, float, float]:
        allowed = tolerances['conv' if 'conv' in name else 'dense']
        excess = distances[name] / allowed
        return math.inf if math.isnan(excess) else excess, name, distances[name], allowed

    return max(map(judge, distances))[1:]


def _exact(function: Any) -> Any:
    """Returns `function` jitted, with products whose operands are not rounded."""
    return jax.default_matmul_precision('float32')(jax.jit(function))


def _images(function: Any, project: Project) -> jax.Array:
    """Returns the images that the project's preprocessing produces, float32."""
    return jax.jit(function)(project.batch['image'], project.preprocessing)


def _weights(random: Any, path: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Draws kernels that preserve the signal variance from layer to layer of a ReLU network, and small biases."""
    deviation = 0.1 if path[-1].key == 'bias' else 0.01 if path[-2].key == 'conv1' else (2 / np.prod(shape[:-1])) ** 0.5
    return np.float32(deviation) * random.standard_normal(shape, np.float32)


def _is_of_layer(path: Any) -> bool:
    return len(path) > 1 and all(isinstance(entry, jax.tree_util.DictKey) for entry in path[-2:])


def _replaced(tree: Any, new: dict[str, Any]) -> Any:
    """Returns the optimizer state or the parameters with the values in `new`, which is indexed by layer and kind."""

    def replace(path, leaf):
        if not _is_of_layer(path):
            return jnp.copy(leaf)
        return jax.device_put(new[path[-2].key][path[-1].key], leaf.sharding, may_alias=False)

    return jax.tree_util.tree_map_with_path(replace, tree)


def _velocities(opt_state: Any) -> dict[tuple[str, str], Any]:
    """Returns the velocities by (layer, 'kernel' or 'bias')."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return {(path[-2].key, path[-1].key): leaf for path, leaf in leaves if _is_of_layer(path)}
