"""The device mesh, shardings and collectives: the paper's model parallelism (section 3.2) and data parallelism.

No other module imports jax.sharding. The whole step is one fully manual shard_map, so XLA's partitioner adds no
collectives; for grouped convolutions, the partitioner would all-gather the batch on every device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, PyTree, Shaped, UInt32

from alexnet_jax.config import Config, ConfigError, MeshConfig, check_mesh
from alexnet_jax.layers import for_platform, platform

Spec = PartitionSpec

REPLICATED = Spec()

Arguments = ParamSpec('Arguments')
Result = TypeVar('Result', covariant=True)


@runtime_checkable
class JittedFunction(Protocol[Arguments, Result]):
    """The type of a jitted function: jax.stages.Wrapped with types for the arguments and the result."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Runs the function; the first call compiles it."""

    def lower(self, *args: Any) -> Any:
        """Returns the jax.stages.Lowered for `args`, which are arrays or jax.ShapeDtypeStructs."""


def mesh_shape(config: Config, devices: int) -> tuple[int, int]:
    """Returns the numbers of `devices` on the axes `data` and `model` of `config.mesh`.

    A `data` of -1 means `devices` / `model`. Raises ConfigError: there are too few devices, or the mesh does not evenly
    divide the batch, towers or widths.
    """
    data, model = config.mesh.data, config.mesh.model
    if data == -1:
        data = max(1, devices // model)
    if data * model > devices:
        raise ConfigError(
            f'config.mesh: data={data} times model={model} needs {data * model} devices and there are {devices};'
            f' the nearest is data={max(1, devices // model)}, model={min(model, devices)}'
            ' (on a CPU, JAX_NUM_CPU_DEVICES=8 simulates 8)'
        )
    check_mesh(config, data, model)
    return data, model


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the ('data', 'model') mesh of `config.mesh` over `devices`, by default all devices of JAX.

    Raises ConfigError: see mesh_shape().
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    used = devices[: shape[0] * shape[1]]
    try:
        return jax.make_mesh(shape, ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=used)
    except NotImplementedError:  # neither axis is a product of axes of the torus, as in (128, 2) on 16 x 16 chips
        split = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
        return Mesh(split, ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def local_mesh() -> Mesh:
    """Returns the ('data', 'model') mesh of one device of this process, for arrays that only this process reads."""
    return jax.make_mesh((1, 1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()[:1])


def batch_axes(layout: str) -> tuple[str, ...]:
    """Returns the mesh axes that shard a batch: both in `hybrid`; other layouts replicate the batch along `model`."""
    return ('data', 'model') if layout == 'hybrid' else ('data',)


def batch_spec(layout: str) -> Spec:
    """Returns the spec that shards the rows of a batch over batch_axes()."""
    return Spec(batch_axes(layout))


def redistribute_features(
    x: Float[Array, 'b *dims c'], features: int, layer: str
) -> Float[Array, 'rows *dims features']:
    """Redistributes the channels of `x` along `model`, so that each device has the input channels of its kernel.

    Args:
      x: this device's shard of the activations.
      features: number of input channels of this device's kernel.
      layer: name of the collective in profiler traces.

    Returns:
      C == features: `x`.
      C < features: all-gather along `model` to (B, ..., features): the arrows between the GPUs in the paper's figure 2.
      C > features: all-to-all along `model` from (B, C) to (B * C / features, features): each device keeps its shard of
        the channels and receives the same channels of the other devices' examples (`hybrid`, before fc6).
    """
    with jax.named_scope(layer):
        if x.shape[-1] < features:
            # Between a gather of the last dimension and other operations, GPUs transpose the maps; TPUs replace its
            # transpose by an all-reduce in bfloat16. A CPU takes longer for the concatenation.
            if platform() == 'cpu':
                return lax.all_gather(x, 'model', axis=x.ndim - 1, tiled=True)
            return jnp.concatenate([*lax.all_gather(x, 'model')], -1)
        if x.shape[-1] > features:
            return lax.all_to_all(x, 'model', split_axis=1, concat_axis=0, tiled=True)
        return x


def reduce_scatter_partial_sums(x: Float[Array, 'b c'], features: int) -> Float[Array, 'rows columns']:
    """Reduce-scatters the outputs of a dense layer that each device computed from its shard of the inputs.

    The collective runs along `model`. If C > features, the result is this device's shard of the channels,
    (B, features). Otherwise the result is this device's shard of the examples, (B / model, C).
    """
    return lax.psum_scatter(x, 'model', scatter_dimension=1 if x.shape[-1] > features else 0, tiled=True)


def local_feature_slice(x: Shaped[Array, '*dims c'], features: int) -> Shaped[Array, '*dims features']:
    """Slices the `features` channels of this device out of `x`, which is replicated along `model`."""
    if x.shape[-1] == features:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index('model') * features, features, x.ndim - 1)


def all_gather_example_ids(x: UInt32[Array, ' b'], layout: str) -> UInt32[Array, ' gathered']:
    """Returns the ids of the examples in this device's dense layers: (B * model,) in `hybrid`, otherwise `x`."""
    if layout != 'hybrid':
        return x
    with jax.named_scope('dropout'):
        return lax.all_gather(x, 'model', tiled=True)


def global_sum(x: Float32[Array, ' n'], layout: str) -> Float32[Array, ' n']:
    """All-reduces per-device sums over the whole mesh; examples replicated along `model` are counted once."""
    with jax.named_scope('metrics'):
        return lax.psum(x, ('data', 'model')) / loss_replication_factor(layout)


def mark_replicated(x: Float[Array, 'b classes'], layout: str) -> Float[Array, 'b classes']:
    """Marks `x` as replicated along `model`, for out_specs of shard_map; in `hybrid`, `x` is sharded and unchanged."""
    return x if layout == 'hybrid' else lax.pmax(x, 'model')  # pmax is exact; pmean may round


def activation_spec(layer: str, dimensions: int, layout: str) -> Spec:
    """Returns the spec of the output of `layer` in AlexNet.activations(), which has `dimensions` dimensions."""
    if layout == 'hybrid' and (layer.startswith('conv') or layer == 'fc8'):
        return batch_spec(layout)
    return Spec('data', *[None] * (dimensions - 2), 'model')


def loss_replication_factor(layout: str) -> int:
    """Returns the number of devices that compute the loss of each example; a sum over the mesh counts it that often."""
    return 1 if layout == 'hybrid' else lax.axis_size('model')


def param_specs(tree: PyTree[Array | jax.ShapeDtypeStruct], layout: str) -> PyTree[Spec]:
    """Returns the specs of a tree of parameters, or of an optimizer state that contains such trees.

    The layouts `towers` and `data` shard the output dimension over `model`. With two shards, each shard of conv1 to fc7
    has the parameters of one of the paper's GPUs.

    The layout `hybrid` replicates convolutions and shards the input dimension of dense kernels over `model`. The biases
    of fc6 and fc7 are sharded like the inputs of the next layer. The bias of fc8 is replicated, because each device
    adds the bias to its shard of the examples.
    """

    def spec(path, leaf):
        layer, name = path[-2].key, path[-1].key
        if layout != 'hybrid':
            return Spec(*[None] * (leaf.ndim - 1), 'model')
        if layer.startswith('conv') or (layer, name) == ('fc8', 'bias'):
            return Spec(*[None] * leaf.ndim)
        return Spec('model', *[None] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(spec, tree)


def optimizer_specs(tree: PyTree[Array | jax.ShapeDtypeStruct], mesh: Mesh, config: MeshConfig) -> PyTree[Spec]:
    """Returns the specs of the operands of the update: velocities, gradients and weights.

    The specs equal param_specs(). With `config.shard_optimizer`, kernels are also sharded over `data`, in the first
    dimension that can be divided evenly; biases, and kernels without such a dimension, are not.
    """

    def split(leaf, spec):
        axes = list(spec)
        if config.shard_optimizer and mesh.shape['data'] > 1 and leaf.ndim > 1:
            for i, axis in enumerate(axes):
                if leaf.shape[i] % (mesh.shape['data'] * (mesh.shape['model'] if axis else 1)) == 0:
                    axes[i] = (axis, 'data') if axis else 'data'
                    break
        return Spec(*axes)

    return jax.tree.map(split, tree, param_specs(tree, config.layout))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a spec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _replicated_axes(spec: Spec) -> tuple[str, ...]:
    """Returns the mesh axes along which an array with this spec is replicated."""
    named = [axis for entry in spec for axis in _axes(entry)]
    return tuple(axis for axis in ('data', 'model') if axis not in named)


def _data_sharded_dim(spec: Spec) -> int | None:
    """Returns the dimension that `spec` shards over `data`, or None."""
    return next((i for i, entry in enumerate(spec) if 'data' in _axes(entry)), None)


def mark_device_varying(params: PyTree[Array], specs: PyTree[Spec]) -> PyTree[Array]:
    """Casts replicated parameters to device-varying, so that jax.grad returns gradients before the all-reduce."""

    def own(x, spec):
        return lax.pcast(x, _replicated_axes(spec), to='varying') if _replicated_axes(spec) else x

    return jax.tree.map(own, params, specs)


def all_reduce_gradients(
    gradients: PyTree[Array], specs: PyTree[Spec], split: PyTree[Spec], dtypes: PyTree[str]
) -> PyTree[Float32[Array, '...']]:
    """All-reduces local gradients (see mark_device_varying()) over the replicas of each parameter; returns float32.

    Args:
      gradients: local gradients.
      specs: specs of the parameters.
      split: specs from optimizer_specs(); a leaf that `split` shards over `data` is reduce-scattered along `data`.
      dtypes: dtypes of the collectives.
    """

    def add(x, spec, split_spec, dtype):
        axes, dimension = _replicated_axes(spec), _data_sharded_dim(split_spec)
        x = x.astype(dtype)
        if dimension is not None:
            x = lax.psum_scatter(x, 'data', scatter_dimension=dimension, tiled=True)
            axes = tuple(axis for axis in axes if axis != 'data')
        if lax.axis_size(('data', 'model')) == 1:
            axes = ()  # XLA compiles an all-reduce over one device to a copy
        return (lax.psum(x, axes) if axes else x).astype('float32')

    with jax.named_scope('gradients'):
        return jax.tree.map(add, gradients, specs, split, dtypes)


def psum_over_shards(sums: PyTree[Float32[Array, '']], split: PyTree[Spec]) -> PyTree[Float32[Array, '']]:
    """All-reduces sums over this device's shard of each leaf to sums over the whole leaf.

    `split`: specs of the leaves, for example from optimizer_specs().
    """

    def add(x, spec):
        axes = tuple(axis for entry in spec for axis in _axes(entry))
        return lax.psum(x, axes) if axes else x

    with jax.named_scope('update'):
        return jax.tree.map(add, sums, split)


def dead_unit_fraction(outputs: Float[Array, 'b *dims c'], layer: str, layout: str) -> Float32[Array, '']:
    """Returns the fraction of the units (in convolutions, feature maps) that are 0 for all examples on all devices.

    `outputs`: this device's shard of the output of `layer`, see AlexNet.activations().
    """
    whole = layout == 'hybrid' and layer.startswith('conv')
    alive = jnp.any(outputs != 0, axis=tuple(range(outputs.ndim - 1))).astype(jnp.float32)
    dead = jnp.mean((lax.psum(alive, ('data', 'model') if whole else 'data') == 0).astype(jnp.float32))
    return dead if whole else lax.pmean(dead, 'model')


def local_shards(params: PyTree[Array], split: PyTree[Spec]) -> PyTree[Array]:
    """Returns the shards of `params` that this device updates; `split` are the specs from optimizer_specs()."""

    def own(x, spec):
        dimension = _data_sharded_dim(spec)
        if dimension is None:
            return x
        size = x.shape[dimension] // lax.axis_size('data')
        return lax.dynamic_slice_in_dim(x, lax.axis_index('data') * size, size, dimension)

    return jax.tree.map(own, params, split)


def all_gather_shards(params: PyTree[Array], split: PyTree[Spec]) -> PyTree[Array]:
    """All-gathers the updated shards of the parameters along `data`: the inverse of local_shards()."""

    def gather(x, spec):
        dimension = _data_sharded_dim(spec)
        if dimension is None:
            return x
        return lax.all_gather(x, 'data', axis=dimension, tiled=True, to='invarying')

    with jax.named_scope('update'):
        return jax.tree.map(gather, params, split)


def shardings(mesh: Mesh, specs: PyTree[Spec]) -> PyTree[NamedSharding]:
    """Converts a tree of specs to shardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, Spec))


def jit_shard_map(
    function: Callable[Arguments, Result],
    mesh: Mesh,
    in_specs: PyTree[Spec],
    out_specs: PyTree[Spec],
    donate_argnums: tuple[int, ...] = (),
    only_gradients: bool = False,
) -> JittedFunction[Arguments, Result]:
    """Returns `function` as a shard_map on `mesh` in jax.jit (formerly pjit), with the shardings of the specs.

    The layers are traced for the platform of the mesh, which need not be that of this process (see audit/targets.py).
    With more than one device, JAX checks (`check_vma`) that outputs declared as replicated are replicated.
    `only_gradients`: see compiler_options().
    """
    device = mesh.devices.flat[0]

    @functools.wraps(function)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with for_platform(device.platform):
            return function(*args, **kwargs)

    return jax.jit(
        jax.shard_map(traced, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=mesh.size > 1),
        in_shardings=shardings(mesh, in_specs),
        out_shardings=shardings(mesh, out_specs),
        donate_argnums=donate_argnums,
        compiler_options=compiler_options(device.platform, device.device_kind, mesh.size, only_gradients),
    )


def compiler_options(
    platform: str, device_kind: str, devices: int, only_gradients: bool
) -> dict[str, str | int | bool]:
    """Returns the XLA options of a program that differ from XLA's defaults; docs/devices.md gives the reasons.

    An unknown option is an error when the program is compiled.

    Args:
      platform, device_kind: of the devices; see layers.platform() and jax.Device.
      devices: number of devices of the program.
      only_gradients: whether the program sends nothing that a layer needs, but only gradients and metrics.
    """
    if platform == 'cpu':
        return {'xla_disable_hlo_passes': 'cse_barrier_expander'}  # keeps lax.optimization_barrier()
    if platform == 'gpu' and devices > 1:
        return {
            'xla_gpu_experimental_parallel_collective_overlap_limit': 8,
            'xla_gpu_all_reduce_combine_threshold_bytes': 2 * 2**20,
            'xla_gpu_reduce_scatter_combine_threshold_bytes': 2**20,
            'xla_gpu_experimental_collective_start_as_early_as_possible': only_gradients,
        }
    if device_kind == 'TPU v5 lite' and devices > 1:  # v5p and v6e refuse to fuse all-reduces
        return {
            'xla_enable_async_all_reduce': True,
            'xla_jf_crs_combiner_threshold_in_bytes': 4 * 2**20,
            'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
            'xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions': True,
        }
    return {}


def batch_sharding(mesh: Mesh, layout: str) -> NamedSharding:
    """Returns the sharding of the rows of a batch on `mesh`, see batch_spec()."""
    return NamedSharding(mesh, batch_spec(layout))


def make_global_batch(sharding: NamedSharding, batch: PyTree[np.ndarray | np.float32]) -> PyTree[Array]:
    """Builds global arrays from this process's rows of a batch; `sharding` is the batch_sharding()."""
    return jax.make_array_from_process_local_data(sharding, batch)


def replicate(mesh: Mesh, values: PyTree[np.ndarray | np.float32]) -> PyTree[Array]:
    """Replicates NumPy arrays, which must be equal on all processes, on every device of `mesh`."""
    return make_global_batch(NamedSharding(mesh, REPLICATED), values)


def num_batch_shards(sharding: NamedSharding) -> int:
    """Returns the number of distinct shards of a batch with the batch_sharding() `sharding`."""
    return len(set(_rows(sharding).values()))


def _rows(sharding: NamedSharding) -> dict[jax.Device, tuple[int, int]]:
    """Returns the rows (start, stop) on each device, for a batch with as many rows as the mesh has devices."""
    rows = sharding.mesh.size
    indices = sharding.devices_indices_map((rows,))
    return {device: index[0].indices(rows)[:2] for device, index in indices.items()}


def process_shard(sharding: NamedSharding) -> tuple[int, int]:
    """Returns (shard_index, shard_count): the shard of every batch that this process reads, and the number of shards.

    A shard is the set of rows on the devices of one process; processes with the same rows read the same shard.

    Raises ConfigError: a process has no device in the mesh, or the shards differ in size or overlap partially.
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
            f' processes unequal shards of a batch: use all devices, and a mesh.model that divides the devices per'
            f' process or is a multiple of their number'
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)
