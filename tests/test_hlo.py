"""Programs of the compilers for CPUs, GPUs and TPUs, read by the audit: against numbers counted by hand in their texts.

fixtures/hlo_{cpu,gpu,tpu}.gz is the train step of a narrow paper (conv1 16 maps, conv5 32, fc6 and fc7 256 units, 1000
classes) in the layout towers on data 4 x model 2, with 16 images per device: 32 images per pair of devices, on which
each has one tower. fixtures/make_hlo_fixtures.py says how the files were made, and makes them again.
"""

import functools
import gzip

import pytest
from helpers import ROOT

from alexnet_jax.audit.hlo import HloFormatError, Program
from alexnet_jax.audit.hlo_collectives import Collective, step_collectives

DEVICES = 8


@functools.cache
def text(name: str) -> str:
    return gzip.decompress((ROOT / 'tests' / 'fixtures' / f'hlo_{name}.gz').read_bytes()).decode()


@functools.cache
def program(platform: str) -> Program:
    return Program(text(platform))


@functools.cache
def collectives(platform: str) -> list[Collective]:
    return step_collectives(text(platform), text(f'{platform}_lowered'), DEVICES)


def row(each: Collective) -> tuple:
    shapes = ' '.join('x'.join(map(str, shape)) for shape in each.shapes)
    return each.kind, each.layer, each.dtype, shapes, each.group_size, each.trips, each.bytes, each.start, each.done


# The gradients of a device: kernel and bias of fc8, fc7, fc6, conv1 and conv5, of 500, 128, 128, 8 and 16 units or
# maps. An all-reduce over 4 devices sends 2 x 3/4 of 4 bytes per number.
GRADIENTS = '256x500 256x128 32x128 11x11x3x8 3x3x8x16 500 128 128 16 8'
NUMBERS = 256 * 500 + 256 * 128 + 32 * 128 + 11 * 11 * 3 * 8 + 3 * 3 * 8 * 16 + 500 + 128 + 128 + 16 + 8

