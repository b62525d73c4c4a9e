"""The mesh of devices and what crosses it: the paper's split over two GPUs (section 3.5) times data parallelism.

The only module that names jax.sharding. The whole step runs as device code (a fully manual shard_map), so what is not
written out here does not travel: left to the partitioner, grouped convolutions gather the batch on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.config import ConfigError, check_mesh

EVERYWHERE = PartitionSpec()
BY_EXAMPLE = PartitionSpec('data')


def make_mesh(config: Any) -> Mesh:
    """The ('data', 'model') mesh of `config.mesh`; a `data` of -1 takes all devices that `model` leaves.

    Raises ConfigError: there are too few devices, or batch or towers do not divide over them.
    """
    data, model, devices = config.mesh.data, config.mesh.model, jax.device_count()
    if data == -1:
        data = max(1, devices // model)
    if data * model > devices:
        raise ConfigError(
            f'config.mesh: data={data} times model={model} needs {data * model} devices and there are {devices};'
            f' the nearest is data={max(1, devices // model)}, model={min(model, devices)}'
            ' (on a CPU, JAX_NUM_CPU_DEVICES=8 simulates 8)'
        )
    check_mesh(config, data, model)
    return jax.make_mesh(
        (data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * model]
    )


def exchange(x: jax.Array, features: int) -> jax.Array:
    """All `features` channels of `x` on every device: the arrows between the GPUs in the paper's figure 2.

    `x` is (..., C), this device's share of the channels; where it holds all of them nothing is done.
    """
    if x.shape[-1] == features:
        return x
    return lax.all_gather(x, 'model', axis=x.ndim - 1, tiled=True)


def sum_over_examples(x: jax.Array) -> jax.Array:
    """Sum over all devices of what each computed for its examples; the model axis holds copies, counted once."""
    return lax.psum(x, ('data', 'model')) / lax.axis_size('model')


def copies_of_loss() -> int:
    """How many devices compute the same example's loss: a gradient summed over the mesh counts it that often."""
    return lax.axis_size('model')


def parameter_specs(parameters: Any) -> Any:
    """Specs of kernels and biases, split over `model` on their outputs: a half of conv1..fc7 is one of the GPUs."""
    return jax.tree.map(lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), 'model'), parameters)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """`specs` as shardings on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


def compile_on_mesh(
    function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any, donate_argnums: tuple[int, ...] = ()
) -> Any:
    """`function` as device code on every device of `mesh`, compiled with shardings (jax.jit, once called pjit)."""
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs),
        in_shardings=shardings(mesh, in_specs),
        out_shardings=shardings(mesh, out_specs),
        donate_argnums=donate_argnums,
    )


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This process's rows of a batch (NumPy arrays) as arrays over the mesh, split over `data`."""
    sharding = NamedSharding(mesh, BY_EXAMPLE)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
