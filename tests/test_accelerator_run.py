"""`make gpu` and `make tpu`: a rehearsal on a CPU, and parts that fail, hang, do not fit or lack a package."""

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
from helpers import ROOT, read_json, run_command, wait_for

from alexnet_jax.audit.targets import parse_target
from benchmarks import accelerator, accelerator_summary
from benchmarks.accelerator import Part


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs a part of Python code with so many seconds left."""

    def run_code(code: str, left: float = 60, limit: int = 60, seconds: int = 1, needs=()) -> dict:
        part = Part('part', [sys.executable, '-c', code], seconds, limit, needs, {'GIVEN': '7'})
        return accelerator.run(part, {'GIVEN': '6', 'OTHER': '5'}, left, str(tmp_path))

    return run_code


def test_results_are_the_lines_of_json(run, tmp_path):
    result = run('import os; print("text\\n{broken\\n{\\"a\\": " + os.environ["GIVEN"] + os.environ["OTHER"] + "}")')
    assert (result['status'], result['rows'], result['note']) == ('passed', [{'a': 75}], '')
    assert (tmp_path / 'part.out').read_text().startswith('text\n')
    assert run('import json; print(json.dumps({"a": {"b": 1}}, indent=1))')['rows'] == [{'a': {'b': 1}}]


def test_failed_part_keeps_what_it_measured(run):
    result = run('import sys; print(\'{"a": 1}\', flush=True); sys.exit("no memory")')
    assert (result['status'], result['rows'], result['note']) == ('failed', [{'a': 1}], 'exit code 1: no memory')


def has_ended(pid: int) -> bool:
    """Returns whether the process has ended, even if nobody waits for it."""
    state = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] in ('', 'Z')


def test_hanging_part_is_killed_with_its_children(run, tmp_path):
    child = 'import time; time.sleep(999)'
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {child!r}])
print('{{"pid": ' + str(child.pid) + '}}', flush=True)
child.wait()
"""
    for left, limit in ((60, 2), (2, 60)):
        begin = time.monotonic()
        result = run(code, left, limit)
        assert time.monotonic() - begin < 30
        assert (result['status'], result['note']) == ('timeout', 'killed after 2 s')
        wait_for(lambda pid=result['rows'][0]['pid']: has_ended(pid), 10)


def test_part_that_does_not_fit_is_not_run(run, tmp_path):
    result = run('print(1)', left=9.5, seconds=10)
    assert (result['status'], result['note']) == ('not run', 'takes 10 s, and 10 s were left')
    result = run('print(1)', needs=('json', 'no_such_package', 'neither'))
    assert (result['status'], result['note']) == ('skipped', 'needs no_such_package, neither')
    assert not os.listdir(tmp_path)


def test_parts_are_ordered_by_worth_and_the_names_are_documented():
    names = [part.name for part in accelerator.parts('gpu', 'NVIDIA H100 80GB HBM3', '')]
    assert names[:4] == ['tests', 'steps', 'audit', 'peers-float32-128']
    assert sorted(name for name in names if name.startswith('peers')) == sorted(
        f'peers-{kind}-{size}' for kind in ('float32', 'exact', 'bfloat16') for size in (128, 1024)
    )
    documented = {line.split()[0] for line in accelerator.__doc__.splitlines() if line.startswith('  ')}
    assert {name.partition('-')[0] for name in names} <= {word.partition('-')[0] for word in documented}


@pytest.mark.parametrize(
    ('kind', 'target'),
    [
        ('NVIDIA A100-SXM4-80GB', 'a100:1'),
        ('NVIDIA A100-SXM4-40GB', None),
        ('NVIDIA H100 80GB HBM3', 'h100:1'),
        ('NVIDIA H100 PCIe', None),
        ('NVIDIA H200', 'h200:1'),
        ('NVIDIA GH200 480GB', None),
        ('NVIDIA L4', None),
        ('TPU v4', 'v4:2x2x1'),
        ('TPU v4 lite', None),
        ('TPU v5', 'v5p:2x2x1'),
        ('TPU v5 lite', 'v5e:2x2'),
        ('TPU v6 lite', 'v6e:2x2'),
        ('TPU7x', 'tpu7x:2x2x1'),
    ],
)
def test_audit_is_for_the_card_and_the_measured_network(kind, target, tmp_path):
    [part] = (part for part in accelerator.parts('gpu', kind, '') if part.name == 'audit')
    if target is None:
        result = accelerator.run(part, {}, 600, str(tmp_path))
        assert (result['status'], result['note']) == ('skipped', f'there is no data sheet of {kind!r}')
    else:
        flags = part.command[part.command.index('audit') + 1 :]
        assert flags == ['--config=imagenet', f'--target={target}', '--images_per_device=128', '--json']
        assert parse_target(target).devices in (1, 4, 8)
    assert part.environment == {'JAX_PLATFORMS': 'cpu'}


