"""Audits for accelerators, without the compilers: targets, times by hand, differences. See make audit-targets."""

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import types

import pytest
from helpers import ROOT, run_command, usage_error
from test_hlo import NUMBERS, collectives, program
from test_hlo import text as hlo_text

from alexnet_jax import config
from alexnet_jax.audit import report_text, roofline, step_audit, target_report, targets
from alexnet_jax.audit.hlo import Program
from alexnet_jax.audit.hlo_collectives import Collective, step_collectives
from alexnet_jax.config import ConfigError
from docs import audit_targets

COMMAND = ['-m', 'alexnet_jax.audit', '--config=configs/imagenet.py']


@pytest.mark.parametrize(
    ('text', 'platform', 'devices', 'topology'),
    [
        ('v5e:2x4', 'tpu', 8, 'v5e:2x4'),
        ('v5e:16x16', 'tpu', 256, 'v5e:16x16'),
        ('v5p:2x2x4', 'tpu', 16, 'v5p:2x2x4'),
        ('tpu7x:2x2x1', 'tpu', 8, 'tpu7x:2x2x1'),  # two devices per chip
        ('h100:1', 'gpu', 1, '1x1x1'),
        ('a100:4', 'gpu', 4, '1x1x4'),
        ('h100:8', 'gpu', 8, '1x1x8'),
        ('h200:64', 'gpu', 64, '1x8x8'),
    ],
)
def test_parsed_targets(text, platform, devices, topology):
    found = targets.parse_target(text)
    assert (found.text, found.platform, found.devices, found.topology) == (text, platform, devices, topology)


@pytest.mark.parametrize(
    ('text', 'pattern'),
    [
        ('v9:2x2', "'v9:2x2' is not known; known are v4, .*h100"),
        ('', "'' is not known"),
        ('h100', 'h100:8'),
        ('h100:0', 'h100:8'),
        ('h100:2x4', 'h100:8'),
        ('h100:12', 'hosts of 8 GPUs; the nearest are h100:8 and h100:16'),
        ('v5e', '2 axes; write for example v5e:2x2'),
        ('v5e:8', '2 axes'),
        ('v5e:0x4', '2 axes'),
        ('v5e:2x2x2', '2 axes'),
        ('v5p:2x4', '3 axes; write for example v5p:2x2x2'),
    ],
)
def test_impossible_targets_are_rejected(text, pattern):
    with pytest.raises(ConfigError, match=rf'^--target: .*{pattern}'):
        targets.parse_target(text)


@pytest.mark.parametrize('kind', [kind for kind, data in targets.HARDWARE.items() if data.network])
def test_description_of_a_gpu_names_its_hardware(kind):
    text = targets.gpu_config(kind)
    assert text.count('{') == text.count('}')
    assert f'device_memory_size: {targets.HARDWARE[kind].memory}\n' in text
    bandwidth = float(re.search(r'memory_bandwidth: (\d+)', text)[1])
    assert bandwidth == pytest.approx(targets.HARDWARE[kind].bandwidth, rel=1e-3)
    assert kind.upper() in text


def install(folder, package, version, library):
    """Makes the files of an installed package, as pip --target does."""
    info = folder / f'{package.replace("-", "_")}-{version}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n')
    (folder / library).parent.mkdir(parents=True)
    (folder / library).touch()
    return str(folder)


def jaxlib(change=0):
    """Returns the version of jaxlib, with a change of its second number."""
    first, second, *rest = importlib.metadata.version('jaxlib').split('.')
    return '.'.join([first, str(int(second) + change), *rest])


@pytest.mark.parametrize('cuda', [12, 13])
def test_compiler_for_gpus_is_found_in_a_folder(tmp_path, cuda):
    library = f'jax_plugins/xla_cuda{cuda}/xla_cuda_plugin.so'
    folder = install(tmp_path, f'jax-cuda{cuda}-pjrt', jaxlib(), library)
    found = targets.find_compiler(targets.parse_target('h100:8'), folder)
    assert (found.package, found.version, found.library) == (f'jax-cuda{cuda}-pjrt', jaxlib(), f'{folder}/{library}')
    assert not found.is_importable


def test_compiler_is_found_on_the_path_of_python(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, 'libtpu', '9.0.0', 'libtpu/libtpu.so'))
    found = targets.find_compiler(targets.parse_target('v5e:2x4'))
    assert (found.package, found.version, found.is_importable) == ('libtpu', '9.0.0', True)


def test_compiler_that_jax_would_load_comes_first(tmp_path, monkeypatch):
    both = [
        install(
            tmp_path / str(cuda), f'jax-cuda{cuda}-pjrt', jaxlib(), f'jax_plugins/xla_cuda{cuda}/xla_cuda_plugin.so'
        )
        for cuda in (12, 13)
    ]
    monkeypatch.syspath_prepend(both[1])
    found = targets.find_compiler(targets.parse_target('h100:8'), both[0])
    assert (found.package, found.is_importable) == ('jax-cuda13-pjrt', True)


