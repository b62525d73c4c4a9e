"""Parses the collectives of a compiled training step from its HLO text and computes the bytes each device sends.

Bytes sent per device by ring algorithms, for a group of n devices and a tensor of S bytes:

    all-reduce           2 S (n-1)/n   S: the full tensor, on every device before and after
    all-gather             S (n-1)/n   S: the gathered tensor
    reduce-scatter         S (n-1)/n   S: the unreduced tensor, n times the output of a device
    all-to-all             S (n-1)/n   S: the tensor on one device, same size before and after
    collective-permute     S
    collective-broadcast   S
"""

import collections
import dataclasses
import math
import re

ITEM_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
ITEM_SIZES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8, 'c64': 8}

# Names of the scopes in the training step; `logits` is the exchange after fc8.
LAYERS = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8', 'logits')
STEP_SCOPES = ('dropout', 'gradients', 'update', 'metrics')

_KINDS = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
_INSTRUCTION = re.compile(rf'\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({_KINDS})(-start)?\(')
_TENSOR = re.compile(r'(\w+)\[([\d,]*)\]')
_AXIS = r"'[^']+'"
_MESH_GROUPS = re.compile(
    rf'replica_groups=mesh\[((?:{_AXIS}=\d+,?)+)\](?:, device_ids=\(\S*\))? '
    rf'\{{((?:{_AXIS}(?::\(\d+\)\d+)?,?)+)\}}(?=,|\s|$)'
)


class HloFormatError(ValueError):
    """HLO text in a syntax that this module cannot parse."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step, or the part of a combined collective that belongs to one layer and dtype.

    Attributes:
      kind: HLO opcode.
      layer: One of LAYERS or STEP_SCOPES, '' if unknown.
      dtype: HLO name of the dtype.
      shapes: Shape of each output tensor on one device.
      group_size: Number of devices per group.
    """

    kind: str
    layer: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    group_size: int

    @property
    def elements(self) -> int:
        """Number of output elements on one device."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> float:
        """Bytes that each device sends with a ring algorithm."""
        left, n = self.elements * ITEM_SIZES[self.dtype], self.group_size
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return left
        return left * (n - 1) * {'all-reduce': 2 / n, 'reduce-scatter': 1}.get(self.kind, 1 / n)


def step_collectives(compiled: str, lowered_hlo: str, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled step, sorted by layer, without groups of one device.

    A collective with tensors of several layers or dtypes appears once per layer and dtype.

    Args:
      compiled: HLO text of the compiled step, which determines the list of collectives.
      lowered_hlo: HLO text of the same step before compilation. Layers and dtypes are from this text if it has a
        matching tensor, because XLA on CPU sends bfloat16 as float32 and combines all-reduces of several parts.
      devices: Number of devices of the mesh.
    """
    wanted = [tensor for tensors in _instructions(lowered_hlo, devices) for tensor in tensors]
    found = []
    for tensors in _instructions(compiled, devices):
        parts: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
        for tensor in tensors:
            same = [
                other
                for other in wanted
                if (other.kind, other.elements, other.group_size) == (tensor.kind, tensor.elements, tensor.group_size)
            ]
            if same:
                best = max(same, key=lambda other: (other.layer == tensor.layer, other.shapes == tensor.shapes))
                wanted.remove(best)
                tensor = best
            parts[tensor.layer, tensor.dtype].append(tensor)
        for part in parts.values():
            shapes = sorted((shape for tensor in part for shape in tensor.shapes), key=math.prod, reverse=True)
            found.append(dataclasses.replace(part[0], shapes=tuple(shapes)))
    order = ('', *LAYERS, *STEP_SCOPES)
    return sorted(found, key=lambda each: (order.index(each.layer), each.kind, -each.bytes, each.shapes))


def _instructions(hlo: str, devices: int) -> list[list[Collective]]:
    """Returns one Collective per tensor for each collective instruction, without groups of one device."""
    found = []
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        result, kind, asynchronous = match.groups()
        if asynchronous and kind != 'all-reduce':  # (operands, results, ...)
            result = _entries(result)[1]
        tensors = [(dtype, tuple(map(int, filter(None, dims.split(','))))) for dtype, dims in _TENSOR.findall(result)]
        if kind == 'all-to-all' and len(tensors) > 1:  # HLO lists one tensor per device
            tensors = [(tensors[0][0], (len(tensors), *tensors[0][1]))]
        size = group_size(line, kind, devices)
        if size > 1:
            found.append([Collective(kind, _layer(line), dtype, (shape,), size) for dtype, shape in tensors])
    return found


def _entries(shape: str) -> list[str]:
    """Splits the shape of a tuple into its top-level entries."""
    entries, depth = [''], 0
    for character in shape.strip()[1:-1]:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth == 0:
            entries.append('')
        else:
            entries[-1] += character
    return entries


def _layer(line: str) -> str:
    """Returns the innermost scope in `op_name` that is one of LAYERS or STEP_SCOPES, or ''."""
    name = re.search(r'op_name="([^"]*)"', line)
    words = re.findall(r'\w+', name[1]) if name else []
    return next((word for word in reversed(words) if word in LAYERS + STEP_SCOPES), '')


def group_size(line: str, kind: str, devices: int) -> int:
    """Returns the size of the largest group of an instruction, in a program of one replica with `devices` partitions.

    HLO writes groups as {{0,1},{2,3}}, as [2,4]<=[4,2]T(1,0) for 2 groups of 4 (permuted device numbers), or as {} for
    one group of all devices. Since jaxlib 0.12, HLO also writes mesh['data'=4,'model'=2] {'data'} for groups along mesh
    axes, where 'data':(2)4 is the sub-axis of size 4 behind a sub-axis of size 2. With use_global_device_ids, and in an
    all-to-all with a channel, the numbers are partition ids. Otherwise the numbers are replica ids: a replica stands
    for all its partitions if there is a channel, and only for the executing partition if there is none. For a
    collective-permute, the result is the number of devices that send to or receive from another device.

    Raises HloFormatError: unknown syntax.
    """
    if kind == 'collective-permute':
        pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', line)
        ends = re.findall(r'(\d+),(\d+)', pairs[1]) if pairs else []
        return len({device for source, target in ends if source != target for device in (source, target)})
    on_channel = 'channel_id=' in line
    of_partitions = 'use_global_device_ids=true' in line or (on_channel and kind == 'all-to-all')
    iota = re.search(r'replica_groups=\[\d+,(\d+)\]<=', line)
    listed = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', line)
    mesh = _MESH_GROUPS.search(line)
    if iota:
        size = int(iota[1])
    elif mesh:
        axis_sizes = dict(re.findall(rf'({_AXIS})=(\d+)', mesh[1]))
        axes = re.findall(rf'({_AXIS})(?::\(\d+\)(\d+))?', mesh[2])
        unknown = [name for name, _ in axes if name not in axis_sizes]
        if unknown:
            raise HloFormatError(f'{mesh[0]} names {unknown[0]}, which is not an axis of its mesh')
        size = math.prod(int(part or axis_sizes[name]) for name, part in axes)
    elif listed is None:
        written = re.search(r'replica_groups=.*?(?=, (?!device_ids)[a-z_]+=|$)', line)
        raise HloFormatError(
            f'{kind} has {written[0] if written else "no replica_groups"}, a format unknown to this version of'
            ' alexnet_jax, which reads the formats of jax 0.10 to 0.12'
        )
    else:
        groups = re.findall(r'\{([\d,]*)\}', listed[1])
        size = max((len(group.split(',')) for group in groups), default=devices if of_partitions else 1)
    return size if of_partitions else devices if on_channel else 1