def test_resumed_training_is_deterministic_on_gpus():
    [part] = (part for part in accelerator.parts('gpu', 'NVIDIA H200', '') if part.name == 'resume')
    assert part.environment == {'XLA_FLAGS': '--xla_gpu_deterministic_ops=true'}


def test_summary_of_hand_numbers():
    step = {'dtype': 'float32', 'precision': 'default', 'batch_size': 128, 'images_per_second': 20000.0}
    step |= {'best_images_per_second': 21000.0, 'compile_seconds': 9.0, 'state': 5e8, 'temporary': 7e8}
    target = {'devices': 4, 'roofline': {'images_per_second': 160000.0}, 'memory': {'total': 13e8}}
    peer = {'dtype': 'float32', 'precision': 'default', 'batch_size': 128, 'share_of_product': {'jax': 0.25}}
    peer |= {'images_per_second': 900.0, 'torch_images_per_second': 450.0, 'torch_ratio': 2.0}
    peer |= {'forward_images_per_second': 2700.0, 'forward_share_of_product': {'jax': 0.5}}
    metrics = [
        {'split': 'train', 'images_per_second': speed, 'input_wait': 0.25, 'loss': 2.5} for speed in (1, 70, 80, 90)
    ]
    results = [
        {'name': 'steps', 'rows': [step | {'memory_stats': {'peak_bytes_in_use': 12e8}}]},
        {'name': 'peers-float32-128', 'rows': [peer]},
        {'name': 'audit', 'rows': [{'target': target}]},
    ]
    results = [each | {'status': 'passed', 'seconds': 1.0, 'note': 'a|b'} for each in results]
    device = {'count': 1, 'kind': 'H', 'jax': '1', 'jaxlib': '2', 'client': 'c', 'machine': 'm'}
    page = accelerator_summary.summary({'device': device, 'date': 'd'}, results, metrics)
    for line in (
        '| steps | passed | 1 | a\\|b |',
        '| float32 | default | 128 | 20,000 | 21,000 | 9 | 500 MB | 700 MB | 1,200 MB |',
        '| float32 | default | 128 | train | 900 | 450 | 2.00 | 0.25 |',
        '| float32 | default | 128 | forward | 2,700 | absent |  | 0.50 |',
        '80 images/s, 25.0% of the time waiting for input, last loss 2.500.',
        '| images/s of a device | 40,000 | 20,000 | 0.50 |',
        '| bytes of a device | 1,300 MB | 1,200 MB |  |',
    ):
        assert line in page.splitlines(), page


def test_machine_without_the_accelerator_is_told_what_to_install(tmp_path):
    run = run_command('benchmarks/accelerator.py', f'--output={tmp_path}', CUDA_VISIBLE_DEVICES='-1')
    assert (run.returncode, run.stdout) == (2, '')
    assert run.stderr.startswith('accelerator: jax finds no GPU (')
    assert 'install jax[cuda12] or jax[cuda13]' in run.stderr
    assert run.stderr.count('\n') == 1
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_rehearsal_packs_its_results(tmp_path):
    wanted = ['tests', 'steps', 'precision']
    flags = ('--platform=cpu', f'--output={tmp_path}', f'--parts={",".join(wanted)}')
    run = run_command('benchmarks/accelerator.py', *flags)
    assert (run.returncode, run.stderr) == (0, ''), run.stdout
    (packed,) = tmp_path.glob('accelerator-cpu-*.tar.gz')
    folder = tmp_path / packed.name.removesuffix('.tar.gz')
    written = read_json(folder / 'results.json')
    assert [(part['name'], part['status']) for part in written['parts']] == [(name, 'passed') for name in wanted]
    tests, steps, precision = written['parts']
    assert tests['note'].startswith('8 passed')
    assert [row['precision'] for row in steps['rows']] == ['float32']
    assert {row['operation'] for row in precision['rows']} == {'convolution', 'product'}
    assert all(row['error'] < (1e-2 if row['precision'] == 'bfloat16' else 1e-6) for row in precision['rows'])
    with tarfile.open(packed) as archive:
        names = {name.removeprefix(f'{folder.name}/') for name in archive.getnames()}
        assert json.load(archive.extractfile(f'{folder.name}/results.json')) == written
    assert {'summary.md', 'logs/tests.out', 'logs/steps.err'} <= names
    assert run.stdout.splitlines()[-1] == str(packed)


@pytest.mark.parametrize('goal', ['gpu', 'tpu'])
def test_make_uses_the_python_that_is_there(goal, tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').write_text('#!/bin/sh\necho 3.11.1\n')  # an environment of another Python
    (tmp_path / 'bin' / 'python').chmod(0o755)
    command = [
        'make',
        '--dry-run',
        '--no-print-directory',
        goal,
        f'VENV={tmp_path}',
        'MINUTES=3',
        f'PYTHON={sys.executable}',
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, '')
    flags = run.stdout.replace('\\\n', '').removeprefix(f'"{sys.executable}" benchmarks/accelerator.py ').split()
    assert flags == [f'--platform={goal}', '--minutes=3', '--output=.']