def test_compiler_that_does_not_fit_does_not_hide_one_that_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / 'old', 'libtpu', '0.0.1', 'libtpu/libtpu.so'))
    (tmp_path / 'old' / 'libtpu-9.9.9.dist-info').mkdir()  # what is left of an installation that was interrupted
    folder = install(tmp_path / 'new', 'libtpu', '9.0.0', 'libtpu/libtpu.so')
    found = targets.find_compiler(targets.parse_target('v5e:2x4'), folder)
    assert (found.version, found.library, found.is_importable) == ('9.0.0', f'{folder}/libtpu/libtpu.so', False)


@pytest.mark.parametrize(
    ('target', 'importable', 'loaded'),
    [
        ('v5e:2x4', False, {'TPU_LIBRARY_PATH': 'library'}),
        ('h100:8', False, {'PJRT_NAMES_AND_LIBRARY_PATHS': 'cuda:library'}),
        ('h100:8', True, {}),
    ],
)
def test_environment_loads_the_compiler_on_a_cpu(monkeypatch, target, importable, loaded):
    monkeypatch.setattr(targets.os, 'environ', environment := {'JAX_PLATFORMS': 'cuda'})
    targets.set_environment(targets.parse_target(target), targets.Compiler('package', '1', 'library', importable))
    assert environment['JAX_PLATFORMS'] == 'cpu'
    names = ('TPU_LIBRARY_PATH', 'PJRT_NAMES_AND_LIBRARY_PATHS')
    assert {name: environment[name] for name in names if name in environment} == loaded


@pytest.mark.parametrize(
    ('target', 'package', 'version', 'library'),
    [
        ('h100:8', 'jax-cuda12-pjrt', jaxlib(-1), 'jax_plugins/xla_cuda12/xla_cuda_plugin.so'),
        ('h100:8', 'jax-cuda12-pjrt', jaxlib(+1), 'jax_plugins/xla_cuda12/xla_cuda_plugin.so'),
        ('v5e:2x4', 'libtpu', '0.0.1', 'libtpu/libtpu.so'),
    ],
)
def test_compiler_of_another_jax_is_refused(tmp_path, target, package, version, library):
    folder = install(tmp_path, package, version, library)
    with pytest.raises(ConfigError, match=rf'{package} {version} in .* does not fit jax .*pip install .*"{package}=='):
        targets.find_compiler(targets.parse_target(target), folder)


def test_requirements_are_those_of_jax():
    printed = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax.audit.targets'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    jax = ' '.join(importlib.metadata.requires('jax'))
    assert printed == [re.search(r'libtpu==[\d.*]+', jax)[0], f'jax-cuda12-pjrt=={jaxlib()}']


@pytest.mark.parametrize(
    ('arguments', 'pattern'),
    [
        ('--target=v9:2x2', "--target: 'v9:2x2' .*known"),
        (
            '--target=h100:8 --compilers={empty}',
            '--target=h100:8: its compiler, .*not in {empty}; pip install .*jax-cuda12-pjrt==',
        ),
        ('--target=v5e:2x4 --compilers={empty}/none', "--compilers: '{empty}/none' is not a folder; pip .*libtpu=="),
        ('--compilers={empty}', '--compilers: requires --target'),
    ],
)
def test_invalid_flags_are_rejected(tmp_path, arguments, pattern):
    run = run_command(*COMMAND, *arguments.format(empty=tmp_path).split())
    assert re.match(pattern.format(empty=tmp_path), usage_error(run))


def audited_config(target, mesh=None, model=1):
    settings = config.default_config()
    settings.mesh.model = model
    return step_audit.audit_config(settings, mesh, 16, targets.parse_target(target))


def test_mesh_takes_all_devices_of_the_target(monkeypatch):
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '2')
    found = audited_config('v5e:4x4', model=2)
    assert (found.mesh.data, found.mesh.model, found.train.batch_size) == (8, 2, 16 * 16)


@pytest.mark.parametrize('mesh', ['data:8,model:2', 'data:4,model:1'])
def test_mesh_of_another_size_is_rejected(mesh):
    with pytest.raises(
        ConfigError, match=r'^config.mesh: .*--target=h100:8 has 8; .*--mesh=data:(4,model:2|8,model:1)'
    ):
        audited_config('h100:8', mesh)


