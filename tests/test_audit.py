"""The audit against hand numbers, the published network, and the forms of HLO instructions."""

import functools
import json
import re
import subprocess
import time

import pytest
from helpers import ROOT, run_command, usage_error
from test_presets import PAPER

from alexnet_jax import config
from alexnet_jax.audit import cost_model, hlo_collectives, report_text, step_audit
from alexnet_jax.audit.hlo_collectives import Collective

GOLDEN = ROOT / 'tests' / 'golden'
COMMAND = ['-m', 'alexnet_jax.audit', '--config=configs/imagenet.py']

# The flags of each file in tests/golden, besides --config=configs/imagenet.py --images_per_device=128.
MESHES = {
    'towers_4x2': '--mesh=data:4,model:2',
    'towers_4x2_sharded': '--mesh=data:4,model:2 --config.mesh.shard_optimizer=True',
    'data_8x1': '--mesh=data:8,model:1 --config.mesh.layout=data',
    'hybrid_1x8': '--mesh=data:1,model:8 --config.mesh.layout=hybrid',
    'hybrid_2x4_sharded': '--mesh=data:2,model:4 --config.mesh.layout=hybrid --config.mesh.shard_optimizer=True',
}


def command(*arguments) -> subprocess.CompletedProcess:
    return run_command(*COMMAND, *arguments)


def paper(mesh: str, model_dtype='float32', **fields):
    """Returns the configuration of `paper` on a mesh with 128 images per device."""
    settings = config.default_config()
    settings.model.dtype = model_dtype
    settings.mesh.update(fields)
    return step_audit.audit_config(settings, mesh, 128)


@functools.cache
def report(mesh: str, model_dtype='float32', **fields):
    return step_audit.audit(paper(mesh, model_dtype, **fields))


@functools.cache
def report_of(name: str):
    """Returns the report of one of MESHES."""
    mesh, *overrides = MESHES[name].split()
    values = dict(override.removeprefix('--config.mesh.').split('=') for override in overrides)
    return report(
        mesh.removeprefix('--mesh='),
        layout=values.get('layout', 'towers'),
        shard_optimizer=values.get('shard_optimizer') == 'True',
    )


@pytest.mark.parametrize(
    ('attributes', 'kind', 'size'),
    [
        ('channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true', 'all-gather', 2),
        ('channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true', 'all-reduce', 4),
        ('channel_id=1, replica_groups={{0,2,4},{1}}, use_global_device_ids=true', 'all-reduce', 3),
        ('channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true', 'all-gather', 2),
        ('channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true', 'all-reduce', 4),
        ('channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true', 'all-reduce', 8),
        ('channel_id=1, replica_groups={}, use_global_device_ids=true', 'all-reduce', 8),
        ('channel_id=1, replica_groups={{0},{1}}, use_global_device_ids=true', 'all-reduce', 1),
        # Without global ids, groups are of replicas: one replica has 8 partitions with a channel, and 1 without.
        ('channel_id=1, replica_groups={{0}}', 'all-reduce', 8),
        ('replica_groups={{0}}', 'all-reduce', 1),
        ('replica_groups={}', 'all-reduce', 1),
        ('channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}', 'all-to-all', 4),
        ('channel_id=2, source_target_pairs={{0,1},{1,2},{2,0}}', 'collective-permute', 3),
        ('channel_id=2, source_target_pairs={{0,0},{1,1}}', 'collective-permute', 0),
    ],
)
def test_group_size(attributes, kind, size):
    assert hlo_collectives.group_size(f'x = f32[2]{{0}} {kind}(y), {attributes}, to_apply=%add', kind, 8) == size


@pytest.mark.parametrize(
    ('groups', 'size'),
    [  # jaxlib 0.12 writes groups along axes of a mesh, or along parts of axes.
        ("mesh['data'=4,'model'=2] {'data'}", 4),
        ("mesh['data'=4,'model'=2] {'model'}", 2),
        ("mesh['data'=4,'model'=2] {'data','model'}", 8),
        ("mesh['data'=8,'model'=1] {'model'}", 1),
        ("mesh['a'=8,'b'=8,'c'=16] {'a':(2)4,'b':(2)2}", 8),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 2),
    ],
)
def test_group_size_of_mesh_syntax(groups, size):
    for kind, attributes in (
        ('all-reduce', 'use_global_device_ids=true, to_apply=%add'),
        ('all-to-all', 'channel_id=2'),
    ):
        line = f'x = f32[2]{{0}} {kind}(y), channel_id=1, replica_groups={groups}, {attributes}'
        assert hlo_collectives.group_size(line, kind, 8) == size


