"""The benchmarks' own arithmetic: against hand numbers, and the plain implementation against the project."""

import contextlib
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, run_command
from picture_sets import pictures, write

from alexnet_jax.audit import cost_model
from alexnet_jax.audit.hlo import Program
from alexnet_jax.config import default_config, resolve
from alexnet_jax.prepare.sources import open_source
from alexnet_jax.presets import PRESETS
from alexnet_jax.shapes import LAYERS
from benchmarks import (
    check,
    freezing,
    layers,
    loop_overhead,
    memory,
    plain,
    presets,
    record_files,
    runner,
    table,
    train_step,
)
from benchmarks.project import Project

HLO = """HloModule jit_train_step, is_scheduled=true

%fused_computation (param_0: f32[8,6,6,4], param_1: f32[3,3,4,10]) -> f32[8,10,6,6] {
  %param_0 = f32[8,6,6,4]{3,2,1,0} parameter(0)
  %param_1 = f32[3,3,4,10]{3,2,1,0} parameter(1)
  %convolution.1 = f32[8,6,6,10]{3,2,1,0} convolution(%param_0, %param_1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(train_step)/jvp(conv2)/conv_general_dilated" stack_frame_id=1}
  ROOT %transpose.1 = f32[8,10,6,6]{3,2,1,0} transpose(%convolution.1), dimensions={0,3,1,2}
}

%fused_computation.1 (param_0.1: f32[8,6,6,10]) -> bf16[8,6,6,10] {
  %param_0.1 = f32[8,6,6,10]{3,2,1,0} parameter(0)
  ROOT %copy.1 = bf16[8,6,6,10]{3,2,1,0} copy(%param_0.1)
}

%fused_computation.2 (param_0.2: f32[8,6,6,10], param_1.2: f32[8,6,6,10], param_2.2: f32[10]) -> f32[2,6,6,10] {
  %param_0.2 = f32[8,6,6,10]{3,2,1,0} parameter(0)
  %param_1.2 = f32[8,6,6,10]{3,2,1,0} parameter(1)
  %param_2.2 = f32[10]{0} parameter(2)
  %product = f32[8,6,6,10]{3,2,1,0} multiply(%param_0.2, %param_1.2)
  %part = f32[2,6,6,10]{3,2,1,0} slice(%product), slice={[0:2], [0:6], [0:6], [0:10]}
  %bias = f32[2,6,6,10]{3,2,1,0} broadcast(%param_2.2), dimensions={3}
  ROOT %sum = f32[2,6,6,10]{3,2,1,0} add(%part, %bias)
}

ENTRY %main (x: f32[8,6,6,4], kernel: f32[3,3,4,10], rows: f32[8,20], weights: f32[20,30]) -> (f32[8,30], f32[8,10,6,6]) {
  %x = f32[8,6,6,4]{3,2,1,0} parameter(0)
  %kernel = f32[3,3,4,10]{3,2,1,0} parameter(1)
  %rows = f32[8,20]{1,0} parameter(2)
  %weights = f32[20,30]{1,0} parameter(3)
  %fusion = f32[8,10,6,6]{3,2,1,0} fusion(%x, %kernel), kind=kCustom, calls=%fused_computation
  %convolution.2 = f32[8,3,3,10]{3,2,1,0} convolution(%x, %kernel), window={size=3x3 stride=2x2 pad=1_0x1_0}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(train_step)/jvp(conv1)/conv_general_dilated"}
  %grouped = f32[8,6,6,10]{3,2,1,0} convolution(%x, %half), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, feature_group_count=2
  %half = f32[3,3,2,10]{3,2,1,0} slice(%kernel), slice={[0:3], [0:3], [0:2], [0:10]}
  %dilated = f32[8,6,6,4]{3,2,1,0} convolution(%convolution.2, %kernel), window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f, metadata={op_name="jit(train_step)/transpose(jvp(conv1))/conv_general_dilated"}
  %fusion.1 = bf16[8,6,6,10]{3,2,1,0} fusion(%grouped), kind=kLoop, calls=%fused_computation.1
  %row = f32[10]{0} slice(%rows), slice={[0:1], [0:10]}
  %fusion.2 = f32[2,6,6,10]{3,2,1,0} fusion(%grouped, %grouped, %row), kind=kLoop, calls=%fused_computation.2
  %maximum.1 = f32[8,6,6,10]{3,2,1,0} maximum(%grouped, %grouped), metadata={op_name="jit(train_step)/transpose(jvp(conv3/activation))/max"}
  %add.1 = f32[8,6,6,10]{3,2,1,0} add(%grouped, %grouped), metadata={op_name="jit(train_step)/jvp(conv3)/add"}
  %dot.1 = f32[8,30]{1,0} dot(%rows, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/update/gradients/dot_general"}
  %gradient = f32[8,3,3,10]{3,2,1,0} subtract(%convolution.2, %convolution.2), metadata={op_name="jit(train_step)/transpose(jvp(conv4/bias))/sub"}
  %by_weights = f32[3,3,4,10]{3,2,1,0} convolution(%x, %gradient), window={size=3x3 pad=1_0x1_0 rhs_dilate=2x2}, dim_labels=f01b_i01o->01bf
  %moved = f32[3,3,4,10]{3,2,1,0} subtract(%kernel, %by_weights), metadata={op_name="jit(train_step)/update/sub"}
  %copy.2 = f32[8,20]{1,0} copy(%rows)
  %multiply.1 = f32[8,20]{1,0} multiply(%copy.2, %copy.2), metadata={op_name="jit(train_step)/jvp()/mul"}
  ROOT %tuple = (f32[8,30]{1,0}, f32[8,10,6,6]{3,2,1,0}) tuple(%dot.1, %fusion)
}
"""  # noqa: E501


