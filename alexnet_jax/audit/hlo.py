"""Parses the HLO text of a program: FLOPs, bytes and executions of each instruction, and its part of the train step.

The text is that of XLA's compilers for CPUs, GPUs and TPUs, or that of a program before compilation.

The parts are the scopes of the step (jax.named_scope): the layers `conv1` to `fc8`, their sublayers `activation`,
`lrn`, `pool` and so on, and, outside the layers, `augment`, `dropout`, `loss`, `gradients`, `update` and `metrics`.
"""

import dataclasses
import math
import re

from alexnet_jax.shapes import LAYERS

ITEM_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2}
ITEM_SIZES |= {'f32': 4, 's32': 4, 'u32': 4, 'f64': 8, 's64': 8, 'u64': 8, 'c64': 8}

STEPS = ('bias', 'activation', 'lrn', 'spatial_lrn', 'batch_norm', 'pool')
PARTS = ('augment', 'dropout', 'logits', 'loss', 'gradients', 'update', 'metrics')
MOVES = {'copy', 'transpose', 'slice', 'concatenate', 'reshape', 'bitcast', 'reverse', 'parameter', 'constant', 'tuple'}
# Opcodes that move and compute nothing themselves. Instructions in the computations that they call count separately.
HOLLOW = {'while', 'call', 'conditional', 'tuple', 'get-tuple-element', 'parameter', 'constant', 'bitcast'}
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$')
_INSTRUCTION = re.compile(
    r'\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(((?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+)\)(.*)$'
)
_TENSOR = re.compile(r'(\w+)\[([\d,]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?')
_OPERAND = re.compile(r'%?([A-Za-z_][\w.-]*)(?=,|$)')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.-]+))')


class HloFormatError(ValueError):
    """HLO text in a syntax that this package cannot parse."""


@dataclasses.dataclass
class Instruction:
    """One HLO instruction.

    Attributes:
      tensors: (dtype, shape) of each result.
      spaces: the memory space of each result: 0 is the memory of the device, others are on-chip memories of TPUs.
      operands: the names of the operands.
      attributes: the rest of the line.
      computation: the name of the computation that contains the instruction.
      called: the names of the computations that the instruction calls.
      fused: the instructions inside a fusion; [] for other instructions.
      parameter: of a parameter instruction, the index of the operand that it stands for.
      value: of an integer constant, its value.
    """

    name: str
    opcode: str
    tensors: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    attributes: str
    computation: str
    called: list[str]
    spaces: list[int] = dataclasses.field(default_factory=list)
    fused: list['Instruction'] = dataclasses.field(default_factory=list)
    parameter: int | None = None
    value: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the results in the memory of the device."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each result in the memory of the device."""
        return [
            0 if space else ITEM_SIZES.get(dtype, 4) * math.prod(shape)
            for (dtype, shape), space in zip(self.tensors, self.spaces, strict=True)
        ]

    @property
    def numbers(self) -> int:
        """Number of elements in the results."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def carries_collective(self) -> bool:
        """Whether this is a fusion of a TPU with a piece of an asynchronous collective, and perhaps computations."""
        return any(inner.opcode in KINDS and 'chain_id=' in inner.attributes for inner in self.fused)

    @property
    def op_name(self) -> str:
        """JAX's name: transformations, scopes and the primitive, separated by slashes; '' if absent."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ''