@pytest.mark.parametrize(
    ('groups', 'named'),
    [
        ('replica_groups=@mesh', 'replica_groups=@mesh'),
        ("replica_groups=mesh['a'=2], device_ids=(1,0) {}", "mesh['a'=2], device_ids=(1,0) {}"),
        ("replica_groups=mesh['a'=2,'b'=4]", "replica_groups=mesh['a'=2,'b'=4]"),
        ("replica_groups=mesh['a'=2,'b'=4] {}", "replica_groups=mesh['a'=2,'b'=4] {}"),
        ("replica_groups=mesh['a'=2,'b'=4] {'c'}", "'c'"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}{'b'}", "{'a'}{'b'}"),
        ('dimensions={0}', 'replica_groups'),
    ],
)
def test_unknown_replica_groups_are_rejected(groups, named):
    line = f'x = f32[2] all-reduce(y), channel_id=1, {groups}, to_apply=%add, metadata={{op_name="a"}}'
    with pytest.raises(hlo_collectives.HloFormatError, match=re.escape(named)):
        hlo_collectives.group_size(line, 'all-reduce', 8)


UNREADABLE = """
import runpy, sys, jax
as_text = jax.stages.Compiled.as_text
jax.stages.Compiled.as_text = lambda compiled: as_text(compiled).replace('replica_groups=', 'replica_groups=@')
sys.argv = ['audit', '--config=quickstart', '--mesh=data:2']
runpy.run_module('alexnet_jax.audit', run_name='__main__', alter_sys=True)
"""


@pytest.mark.slow
def test_command_reports_unreadable_hlo():
    run = run_command('-c', UNREADABLE, JAX_NUM_CPU_DEVICES='8')
    assert (run.returncode, run.stdout) == (1, '')
    assert re.fullmatch(r'alexnet_jax: .*jax [\d.]+.*all-reduce.*replica_groups=@.*\n', run.stderr)


@pytest.mark.parametrize(
    ('kind', 'dtype', 'shape', 'group', 'sent'),
    [  # A tensor of 1,200 bytes on 4 devices: each sends quarters of 300 bytes three times, or six times for both ways.
        ('all-reduce', 'f32', (30, 10), 4, 1800),
        ('all-gather', 'f32', (30, 10), 4, 900),
        ('reduce-scatter', 'f32', (30, 10), 4, 3600),  # 1,200 of 4,800 bytes stay on the device.
        ('all-to-all', 'f32', (30, 10), 4, 900),
        ('collective-permute', 'f32', (30, 10), 4, 1200),
        ('all-reduce', 'bf16', (30, 10), 4, 900),
        ('all-reduce', 'f32', (30, 10), 2, 1200),
        ('all-gather', 'u8', (), 2, 0.5),
    ],
)
def test_ring_bytes_equal_hand_numbers(kind, dtype, shape, group, sent):
    assert Collective(kind, '', dtype, (shape,), group).bytes == sent


GROUPS = 'channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true'


def module(*lines) -> str:
    """Returns the text of a program whose entry computation has these instructions after the parameters x, y and z."""
    parameters = [f'  %{name} = f32[1]{{0}} parameter({number})' for number, name in enumerate('xyz')]
    return '\n'.join(
        ['HloModule jit_step, is_scheduled=true', '', 'ENTRY %main () -> f32[1] {', *parameters, *lines, '}']
    )


def read(*lines):
    """Reads a program for 4 devices whose compiled and lowered forms are equal."""
    return hlo_collectives.step_collectives(module(*lines), module(*lines), 4)