def test_flops_and_bytes_equal_hand_numbers():
    program = Program(HLO)
    assert program.module == 'jit_train_step'
    flops = {name: program.flops(name) for name in program.instructions}
    assert flops['fusion'] == flops['convolution.1'] == 2 * 8 * 6 * 6 * 10 * (3 * 3 * 4)
    assert flops['convolution.2'] == 2 * 8 * 3 * 3 * 10 * (3 * 3 * 4)
    assert flops['grouped'] == 2 * 8 * 6 * 6 * 10 * (3 * 3 * 2)
    assert flops['dilated'] == flops['convolution.2']  # The gradient by the inputs has as many as the layer.
    assert flops['by_weights'] == flops['convolution.2']  # So has the gradient by the weights.
    assert flops['dot.1'] == 2 * 8 * 30 * 20
    assert flops['maximum.1'] == flops['copy.2'] == 0
    assert program.bytes('fusion') == 4 * (8 * 6 * 6 * 4 + 3 * 3 * 4 * 10 + 8 * 10 * 6 * 6)
    assert program.bytes('fusion.1') == (4 + 2) * 8 * 6 * 6 * 10
    # A quarter of both factors, and all of the third array.
    assert program.bytes('fusion.2') == 4 * (3 * 2 * 6 * 6 * 10 + 10)
    assert program.bytes('tuple') == program.bytes('x') == 0


def test_instructions_belong_to_their_layer_and_pass():
    program = Program(HLO)
    wanted = {
        'convolution.2': ('conv1', 'forward'),
        'dilated': ('conv1', 'backward'),
        'fusion': ('conv2', 'forward'),  # the part of the fused instructions
        'maximum.1': ('conv3/activation', 'backward'),
        'grouped': ('conv3', 'backward'),  # the part of its users
        'fusion.1': ('other', 'forward'),  # neither operands nor users have a name
        'add.1': ('conv3/bias', 'forward'),
        'gradient': ('conv4/bias', 'backward'),
        'by_weights': ('conv4', 'backward'),  # although the update uses it
        'moved': ('update', 'forward'),
        'dot.1': ('gradients', 'forward'),
        'multiply.1': ('other', 'forward'),
    }
    assert {name: program.part(name) for name in wanted} == wanted


