"""Reads the collectives of a compiled training step from its HLO text and computes the bytes each device sends.

The step may be compiled for CPUs, GPUs or TPUs. A collective counts once, in whatever form the compilers write it:

    all-reduce(...)                          one instruction
    all-reduce-start, all-reduce-done        a pair, between which other instructions may run
    async-start, async-done                  a pair that calls a computation with the collective
    fusion calling %all-reduce-scatter       TPU: an all-reduce of which each device keeps a part: a reduce-scatter
    fusions calling computations with the    TPU: a chain of fusions, each of which advances the collective and may
      same collective and chain_id           compute something else besides

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

from alexnet_jax.audit.hlo import ITEM_SIZES, KINDS, HloFormatError, Instruction, Program
from alexnet_jax.shapes import LAYERS

# Names of the scopes in the training step that have collectives; `logits` is the exchange after fc8.
SCOPES = (*LAYERS, 'logits', 'dropout', 'gradients', 'update', 'metrics')
PARAMETERS = ('gradients', 'update')  # scopes of the collectives that reduce gradients and gather updated weights

_CARRIERS = ('fusion', 'async-start')
_AXIS = r"'[^']+'"
_MESH_GROUPS = re.compile(
    rf'replica_groups=mesh\[((?:{_AXIS}=\d+,?)+)\](?:, device_ids=\(\S*\))? '
    rf'\{{((?:{_AXIS}(?::\(\d+\)\d+)?,?)+)\}}(?=,|\s|$)'
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step, or the part of a combined collective that belongs to one layer and dtype.

    Attributes:
      kind: HLO opcode.
      layer: One of SCOPES, '' if unknown.
      dtype: HLO name of the dtype.
      shapes: Shape of each output tensor on one device.
      group_size: Number of devices per group.
      trips: Executions per step: the product of the trip counts of the loops around the collective.
      start, done: Names of the instructions in hlo.Program that start and complete the collective; equal if it is
        synchronous. The parts of a combined collective have the same names.
    """

    kind: str
    layer: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    group_size: int
    trips: int = 1
    start: str = ''
    done: str = ''

    @property
    def is_async(self) -> bool:
        """True if other instructions can run between the start and the completion."""
        return self.start != self.done

    @property
    def elements(self) -> int:
        """Number of output elements on one device, per execution."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> float:
        """Bytes that each device sends per step with a ring algorithm."""
        left, n = self.trips * self.elements * ITEM_SIZES[self.dtype], self.group_size
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return left
        return left * (n - 1) * {'all-reduce': 2 / n, 'reduce-scatter': 1}.get(self.kind, 1 / n)


def step_collectives(compiled: str, lowered_hlo: str, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled step, sorted by layer, without groups of one device.

    A collective with tensors of several layers or dtypes appears once per layer and dtype.

    Args:
      compiled: HLO text of the compiled step, which determines the list of collectives.
      lowered_hlo: HLO text of the same step before compilation. Layers and shapes are from this text if it has a
        matching tensor, because compilers combine collectives of several parts. So are the dtypes in a program for
        CPUs, because XLA on CPU sends bfloat16 as float32. Programs for GPUs and TPUs keep their own dtypes.
      devices: Number of devices of the mesh.

    Raises HloFormatError: unknown syntax.
    """
    program = Program(compiled)
    wanted = [tensor for tensors in _collectives(Program(lowered_hlo), devices).values() for tensor in tensors]
    found: list[Collective] = []
    for tensors in _collectives(program, devices).values():
        parts: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
        for joined in tensors:
            for tensor in _separated(joined, program, wanted):
                named = _named(tensor, program, wanted, found)
                parts[named.layer, named.dtype].append(named)
        for part in parts.values():
            shapes = sorted((shape for tensor in part for shape in tensor.shapes), key=math.prod, reverse=True)
            trips = program.trips(part[0].start)
            found.append(dataclasses.replace(part[0], shapes=tuple(shapes), trips=trips))
    order = ('', *SCOPES)
    return sorted(found, key=lambda each: (order.index(each.layer), each.kind, -each.bytes, each.shapes))


def _collectives(program: Program, devices: int) -> dict[str, list[Collective]]:
    """Returns one Collective per tensor for each collective, without groups of one device.

    The key is the name of the instruction that starts the collective, or 'chain' and the chain_id.
    """
    found: dict[str, list[Collective]] = {}
    instructions = program.instructions.values()
    carried = {name for each in instructions if each.opcode in _CARRIERS for name in each.called}
    for start in instructions:
        if start.computation in carried:
            continue
        for each in program.computations[start.called[0]] if start.opcode in _CARRIERS else [start]:
            kind = each.opcode.removesuffix('-start')
            size = group_size(each.attributes, kind, devices) if kind in KINDS else 0
            if size > 1:
                chain = re.search(r'chain_id="(\d+)"', each.attributes)
                key = f'chain {chain[1]}' if chain else start.name
                begin = found[key][0].start if key in found else start.name
                end, (kind, tensors) = _done(start, program), _result(start, each, kind, program)
                found[key] = [Collective(kind, _layer(each), *tensor, size, 1, begin, end) for tensor in tensors]
    return found