class Program:
    """The instructions of a module, parsed from its text.

    Attributes:
      module: the name of the module.
      platform: 'tpu' or 'gpu' if the configuration of an instruction is that of these compilers, otherwise 'cpu'.
      instructions: the instructions by name.
      computations: the instructions of each computation, in the order of the text. In a compiled program, which is
        scheduled, this is the order of execution.
      entry: the instructions of the entry computation.
      callers: the instructions that call each computation.
    """

    def __init__(self, text: str):
        self.module = re.match(r'HloModule ([\w.-]+)', text)[1]  # type: ignore[index]
        self.platform = 'tpu' if '"flag_configs"' in text else 'gpu' if '"operation_queue_id"' in text else 'cpu'
        self.instructions: dict[str, Instruction] = {}
        self.computations: dict[str, list[Instruction]] = {}
        self.entry: list[Instruction] = []
        self.callers: dict[str, list[Instruction]] = {}
        self._operands: dict[str, list[str]] = {}
        self._users: dict[str, list[str]] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                computation = header[2]
                current = self.computations[computation] = self.entry if header[1] else []
            elif match := _INSTRUCTION.match(line):
                self._add(_instruction(computation, *match.groups()), current)
        for each in self.instructions.values():
            each.fused = self.computations[each.called[0]] if each.opcode == 'fusion' and each.called else []

    def _add(self, each: Instruction, computation: list[Instruction]) -> None:
        self.instructions[each.name] = each
        self._operands[each.name] = each.operands
        computation.append(each)
        for operand in each.operands:
            self._users.setdefault(operand, []).append(each.name)
        for called in each.called:
            self.callers.setdefault(called, []).append(each)

    def users(self, name: str) -> list[Instruction]:
        """Returns the instructions that read the result of an instruction."""
        return [self.instructions[user] for user in self._users.get(name, ())]

    def trips(self, name: str) -> int:
        """Returns how often one execution of the program executes an instruction.

        This is the product of the trip counts of the loops around the instruction. Branches of a conditional count as
        executed.

        Raises HloFormatError: a loop around the instruction has no known trip count.
        """
        callers = self.callers.get(self.instructions[name].computation)
        return sum(self.trips(each.name) * self.trip_count(each) for each in callers) if callers else 1

    def trip_count(self, caller: Instruction) -> int:
        """Returns the trip count of a loop, 1 for other instructions that call a computation.

        The compilers for CPUs and GPUs write the count. Loops in TPU programs and before compilation only compare a
        counter, which grows by one, with a constant.
        """
        if caller.opcode != 'while':
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', caller.attributes):
            return int(known[1])
        condition = re.search(r'condition=%?([\w.-]+)', caller.attributes)
        for each in self.computations[condition[1]] if condition else ():
            if each.opcode == 'compare' and 'direction=LT' in each.attributes:
                counter, limit = (self.instructions[operand] for operand in each.operands)
                index = re.search(r'index=(\d+)', counter.attributes)
                state = self.instructions[caller.operands[0]]
                first = self.instructions[state.operands[int(index[1])]] if index and state.operands else counter
                while first.opcode == 'copy':
                    first = self.instructions[first.operands[0]]
                if limit.value is not None and first.value is not None:
                    return limit.value - first.value
        raise HloFormatError(f'the loop {caller.name} has no trip count that this version of alexnet_jax reads')

    def flops(self, name: str) -> int:
        """Returns the FLOPs of the convolutions and matrix products in an instruction.

        A multiply-add counts as two. Multiplications with padding count.
        """
        each = self.instructions[name]
        if each.fused:
            return sum(self.flops(inner.name) for inner in each.fused)
        if each.opcode == 'custom-call':
            return _library_flops(each, [self.instructions[operand] for operand in each.operands])
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
        """Returns the bytes of the operands and the results by their shapes: the minimum of memory traffic.

        Only the memory of the device counts, not the on-chip memory of TPUs. Of an operand that is only sliced, the
        slices count; of a result that is an operand with a part updated in place, the update counts twice. Fusions of
        a TPU that start, carry or end an asynchronous collective do not access its tensors.
        """
        each = self.instructions[name]
        is_allocation = 'custom_call_target="AllocateBuffer"' in each.attributes
        if each.opcode in HOLLOW or each.opcode.endswith('-done') or is_allocation:
            return 0
        if each.opcode in ('copy-start', 'slice-start'):  # (result, operand, state) and (operand, result, state)
            source, result = (1, 0) if each.opcode == 'copy-start' else (0, 1)
            dtype, shape = each.tensors[result]
            return ITEM_SIZES.get(dtype, 4) * math.prod(shape) * [each.spaces[source], each.spaces[result]].count(0)
        return self._written(each) + sum(self._read(each, number) for number in range(len(each.operands)))

    def _written(self, each: Instruction) -> int:
        """Returns the bytes written: those of the results, or of the parts of them that are updated in place."""
        root = (each.fused or [each])[-1]
        results = [self.instructions[name] for name in root.operands] if root.opcode == 'tuple' else [root]
        total = 0
        for size, result in zip(each.sizes, results, strict=False):
            while result.opcode == 'bitcast':
                result = self.instructions[result.operands[0]]
            if each.carries_collective and result.opcode in ('parameter', 'custom-call', *KINDS):
                continue
            if result.opcode == 'dynamic-update-slice':
                update = self.instructions[result.operands[1]]
                size = min(size, update.numbers * ITEM_SIZES.get(result.tensors[0][0], 4))
            total += size
        return total if len(results) == len(each.sizes) else each.size

    def _read(self, each: Instruction, number: int) -> int:
        """Returns the bytes read of an operand.

        If only slices of an operand are read, directly or after elementwise instructions of a fusion, only the slices
        count. An operand that is updated in place is read where it is updated.
        """
        operand = self.instructions[each.operands[number]]
        inside = each.fused or [each]
        same = {inner.name for inner in each.fused if inner.parameter == number} or {operand.name}
        if each.carries_collective and all(
            inner.opcode in ('tuple', 'custom-call', *KINDS) for inner in inside if not same.isdisjoint(inner.operands)
        ):
            return 0
        parts, partial = 0, False
        for inner in inside:
            if same.isdisjoint(inner.operands):
                continue
            of_operand = inner.operands[0] in same and same.isdisjoint(inner.operands[1:])
            if inner.opcode in ('slice', 'dynamic-slice') and of_operand:
                parts, partial = parts + inner.numbers, True
            elif inner.opcode == 'dynamic-update-slice' and of_operand:
                parts, partial = parts + self.instructions[inner.operands[1]].numbers, True
            elif inner.numbers == operand.numbers and inner is not inside[-1]:
                same.add(inner.name)
            else:
                return operand.size
        return operand.size * min(parts, operand.numbers) // operand.numbers if partial else operand.size

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