@pytest.fixture(scope='module')
def project():
    config = default_config()
    config.model.widths = (8, 16, 16, 16, 16, 32, 32)
    config.model.num_classes = 10
    config.data.image_size, config.data.crop_size = 72, 64
    config.train.batch_size, config.mesh.data = 8, 1
    return Project(resolve(config))


@pytest.mark.slow
def test_flops_of_the_compiled_step_match_the_layer_table(project):
    program = Program(project.train_step.lower(*project.train_arguments).compile().as_text())
    fused = {each.name for fusion in program.instructions.values() for each in fusion.fused}
    total = sum(program.flops(name) for name in program.instructions.keys() - fused)
    # The compiler writes sums as products, and the forward pass of conv1 has windows of 12 rows, one of zeros.
    zeros = 2 * cost_model.layers(project.config)[0].multiply_adds / 11
    assert total == pytest.approx(8 * (cost_model.flops_per_image(project.config) + zeros), rel=0.02)


@pytest.mark.slow
def test_plain_implementation_matches_the_project(project):
    distances = check.differences(project)
    weights = [f'{layer}/{kind}' for layer in LAYERS for kind in ('kernel', 'bias')]
    velocities = [f'velocity of {name}' for name in weights]
    assert distances.keys() == {'logits', 'loss', 'loss of the evaluation', *weights, *velocities}
    assert max(distances.values()) < 1e-5
    assert check.worst(distances, exact=True)[1] in distances.values()


def test_plain_lrn_and_pooling_equal_hand_numbers():
    x = np.arange(1.0, 9.0, dtype=np.float32).reshape(1, 1, 1, 8) * 100  # towers of 4 maps
    squares = x[0, 0, 0] ** 2
    near = [squares[:3], squares[:4], squares[:4], squares[1:4], squares[4:7], squares[4:], squares[4:], squares[5:]]
    wanted = [value / (2 + 1e-4 * sum(window)) ** 0.75 for value, window in zip(x[0, 0, 0], near, strict=True)]
    np.testing.assert_allclose(plain.response_norm(x)[0, 0, 0], wanted, rtol=1e-6)
    pixels = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(plain.max_pool(pixels)[0, :, :, 0], [[12, 14], [22, 24]])


def test_worst_distance_is_nearest_to_its_tolerance():
    distances = {'logits': 5e-6, 'velocity of conv1/kernel': 1e-3, 'fc6/bias': 1e-7}
    assert check.worst(distances, exact=True) == ('logits', 5e-6, 1e-5)
    assert check.worst(distances | {'conv2/bias': math.nan}, exact=True)[0] == 'conv2/bias'


def test_time_is_shared_among_concurrent_instructions():
    actions = [
        (0, 0, 'task', 'unknown'),  # a task from before the trace counts for no instruction
        (10, 0, 'instruction', 'a'),
        (20, 0, 'record', 7),  # by a
        (30, 0, 'end', None),
        (30, 0, 'instruction', 'b'),
        (40, 1, 'task', 7),  # a and b share 40 to 60
        (50, 1, 'record', 8),  # by a, although a has returned
        (60, 0, 'end', None),
        (70, 1, 'instruction', 'c'),  # within the task: c alone from 70 to 80
        (80, 1, 'end', None),
        (90, 1, 'end', None),
        (100, 2, 'task', 8),  # nothing from 90 to 100
        (130, 2, 'end', None),
    ]
    # a: 10 to 30, half of 40 to 60, 60 to 70, 80 to 90, 100 to 130; b: 30 to 40 and half of 40 to 60.
    assert layers.time_by_instruction(actions) == {'a': 80, 'b': 20, 'c': 10, None: 10}