def _result(
    start: Instruction, each: Instruction, kind: str, program: Program
) -> tuple[str, list[tuple[str, tuple[tuple[int, ...]]]]]:
    """Returns the kind of the collective `each`, which `start` starts, and dtype and shapes of each of its results."""
    tensors, inputs = each.tensors, len(each.operands)
    is_sliced = any(user.opcode == 'dynamic-slice' for user in program.users(each.name))
    if each is not start and kind == 'all-reduce' and is_sliced:
        kind, tensors = 'reduce-scatter', start.tensors
    elif len(tensors) > inputs:  # of a start: operands, results, and the state of the transfer
        tensors = tensors[inputs : 2 * inputs]
    if kind == 'all-to-all' and len(tensors) > 1:  # HLO lists one tensor per device
        tensors = [(tensors[0][0], (len(tensors), *tensors[0][1]))]
    if unknown := [dtype for dtype, _ in tensors if dtype not in ITEM_SIZES]:
        raise HloFormatError(f'{each.name} sends {unknown[0]}, a dtype unknown to this version of alexnet_jax')
    return kind, [(dtype, (shape,)) for dtype, shape in tensors]


def _done(start: Instruction, program: Program) -> str:
    """Returns the name of the instruction that completes the collective that `start` starts."""
    if not start.opcode.endswith(('-start', '-update')) or '"is_sync":true' in start.attributes:
        return start.name
    following = (user for user in program.users(start.name) if user.opcode.endswith(('-update', '-done')))
    return next((_done(user, program) for user in following), start.name)


def _separated(tensor: Collective, program: Program, wanted: list[Collective]) -> list[Collective]:
    """Returns the tensors that `tensor` concatenates; [tensor] if it is one of `wanted`, or no concatenation.

    The compiler for GPUs combines several all-reduces into the all-reduce of one vector.
    """
    if any(_is_same(tensor, other) for other in wanted):
        return [tensor]
    each = program.instructions[program.instructions[tensor.start].operands[0]]
    while each.opcode == 'bitcast' or each.fused:
        each = each.fused[-1] if each.fused else program.instructions[each.operands[0]]
    if each.opcode != 'concatenate':
        return [tensor]
    shapes = [shape for operand in each.operands for _, shape in program.instructions[operand].tensors]
    return [dataclasses.replace(tensor, shapes=(shape,)) for shape in shapes]


def _is_same(tensor: Collective, other: Collective) -> bool:
    """Returns whether a compiled tensor can be the tensor `other` from before compilation, in another shape."""
    return (tensor.kind, tensor.elements, tensor.group_size) == (other.kind, other.elements, other.group_size)


def _named(tensor: Collective, program: Program, wanted: list[Collective], found: list[Collective]) -> Collective:
    """Returns `tensor` with layer, shape and, on CPUs, dtype of its tensor in `wanted`, and removes the latter.

    A TPU pads some tensors of reduce-scatters. They keep their shape. A tensor that the compiler added has the layer
    of the nearest of `found`, or of other instructions with a layer, on which it depends.
    """
    same = [other for other in wanted if _is_same(tensor, other)]
    if not same and tensor.kind == 'reduce-scatter':
        [operand, *_] = program.instructions[tensor.start].operands
        unpadded = program.instructions[operand].numbers // tensor.group_size
        same = [other for other in wanted if (other.kind, other.elements) == (tensor.kind, unpadded)]
    if not same:
        return dataclasses.replace(tensor, layer=tensor.layer or _layer_before(tensor.start, program, found))
    keeps_dtype = program.platform != 'cpu'
    best = max(
        same,
        key=lambda other: (
            keeps_dtype and other.dtype == tensor.dtype,
            other.layer == tensor.layer,
            other.shapes == tensor.shapes,
        ),
    )
    wanted.remove(best)
    shapes = best.shapes if best.elements == tensor.elements else tensor.shapes
    dtype = tensor.dtype if keeps_dtype else best.dtype
    return dataclasses.replace(tensor, layer=best.layer, shapes=shapes, dtype=dtype)


def _layer_before(name: str, program: Program, found: list[Collective]) -> str:
    """Returns the layer of the nearest instruction with a layer that an instruction depends on; '' if there is none."""
    layers = {each.start: each.layer for each in found}
    names = [name]
    for name in names:
        each = program.instructions[name]
        if layer := layers.get(name) or _layer(each):
            return layer
        names += [operand for operand in each.operands if operand not in names]
    return ''


def _layer(each: Instruction) -> str:
    """Returns the innermost scope in `op_name` that is one of SCOPES, or ''."""
    words = re.findall(r'\w+', each.op_name)
    return next((word for word in reversed(words) if word in SCOPES), '')


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
        if pairs is None:
            raise HloFormatError('collective-permute has no source_target_pairs that this version of alexnet_jax reads')
        ends = re.findall(r'(\d+),(\d+)', pairs[1])
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
