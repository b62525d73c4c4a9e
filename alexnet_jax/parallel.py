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
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the rows of a batch lie on the devices."""
    return NamedSharding(mesh, BY_EXAMPLE)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into over the devices."""
    return len(set(_rows(mesh).values()))


def _rows(mesh: Mesh) -> dict[Any, tuple[int, int]]:
    """First and last row (exclusive) that each device holds of a batch with as many rows as there are devices."""
    indices = batch_sharding(mesh).devices_indices_map((mesh.size,))
    return {device: index[0].indices(mesh.size)[:2] for device, index in indices.items()}


def input_share(mesh: Mesh) -> tuple[int, int]:
    """(share, shares): this process reads share number `share` of the `shares` equal ones of every batch.

    A share are the rows that a process's devices hold; processes that hold the same rows read the same share.

    Raises ConfigError: a process has no device in the mesh, or the rows of two overlap in part.
    """
    held: dict[int, set[tuple[int, int]]] = {process: set() for process in range(jax.process_count())}
    for device, rows in _rows(mesh).items():
        held[device.process_index].add(rows)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    parts = [rows for share in shares for rows in share]
    if len({len(share) for share in shares}) > 1 or len(parts) != batch_parts(mesh):
        near = f'data={max(1, jax.device_count() // mesh.shape["model"])}, model={mesh.shape["model"]}'
        raise ConfigError(
            f'config.mesh: data={mesh.shape["data"]}, model={mesh.shape["model"]} gives the {jax.process_count()}'
            f' processes no equal shares of a batch; the nearest is {near}'
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
