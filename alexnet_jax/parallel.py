"""The mesh of devices and what crosses it: the paper's split over two GPUs (section 3.5) times data parallelism.

The only module that names jax.sharding. The whole step runs as device code (a fully manual shard_map), so what is not
written out here does not travel: left to the partitioner, grouped convolutions gather the batch on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_jax.config import ConfigError, check_mesh

REPLICATED = PartitionSpec()


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


def batch_axes(layout: str) -> tuple[str, ...]:
    """The axes of the mesh that split a batch: all in `hybrid`, otherwise `data`, and a row of `model` shares."""
    return ('data', 'model') if layout == 'hybrid' else ('data',)


def batch_spec(layout: str) -> PartitionSpec:
    """How the rows of a batch lie on the devices, see batch_axes()."""
    return PartitionSpec(batch_axes(layout))


def redistribute_features(x: jax.Array, features: int, layer: str) -> jax.Array:
    """`x` with the `features` channels that the kernels of `layer` on this device want; traces name it after `layer`.

    Args:
      x: (B, ..., C), C channels of B examples.

    Returns:
      C == features: `x`.
      C < features: (B, ..., features), gathered over `model`: the arrows between the GPUs in the paper's figure 2.
      C > features: (B * C / features, features), where `x` is (B, C): each device of `model` gives away all but its
        share of the channels for that share of the others' examples (layout `hybrid`, before fc6).
    """
    with jax.named_scope(layer):
        if x.shape[-1] < features:
            return lax.all_gather(x, 'model', axis=x.ndim - 1, tiled=True)
        if x.shape[-1] > features:
            return lax.all_to_all(x, 'model', split_axis=1, concat_axis=0, tiled=True)
        return x


def reduce_scatter_partial_sums(x: jax.Array, features: int) -> jax.Array:
    """Sum over `model` of (B, C) products with a part of the inputs each, scattered while it is added up.

    Returns (B, features) where C > features, this device's share of the channels; otherwise (B / model, C), its share
    of the examples.
    """
    return lax.psum_scatter(x, 'model', scatter_dimension=1 if x.shape[-1] > features else 0, tiled=True)


def local_feature_slice(x: jax.Array, features: int) -> jax.Array:
    """This device's share, `features` channels, of an `x` (..., C) that is the same on every device of `model`."""
    if x.shape[-1] == features:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index('model') * features, features, x.ndim - 1)


def all_gather_example_ids(x: jax.Array, layout: str) -> jax.Array:
    """`x` (B,) of all examples that pass through this device's dense layers: in `hybrid` those of a row of `model`."""
    if layout != 'hybrid':
        return x
    with jax.named_scope('dropout'):
        return lax.all_gather(x, 'model', tiled=True)


def global_sum(x: jax.Array, layout: str) -> jax.Array:
    """Sum over all devices of what each computed for its examples; copies along `model` are counted once."""
    with jax.named_scope('metrics'):
        return lax.psum(x, ('data', 'model')) / loss_replication_factor(layout)


def mark_replicated(x: jax.Array, layout: str) -> jax.Array:
    """`x` of each example, of which all devices of `model` have copies but in `hybrid`; so that it can be returned."""
    return x if layout == 'hybrid' else lax.pmax(x, 'model')  # the same bits, which a mean may not give


def activation_spec(layer: str, dimensions: int, layout: str) -> PartitionSpec:
    """How the output of `layer`, (B, H, W, C) or (B, units), lies on the mesh: see AlexNet.activations()."""
    if layout == 'hybrid' and (layer.startswith('conv') or layer == 'fc8'):
        return batch_spec(layout)
    return PartitionSpec('data', *[None] * (dimensions - 2), 'model')


def loss_replication_factor(layout: str) -> int:
    """How many devices compute the same example's loss: a gradient summed over the mesh counts it that often."""
    return 1 if layout == 'hybrid' else lax.axis_size('model')


