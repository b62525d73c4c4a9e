"""Models the time of a compiled step on an accelerator from its scheduled HLO and the data sheet of the hardware.

The model is a roofline. The instructions run one after another in the order of the schedule. An instruction takes the
larger of its FLOPs divided by the peak rate of their precision, and its bytes of device memory (hlo.Program.bytes())
divided by the memory bandwidth. Asynchronous copies between the memory of a TPU and its on-chip memory use the
bandwidth that the other instructions leave. Collectives are served one after another on one link. A synchronous
collective, and the instruction that waits for an asynchronous one, stop the device until the transfer has ended.
Launches, latencies and elementwise arithmetic take no time, and everything runs at its peak rate, so the result is a
lower bound of the time.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence

from alexnet_jax.audit.hlo import HOLLOW, HloFormatError, Instruction, Program
from alexnet_jax.audit.hlo_collectives import PARAMETERS, Collective
from alexnet_jax.audit.targets import GPUS_PER_HOST, Hardware

COPY_STARTS, COPY_DONES = ('copy-start', 'slice-start'), ('copy-done', 'slice-done')
_FREE = ('AllocateBuffer', 'ConcatBitcast')  # custom calls of TPU programs that compute and move nothing


@dataclasses.dataclass
class Work:
    """An instruction of the schedule, with its executions in loops.

    Attributes:
      name: Name of the HLO instruction.
      part, direction: See hlo.Program.part().
      flops: FLOPs of convolutions and matrix products, per execution.
      bytes: Bytes read from and written to the memory of the device, per execution.
      cycles: Cycles that the compiler for TPUs estimates, per execution; 0 in other programs.
      product_seconds, memory_seconds: `flops` and `bytes` divided by the rates of the hardware.
      executions: Executions per step.
      seconds: Modeled seconds per step.
    """

    name: str
    part: str
    direction: str
    flops: int
    bytes: int
    cycles: int
    product_seconds: float
    memory_seconds: float
    executions: int = 0
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The part of the step, and 'backward' if the instruction belongs to the backward pass."""
        return self.part if self.direction == 'forward' else f'{self.part} backward'


@dataclasses.dataclass
class Transfer:
    """A collective in the modeled schedule.

    Attributes:
      collectives: Its parts, see hlo_collectives.step_collectives().
      bytes: Bytes that a device sends per step.
      seconds: Duration of the transfers of a step.
      exposed_seconds: The part of `seconds` in which the device waits.
      start, done: Share of the step's compute time that precedes the start and the end, in the first execution.
      behind: Parts of the step between start and end, with the seconds of each, the longest first.
    """

    collectives: list[Collective]
    bytes: float
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    start: float = 0.0
    done: float = 0.0
    behind: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def hidden_bytes(self) -> float:
        """Bytes that are sent while the device computes."""
        return self.bytes * max(0.0, 1 - self.exposed_seconds / self.seconds) if self.seconds else 0.0

    @property
    def is_gradient(self) -> bool:
        """True if any part reduces gradients."""
        return any(each.layer == 'gradients' for each in self.collectives)