def test_instruction_forms():
    [joined] = read(
        f'  %all-reduce.1 = (f32[3]{{0}}, /*index=1*/f32[2,5]{{1,0}}) all-reduce(%x, %y), {GROUPS}, to_apply=%add',
        '  %get-tuple-element.1 = f32[3]{0} get-tuple-element(%all-reduce.1), index=0',
    )
    assert (joined.kind, joined.shapes, joined.elements) == ('all-reduce', ((2, 5), (3,)), 13)
    [started] = read(
        f'  %s = (f32[2,4]{{1,0}}, f32[4,4]{{1,0}}) all-gather-start(f32[2,4]{{1,0:T(8,128)(2,1)}} %x), {GROUPS}',
        '  ROOT %d = f32[4,4]{1,0} all-gather-done(%s)',
    )
    assert (started.kind, started.shapes, started.is_async) == ('all-gather', ((4, 4),), True)
    several = read(
        f'  %s = ((f32[2]{{0}}, bf16[3]{{0}}), (f32[4]{{0}}, bf16[6]{{0}})) all-gather-start(%x, %y), {GROUPS}'
    )
    assert [(each.dtype, each.shapes) for each in several] == [('f32', ((4,),)), ('bf16', ((6,),))]
    [reduced] = read(f'  %s = f32[8]{{0}} all-reduce-start(%x), {GROUPS}', '  %d = f32[8]{0} all-reduce-done(%s)')
    assert reduced.shapes == ((8,),)
    [scattered] = read(f'  %s = ((f32[8]{{0}}), f32[4]{{0}}) reduce-scatter-start(%x), {GROUPS}, dimensions={{0}}')
    assert scattered.shapes == ((4,),)
    assert scattered.bytes == 16
    [parts] = read(f'  %a = (f32[1,6]{{1,0}}, f32[1,6]{{1,0}}) all-to-all(%x, %y), {GROUPS}')
    assert parts.shapes == ((2, 1, 6),)
    [permuted] = read(
        '  %p = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2,'
        ' source_target_pairs={{0,1},{1,0}}'
    )
    assert permuted.bytes == 24
    pair = read(  # of a GPU, since jax 0.11
        f'  %s = ((f32[3]{{0}}, bf16[5]{{0}}), (f32[3]{{0}}, bf16[5]{{0}})) all-reduce-start(%x, %y), {GROUPS}',
        '  %d = (f32[3]{0}, bf16[5]{0}) all-reduce-done(%s)',
    )
    assert [(each.dtype, each.shapes, each.start, each.done) for each in pair] == [
        ('f32', ((3,),), 's', 'd'),
        ('bf16', ((5,),), 's', 'd'),
    ]
    [at_once] = read(  # of a GPU, before jax 0.11
        f'  %s = (f32[2]{{0}}, f32[4]{{0}}) all-gather-start(%x), {GROUPS}, backend_config={{"is_sync":true}}',
        '  %d = f32[4]{0} all-gather-done(%s)',
    )
    assert (at_once.shapes, at_once.start, at_once.done, at_once.is_async) == (((4,),), 's', 's', False)
    assert (
        read('  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0},{1}}, use_global_device_ids=true')
        == []
    )


WRAPPED = """HloModule jit_step, is_scheduled=true

%wrapped (p: f32[2,6]) -> f32[2,6] {
  %p = f32[2,6]{1,0} parameter(0)
  ROOT %exchanged = f32[2,6]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (x: f32[2,6]) -> f32[2,6] {
  %x = f32[2,6]{1,0} parameter(0)
  %begun = ((f32[2,6]{1,0}), f32[2,6]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %carried = ((f32[2,6]{1,0}), f32[2,6]{1,0}, u32[]) async-update(%begun), calls=%wrapped
  ROOT %ended = f32[2,6]{1,0} async-done(%carried), calls=%wrapped
}
"""


def test_collective_in_a_called_computation_counts_once():
    [found] = hlo_collectives.step_collectives(WRAPPED, WRAPPED, 4)
    assert (found.kind, found.shapes, found.trips) == ('all-to-all', ((2, 6),), 1)
    assert (found.start, found.done, found.is_async) == ('begun', 'ended', True)