def param_specs(tree: Any, layout: str) -> Any:
    """Specs of a tree of parameters, or of a state of the optimiser that has such trees in it.

    `towers`, `data`: split over `model` on the outputs, so a half of conv1..fc7 is one of the paper's GPUs.
    `hybrid`: convolutions whole on every device; dense kernels split over `model` on their inputs, and the biases of
    fc6 and fc7 as those of the next layer; the bias of fc8 whole, for it is added to a share of the examples.
    """

    def spec(path, leaf):
        layer, name = path[-2].key, path[-1].key
        if layout != 'hybrid':
            return PartitionSpec(*[None] * (leaf.ndim - 1), 'model')
        if layer.startswith('conv') or (layer, name) == ('fc8', 'bias'):
            return PartitionSpec(*[None] * leaf.ndim)
        return PartitionSpec('model', *[None] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(spec, tree)


def optimizer_specs(tree: Any, mesh: Mesh, config: Any) -> Any:
    """Specs of what the update works on: velocities in the state, and inside the step gradients and weights.

    They are those of the parameters; with `shard_optimizer` (of `config`, `mesh` of a configuration) kernels are split
    over `data` besides, in the first dimension that it divides. A kernel without one stays whole, and so do biases.
    """

    def split(leaf, spec):
        axes = list(spec)
        if config.shard_optimizer and mesh.shape['data'] > 1 and leaf.ndim > 1:
            for i, axis in enumerate(axes):
                if leaf.shape[i] % (mesh.shape['data'] * (mesh.shape['model'] if axis else 1)) == 0:
                    axes[i] = (axis, 'data') if axis else 'data'
                    break
        return PartitionSpec(*axes)

    return jax.tree.map(split, tree, param_specs(tree, config.layout))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _replicated_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes along which an array of this spec is the same."""
    named = [axis for entry in spec for axis in _axes(entry)]
    return tuple(axis for axis in ('data', 'model') if axis not in named)


def _data_sharded_dim(spec: PartitionSpec) -> int | None:
    return next((i for i, entry in enumerate(spec) if 'data' in _axes(entry)), None)


def mark_device_varying(parameters: Any, specs: Any) -> Any:
    """`parameters` taken for this device's own: their gradients come as each device has them, not summed."""

    def own(x, spec):
        return lax.pcast(x, _replicated_axes(spec), to='varying') if _replicated_axes(spec) else x

    return jax.tree.map(own, parameters, specs)


def all_reduce_gradients(gradients: Any, specs: Any, split: Any, dtype: str) -> Any:
    """Gradients of mark_device_varying() summed over the devices that hold copies, in `dtype` on the wire; float32.

    Args:
      specs: of the parameters.
      split: see optimizer_specs(): where it splits a leaf over `data`, only this device's share of the sum is returned.
    """

    def add(x, spec, split_spec):
        axes, dimension = _replicated_axes(spec), _data_sharded_dim(split_spec)
        x = x.astype(dtype)
        if dimension is not None:
            x = lax.psum_scatter(x, 'data', scatter_dimension=dimension, tiled=True)
            axes = tuple(axis for axis in axes if axis != 'data')
        if lax.axis_size(('data', 'model')) == 1:
            axes = ()  # a sum over one device would be compiled to a copy
        return (lax.psum(x, axes) if axes else x).astype('float32')

    with jax.named_scope('gradients'):
        return jax.tree.map(add, gradients, specs, split)


def psum_over_shards(sums: Any, split: Any) -> Any:
    """Sums over the shards of each kernel that this device updates -> sums over whole kernels.

    `split`: see optimizer_specs().
    """

    def add(x, spec):
        axes = tuple(axis for entry in spec for axis in _axes(entry))
        return lax.psum(x, axes) if axes else x

    with jax.named_scope('update'):
        return jax.tree.map(add, sums, split)


def dead_unit_fraction(outputs: jax.Array, layer: str, layout: str) -> jax.Array:
    """The share of the units of `layer` that are 0 for all examples of all devices, a scalar.

    `outputs`: (B, ..., C), what this device has of them, see AlexNet.activations().
    """
    whole = layout == 'hybrid' and layer.startswith('conv')
    alive = jnp.any(outputs != 0, axis=tuple(range(outputs.ndim - 1))).astype(jnp.float32)
    dead = jnp.mean((lax.psum(alive, ('data', 'model') if whole else 'data') == 0).astype(jnp.float32))
    return dead if whole else lax.pmean(dead, 'model')


def local_shards(parameters: Any, split: Any) -> Any:
    """The shares of `parameters` that this device updates, see optimizer_specs()."""

    def own(x, spec):
        dimension = _data_sharded_dim(spec)
        if dimension is None:
            return x
        size = x.shape[dimension] // lax.axis_size('data')
        return lax.dynamic_slice_in_dim(x, lax.axis_index('data') * size, size, dimension)

    return jax.tree.map(own, parameters, split)


def all_gather_shards(parameters: Any, split: Any) -> Any:
    """Whole parameters from the shares that the devices along `data` have updated: the inverse of local_shards()."""

    def gather(x, spec):
        dimension = _data_sharded_dim(spec)
        if dimension is None:
            return x
        return lax.all_gather(x, 'data', axis=dimension, tiled=True, to='invarying')

    with jax.named_scope('update'):
        return jax.tree.map(gather, parameters, split)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """`specs` as shardings on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


def jit_shard_map(
    function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any, donate_argnums: tuple[int, ...] = ()
) -> Any:
    """`function` as device code on every device of `mesh`, compiled with shardings (jax.jit, once called pjit).

    JAX checks that what is said to be the same on several devices is summed over them, if there are several.
    """
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=mesh.size > 1),
        in_shardings=shardings(mesh, in_specs),
        out_shardings=shardings(mesh, out_specs),
        donate_argnums=donate_argnums,
        compiler_options=_compiler_options(mesh),
    )


def _compiler_options(mesh: Mesh) -> dict[str, Any]:
    """What XLA is told besides its defaults; docs/devices.md says why, and what was left at its default."""
    platform = mesh.devices.flat[0].platform
    if platform == 'cpu':
        return {'xla_disable_hlo_passes': 'cse_barrier_expander'}  # keeps the barriers of lax.optimization_barrier()
    if platform == 'gpu' and mesh.size > 1:
        return {'xla_gpu_enable_latency_hiding_scheduler': True}
    return {}


def batch_sharding(mesh: Mesh, layout: str) -> NamedSharding:
    """How the rows of a batch lie on `mesh`, see batch_spec()."""
    return NamedSharding(mesh, batch_spec(layout))


def make_global_batch(sharding: NamedSharding, batch: Any) -> Any:
    """This process's rows of a batch (NumPy arrays) as arrays over the mesh; `sharding`: see batch_sharding()."""
    return jax.make_array_from_process_local_data(sharding, batch)


def replicate(mesh: Mesh, values: Any) -> Any:
    """NumPy arrays, the same on all processes, as arrays that each device of `mesh` holds."""
    return make_global_batch(NamedSharding(mesh, REPLICATED), values)


def num_batch_shards(sharding: NamedSharding) -> int:
    """How many parts `sharding`, see batch_sharding(), splits a batch into."""
    return len(set(_rows(sharding).values()))


def _rows(sharding: NamedSharding) -> dict[Any, tuple[int, int]]:
    """First and last row (exclusive) that each device holds of a batch with as many rows as there are devices."""
    rows = sharding.mesh.size
    indices = sharding.devices_indices_map((rows,))
    return {device: index[0].indices(rows)[:2] for device, index in indices.items()}


def process_shard(sharding: NamedSharding) -> tuple[int, int]:
    """(share, shares): this process reads share number `share` of the `shares` equal ones of every batch.

    A share are the rows that a process's devices hold; processes that hold the same rows read the same share.

    Raises ConfigError: a process has no device in the mesh, or the rows of two overlap in part.
    """
    held: dict[int, set[tuple[int, int]]] = {process: set() for process in range(jax.process_count())}
    for device, rows in _rows(sharding).items():
        held[device.process_index].add(rows)
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    parts = [rows for share in shares for rows in share]
    if len({len(share) for share in shares}) > 1 or len(parts) != num_batch_shards(sharding):
        mesh = sharding.mesh
        raise ConfigError(
            f'config.mesh: data={mesh.shape["data"]}, model={mesh.shape["model"]} gives the {jax.process_count()}'
            f' processes no equal shares of a batch: use all devices, and a model that divides the devices of a process'
            f' or is a multiple of them'
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