def test_events_of_a_thread_become_actions():
    def event(name, start, end, **stats):
        return SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=stats.items())

    events = [
        event('ThreadpoolListener::StopRegion', 5, 5),  # of a task that began before the trace
        event('ThreadpoolListener::StartRegion', 10, 10, _c=3),
        event('ThunkExecutor::Execute', 11, 60),
        event('outer', 20, 50, hlo_module='jit_step', hlo_op='outer'),
        event('elsewhere', 21, 22, hlo_module='jit_other', hlo_op='elsewhere'),
        event('ThreadpoolListener::Record', 25, 25, _p=4),
        event('inner', 30, 30, hlo_module='jit_step', hlo_op='inner'),  # has no duration
        event('end: inner', 30, 31, hlo_module='jit_step'),
        event('ThreadpoolListener::Record', 50, 50, _p=5),
        event('ThreadpoolListener::StopRegion', 60, 60),
    ]
    assert list(layers.actions_of_thread(1, events[::-1], 'jit_step')) == [
        (10, 1, 'task', 3),
        (20, 1, 'instruction', 'outer'),
        (25, 1, 'record', 4),
        (30, 1, 'instruction', 'inner'),
        (30, 1, 'end', None),
        (50, 1, 'record', 5),
        (50, 1, 'end', None),
        (60, 1, 'end', None),
    ]


def test_rows_sum_the_instructions_of_a_part():
    actions = [(0, 0, 'instruction', 'convolution.2'), (3e9, 0, 'end', None), (5e9, 0, 'instruction', 'dilated')]
    actions += [(6e9, 0, 'end', None), (6e9, 0, 'instruction', 'dilated'), (7e9, 0, 'end', None)]
    rows = layers.rows_of(actions, Program(HLO), product=1e4, bandwidth=1e3)
    flops, size = 2 * 8 * 3 * 3 * 10 * 36, 4 * (8 * 6 * 6 * 4 + 360 + 8 * 3 * 3 * 10)
    assert [(row['part'], row['pass'], row['seconds']) for row in rows] == [
        ('conv1', 'forward', 3.0),
        ('conv1', 'backward', 2.0),
        ('idle', 'forward', 2.0),
    ]
    assert [(row['flops'], row['bytes']) for row in rows] == [(flops, size), (2 * flops, 2 * size), (0, 0)]
    assert rows[0]['least_seconds'] == pytest.approx(max(flops / 1e4, size / 1e3))
    (convolutions, idle) = layers.by_kind(rows)
    assert (convolutions['part'], convolutions['seconds'], convolutions['flops']) == ('convolutions', 5.0, 3 * flops)
    assert idle['seconds'] == 2.0


def test_only_times_above_the_noise_are_slower():
    def seconds(this, other, again):
        return {'train': {'this': this, 'other': other, 'again': again}}

    times = {
        'preset/a': seconds(1.05, 1.0, 1.0),
        'preset/b': seconds(1.0, 1.0, 1.05),
        'preset/c': seconds(2.0, 2.0, 1.96),
        'mesh/a': seconds(1.25, 1.0, 1.1),
    }
    margins, slower = presets.judge(times)
    assert margins['preset'] == pytest.approx(3 / 0.6745 * -math.log(0.98))  # 9.0 %, of the second of three
    assert margins['mesh'] == pytest.approx(3 / 0.6745 * math.log(1.1))  # 42 %
    assert slower == []
    times['preset/d'] = seconds(1.5, 1.1, 1.0)
    assert presets.judge(times)[1] == [('preset/d', 'train')]
    assert presets.judge({'mesh/b': seconds(1.05, 1.0, 1.0)}) == ({'mesh': 0.03}, [('mesh/b', 'train')])


def test_cases_are_all_presets_all_ablations_and_all_layouts():
    found = presets.cases()
    assert {name.split('/')[1] for name in found if name.startswith('preset/')} == set(PRESETS)
    assert {'ablation/no_lrn', 'ablation/no_dropout', 'ablation/no_overlap', 'ablation/one_tower'} <= found.keys()
    assert {'ablation/no_conv4', 'ablation/no_exchange', 'ablation/no_spatial_norm'} <= found.keys()
    assert {case[2]['mesh.layout'] for name, case in found.items() if 'mesh.layout' in case[2]} == {'data', 'hybrid'}
    assert json.loads(json.dumps(found)).keys() == found.keys()