# A device of 1 TB/s and, for float32 at default precision, 10 TFLOP/s, with links of 100 GB/s and adapters of 10 GB/s.
SLOW = targets.Hardware(10**9, 1e12, 20e12, 10e12, 5e12, 1e12, 100e9, 10e9)
GROUPS = 'channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true'
NAME = 'metadata={{op_name="jit(train_step)/{}"}}'.format
HEAD = """HloModule jit_train_step, is_scheduled=true
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def model(text, hardware=SLOW):
    """Returns the modeled step of a program for two devices."""
    return roofline.simulate(Program(text), step_collectives(text, text, 2), hardware, 2, 1)


def overlapped(done):
    """Returns a program in which a gradient is sent during a product; `done` is the place of the all-reduce-done."""
    lines = [
        '%x = f32[1000,1000]{1,0} parameter(0)',
        f'%start = f32[1000,1000]{{1,0}} all-reduce-start(%x), {GROUPS}, to_apply=%add, {NAME("gradients/psum")}',
        f'%dot = f32[1000,1000]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}},'
        f' {NAME("transpose(jvp(conv2))/dot_general")}',
        f'%copy = f32[1000,1000]{{1,0}} copy(%dot), {NAME("update/copy")}',
    ]
    lines.insert(done, '%done = f32[1000,1000]{1,0} all-reduce-done(%start)')
    return HEAD + 'ENTRY %main (x: f32[1000,1000]) -> f32[1000,1000] {\n  ' + '\n  '.join(lines) + '\n}\n'


def test_body_of_a_loop_of_unknown_length_counts_once():
    """The body adds two vectors of 1000 numbers: 8,000 bytes are read, 4,000 written."""
    text = HEAD + (
        '%body (s: f32[1000]) -> f32[1000] {\n'
        '  %s = f32[1000]{0} parameter(0)\n'
        '  ROOT %sum = f32[1000]{0} add(%s, %s)\n'
        '}\n\n'
        '%condition (c: f32[1000]) -> pred[] {\n'
        '  %c = f32[1000]{0} parameter(0)\n'
        '  ROOT %less = pred[] custom-call(%c), custom_call_target="any"\n'
        '}\n\n'
        'ENTRY %main (x: f32[1000]) -> f32[1000] {\n'
        '  %x = f32[1000]{0} parameter(0)\n'
        '  ROOT %loop = f32[1000]{0} while(%x), condition=%condition, body=%body\n'
        '}\n'
    )
    program = Program(text)
    assert roofline.is_unbounded(program, program.instructions['loop'])
    assert not roofline.is_unbounded(program, program.instructions['sum'])
    assert {name: (work.bytes, work.executions) for name, work in model(text).work.items()} == {'sum': (12_000, 1)}


def test_modeled_times_equal_hand_numbers():
    # The product: 2e9 FLOPs at 10 TFLOP/s, 200 us; 12 MB at 1 TB/s would take 12 us. The copy: 8 MB, 8 us.
    # The all-reduce on two devices sends 4 MB at 100 GB/s, 40 us.
    hidden = model(overlapped(3))
    assert hidden.compute_seconds == pytest.approx(208e-6)
    assert hidden.exposed_seconds == 0
    assert [(each.name, each.seconds) for each in hidden.costliest] == [
        ('dot', pytest.approx(200e-6)),
        ('copy', pytest.approx(8e-6)),
    ]
    [transfer] = hidden.transfers
    assert transfer.is_gradient
    assert (transfer.start, transfer.done) == (0, pytest.approx(200 / 208))
    assert transfer.behind == {'conv2 backward': pytest.approx(200e-6)}
    assert transfer.hidden_bytes == pytest.approx(4e6)

    exposed = model(overlapped(2))
    assert exposed.step_seconds == pytest.approx(248e-6)
    assert exposed.transfers[0].hidden_bytes == pytest.approx(0)
    # With products of ten times the rate, 20 of the 40 us are behind the product and 8 behind the copy.
    faster = model(overlapped(4), targets.Hardware(10**9, 1e12, 1e14, 1e14, 1e14, 1e12, 100e9))
    assert faster.exposed_seconds == pytest.approx(12e-6)
    assert faster.transfers[0].hidden_bytes == pytest.approx(4e6 * 28 / 40)
    assert list(faster.transfers[0].behind) == ['conv2 backward', 'update']


@pytest.mark.parametrize(
    ('operands', 'attributes', 'named', 'rate'),
    [
        ('f32', '', 'f32 default', 10e12),
        ('f32', ', operand_precision={highest,highest}', 'f32 highest', 1e12),
        ('f32', ', algorithm=dot_f32_f32_f32', 'f32 highest', 1e12),
        ('f32', ', backend_config={"operand_precision":["HIGHEST","HIGHEST"]}', 'f32 highest', 1e12),
        ('f32', ', operand_precision={high,high}', 'f32 high', 5e12),
        ('bf16', '', 'bf16', 20e12),
    ],
)
def test_rate_of_products_follows_their_precision(operands, attributes, named, rate):
    text = f"""{HEAD}ENTRY %main (x: {operands}[1000,1000]) -> f32[1000,1000] {{
  %x = {operands}[1000,1000]{{1,0}} parameter(0)
  ROOT %dot = f32[1000,1000]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{attributes}
}}
"""
    assert model(text).compute_seconds == pytest.approx(2e9 / rate)
    program = Program(text)
    assert roofline.operand_precision(program, program.instructions['dot']) == named


def test_rates_of_the_precisions():
    for kind, data in targets.HARDWARE.items():
        passes = [data.bfloat16 / rate for rate in (data.tensorfloat32, data.high, data.float32)]
        # JAX's documentation of jax.lax.Precision: a TPU multiplies one, three or six pairs of bfloat16 parts.
        assert passes == pytest.approx([1, 3, 6] if data.network is None else [2, 2, passes[2]]), kind


@pytest.mark.parametrize(('first', 'second'), [('one', 'two'), ('two', 'one')])
def test_transfers_share_one_link(first, second):
    send = f'f32[1000,1000]{{1,0}} all-reduce-start(%x), {GROUPS}, to_apply=%add, {NAME("gradients/psum")}'
    text = f"""{HEAD}ENTRY %main (x: f32[1000,1000]) -> f32[1000,1000] {{
  %x = f32[1000,1000]{{1,0}} parameter(0)
  %one = {send}
  %two = {send}
  %copy = f32[1000,1000]{{1,0}} copy(%x)
  %first = f32[1000,1000]{{1,0}} all-reduce-done(%{first})
  ROOT %second = f32[1000,1000]{{1,0}} all-reduce-done(%{second})
}}
"""
    found = model(text)
    assert found.step_seconds == pytest.approx(80e-6)
    assert found.exposed_seconds == pytest.approx(72e-6)
    # The copy takes 8 of the 40 us of the transfer that starts first, in whatever order the program waits.
    assert [each.hidden_bytes for each in found.transfers] == [pytest.approx(4e6 * 8 / 40), pytest.approx(0)]


LOOP = (
    HEAD
    + f"""%body (p: (s32[], f32[1000,1000])) -> (s32[], f32[1000,1000]) {{
  %p = (s32[], f32[1000,1000]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[1000,1000]{{1,0}} get-tuple-element(%p), index=1
  %z = f32[1000,1000]{{1,0}} copy(%y)
  %summed = f32[1000,1000]{{1,0}} all-reduce(%z), {GROUPS}, to_apply=%add, {NAME('fc6/psum')}
  ROOT %t = (s32[], f32[1000,1000]{{1,0}}) tuple(%i, %summed)
}}
%condition (p: (s32[], f32[1000,1000])) -> pred[] {{
  %q = (s32[], f32[1000,1000]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}}
ENTRY %main (x: f32[1000,1000]) -> f32[1000,1000] {{
  %x = f32[1000,1000]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %state = (s32[], f32[1000,1000]{{1,0}}) tuple(%zero, %x)
  %while = (s32[], f32[1000,1000]{{1,0}}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[1000,1000]{{1,0}} get-tuple-element(%while), index=1
}}
"""
)


def test_loops_count_as_often_as_they_run():
    found = model(LOOP)  # three times a copy of 8 us and an all-reduce of 40 us
    copy = found.work['z']
    assert (copy.executions, copy.bytes, copy.seconds) == (3, 8_000_000, pytest.approx(24e-6))
    assert (found.compute_seconds, found.exposed_seconds) == (pytest.approx(24e-6), pytest.approx(120e-6))
    [transfer] = found.transfers
    assert (transfer.bytes, transfer.seconds) == (pytest.approx(12e6), pytest.approx(120e-6))
    assert target_report.repeated_copies(Program(LOOP), found) == [
        'z, in a loop, copies 8,000,000 bytes 3 times per step'
    ]


def on_chip(product):
    """Returns a program for a TPU that copies an operand to on-chip memory, during a product if `product`."""
    dot = 'dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
    return f"""{HEAD}ENTRY %main (x: f32[1000,1000], w: f32[1000,2000]) -> f32[1000,1000] {{
  %x = f32[1000,1000]{{1,0:T(8,128)S(1)}} parameter(0)
  %w = f32[1000,2000]{{1,0:T(8,128)}} parameter(1)
  %start = (f32[1000,2000]{{1,0:T(8,128)S(1)}}, f32[1000,2000]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%w)
  %first = f32[1000,1000]{{1,0:T(8,128)S(1)}} {dot if product else 'negate(%x)'}
  %done = f32[1000,2000]{{1,0:T(8,128)S(1)}} copy-done(%start)
  ROOT %last = f32[1000,1000]{{1,0:T(8,128)}} slice(%done), slice={{[0:1000], [0:1000]}}
}}
"""


def test_copies_share_the_memory_with_products_and_wait_for_one_another():
    """Two copies of 8 us each run behind a product of 10 us, 4 of which read and write memory: 10 us are left."""
    dot = 'lhs_contracting_dims={1}, rhs_contracting_dims={0}'
    text = f"""{HEAD}ENTRY %main (x: f32[1000,1000], w: f32[1000,2000]) -> f32[1000,1000] {{
  %x = f32[1000,1000]{{1,0:T(8,128)S(1)}} parameter(0)
  %w = f32[1000,2000]{{1,0:T(8,128)}} parameter(1)
  %one = (f32[1000,2000]{{1,0:T(8,128)S(1)}}, f32[1000,2000]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%w)
  %two = (f32[1000,2000]{{1,0:T(8,128)S(1)}}, f32[1000,2000]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%w)
  %first = f32[1000,1000]{{1,0:T(8,128)}} dot(%x, %x), {dot}
  %done = f32[1000,2000]{{1,0:T(8,128)S(1)}} copy-done(%one)
  ROOT %last = f32[1000,2000]{{1,0:T(8,128)S(1)}} copy-done(%two)
}}
"""
    found = model(text, targets.Hardware(10**9, 1e12, 2e14, 2e14, 2e14, 1e12, 100e9))
    assert [found.work[name].seconds for name in ('first', 'one', 'two')] == [
        pytest.approx(10e-6),
        pytest.approx(2e-6),
        pytest.approx(8e-6),
    ]


def test_copies_continue_while_the_device_waits_for_a_collective():
    start = '(f32[1000,2000]{1,0:T(8,128)S(1)}, f32[1000,2000]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)'
    text = f"""{HEAD}ENTRY %main (x: f32[1000,1000], w: f32[1000,2000]) -> f32[1000,2000] {{
  %x = f32[1000,1000]{{1,0:T(8,128)}} parameter(0)
  %w = f32[1000,2000]{{1,0:T(8,128)}} parameter(1)
  %start = {start}
  %sum = f32[1000,1000]{{1,0:T(8,128)}} all-reduce(%x), {GROUPS}, to_apply=%add, {NAME('gradients/psum')}
  ROOT %done = f32[1000,2000]{{1,0:T(8,128)S(1)}} copy-done(%start)
}}
"""
    found = model(text)  # 40 us for the collective, behind which the copy of 8 us ends
    assert (found.exposed_seconds, found.compute_seconds) == (pytest.approx(40e-6), 0)


def test_on_chip_memory_of_tpus():
    # 8 MB are copied in 8 us, behind a product of 200 us without access to memory. The slice writes 4 MB.
    behind, waited = model(on_chip(True)), model(on_chip(False))
    assert {name: work.bytes for name, work in behind.work.items()} == {
        'start': 8_000_000,
        'first': 0,
        'last': 4_000_000,
    }
    assert behind.compute_seconds == pytest.approx(204e-6)
    assert behind.work['start'].seconds == 0
    assert waited.compute_seconds == pytest.approx(12e-6)
    assert waited.work['start'].seconds == pytest.approx(8e-6)


@pytest.mark.parametrize(
    ('layer', 'group', 'data', 'model_devices', 'gigabytes'),
    [  # hosts of 8, links of 100 GB/s, adapters of 10 GB/s
        ('gradients', 8, 8, 1, 100),  # one host
        ('fc6', 2, 32, 2, 100),  # neighbors
        ('gradients', 8, 8, 8, 10),  # one device per host
        ('gradients', 32, 32, 2, 40),  # four devices per host
        ('gradients', 16, 16, 4, 20),  # two devices per host
        ('fc6', 8, 8, 8, 100),  # along `model`, in one host
        ('metrics', 64, 8, 8, 80),  # all
        ('fc6', 16, 4, 16, 80),  # along `model`, which spans two hosts
    ],
)
def test_rate_between_hosts(layer, group, data, model_devices, gigabytes):
    found = Collective('all-reduce', layer, 'f32', ((8,),), group)
    assert roofline.link_rate(found, SLOW, data, model_devices) == gigabytes * 1e9


def collective(kind, layer, shape, dtype='f32', asynchronous=True):
    return Collective(kind, layer, dtype, (shape,), 2, 1, f'{kind}.{layer}', f'{kind}.{layer}' + 'd' * asynchronous)


def test_differences_from_the_design():
    designed = [
        collective('all-gather', 'conv3', (100,)),
        collective('reduce-scatter', 'conv3', (50,)),
        collective('all-gather', 'fc6', (100,)),
        collective('all-reduce', 'gradients', (1000,)),
    ]
    transfers = [roofline.Transfer([designed[-1]], 4000)]
    assert target_report.differences(designed, designed, transfers) == []
    found = [
        collective('all-gather', 'conv3', (100,), 'bf16'),
        collective('all-reduce', 'conv3', (100,)),
        collective('collective-permute', 'logits', (25,)),
        collective('all-reduce', 'gradients', (750,), asynchronous=False),
        collective('all-reduce', 'gradients', (250,)),
    ]
    transfers = [roofline.Transfer([each], each.bytes) for each in found[-2:]]
    assert target_report.differences(found, designed, transfers) == [
        'conv3: reduce-scatter became all-reduce (+200 bytes)',
        'conv3: all-gather sends 100 bytes instead of 200 (bf16 instead of f32)',
        'fc6: all-gather is missing (-200 bytes)',
        'logits: collective-permute was added (+100 bytes)',
        'gradients are sent in 2 collectives instead of 1',
        '75% of the gradient bytes are sent by synchronous collectives: nothing is computed meanwhile',
    ]


# FLOPs of the fixtures' forward pass by hand, for the 32 images of a pair and the tower of a device: 8 maps of 15 x 15,
# kernels of 11 x 11 x 3; 16 maps of 3 x 3, kernels of 3 x 3 x 8. All layers but conv1 have an input gradient.
CONV1, CONV5 = 2 * 32 * 15 * 15 * 8 * 11 * 11 * 3, 2 * 32 * 3 * 3 * 16 * 3 * 3 * 8
DENSE = 2 * 32 * (32 * 128 + 256 * 128 + 256 * 500)
FLOPS = 2 * CONV1 + 3 * (CONV5 + DENSE)
PADDED = 2 * 32 * 256 * (512 - 500)  # The GPU divides the sum over the 500 logits into equal parts.


@pytest.mark.parametrize(('platform', 'kind', 'flops'), [('tpu', 'v5e', FLOPS), ('gpu', 'h100', FLOPS + PADDED)])
def test_flops_of_real_programs(platform, kind, flops):
    found = roofline.simulate(program(platform), collectives(platform), targets.HARDWARE[kind], 4, 2)
    assert sum(work.flops * work.executions for work in found.work.values()) == flops


def test_bytes_of_parts_of_operands():
    found = Program("""HloModule parts, is_scheduled=true
%update (p0: f32[100,10], p1: f32[1,10], p2: s32[]) -> f32[100,10] {
  %p0 = f32[100,10]{1,0} parameter(0)
  %p1 = f32[1,10]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %twice = f32[1,10]{1,0} add(%p1, %p1)
  ROOT %updated = f32[100,10]{1,0} dynamic-update-slice(%p0, %twice, %p2, %p2)
}
ENTRY %main (x: f32[100,10], i: s32[]) -> f32[100,10] {
  %x = f32[100,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %buffer = f32[100,10]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %row = f32[1,10]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,10}
  %start = ((f32[100,10]{1,0}), f32[5,10]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:5], [0:10]}
  %end = f32[5,10]{1,0:T(8,128)S(1)} slice-done(%start)
  ROOT %fusion = f32[100,10]{1,0} fusion(%buffer, %row, %i), kind=kLoop, calls=%update
}
""")
    assert found.bytes('row') == 40 + 40 + 2 * 4  # a row, read and written, and the number twice
    assert found.bytes('fusion') == 40 + 40 + 40 + 4  # a row, the row before and after its update, and the number
    assert found.bytes('start') == 5 * 10 * 4  # the result is on the chip
    assert [found.bytes(name) for name in ('buffer', 'end', 'x')] == [0, 0, 0]


def test_flops_of_library_calls():
    convolution = 'window={size=5x5}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv'
    found = Program(f"""HloModule calls, is_scheduled=true
ENTRY %main (x: f32[2,9,9,6], w: f32[8,5,5,3]) -> f32[2,5,5,8] {{
  %x = f32[2,9,9,6]{{3,2,1,0}} parameter(0)
  %w = f32[8,5,5,3]{{3,2,1,0}} parameter(1)
  %forward = (f32[2,5,5,8]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %w), {convolution}Forward"
  %y = f32[2,5,5,8]{{3,2,1,0}} get-tuple-element(%forward), index=0
  %input = (f32[2,9,9,6]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%y, %w), {convolution}BackwardInput"
  %filter = (f32[8,5,5,3]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %y), {convolution}BackwardFilter"
  %a = f32[30,40]{{1,0}} parameter(2)
  %b = f32[40,50]{{1,0}} parameter(3)
  %product = (f32[30,50]{{1,0}}, s8[9]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm",\
 backend_config={{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}}}}
  %c = f32[4,40,30]{{2,1,0}} parameter(4)
  %d = f32[4,40,50]{{2,1,0}} parameter(5)
  %batched = (f32[4,30,50]{{2,1,0}}, s8[9]{{0}}) custom-call(%c, %d), custom_call_target="__cublas$gemm",\
 backend_config={{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}}
  ROOT %other = f32[2,5,5,8]{{3,2,1,0}} custom-call(%y, %y), custom_call_target="other"
}}
""")
    outputs = 2 * 5 * 5 * 8
    assert [found.flops(name) for name in ('forward', 'input', 'filter')] == [2 * outputs * 5 * 5 * 3] * 3
    assert (found.flops('product'), found.flops('batched')) == (2 * 30 * 40 * 50, 4 * 2 * 30 * 40 * 50)
    assert found.flops('other') == 0


# A fusion that only moves data (8 MB), an asynchronous copy to on-chip memory (8 MB), a loop of 3 executions of a copy
# (8 MB) and a negation (8 MB), an unbounded loop, and a gradient of 4 MB that is sent for 40 us, 20 of them during a
# product (12 MB).
PARTS = (
    LOOP.partition('ENTRY')[0].replace(f'all-reduce(%z), {GROUPS}, to_apply=%add', 'negate(%z)')
    + f"""%moves (p: f32[1000,1000]) -> f32[1000,1000] {{
  %part = f32[1000,1000]{{1,0}} parameter(0)
  ROOT %turned = f32[1000,1000]{{0,1}} transpose(%part), dimensions={{1,0}}
}}
%until (c: f32[1000,1000]) -> pred[] {{
  %c = f32[1000,1000]{{1,0}} parameter(0)
  ROOT %stop = pred[] custom-call(%c), custom_call_target="any"
}}
%again (s: f32[1000,1000]) -> f32[1000,1000] {{
  ROOT %s = f32[1000,1000]{{1,0}} parameter(0)
}}
ENTRY %main (x: f32[1000,1000]) -> f32[1000,1000] {{
  %x = f32[1000,1000]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %copy = (f32[1000,2000]{{1,0:S(1)}}, f32[1000,2000]{{1,0}}, u32[]{{:S(2)}}) copy-start(%x)
  %copied = f32[1000,2000]{{1,0:S(1)}} copy-done(%copy)
  %fusion = f32[1000,1000]{{0,1}} fusion(%x), kind=kLoop, calls=%moves
  %state = (s32[], f32[1000,1000]{{1,0}}) tuple(%zero, %x)
  %while = (s32[], f32[1000,1000]{{1,0}}) while(%state), condition=%condition, body=%body
  %unknown = f32[1000,1000]{{1,0}} while(%x), condition=%until, body=%again
  %start = f32[1000,1000]{{1,0}} all-reduce-start(%x), {GROUPS}, to_apply=%add, {NAME('gradients/psum')}
  %dot = f32[1000,1000]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %done = f32[1000,1000]{{1,0}} all-reduce-done(%start)
  %last = f32[1000,1000]{{1,0}} all-reduce(%done), {GROUPS}, to_apply=%add, {NAME('metrics/psum')}
  ROOT %end = f32[2,3,3,4]{{3,2,1,0}} custom-call(%x, %x), dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$conv"
}}
"""
)


def test_counts_of_a_program_equal_hand_numbers(monkeypatch):
    monkeypatch.setattr(target_report, '_memory', lambda *_: {})
    found = step_collectives(PARTS, PARTS, 2)
    target = targets.parse_target('h100:2')
    slow = types.SimpleNamespace(text='h', devices=2, hardware=dataclasses.replace(SLOW, tensorfloat32=1e14))
    compiled = types.SimpleNamespace(as_text=lambda: PARTS)
    cpu = {'wire_bytes_per_device': 0, 'peak_bytes_per_device': 0, 'collectives': found}
    settings = audited_config('h100:2', 'data:2,model:1')
    compiler = targets.Compiler('c', '1', 'library', False)
    made = target_report.make(settings, slow, compiler, 'k', compiled, found, cpu, 1.0)
    assert target.devices == made['devices']
    small = 2 * 3 * 3 * 4 * 4 + 2 * 4_000_000  # the call of cuDNN: its result and its two operands
    assert made['accessed_bytes'] == {
        'total': 8_000_000 + 8_000_000 + 3 * 16_000_000 + 12_000_000 + small,
        'asynchronous_copies': 8_000_000,
        'loops': 3 * 16_000_000,
    }
    assert made['copies'] == {
        'kernels': 2,
        'bytes': 8_000_000 + 3 * 8_000_000,
        'only_moving': 2,
        'only_moving_bytes': 8_000_000 + 3 * 8_000_000,
    }
    assert made['kernels'] == {'number': 6, 'launches': 10, 'unbounded_loops': 1}
    assert made['gradient_collectives'] == {'number': 1, 'bytes': 4_000_000, 'synchronous': 0}
    assert made['gradient_bytes_behind_compute'] == pytest.approx(0.5)
    assert made['convolutions'] == {'NCHW': 1}
    assert made['products'] == {'f32 default': 2}
    assert made['differences'] == [
        'z, in a loop, copies 8,000,000 bytes 3 times per step',
    ]


@pytest.fixture
def report():
    """A report about the GPU fixture, with numbers in place of JAX's compiled step and of the report of a CPU."""
    target = targets.parse_target('h100:8')
    compiler = targets.Compiler('jax-cuda12-pjrt', '1.2.3', 'library', False)
    memory = types.SimpleNamespace(
        argument_size_in_bytes=7 * 10**10,
        temp_size_in_bytes=10**10,
        output_size_in_bytes=7 * 10**10,
        alias_size_in_bytes=6 * 10**10,
    )
    compiled = types.SimpleNamespace(as_text=lambda: hlo_text('gpu'), memory_analysis=lambda: memory)
    settings = audited_config('h100:8', 'data:4,model:2')
    found = collectives('gpu')
    whole = {
        'layout': 'towers',
        'mesh': {'data': 4, 'model': 2},
        'batch_size': 128,
        'batch_per_device': 16.0,
        'parameters': 1,
        'multiply_adds': 1,
        'flops_per_device': 1,
        'compiler_flops_per_device': None,
        'peak_bytes_per_device': 123,
        'collectives': found,
        'wire_bytes_per_device': 2000,
        'analytic_minimum_bytes': 1000,
        'layers': [],
    }
    part = target_report.make(settings, target, compiler, 'NVIDIA H100', compiled, found, {**whole}, 12.3)
    return {**whole, 'target': part}


def test_report_in_text(report):
    found = report_text.as_text(report)
    for line in (
        r'compiled for 8 x NVIDIA H100 \(h100:8\) in 12 s by jax-cuda12-pjrt 1.2.3 and jax .*; not run',
        'bytes sent +2,000  2.0000 of the lower bound of this layout, 1,000',
        'compiled for CPU +2,000  bytes sent; 123 of memory',
        'memory, bytes +90,000,000,000  DOES NOT FIT: state and batch 70,000,000,000 [+] step 20,000,000,000,'
        ' of 84,929,347,584',
        'products +14  convolutions and matrix products: 14 f32 default',
        'cuDNN +5  convolutions: 5 NHWC',
        f'gradient bytes +{6 * NUMBERS:,}  collectives: 1, bytes of the synchronous ones: 0',
        'modeled, not measured: .*3,352 GB/s, link 450 GB/s.*',
        'at least [0-9.]+ ms per step, at most [0-9,]+ images/s',
        r'reduce-scatter +logits .* asynchronous  f32 8x500 \(4 times\)',
    ):
        assert re.search(f'^{line}$', found, re.MULTILINE), line
    assert 'differences' not in found  # The collectives are compared with themselves.


def test_report_in_json(report):
    found = json.loads(report_text.as_json(report))
    part = found['target']
    assert part['executed'] is False
    assert part['memory'] == {
        'state': 7 * 10**10,
        'step': 2 * 10**10,
        'total': 9 * 10**10,
        'available': 84_929_347_584,
        'fits': False,
    }
    gradients = [each for each in found['collectives'] if each['layer'] == 'gradients']
    assert part['gradient_collectives']['bytes'] == sum(each['bytes'] for each in gradients)
    assert part['roofline']['images_per_second'] == pytest.approx(128 / part['roofline']['step_seconds'])
    assert part['hardware']['bandwidth'] == 3.352e12
    assert part['kernels']['launches'] > part['kernels']['number']
    assert len(part['roofline']['costliest']) == 5


def test_table_of_all_presets_resumes(tmp_path, monkeypatch, capsys):
    names = audit_targets.case_names('^h100:8/(paper|torchvision|cifar10_11pct)/.*/float32')
    assert [name.split('/')[1:3] for name in names] == [
        ['paper', 'data'],
        ['paper', 'towers'],
        ['paper', 'hybrid'],
        ['torchvision', 'data'],
        ['torchvision', 'hybrid'],
        ['cifar10_11pct', 'data'],
    ]
    log = tmp_path / 'targets.jsonl'
    monkeypatch.setattr(audit_targets, 'LOG', log)
    log.write_text(f'{{"case": "{names[0]}"}}\n{{"case": "{names[1]}", "error": "killed"}}\n')
    audit_targets.run_cases(names[:2], str(tmp_path))  # no compilers
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line['case'] for line in lines] == [names[0], names[1], names[1]]
    assert re.match('--target=h100:8: .* is not in .*; pip install', lines[2]['error'])
    assert f'2 cases, 1 of them in {log}' in capsys.readouterr().out


def test_summary_of_efficiencies_equals_hand_numbers(tmp_path, monkeypatch, capsys):
    """Compute 6 ms; 3 ms of sending at 1 GB/s, of which 1 MB, 1 ms, is no gradient; a step of 8 ms."""
    roof = {'compute_seconds': 6e-3, 'communication_seconds': 3e-3, 'step_seconds': 8e-3}
    line = {'roofline': roof, 'hardware': {'link': 1e9}, 'gradient_collectives': {'bytes': 2_000_000}}
    log = tmp_path / 'targets.jsonl'
    case = {'case': 'h100:8/paper/data/float32', 'wire_bytes_per_device': 3_000_000, 'target': line}
    log.write_text(json.dumps(case) + '\n' + json.dumps(case | {'case': 'h100:8/half/data/float32'}) + '\n')
    monkeypatch.setattr(audit_targets, 'LOG', log)
    audit_targets.print_summary()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| `')]
    # 6 / (6 + 3), 6 / 8, and 6 / (1 + the larger of 6 and 2)
    assert rows == ['| `h100:8` | `data` | float32 | 67% | **75%** | 86% |']


def test_row_of_the_table(report):
    row = audit_targets.table_row({'case': 'h100:8/paper/towers/float32', **report})
    assert re.fullmatch(
        r'\| `paper` \| `towers` \| float32 \| 0.0 \(2.000\) \| \d+% \| 90,000 \(does not fit\) \| 0.04'
        r' \| 0.01 \+ 0.00 \| [\d,]+ \| \d+% \|',
        row,
    )