# Kind, layer, dtype, shapes, group, executions, bytes per device, first and last instruction. Exchanges between two
# devices send half of the gathered or unreduced tensor. The metrics are three numbers of eight devices: 2 x 7/8 x 12.
BY_HAND = {
    'cpu': [  # The text has f32 instead of bf16 everywhere.
        ('all-gather', 'fc6', 'bf16', '32x1x1x32', 2, 1, 32 * 32 * 2 / 2, 'all_gather.12', 'all_gather.12'),
        ('reduce-scatter', 'fc6', 'bf16', '32x1x1x16', 2, 1, 32 * 32 * 2 / 2, 'reduce_scatter.35', 'reduce_scatter.35'),
        ('all-gather', 'fc7', 'bf16', '32x256', 2, 1, 32 * 256 * 2 / 2, 'all_gather.13', 'all_gather.13'),
        ('reduce-scatter', 'fc7', 'bf16', '32x128', 2, 1, 32 * 256 * 2 / 2, 'reduce_scatter.34', 'reduce_scatter.34'),
        ('all-gather', 'fc8', 'bf16', '32x256', 2, 1, 32 * 256 * 2 / 2, 'all_gather.14', 'all_gather.14'),
        ('reduce-scatter', 'fc8', 'bf16', '32x128', 2, 1, 32 * 256 * 2 / 2, 'reduce_scatter.33', 'reduce_scatter.33'),
        ('all-gather', 'logits', 'bf16', '32x1000', 2, 1, 32 * 1000 * 2 / 2, 'all_gather.15', 'all_gather.15'),
        ('reduce-scatter', 'logits', 'bf16', '32x500', 2, 1, 32000, 'reduce_scatter.32', 'reduce_scatter.32'),
        ('all-reduce', 'gradients', 'f32', GRADIENTS, 4, 1, NUMBERS * 6, 'all-reduce.3', 'all-reduce.3'),
        ('all-reduce', 'metrics', 'f32', '3', 8, 1, 21, 'psum_invariant.87', 'psum_invariant.87'),
    ],
    'gpu': [  # Four micro-batches of 8 images in a loop.
        ('all-gather', 'fc6', 'f32', '8x1x1x32', 2, 4, 4 * 8 * 32 * 4 / 2, 'all_gather.12.2', 'all_gather.12.2'),
        ('reduce-scatter', 'fc6', 'f32', '8x1x1x16', 2, 4, 2048, 'reduce-scatter-start.3', 'reduce-scatter-done.3'),
        ('all-gather', 'fc7', 'f32', '8x256', 2, 4, 4 * 8 * 256 * 4 / 2, 'all-gather-start', 'all-gather-done'),
        ('reduce-scatter', 'fc7', 'f32', '8x128', 2, 4, 16384, 'reduce_scatter.26.2', 'reduce_scatter.26.2'),
        ('all-gather', 'fc8', 'f32', '8x256', 2, 4, 16384, 'all_gather.10.2', 'all_gather.10.2'),
        ('reduce-scatter', 'fc8', 'f32', '8x128', 2, 4, 16384, 'reduce_scatter.25.2', 'reduce_scatter.25.2'),
        ('all-gather', 'logits', 'f32', '8x1000', 2, 4, 4 * 8 * 1000 * 4 / 2, 'all_gather.11.2', 'all_gather.11.2'),
        ('reduce-scatter', 'logits', 'f32', '8x500', 2, 4, 64000, 'reduce-scatter-start', 'reduce-scatter-done'),
        # One all-reduce of f32[169700], a concatenation of ten vectors.
        ('all-reduce', 'gradients', 'f32', GRADIENTS, 4, 1, 169700 * 6, 'all-reduce-start.1', 'all-reduce-done.1'),
        ('all-reduce', 'metrics', 'f32', '3', 8, 1, 21, 'all-reduce-start', 'all-reduce-done'),
    ],
    'tpu': [  # The program before compilation has only f32. The logits of 500 classes are padded to 512.
        ('all-gather', 'fc6', 'bf16', '32x1x1x32', 2, 1, 32 * 32 * 2 / 2, 'all_gather.16', 'all_gather.16'),
        ('reduce-scatter', 'fc6', 'f32', '32x1x1x16', 2, 1, 32 * 32 * 4 / 2, 'reduce_scatter.39', 'reduce_scatter.39'),
        ('all-gather', 'fc7', 'bf16', '32x256', 2, 1, 32 * 256 * 2 / 2, 'all-gather.13', 'all-gather.13'),
        ('reduce-scatter', 'fc7', 'f32', '32x128', 2, 1, 32 * 256 * 4 / 2, 'reduce_scatter.38', 'reduce_scatter.38'),
        ('all-gather', 'fc8', 'bf16', '32x256', 2, 1, 32 * 256 * 2 / 2, 'all-gather.14', 'all-gather.14'),
        ('reduce-scatter', 'fc8', 'f32', '32x128', 2, 1, 32 * 256 * 4 / 2, 'reduce_scatter.37', 'reduce_scatter.37'),
        ('all-gather', 'logits', 'f32', '32x1000', 2, 1, 32 * 1000 * 4 / 2, 'all-gather.15', 'all-gather.15'),
        # One device of a pair sends the 12 classes between the shares of 512 and 500.
        (
            *('collective-permute', 'logits', 'f32', '32x12', 8, 1, 32 * 12 * 4),
            *('collective-permute-start', 'collective-permute-done'),
        ),
        ('reduce-scatter', 'logits', 'f32', '32x512', 2, 1, 32 * 1024 * 4 / 2, 'fusion', 'fusion'),
        ('all-reduce', 'gradients', 'f32', '256x500', 4, 1, 256 * 500 * 6, 'all-reduce.44', 'all-reduce.44'),
        (
            *('all-reduce', 'gradients', 'f32', '256x128', 4, 1, 256 * 128 * 6),
            *('async-collective-start.1', 'async-collective-done.1'),
        ),
        (
            *('all-reduce', 'gradients', 'f32', '32x128 3x3x8x16 128 16 8', 4, 1, (4096 + 1152 + 152) * 6),
            *('all-reduce.43', 'all-reduce.43'),
        ),
        (
            *('all-reduce', 'gradients', 'f32', '11x11x3x8', 4, 1, 11 * 11 * 3 * 8 * 6),
            *('async-collective-start', 'async-collective-done'),
        ),
        ('all-reduce', 'gradients', 'f32', '500 128', 4, 1, 628 * 6, 'all-reduce.14', 'all-reduce.14'),
        ('all-reduce', 'metrics', 'f32', '3', 8, 1, 21, 'psum_invariant.109', 'psum_invariant.109'),
    ],
}


@pytest.mark.parametrize('platform', BY_HAND)
def test_collectives_equal_counts_by_hand(platform):
    assert [row(each) for each in collectives(platform)] == BY_HAND[platform]