@dataclasses.dataclass
class Timeline:
    """The modeled step: its instructions, its transfers, and the seconds in which the device computes and waits."""

    work: dict[str, Work]
    transfers: list[Transfer]
    compute_seconds: float
    exposed_seconds: float

    @property
    def step_seconds(self) -> float:
        """Modeled time of a step."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def costliest(self) -> list[Work]:
        """The instructions by time, the longest first."""
        return sorted(self.work.values(), key=lambda each: -each.seconds)


def instruction_work(program: Program, hardware: Hardware) -> dict[str, Work]:
    """Returns the Work of each instruction of the schedule that computes or moves data, without loop counts."""
    found = {}
    for each in program.instructions.values():
        callers = program.callers.get(each.computation, [])
        is_scheduled = all(caller.opcode in HOLLOW for caller in callers)
        if not is_scheduled or each.opcode in HOLLOW or each.opcode.endswith('-done') or _is_free(each):
            continue
        flops, moved = program.flops(each.name), program.bytes(each.name)
        compute, memory = flops / product_rate(program, each, hardware), moved / hardware.bandwidth
        cycles = re.search(r'"estimated_cycles":"(\d+)"', each.attributes)
        found[each.name] = Work(
            each.name, *program.part(each.name), flops, moved, int(cycles[1]) if cycles else 0, compute, memory
        )
    return found


def _is_free(each: Instruction) -> bool:
    target = re.search(r'custom_call_target="(\w+)"', each.attributes)
    return target is not None and target[1] in _FREE


def product_rate(program: Program, each: Instruction, hardware: Hardware) -> float:
    """Returns the peak FLOP/s of the convolutions and matrix products in an instruction, by dtype and precision."""
    products = [inner for inner in _innermost(each) if program.flops(inner.name)]
    if not products:
        return hardware.bfloat16
    dtype, _, precision = operand_precision(program, products[0]).partition(' ')
    if dtype != 'f32':
        return hardware.bfloat16
    return {'high': hardware.high, 'highest': hardware.float32}.get(precision, hardware.tensorfloat32)


def operand_precision(program: Program, product: Instruction) -> str:
    """Returns dtype and precision of the operands of a convolution or matrix product, such as 'f32 highest' or 'bf16'.

    The precision is 'default', 'high' or 'highest', as in jax.lax.Precision.
    """
    dtypes = {program.instructions[name].tensors[0][0] for name in product.operands[:2]}
    if 'f32' not in dtypes:
        return '/'.join(sorted(dtypes))
    given = re.search(r'operand_precision"?[=:][{\[]"?(\w+)', product.attributes)
    exact = 'algorithm=dot_f32_f32_f32' in product.attributes
    return f'f32 {"highest" if exact else given[1].lower() if given else "default"}'


def _innermost(each: Instruction) -> Iterator[Instruction]:
    if each.fused:
        for inner in each.fused:
            yield from _innermost(inner)
    else:
        yield each


def is_unbounded(program: Program, each: Instruction) -> bool:
    """Returns whether an instruction is a loop whose trip count depends on data, such as that of rejection sampling."""
    try:
        program.trip_count(each)
    except HloFormatError:
        return True
    return False


def _executed(program: Program, instructions: Sequence[Instruction]) -> Iterator[Instruction]:
    """Yields the instructions in the order of execution, the bodies of loops as often as they run.

    The bodies of unbounded loops count once.
    """
    for each in instructions:
        if each.opcode == 'while':
            body = re.search(r'body=%?([\w.-]+)', each.attributes)
            inside = program.computations[body[1]] if body else []
            for _ in range(1 if is_unbounded(program, each) else program.trip_count(each)):
                yield from _executed(program, inside)
        elif each.opcode in ('call', 'conditional') and each.called:
            yield from _executed(program, program.computations[each.called[-1]])
        else:
            yield each


def link_rate(collective: Collective, hardware: Hardware, data: int, model: int) -> float:
    """Returns the bytes/s that a device sends in a collective.

    The devices of a mesh of `data` x `model` are numbered along `model` first, and hosts have GPUS_PER_HOST GPUs. In a
    group that spans hosts, each ring passes every network adapter of the group's devices on a host, so the rate is
    that of these adapters together, if the links within the host are not slower.
    """
    if hardware.network is None or data * model <= GPUS_PER_HOST:
        return hardware.link
    along_model = collective.group_size == model and collective.layer not in PARAMETERS
    if along_model and model <= GPUS_PER_HOST:
        return hardware.link
    everywhere = along_model or collective.group_size == data * model
    on_host = GPUS_PER_HOST if everywhere else max(1, GPUS_PER_HOST // model)
    return min(hardware.link, hardware.network * on_host)


def simulate(program: Program, found: Sequence[Collective], hardware: Hardware, data: int, model: int) -> Timeline:
    """Returns the modeled step of a compiled program on a mesh of `data` x `model` devices.

    `found`: the collectives of the program, from hlo_collectives.step_collectives().
    """
    work = instruction_work(program, hardware)
    parts: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
    for part in found:
        parts[part.start, part.done].append(part)
    starts = {start: Transfer(group, sum(each.bytes for each in group)) for (start, _), group in parts.items()}
    waits = {done: starts[start] for start, done in parts}
    for start, done in parts:
        for name in (start, done):  # A chain of fusions on a TPU also computes.
            if start == done or program.instructions[name].opcode != 'fusion':
                work.pop(name, None)
    clock = _Clock()
    for each in _executed(program, program.entry):
        if each.name in starts:
            transfer = starts[each.name]
            first = transfer.collectives[0]
            seconds = transfer.bytes / first.trips / link_rate(first, hardware, data, model)
            clock.send(transfer, seconds)
        if each.opcode in COPY_STARTS:
            clock.start_copy(work[each.name])
        elif each.opcode in COPY_DONES:
            clock.finish_copy(work[each.operands[0]])
        elif each.name in work:
            clock.compute(work[each.name])
        if each.name in waits:
            clock.wait(waits[each.name])
    transfers = list(starts.values())
    for transfer in transfers:
        transfer.start /= clock.computed or 1
        transfer.done /= clock.computed or 1
        transfer.behind = dict(sorted(transfer.behind.items(), key=lambda item: -item[1]))
    executed = {name: item for name, item in work.items() if item.executions}
    return Timeline(executed, sorted(transfers, key=lambda each: each.start), clock.computed, clock.waited)


class _Clock:
    """The state of the model: times of device and link, transfers under way, and asynchronous copies of a TPU.

    Copies are served in the order of their start. `copies_started` and `copies_done` are the seconds of memory
    bandwidth that all copies need that have started, and that they have had.
    """

    def __init__(self) -> None:
        self.now = self.computed = self.waited = 0.0
        self.link_free = 0.0
        self.open: dict[int, tuple[Transfer, float, float]] = {}  # id -> (transfer, begin and end on the link)
        self.copies_started = self.copies_done = 0.0
        self.copy_ends: dict[str, float] = {}

    def send(self, transfer: Transfer, seconds: float) -> None:
        """Queues a transfer on the link."""
        begin = max(self.now, self.link_free)
        self.link_free = begin + seconds
        self.open[id(transfer)] = (transfer, begin, self.link_free)
        if not transfer.seconds:
            transfer.start = self.computed
        transfer.seconds += seconds

    def compute(self, work: Work) -> None:
        """Runs an instruction."""
        work.executions += 1
        self._use(work, max(work.product_seconds, work.memory_seconds))
        self._serve_copies(max(0.0, work.product_seconds - work.memory_seconds))

    def start_copy(self, work: Work) -> None:
        """Queues a copy."""
        work.executions += 1
        self.copies_started += work.memory_seconds
        self.copy_ends[work.name] = self.copies_started

    def finish_copy(self, work: Work) -> None:
        """Waits until a copy has ended."""
        left = max(0.0, self.copy_ends[work.name] - self.copies_done)
        self._use(work, left)
        self._serve_copies(left)

    def wait(self, transfer: Transfer) -> None:
        """Stops the device until a transfer has ended."""
        if id(transfer) not in self.open:
            return
        end = max(self.now, self.open[id(transfer)][2])
        for other, begin, other_end in self.open.values():
            other.exposed_seconds += max(0.0, min(other_end, end) - max(begin, self.now))
        self._serve_copies(end - self.now)
        self.waited += end - self.now
        self.now = end
        transfer.done = transfer.done or self.computed
        del self.open[id(transfer)]

    def _use(self, work: Work, seconds: float) -> None:
        work.seconds += seconds
        self.now += seconds
        self.computed += seconds
        for transfer, _, _ in self.open.values():
            transfer.behind[work.label] = transfer.behind.get(work.label, 0.0) + seconds

    def _serve_copies(self, seconds: float) -> None:
        self.copies_done = min(self.copies_started, self.copies_done + seconds)