RESULTS: dict = {
    'train_step': {
        'images_per_second': 40.0,
        'forward_images_per_second': 100.0,
        'tensorflow_images_per_second': 50.0,
        'tensorflow_forward_images_per_second': 80.0,
        'tensorflow_ratio': 0.8,
        'tensorflow_forward_ratio': 1.25,
        'torch_images_per_second': 20.0,
        'torch_forward_images_per_second': 100.0,
        'torch_ratio': 2.0,
        'torch_forward_ratio': 1.0,
        'share_of_product': {'jax': 0.55},
        'forward_share_of_product': {'jax': 0.66},
        'product_flops_per_second': {'jax': 2e11, 'torch': 3e11},
        'batch_size': 128,
        'dtype': 'float32',
        'versions': {'python': '3.11.7', 'jax': '0.10', 'tensorflow': '2.21', 'torch': None},
        'machine': '2 cores',
        'date': '2026-01-02',
    },
    'startup': {'help': 0.44, 'warm': 7.96, 'stages': {}, 'machine': '2 cores', 'date': '2026-01-09'},
}


LOOP = {
    'machine': '2 cores',
    'date': '2026-01-05',
    'parts': {
        'quickstart': {'images_per_second': 1980.0, 'step_images_per_second': 2000.0, 'ratio': 0.99, 'steps': 400},
        'checkpoint': {
            'saving': 2.5,
            'held_up': 0.05,
            'held_up_share': 0.02,
            'first_held_up': 0.5,
            'slowed_down': 1.0,
            'slowed_down_share': 0.4,
            'step': 3.25,
            'memory': 488e6,
        },
    },
}
MEMORY = {
    'jax': {'version': '0.10', 'imported': 2e8, 'made': 1e9, 'first_step': 2e9, 'peak': 2.5e9}
    | {'state': 488e6, 'batch': 25e6, 'temporary': 9e8},
    'torch': {'version': '2.13', 'imported': 3e8, 'made': 9e8, 'first_step': 2e9, 'peak': 2e9},
    'ratio': 1.25,
    'batch_size': 128,
    'steps': 10,
    'machine': '2 cores',
    'date': '2026-01-05',
}


FREEZING = {
    'cases': {
        'full': {'seconds': 4.0, 'ratio': 1.0, 'ratio_of_minima': 1.0, 'temporary': 8e8},
        'convolutions': {'seconds': 1.5, 'ratio': 0.375, 'ratio_of_minima': 0.36, 'temporary': 4e8},
        'head': {'seconds': 1.0, 'ratio': 0.25, 'ratio_of_minima': 0.24, 'temporary': 2e8},
    },
    'batch_size': 128,
    'rounds': 7,
    'machine': '2 cores',
    'date': '2026-01-05',
}


def test_report_of_frozen_steps():
    assert ['convolutions', '1,500', '0.375', '0.360', '400'] in [
        line.split() for line in freezing.report(FREEZING).splitlines()
    ]
    rows = table.freezing_rows(FREEZING)
    assert [row[1:] for row in rows] == [('0.38',), ('0.50',), ('0.25',), ('0.25',)]


def test_reports_of_the_loop_and_of_memory():
    assert '0.990' in loop_overhead.report(LOOP)
    assert '488 MB more at its peak' in loop_overhead.report(LOOP)
    assert 'state 488, batch 25, temporary 900 MB\njax / torch: 1.25' in memory.report(MEMORY)
    rows = table.loop_overhead_rows(LOOP) + table.memory_rows(MEMORY)
    assert [row[1:] for row in rows] == [
        ('1,980.0', 'the step alone', '2,000.0', '0.990'),
        ('0.050',),
        ('2,500', 'PyTorch, `torch.compile`', '2,000', '0.80'),
    ]


