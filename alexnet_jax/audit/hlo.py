"""Parses the HLO text of a compiled program: FLOPs and bytes of each instruction, and its part of the train step.

The parts are the scopes of the step (jax.named_scope): the layers `conv1` to `fc8`, their sublayers `activation`,
`lrn`, `pool` and so on, and, outside the layers, `augment`, `dropout`, `loss`, `gradients`, `update` and `metrics`.
"""

import dataclasses
import math
import re

from alexnet_jax.audit.hlo_collectives import ITEM_SIZES
from alexnet_jax.shapes import LAYERS

STEPS = ('bias', 'activation', 'lrn', 'spatial_lrn', 'batch_norm', 'pool')
PARTS = ('augment', 'dropout', 'logits', 'loss', 'gradients', 'update', 'metrics')
MOVES = {'copy', 'transpose', 'slice', 'concatenate', 'reshape', 'bitcast', 'reverse', 'parameter', 'constant', 'tuple'}
# Opcodes that move and compute nothing themselves. Instructions in the computations that they call count separately.
HOLLOW = {'while', 'call', 'conditional', 'tuple', 'get-tuple-element', 'parameter', 'constant', 'bitcast'}

_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$')
_TENSOR = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass
class Instruction:
    """One HLO instruction.

    Attributes:
      tensors: (dtype, shape) of each result.
      operands: the names of the operands.
      attributes: the rest of the line.
      fused: the instructions inside a fusion; [] for other instructions.
      parameter: of a parameter instruction, the index of the operand that it stands for.
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
        """Bytes of the results."""
        return sum(ITEM_SIZES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.tensors)

    @property
    def numbers(self) -> int:
        """Number of elements in the results."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def op_name(self) -> str:
        """JAX's name: transformations, scopes and the primitive, separated by slashes; '' if absent."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ''


class Program:
    """The instructions of a compiled module by name, parsed from its text."""

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
        """Returns the FLOPs of the convolutions and matrix products in an instruction.

        A multiply-add counts as two. Multiplications with padding count.
        """
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
        dilation = re.search(r'lhs_dilate=([\dx]+)', each.attributes)  # one in `zeros` products has a nonzero factor
        zeros = math.prod(map(int, dilation[1].split('x'))) if dilation else 1
        return 2 * outputs * math.prod(right) // right[kernel[1].index('o')] // zeros  # type: ignore[index]

    def bytes(self, name: str) -> int:
        """Returns the bytes of the operands and the results by their shapes: the minimum of memory traffic."""
        each = self.instructions[name]
        if each.opcode in HOLLOW:
            return 0
        return each.size + sum(self._read(each, number) for number in range(len(each.operands)))

    def _read(self, each: Instruction, number: int) -> int:
        """Returns the bytes read of an operand.

        If a fusion reads only slices of an operand, directly or after elementwise instructions, only the slices count.
        """
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
        """Returns (part, 'forward' or 'backward') of an instruction, such as ('conv1/lrn', 'forward').

        `conv1` stands for the layer's convolutions or matrix products, `conv1/copies` for instructions that only move
        data, and `conv1/bias` for the layer's remaining instructions. The part of a fusion is that of its last
        instruction. The part is 'other' if no scope is known.
        """
        each = self.instructions[name]
        scope, is_product = self._own_scope(name), self.flops(name) > 0
        is_named = bool(scope)
        if not is_named and is_product:  # a weight gradient that XLA rewrote without its op_name
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
        """Returns the op_name or, if it is missing, that of the last instruction in the fusion that has one."""
        each = self.instructions[name]
        return next(filter(None, (each.op_name, *(inner.op_name for inner in reversed(each.fused)))), '')

    def _nearest(self, name: str, way: dict[str, list[str]], seen: set[str]) -> str:
        """Returns the scope of the nearest instruction along `way`, which maps a name to its users or its operands."""
        if scope := self._own_scope(name):
            return scope
        seen.add(name)
        further = (self._nearest(other, way, seen) for other in way.get(name, ()) if other not in seen)
        return next(filter(None, further), '')