@pytest.mark.parametrize('platform', BY_HAND)
def test_platform_is_that_of_the_text(platform):
    assert program(platform).platform == platform


def test_fixtures_have_the_forms_of_their_compiler():
    assert 'all_gather.13 = f32[32,256]' in text('cpu')
    assert (text('gpu').count('"known_trip_count":{"n":"4"}'), text('gpu').count('"is_sync":true')) == (1, 5)
    assert text('tpu').count(' all-reduce(') == 1 + 2 * 3 + 3 + 1  # in the fusion, in the chains, alone, the metrics
    assert text('tpu').count('chain_id="0"') == text('tpu').count('chain_id="1"') == 3


def test_entry_is_the_schedule():
    names = {platform: [each.name for each in program(platform).entry] for platform in BY_HAND}
    for platform, name in names.items():
        written = [line.split(' = ')[0].split('%')[-1] for line in text(platform).rpartition('ENTRY ')[2].splitlines()]
        assert name == [each for each in written if each in program(platform).instructions]
    # The fusion in the middle of the chain computes the kernel gradient of fc7 as well.
    start, middle, done = map(names['tpu'].index, ('async-collective-start', 'fusion.193', 'async-collective-done'))
    assert start < middle < done
    loop, joined = names['gpu'].index('while.30'), names['gpu'].index('all-reduce-start.1')
    assert loop < joined < names['gpu'].index('all-reduce-done.1')


def test_tensors_operands_and_callers():
    tpu = program('tpu').instructions
    scatter = tpu['fusion']
    assert (scatter.opcode, scatter.tensors, scatter.called) == ('fusion', [('f32', (32, 512))], ['all-reduce-scatter'])
    permute = tpu['collective-permute-start']
    assert permute.tensors == [('f32', (32, 12)), ('f32', (32, 12)), ('u32', ()), ('u32', ())]
    assert [each.name for each in program('tpu').users('collective-permute-start')] == ['collective-permute-done']
    assert [each.name for each in program('tpu').callers['all-reduce-scatter']] == ['fusion']
    gradients = tpu['all-reduce.43']
    assert gradients.operands == ['fusion.4', 'fusion.17', 'fusion.15', 'fusion.172', 'fusion.29']
    assert [shape for _, shape in gradients.tensors] == [(8,), (16,), (3, 3, 8, 16), (128,), (32, 128)]
    gather = program('gpu').instructions['all-gather-start']
    assert gather.tensors == [('f32', (8, 128)), ('f32', (8, 256))]
    assert gather.computation == program('gpu').instructions['while.30'].called[1]
    assert program('tpu').instructions.keys() == {each.split(' = ')[0] for each in instruction_lines('tpu')}


def instruction_lines(platform: str) -> list[str]:
    lines = (line.strip().removeprefix('ROOT ').removeprefix('%') for line in text(platform).splitlines()[1:])
    return [line for line in lines if ' = ' in line]


LOOPS = """HloModule jit_step, is_scheduled=true

%inner_body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%counter, %one)
  %value = f32[4]{0} get-tuple-element(%state), index=1
  %sum = f32[4]{0} all-reduce(%value), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  ROOT %pair = (s32[], f32[4]{0}) tuple(%next, %sum)
}

%inner_condition (state.1: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(7)
  %state.1 = (s32[], f32[4]{0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%counter.1, %limit), direction=LT
}

%outer_body (state.2: f32[4]) -> f32[4] {
  %state.2 = f32[4]{0} parameter(0)
  %first = s32[] constant(2)
  %copy = s32[] copy(%first)
  %start = (s32[], f32[4]{0}) tuple(%copy, %state.2)
  %inner = (s32[], f32[4]{0}) while(%start), condition=%inner_condition, body=%inner_body
  ROOT %out = f32[4]{0} get-tuple-element(%inner), index=1
}

%outer_condition (state.3: f32[4]) -> pred[] {
  %state.3 = f32[4]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %outer = f32[4]{0} while(%x), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_trips_are_the_product_of_nested_loops():
    loops = Program(LOOPS)
    # The compiler writes the count of the outer loop; the inner one counts from 2 to 6.
    assert [loops.trips(name) for name in ('outer', 'inner', 'sum', 'x')] == [1, 3, 15, 1]
    [found] = step_collectives(LOOPS, 'HloModule none', 8)
    assert (found.trips, found.elements, found.bytes) == (15, 4, 15 * 2 * 16 * 7 / 8)
    gpu = program('gpu')
    assert {gpu.trips(each.name) for each in gpu.entry} == {1}
    assert gpu.trips('all_gather.12.2') == 4


def test_loop_without_a_trip_count_is_rejected():
    unknown = LOOPS.replace('"known_trip_count":{"n":"3"}', '')
    with pytest.raises(HloFormatError, match='outer'):
        step_collectives(unknown, 'HloModule none', 8)
    with pytest.raises(HloFormatError, match='inner'):
        Program(LOOPS.replace('constant(7)', 'constant({7})')).trips('sum')


# Two all-reduces that the compiler for GPUs made of four; a convolution's statistics have the size of its bias.
JOINED = """HloModule jit_step, is_scheduled=true

