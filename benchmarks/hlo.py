"""The instructions of a compiled program, read from its HLO text: FLOPs, bytes, and the part of the step they are.

Parts are the scopes of the step (jax.named_scope): `conv1` to `fc8`, within those `activation`, `lrn`, `pool` and so
on, and beside them `augment`, `dropout`, `loss`, `gradients`, `update` and `metrics`.
"""

import dataclasses
import math
import re

from alexnet_jax.collectives import ITEM_SIZES
from alexnet_jax.shapes import LAYERS

STEPS = ('bias', 'activation', 'lrn', 'spatial_norm', 'batch_norm', 'pool')
PARTS = ('augment', 'dropout', 'logits', 'loss', 'gradients', 'update', 'metrics')
MOVES = {'copy', 'transpose', 'slice', 'concatenate', 'reshape', 'bitcast', 'reverse', 'parameter', 'constant', 'tuple'}
# Those that move or compute nothing themselves: what they call is seen by itself, or there is nothing.
HOLLOW = {'while', 'call', 'conditional', 'tuple', 'get-tuple-element', 'parameter', 'constant', 'bitcast'}

_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$')
_TENSOR = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass
class Instruction:
    """One instruction.

    tensors: (dtype, shape) of what it gives. operands: names. attributes: the rest of the line.
    fused: the instructions of the fusion that it is. parameter: which operand of the fusion it is, within one.
    """

    name: str
    opcode: str
    tensors: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    attributes: str
    fused: list['Instruction'] = dataclasses.field(default_factory=list)
    parameter: int | None = None

    @property
    def size(self) -> int:
        """Bytes of what it gives."""
        return sum(ITEM_SIZES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.tensors)

    @property
    def numbers(self) -> int:
        """In what it gives."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def op_name(self) -> str:
        """What JAX called it: transformations, scopes and the primitive, with slashes between; '' if not said."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ''


class Program:
    """The instructions by name, from the text of a compiled module."""

    def __init__(self, text: str):
        self.module = re.match(r'HloModule ([\w.-]+)', text)[1]  # type: ignore[index]
        self.instructions: dict[str, Instruction] = {}
        self._operands: dict[str, list[str]] = {}
        self._users: dict[str, list[str]] = {}
        computations: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[1], [])
            elif match := _INSTRUCTION.match(line):
                name, result, opcode, operands, attributes = match.groups()
                tensors = [(d, tuple(map(int, filter(None, dims.split(','))))) for d, dims in _TENSOR.findall(result)]
                found = Instruction(name, opcode, tensors, re.findall(r'%([\w.-]+)', operands), attributes)
                found.parameter = int(operands) if opcode == 'parameter' else None
                self.instructions[name] = found
                self._operands[name] = found.operands
                current.append(found)
                for operand in found.operands:
                    self._users.setdefault(operand, []).append(name)
        for each in self.instructions.values():
            called = re.search(r'calls=%?([\w.-]+)', each.attributes) if each.opcode == 'fusion' else None
            each.fused = computations[called[1]] if called else []

    def flops(self, name: str) -> int:
        """Of the convolutions and matrix products in it, two a multiply-add; those with padding count."""
        each = self.instructions[name]
        if each.fused:
            return sum(self.flops(inner.name) for inner in each.fused)
        if each.opcode not in ('convolution', 'dot'):
            return 0
        outputs = math.prod(each.tensors[0][1])
        left, right = (self.instructions[operand].tensors[0][1] for operand in each.operands)
        if each.opcode == 'dot':
            summed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', each.attributes)
            return 2 * outputs * math.prod(left[int(i)] for i in summed[1].split(',') if i) if summed else 2 * outputs
        kernel = re.search(r'dim_labels=\w+_(\w+)->', each.attributes)
        dilation = re.search(r'lhs_dilate=([\dx]+)', each.attributes)  # of every so many products one is not with 0
        zeros = math.prod(map(int, dilation[1].split('x'))) if dilation else 1
        return 2 * outputs * math.prod(right) // right[kernel[1].index('o')] // zeros  # type: ignore[index]

    def bytes(self, name: str) -> int:
        """Of its operands and of what it gives, as shapes have them: what must be read and written at the least."""
        each = self.instructions[name]
        if each.opcode in HOLLOW:
            return 0
        return each.size + sum(self._read(each, number) for number in range(len(each.operands)))

    def _read(self, each: Instruction, number: int) -> int:
        """Bytes of an operand, or of the slices of it that are left in a fusion after what it does number by number."""
        operand = self.instructions[each.operands[number]]
        same, slices = {inner.name for inner in each.fused if inner.parameter == number}, 0
        for inner in each.fused if same else ():
            if same.isdisjoint(inner.operands):
                continue
            if inner.opcode == 'slice':
                slices += inner.numbers
            elif inner.numbers == operand.numbers and inner is not each.fused[-1]:
                same.add(inner.name)
            else:
                return operand.size
        return operand.size * min(slices, operand.numbers) // operand.numbers if slices else operand.size

    def part(self, name: str) -> tuple[str, str]:
        """(part, 'forward' or 'backward') of the step, such as ('conv1/lrn', 'forward'); 'other' where none is named.

        `conv1` are a layer's convolutions or products, `conv1/copies` what only moves numbers for it, and `conv1/bias`
        what else it does. A fusion is what it ends with.
        """
        each = self.instructions[name]
        scope, is_product = self._own_scope(name), self.flops(name) > 0
        is_named = bool(scope)
        if not is_named and is_product:  # a gradient by the weights, which the compiler wrote anew
            scopes = (self._nearest(operand, self._operands, set()) for operand in each.operands)
            scope = next((other for other in scopes if 'transpose(' in other), '')
        scope = scope or self._nearest(name, self._users, set()) or self._nearest(name, self._operands, set())
        known = [word for word in re.findall(r'\w+', scope.rpartition('/')[0]) if word in LAYERS + STEPS + PARTS]
        direction = 'backward' if 'transpose(' in scope else 'forward'
        layer = next((word for word in reversed(known) if word in LAYERS), '')
        if known and known[-1] in PARTS:
            return known[-1], 'forward'
        if not layer:
            return 'other', direction
        if all(inner.opcode in MOVES for inner in each.fused or [each]):
            return f'{layer}/copies', direction
        if known[-1] in STEPS and (is_named or not is_product):
            return f'{layer}/{known[-1]}', direction
        return (layer if is_product else f'{layer}/bias'), direction

    def _own_scope(self, name: str) -> str:
        """Its op_name or, of a fusion, that of the last instruction in it that has one."""
        each = self.instructions[name]
        return next(filter(None, (each.op_name, *(inner.op_name for inner in reversed(each.fused)))), '')

    def _nearest(self, name: str, way: dict[str, list[str]], seen: set[str]) -> str:
        """The scope of what is nearest on the way from user to user, or from operand to operand."""
        if scope := self._own_scope(name):
            return scope
        seen.add(name)
        further = (self._nearest(other, way, seen) for other in way.get(name, ()) if other not in seen)
        return next(filter(None, further), '')