def _instruction(computation: str, name: str, result: str, opcode: str, operands: str, attributes: str) -> Instruction:
    """Returns the instruction of a parsed line."""
    results = _TENSOR.findall(result)
    tensors = [(dtype, tuple(map(int, filter(None, dims.split(','))))) for dtype, dims, _ in results]
    called = [each for several, one in _CALLED.findall(attributes) for each in re.findall(r'[\w.-]+', several or one)]
    spaces = [int(space or 0) for *_, space in results]
    found = Instruction(name, opcode, tensors, [], attributes, computation, called, spaces)
    if opcode == 'parameter':
        found.parameter = int(operands)
    elif opcode == 'constant':
        found.value = int(operands) if re.fullmatch(r'-?\d+', operands) else None
    else:
        found.operands = _OPERAND.findall(operands)
    return found


def _library_flops(each: Instruction, operands: list[Instruction]) -> int:
    """Returns the FLOPs of a call of cuDNN's convolutions or cuBLAS's matrix products; 0 for other calls."""
    target = re.search(r'custom_call_target="__(cudnn|cublas)\$(\w+)', each.attributes)
    if target is None or len(operands) < 2:
        return 0
    left, right, result = (part.tensors[0][1] for part in (*operands[:2], each))
    if target[1] == 'cublas':
        summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', each.attributes)
        if summed is None:
            raise HloFormatError(f'{each.name} has no lhs_contracting_dimensions')
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in re.findall(r'\d+', summed[1]))
    labels = re.search(r'dim_labels=\w+_(\w+)->', each.attributes)
    if labels is None:
        return 0
    # The labels are those of the forward convolution, in which each output is a sum over the rest of its kernel.
    kernel = result if 'BackwardFilter' in target[2] else right
    outputs = right if 'BackwardFilter' in target[2] else left if 'BackwardInput' in target[2] else result
    return 2 * math.prod(outputs) * math.prod(kernel) // kernel[labels[1].index('o')]