%wrapped (p: f32[16], q: f32[3]) -> f32[19] {
  %p = f32[16]{0} parameter(0)
  %q = f32[3]{0} parameter(1)
  ROOT %vector = f32[19]{0} concatenate(%p, %q), dimensions={0}
}

ENTRY %main (a: f32[16], b: f32[3], c: bf16[6], d: bf16[16]) -> (f32[19], bf16[22]) {
  %a = f32[16]{0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %c = bf16[6]{0} parameter(2)
  %d = bf16[16]{0} parameter(3)
  %joined = f32[19]{0} fusion(%a, %b), kind=kLoop, calls=%wrapped, backend_config={"operation_queue_id":"0"}
  %s = f32[19]{0} all-reduce(%joined), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %parts = bf16[22]{0} concatenate(%c, %d), dimensions={0}
  %row = bf16[1,22]{1,0} bitcast(%parts)
  %t = bf16[1,22]{1,0} all-reduce(%row), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  ROOT %sums = (f32[19]{0}, bf16[22]{0}) tuple(%s, %t)
}
"""
ASKED = """HloModule jit_step

ENTRY main {
  bias = bf16[16] all-reduce(a), replica_groups={}, use_global_device_ids=true, metadata={op_name="gradients/psum"}
  statistics = f32[1,16] all-reduce(b), replica_groups={}, use_global_device_ids=true, metadata={op_name="conv1/psum"}
  kernel = bf16[2,3] all-reduce(c), replica_groups={}, use_global_device_ids=true, metadata={op_name="gradients/psum"}
  ROOT logged = f32[3] all-reduce(d), replica_groups={}, use_global_device_ids=true, metadata={op_name="metrics/psum"}
}
"""


def test_joined_tensors_return_to_their_layers():
    assert [row(each)[1:4] for each in step_collectives(JOINED, ASKED, 8)] == [
        ('conv1', 'f32', '1x16'),
        ('gradients', 'bf16', '16 2x3'),
        ('metrics', 'f32', '3'),
    ]


# As a TPU exchanges 4 x 10 numbers of two devices: padded to 16, of which each keeps 8, and sends 3 of them on.
PADDED = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: f32[4,10]) -> f32[4,8] {
  %input = f32[4,10]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[4,16]{1,0:T(8,128)} pad(%input, %zero), padding=0_0x0_6
  %sum = f32[4,16]{1,0:T(8,128)} all-reduce(%pad), channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true
  %offset = u32[] constant(8)
  ROOT %part = f32[4,8]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %offset), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: f32[4,10]) -> f32[4,3] {
  %x = f32[4,10]{1,0:T(8,128)} parameter(0)
  %loss = f32[4,10]{1,0:T(8,128)} negate(%x), metadata={op_name="jit(train_step)/jvp(fc8)/neg"}
  %scattered = f32[4,8]{1,0:T(8,128)} fusion(%loss), kind=kCustom, calls=%all-reduce-scatter
  %end = f32[4,3]{1,0:T(8,128)} slice(%scattered), slice={[0:4], [5:8]}, backend_config={"flag_configs":[]}
  ROOT %moved = f32[4,3]{1,0:T(8,128)} collective-permute(%end), channel_id=2, source_target_pairs={{0,1}}
}
"""
UNPADDED = """HloModule jit_step

ENTRY main {
  x = f32[4,10] parameter(0)
  ROOT y = f32[4,5] reduce-scatter(x), replica_groups={{0,1}}, use_global_device_ids=true, metadata={op_name="logits/"}
}
"""


def test_padded_tensors_have_the_layer_of_the_whole_and_their_own_size():
    assert [row(each) for each in step_collectives(PADDED, UNPADDED, 2)] == [
        ('collective-permute', 'logits', 'f32', '4x3', 2, 1, 4 * 3 * 4, 'moved', 'moved'),
        ('reduce-scatter', 'logits', 'f32', '4x8', 2, 1, 4 * 16 * 4 / 2, 'scattered', 'scattered'),
    ]


STARTED = """HloModule jit_step, is_scheduled=true

%summed (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[8]{0}) async-start(%x), calls=%summed
  ROOT %done = f32[8]{0} async-done(%start)
}
"""


def test_collective_that_is_the_result_of_an_asynchronous_computation():
    [found] = step_collectives(STARTED, 'HloModule none', 2)
    assert (found.kind, found.bytes, found.start, found.done) == ('all-reduce', 8 * 4, 'start', 'done')
    updated = STARTED.replace('async-done(%start)', 'async-done(%next)').replace(
        '  ROOT %done', '  %next = ((f32[8]{0}), f32[8]{0}) async-update(%start)\n  ROOT %done'
    )
    [found] = step_collectives(updated, 'HloModule none', 2)
    assert (found.start, found.done) == ('start', 'done')


@pytest.mark.parametrize(
    ('old', 'new', 'named'),
    [
        ('f32[8]', 'f4e2m1fn[8]', 'f4e2m1fn'),
        ('all-reduce(%p), channel_id=1, replica_groups={{0,1}}', 'collective-permute(%p), pairs={{0,1}}', 'permute'),
    ],
)
def test_unknown_syntax_is_rejected(old, new, named):
    with pytest.raises(HloFormatError, match=named):
        step_collectives(STARTED.replace(old, new), 'HloModule none', 2)


CHAIN = """HloModule jit_train_step, is_scheduled=true

%piece (p0: f32[64,16], p1: f32[64,16], p2: f32[32], p3: f32[32]) -> (f32[32], f32[64,16], f32[64,16]) {
  %p2 = f32[32]{0:T(256)} parameter(2)
  %p3 = f32[32]{0:T(256)S(1)} parameter(3)
  %sum = f32[32]{0:T(256)} add(%p2, %p3)
  %p0 = f32[64,16]{1,0:T(8,128)} parameter(0)
  %p1 = f32[64,16]{1,0:T(8,128)} parameter(1)
  %piece_of_all = f32[64,16]{1,0:T(8,128)} all-reduce(%p0), replica_groups={{0,1}}, frontend_attributes={chain_id="6"}
  ROOT %all = (f32[32]{0:T(256)}, f32[64,16]{1,0:T(8,128)}, f32[64,16]{1,0:T(8,128)}) tuple(%sum, %p0, %p1)
}

%end (q0: f32[64,16], q1: f32[64,16]) -> f32[64,16] {
  %q0 = f32[64,16]{1,0:T(8,128)} parameter(0)
  %q1 = f32[64,16]{1,0:T(8,128)} parameter(1)
  %rest_of_all = f32[64,16]{1,0:T(8,128)} all-reduce(%q0), replica_groups={{0,1}}, frontend_attributes={chain_id="6"}
  ROOT %result = f32[64,16]{1,0:T(8,128)} custom-call(%q0, %q1, %rest_of_all), custom_call_target="end"
}

ENTRY %main (a: f32[64,16], b: f32[64,16], c: f32[32], d: f32[32]) -> f32[64,16] {
  %a = f32[64,16]{1,0:T(8,128)} parameter(0)
  %b = f32[64,16]{1,0:T(8,128)} parameter(1)
  %c = f32[32]{0:T(256)} parameter(2)
  %d = f32[32]{0:T(256)S(1)} parameter(3)
  %both = (f32[32]{0}, f32[64,16]{1,0}, f32[64,16]{1,0}) fusion(%a, %b, %c, %d), kind=kLoop, calls=%piece
  %x = f32[64,16]{1,0:T(8,128)} get-tuple-element(%both), index=1
  %y = f32[64,16]{1,0:T(8,128)} get-tuple-element(%both), index=2
  ROOT %done = f32[64,16]{1,0:T(8,128)} fusion(%x, %y), kind=kCustom, calls=%end
}
"""


def test_tensors_of_a_carried_collective_are_not_accessed():
    """Of the first fusion, the sum of 32 numbers reads one operand of 128 bytes, and writes 128 bytes."""
    read = Program(CHAIN)
    assert (read.bytes('both'), read.bytes('done')) == (256, 0)
    without = Program(CHAIN.replace('frontend_attributes={chain_id="6"}', 'frontend_attributes={}'))
    assert without.bytes('both') == 256 + 4 * 4096