def test_collectives_take_layer_and_dtype_from_lowered_hlo():
    name = 'metadata={op_name="jit(train_step)/shard_map/transpose(jvp(%s))/psum"}'
    asked = [
        f'  a = bf16[4,4]{{1,0}} all-gather(x), {GROUPS}, {name % "fc7"}',
        f'  b = bf16[4,4]{{1,0}} all-gather(y), {GROUPS}, {name % "fc8"}',
        f'  c = f32[4,4]{{1,0}} all-gather(z), {GROUPS}, {name % "update"}',
        f'  d = bf16[5]{{0}} all-reduce(x), {GROUPS}, {name % "gradients"}',
        f'  e = f32[3]{{0}} all-reduce(x), {GROUPS}, {name % "metrics"}',
        f'  f = f32[7]{{0}} all-gather(x), {GROUPS}, {name % "conv3"}',  # removed by the compiler
        f'  g = f32[7]{{0}} all-gather(x), {GROUPS}, {name % "fc6"}',
    ]
    compiled = [
        f'  %f = f32[4,4]{{1,0}} all-gather(%z), {GROUPS}, {name % "update"}',
        f'  %g = f32[4,4]{{1,0}} all-gather(%y), {GROUPS}, {name % "fc8"}',
        f'  %h = f32[4,4]{{1,0}} all-gather(%x), {GROUPS}, {name % "fc7"}',
        f'  %i = (f32[3]{{0}}, f32[1,5]{{1,0}}) all-reduce(%x, %y), {GROUPS}, {name % "gradients"}',
        f'  %k = f32[7]{{0}} all-gather(%x), {GROUPS}, {name % "fc6"}',
        f'  %j = f32[100]{{0}} all-gather(%x), {GROUPS}, metadata={{op_name="jit(train_step)/convolution"}}',
    ]
    found = hlo_collectives.step_collectives(module(*compiled), module(*asked), 4)
    assert [(each.kind, each.layer, each.dtype, each.shapes) for each in found] == [
        ('all-gather', '', 'f32', ((100,),)),  # added by the compiler
        ('all-gather', 'fc6', 'f32', ((7,),)),
        ('all-gather', 'fc7', 'bf16', ((4, 4),)),
        ('all-gather', 'fc8', 'bf16', ((4, 4),)),
        ('all-reduce', 'gradients', 'bf16', ((5,),)),
        ('all-gather', 'update', 'f32', ((4, 4),)),
        ('all-reduce', 'metrics', 'f32', ((3,),)),
    ]


@pytest.mark.slow
def test_cost_table_matches_published_numbers():
    table = {layer.name: layer for layer in cost_model.layers(paper('data:1,model:1'))}
    assert {name: (layer.parameters, layer.multiply_adds) for name, layer in table.items()} == PAPER
    # Figure 2 of the paper wrongly has 253,440 neurons in the first layer; 55 x 55 x 96 are 290,400.
    assert [table[f'conv{i}'].output for i in (1, 2, 3, 4, 5)] == [
        (55, 55, 96),
        (27, 27, 256),
        (13, 13, 384),
        (13, 13, 384),
        (13, 13, 256),
    ]
    whole = report_of('data_8x1')
    assert whole['parameters'] == 60_965_224
    assert whole['multiply_adds'] == 665_784_864 + 58_621_952
    assert whole['flops_per_device'] == 128 * 2 * (3 * 724_406_816 - 105_415_200)


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
def test_flops_agree_with_compiler_count(name):
    # The compiler does not count padding: 602, 129 and 37 pixels are under the windows of a row.
    inside = [602**2 * 288, 129**2 * 48 * 256, 37**2 * 256 * 384, 37**2 * 192 * 384, 37**2 * 192 * 256, 58_621_952]
    expected = 128 * 2 * (3 * sum(inside) - inside[0])
    conv1 = 55**2 * 12 * 11 * 3 * 96  # the forward pass of conv1 with one row of zeros and the padding
    found = report_of(name)
    # Seven operations on the maps of conv1 precede its weight gradient, which a CPU computes in 16 chunks. The
    # compiler counts all images in each chunk.
    counted_again = 128 * 15 * 7 * 55**2 * 96
    # The compiler also counts normalization, pooling, dropout and the update: a little over one percent.
    most = 1.014 * (expected + 128 * 2 * (conv1 - inside[0])) + counted_again
    assert expected < found['compiler_flops_per_device'] < most
    assert found['flops_per_device'] / expected == pytest.approx(1.0846, abs=1e-4)


def test_towers_collectives_by_layer():
    found = report_of('towers_4x2')['collectives']
    by_kind = {kind: [each.layer for each in found if each.kind == kind] for kind in {each.kind for each in found}}
    assert by_kind == {
        'all-gather': ['conv3', 'fc6', 'fc7', 'fc8', 'logits'],
        'reduce-scatter': ['conv3', 'fc6', 'fc7', 'fc8', 'logits'],
        'all-reduce': ['gradients', 'metrics'],
    }
    assert {each.group_size for each in found if each.kind != 'all-reduce'} == {2}
    [gradients] = [each for each in found if each.layer == 'gradients']
    assert (gradients.group_size, gradients.elements, len(gradients.shapes)) == (4, 30_482_612, 16)