def test_figures_of_the_train_step_equal_hand_numbers():
    times = {'train': {'jax': [2.0, 1.0, 3.0], 'torch': [4.0, 4.0, 5.0]}, 'forward': {'jax': [1.0], 'torch': [0.5]}}
    times['product 100'] = {'jax': [0.1, 0.2], 'torch': [0.05, 0.1]}
    found = train_step.results(times, 8, {'train': 10**6, 'forward': 10**5})
    assert (found['images_per_second'], found['torch_ratio'], found['torch_forward_ratio']) == (4.0, 2.0, 0.5)
    assert found['tensorflow_images_per_second'] is found['tensorflow_ratio'] is None
    assert found['best_images_per_second'] == {'jax': 8.0, 'torch': 2.0}
    assert found['product_flops_per_second'] == {'jax': 2e7, 'torch': 4e7}
    assert found['share_of_product'] == {'jax': 0.1, 'torch': 0.05}


ECHO = """
from benchmarks import runner

runner.serve(lambda: ('ready', lambda number: 1 / number))
"""


def test_workers_take_turns_and_a_failed_one_is_reported(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['benchmarks/name.py'])
    with contextlib.ExitStack() as stack:
        workers = [runner.Worker(side, [sys.executable, '-c', ECHO], {}, stack) for side in ('one', 'two')]
        assert [worker.about for worker in workers] == ['ready', 'ready']
        assert runner.take_turns(workers, 2, rounds=3, warmup=1) == [[0.5] * 3, [0.5] * 3]
        with pytest.raises(SystemExit, match='name: the process of two ended with exit code 1; see above'):
            workers[1].ask(0)
        assert 'ZeroDivisionError' in capsys.readouterr().err
        workers[0].terminate()
        assert workers[0].process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ('script', 'flag', 'reason'),
    [
        (loop_overhead, '--parts=paper,pages', 'pages is unknown; the names are quickstart, paper, checkpoint'),
        (loop_overhead, '--rounds=0', "--rounds: '0' is not a whole number of at least 1"),
        (memory, '--sides=jax,caffe', 'caffe is unknown; the names are jax, torch'),
        (memory, '--steps=0', "--steps: '0' is not a whole number of at least 1"),
        (memory, '--confg.seed=1', "'--confg.seed=1' is not a flag"),
        (memory, '--config.seed=-1', 'config.seed: -1 is outside'),
        (memory, '--torch_python=/no/python', "--torch_python: '/no/python' is not a program"),
        (presets, '--against=/no/checkout', "--against: '/no/checkout' has no benchmarks/presets.py"),
    ],
)
def test_invalid_flags_of_benchmarks_are_rejected(monkeypatch, capsys, script, flag, reason):
    monkeypatch.setattr('sys.argv', ['benchmarks/name.py', flag])
    with pytest.raises(SystemExit) as rejected:
        script.main()
    assert rejected.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_memory_of_a_narrow_network():
    flags = ['--config.model.widths=(8,16,16,16,16,32,32)', '--sides=jax', '--batch_size=2', '--steps=2', '--json']
    run = run_command('benchmarks/memory.py', *flags)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    found = result['jax']
    kernels = 11 * 11 * 3 * 8 + 25 * 4 * 16 + 9 * 16 * 16 + 2 * (9 * 8 * 16) + 6 * 6 * 16 * 32 + 32 * 32 + 32 * 1000
    assert found['state'] == 2 * 4 * (kernels + 8 + 4 * 16 + 2 * 32 + 1000) + 4  # weights, velocities, the step
    assert 2 * 256 * 256 * 3 < found['batch'] < 2 * 256 * 256 * 3 + 2**20  # images, and the mean one
    assert 0 < found['imported'] < found['made'] <= found['first_step'] <= found['peak'] < 4e9
    assert result['ratio'] is None