# Bytes computed manually, for 128 images per device.
KERNELS, BIASES = 60_965_224 - 10_568, 10_568
MINIMUM = {
    'data_8x1': 426_756_568,  # 2 x 4 x 60,965,224 x 7/8
    # All-gathers of 256 x (13x13x256 + 6x6x256 + 4096 + 4096 + 1000) numbers send half of their bytes, twice.
    # 30,482,612 gradients are all-reduced over four devices.
    'towers_4x2': 63_152_128 + 182_895_672,
    'towers_4x2_sharded': 63_152_128 + 182_895_672,
    # 128 x 9216 and 1024 x (4096 + 4096 + 1000) numbers, twice, 7/8; 2,335,080 gradients over eight devices.
    'hybrid_1x8': 74_145_792 + 16_345_560,
    # 128 x 9216 and 512 x 9192 numbers, twice, 3/4; 2,335,080 gradients over eight devices, 14,656,536 over two.
    'hybrid_2x4_sharded': 35_315_712 + 16_345_560 + 58_626_048 + 4_096,
}


@pytest.mark.parametrize('name', MESHES)
def test_wire_bytes_are_close_to_the_lower_bound(name):
    found = report_of(name)
    assert found['analytic_minimum_bytes'] == MINIMUM[name]
    assert found['wire_bytes_per_device'] == round(sum(each.bytes for each in found['collectives']))
    assert 1 <= found['wire_bytes_per_device'] / MINIMUM[name] <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ('layout', 'mesh', 'shard', 'model_dtype', 'minimum'),
    [
        ('data', 'data:8,model:1', False, 'float32', 2 * 2 * 60_965_224 * 7 // 8),
        # Kernel gradients are sent in two bytes, updated weights in four.
        ('data', 'data:8,model:1', True, 'float32', (2 + 4) * KERNELS * 7 // 8 + 2 * 2 * BIASES * 7 // 8),
        ('towers', 'data:4,model:2', False, 'bfloat16', 63_152_128 // 2 + 182_895_672 // 2),
    ],
)
def test_wire_bytes_in_bfloat16(layout, mesh, shard, model_dtype, minimum):
    found = report(mesh, model_dtype, layout=layout, shard_optimizer=shard, grad_allreduce_dtype='bfloat16')
    assert found['analytic_minimum_bytes'] == minimum
    assert 1 <= found['wire_bytes_per_device'] / minimum <= 1.02


@pytest.mark.parametrize(
    ('layout', 'mesh', 'saved'),
    [
        # 2,332,704 numbers are the kernels of convolutions, half of them on each device of a pair.
        ('towers', 'data:4,model:2', 2 * 2 * 1_166_352 * 3 // 4),
        ('hybrid', 'data:2,model:4', 2 * 2 * 2_332_704 * 7 // 8),
    ],
)
def test_lower_bound_counts_rounded_gradients_of_gpus_in_two_bytes(layout, mesh, saved):
    def bound(platform: str, dtype: str, **fields) -> float:
        return cost_model.lower_bound_bytes(paper(mesh, dtype, layout=layout, **fields), platform)

    assert bound('cpu', 'bfloat16') - bound('gpu', 'bfloat16') == saved
    assert bound('cpu', 'bfloat16') == bound('tpu', 'bfloat16')
    assert bound('cpu', 'bfloat16') == bound('gpu', 'bfloat16', grad_allreduce_dtype='float32')
    assert bound('cpu', 'float32') == bound('gpu', 'float32')


def test_memory_includes_state_and_batch():
    least = 2 * 4 * 60_965_224 + 128 * 256 * 256 * 3
    assert least < report_of('data_8x1')['peak_bytes_per_device'] < least + 3e9
    assert report_of('towers_4x2_sharded')['peak_bytes_per_device'] < report_of('towers_4x2')['peak_bytes_per_device']


def test_predicted_step_time_equals_hand_numbers():
    settings = paper('data:4,model:2')
    flops = settings.train.batch_size / 8 * 4_135_610_496
    found = [
        Collective('all-gather', 'fc6', 'f32', ((2, 1000),), 2),  # 4,000 bytes
        Collective('all-reduce', 'gradients', 'f32', ((1000,),), 4),  # 6,000 bytes
        Collective('all-gather', 'update', 'f32', ((1000,),), 2),  # 2,000 bytes
    ]
    slow = cost_model.predict(settings, found, bandwidth=1000, flops=flops / 2)
    assert slow['compute_seconds'] == pytest.approx(2)
    assert slow['wire_seconds'] == pytest.approx(12)
    assert slow['step_seconds_without_overlap'] == pytest.approx(14)
    assert slow['step_seconds_with_gradients_overlapped'] == pytest.approx(12)
    assert slow['images_per_second_without_overlap'] == pytest.approx(1024 / 14)
    assert slow['efficiency_with_gradients_overlapped'] == pytest.approx(2 / 12)
    fast = cost_model.predict(settings, found, bandwidth=1000, flops=flops / 20)
    assert fast['step_seconds_with_gradients_overlapped'] == pytest.approx(24)


@pytest.mark.parametrize('name', MESHES)
def test_collectives_match_golden_files(name):
    file = GOLDEN / f'collectives_{name}.txt'
    renew = (
        f'python {" ".join(COMMAND)} --images_per_device=128 {MESHES[name]} --collectives > {file.relative_to(ROOT)}'
    )
    found = report_text.collectives_table(report_of(name)['collectives']) + '\n'
    assert found == (file.read_text() if file.exists() else ''), f'if the change is intended, renew the file: {renew}'


@pytest.mark.slow
def test_512_devices_within_a_minute():
    start = time.monotonic()
    run = command('--mesh=data:256,model:2', '--images_per_device=128', '--json', '--bandwidth=1e11', '--flops=1e14')
    assert time.monotonic() - start < 60
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found['mesh'] == {'data': 256, 'model': 2}
    assert found['layout'] == 'towers'
    assert (found['batch_size'], found['batch_per_device']) == (65_536, 128)
    assert found['parameters'] == 60_965_224
    assert {each['group_size'] for each in found['collectives']} == {2, 256, 512}
    assert {'kind', 'layer', 'dtype', 'shapes', 'group_size', 'trips', 'start', 'done', 'bytes'} == set(
        found['collectives'][0]
    )
    [gradients] = [each for each in found['collectives'] if each['layer'] == 'gradients']
    assert gradients['bytes'] == round(2 * 4 * 30_482_612 * 255 / 256)
    assert 1 <= found['wire_bytes_per_device'] / found['analytic_minimum_bytes'] <= 1.02
    assert found['layers'][0] == {
        'name': 'conv1',
        'output': [55, 55, 96],
        'parameters': 34_944,
        'multiply_adds': 105_415_200,
    }
    assert found['peak_bytes_per_device'] > 0
    assert found['prediction']['compute_seconds'] == pytest.approx(128 * 4_135_610_496 / 1e14)


@pytest.mark.slow
def test_text_report():
    run = command('--mesh=data:1,model:1', '--config.train.batch_size=8', '--bandwidth=1e11', '--flops=1e14')
    assert run.returncode == 0, run.stderr
    row = next(line.split() for line in run.stdout.splitlines() if line.startswith('conv2 '))
    assert row == ['conv2', '27x27x256', '307,456', '0.5%', '223,948,800', '30.9%']
    assert 'batch 8' in run.stdout
    assert '100.0% efficiency' in run.stdout


@pytest.mark.parametrize(
    ('arguments', 'pattern'),
    [
        ('--mesh=data:3,model:2', 'config.train.batch_size: 128 .*mesh.data=3.*129'),
        ('--mesh=data:4,model:3', 'config.mesh.model: 3 .*model.towers=2'),
        ('--mesh=data:4,model:2 --config.mesh.layout=data', "config.mesh.model: 2 .*mesh.layout='data'"),
        ('--mesh=data=4', "--mesh: 'data=4' .*--mesh=data:64,model:2"),
        ('--mesh=data:4096 --images_per_device=1', 'config.mesh: 4096 .*2048'),
        ('--images_per_device=0', '.*--images_per_device=0'),
        ('--bandwidth=1e9', '--bandwidth.*--flops'),
        ('--bandwidth=inf --flops=inf', '--bandwidth=inf --flops=inf: .*finite'),
        ('--collectives --json', '--collectives prints only'),
        ('--bandwidth=1e9 --flops=0', '--bandwidth=1e[+]09 --flops=0: .*0'),
        ('--config.mesh.modle=2', 'config.mesh.modle: .*config.mesh.model'),
    ],
)
def test_invalid_flags_are_rejected(arguments, pattern):
    assert re.match(pattern, usage_error(command(*arguments.split())))


def test_default_mesh_uses_simulated_devices(monkeypatch):
    settings = config.default_config()
    settings.mesh.model = 2
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')
    found = step_audit.audit_config(settings, None, 16)
    assert (found.mesh.data, found.mesh.model, found.train.batch_size) == (4, 2, 128)