@pytest.mark.slow
def test_records_have_the_jpegs_of_the_folder(tmp_path):
    folder = tmp_path / 'pictures'
    for split, images in (('train', 20), ('val', 8)):
        for i, picture in enumerate(pictures('train')[:images]):
            write(folder / split / f'{i % 4:04d}' / f'{i:06d}.jpg', picture.content)
    record_files.write_in_child(str(folder))
    kinds = record_files.sources(str(folder))
    assert list(kinds) == ['folder', 'tfrecord', 'parquet', 'tars']
    expected = {
        split: [
            (path.read_bytes(), label)
            for label in range(4)
            for path in sorted((folder / name / f'{label:04d}').iterdir())
        ]
        for split, name in (('train', 'train'), ('validation', 'val'))
    }
    assert [len(examples) for examples in expected.values()] == [20, 8]
    for kind, source in kinds.items():
        opened = open_source(source, f'{folder}.records', validation_fraction=0.1)
        for split, examples in expected.items():
            assert [opened.splits[split][i] for i in range(len(examples))] == examples, kind


def test_rows_of_the_input_benchmark():
    speeds = {'raw': 1000.0, 'jpeg': 500.0, 'tensorflow': 100.0, 'pillow': 50.0}
    result = {'images_per_second': speeds, 'prepare_images_per_second': {'raw': 300.0, 'jpeg': 250.0}, 'cores': 2}
    result |= {'prepare_from': {'folder': 300.0, 'parquet': 330.0}, 'prepare_from_ratio': {'parquet': 1.1}}
    rows = table.input_rows(result)
    assert [row[1:] for row in rows[:2]] == [
        ('1,000', table.INPUT_PEERS['tensorflow'], '100', '10.0'),
        ('1,000', table.INPUT_PEERS['pillow'], '50', '20.0'),
    ]
    assert rows[4:6] == [
        ('preparation, raw, 2 processes: images/s', '300'),
        ('preparation, jpeg, 2 processes: images/s', '250'),
    ]
    assert rows[6:] == [
        ('preparation from parquet, 2 processes: images/s', '330', 'the same JPEGs in folders', '300', '1.10')
    ]


def test_loop_configuration_has_no_evaluation():
    for part, batch_size in (('quickstart', 64), ('paper', 128), ('checkpoint', 128)):
        assert loop_overhead.configuration(part, '/data').train.batch_size == batch_size
    config = loop_overhead.configuration('quickstart', '/data')
    assert (config.data.data_dir, config.train.log_every) == ('/data', '50 steps')
    assert config.eval.every == config.checkpoint.every == config.train.stall_after == loop_overhead.NEVER


def test_table_is_made_from_the_results():
    made = table.table(RESULTS)
    assert made.splitlines()[2:] == [
        '| train step of `paper`, batch 128, float32: images/s | 40.0 | TensorFlow, oneDNN | 50.0 | 0.80 |',
        '|  |  | PyTorch, `torch.compile` | 20.0 | 2.00 |',
        '| its FLOP/s / those of a matrix product, 300 G | 0.55 |  |  |  |',
        '| forward pass of `paper`, batch 128, float32: images/s | 100.0 | TensorFlow, oneDNN | 80.0 | 1.25 |',
        '|  |  | PyTorch, `torch.compile` | 100.0 | 1.00 |',
        '| its FLOP/s / those of a matrix product, 300 G | 0.66 |  |  |  |',
        '| `launch.py --help`: seconds | 0.4 |  |  |  |',
        '| first step of `paper`, compiled before: seconds | 8.0 |  |  |  |',
        '',
        '2 cores; jax 0.10, tensorflow 2.21. Measured 2026-01-02 to 2026-01-09.',
    ]
    page = f'# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nmore\n'
    assert table.replace_table(page, made) == f'# Title\n\n{table.BEGIN}\n{made}\n{table.END}\n\nmore\n'
    for invalid in (page.replace(table.END, ''), page + table.END, page.replace(table.BEGIN, '')):
        with pytest.raises(ValueError, match='one line'):
            table.replace_table(invalid, made)


def test_page_has_the_table_of_the_stored_results():
    page, kept = (ROOT / table.PAGE).read_text(), json.loads((ROOT / table.RESULTS).read_text())
    assert table.replace_table(page, table.table(kept)) == page
