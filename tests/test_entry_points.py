"""The command `alexnet`, configurations by name, and commands that work from any folder."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from helpers import ROOT, refusal, run_command, usage_error

import alexnet_jax
from alexnet_jax import __version__, cli, config_files
from alexnet_jax.__main__ import COMMANDS
from alexnet_jax.config import ConfigError, default_config
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.presets import PRESETS
from alexnet_jax.runtime import commands
from alexnet_jax.runtime.workdir import CheckpointError


def alexnet(*arguments: str, cwd: Path, program=('-m', 'alexnet_jax')) -> subprocess.CompletedProcess:
    """Runs `alexnet` in a folder without files of the project."""
    return run_command(*program, *arguments, cwd=cwd, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h'], ['help']])
def test_help_lists_the_commands(tmp_path, arguments):
    run = alexnet(*arguments, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, '')
    listed = [line.split()[0] for line in run.stdout.splitlines() if line.startswith('  ')]
    assert listed == ['train', 'prepare', 'evaluate', 'predict', 'figures', 'report', 'convert', 'audit']


@pytest.mark.parametrize('name', COMMANDS)
def test_each_command_has_its_help(tmp_path, name):
    run = alexnet(name, '--help', cwd=tmp_path)
    assert f'    alexnet {name}' in run.stdout
    assert '\nflags:\n' in run.stdout
    assert ('  --config: ' in run.stdout) == (name in ('train', 'audit'))
    assert alexnet('--help', cwd=tmp_path, program=['-m', COMMANDS[name][0]]).stdout == run.stdout


def test_version(tmp_path):
    assert alexnet('--version', cwd=tmp_path).stdout == f'alexnet_jax {__version__}\n'
    assert f'\n## [{__version__}]' in (ROOT / 'CHANGELOG.md').read_text()
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == __version__


@pytest.mark.parametrize(('name', 'hint'), [('trian', '; did you mean train? The'), ('xyz', '. The')])
def test_unknown_command_is_refused(tmp_path, name, hint):
    message = usage_error(alexnet(name, cwd=tmp_path))
    assert message.startswith(f"'{name}' is not a command{hint} commands are train, ")


def test_package_import_loads_no_libraries():
    program = "import sys; import alexnet_jax; print(sorted({'jax', 'numpy', 'absl', 'matplotlib'} & set(sys.modules)))"
    run = run_command('-c', program)
    assert run.stdout == '[]\n'


def test_public_names_are_imported_on_first_access():
    program = """
import sys, alexnet_jax
assert {'AlexNet', 'PRESETS', 'TrainedModel', 'create', 'default_config', 'load'} <= set(dir(alexnet_jax))
assert alexnet_jax.PRESETS['paper'] and 'absl' not in sys.modules
assert alexnet_jax.default_config() and 'jax' not in sys.modules
print(alexnet_jax.load.__module__, alexnet_jax.AlexNet.__module__)
"""
    run = run_command('-c', program)
    assert (run.stdout, run.stderr) == ('alexnet_jax.inference.loading alexnet_jax.model\n', '')
    assert alexnet_jax.default_config is default_config
    assert alexnet_jax.PRESETS is PRESETS
    with pytest.raises(AttributeError, match="module 'alexnet_jax' has no attribute 'AlexNets'"):
        _ = alexnet_jax.AlexNets


@pytest.mark.parametrize(
    ('error', 'code', 'message'),
    [
        (ConfigError('config.seed: -1'), 2, 'config.seed: -1'),
        (CheckpointError('run: corrupt'), 2, 'run: corrupt'),
        (KeyError('usage'), 2, "'usage'"),
        (DatasetError('data: corrupt'), 1, 'data: corrupt'),
        (FileNotFoundError(2, 'No such file or directory', 'a.png'), 1, 'a.png: No such file or directory'),
        (OSError('disk'), 1, 'disk'),
        (IndexError('failure'), 1, 'failure'),
        (KeyboardInterrupt(), 130, 'stopped; rerun'),
    ],
)
def test_known_errors_become_one_line_and_an_exit_code(capsys, error, code, message):
    def command(argv):
        assert argv == ['alexnet']
        raise error

    options = {'usage_errors': (KeyError,), 'failures': (IndexError,), 'interrupted': 'stopped; rerun'}
    assert cli.exit_code(command, ['alexnet'], **options) == code
    assert capsys.readouterr() == ('', f'alexnet_jax: {message}\n')


def test_unknown_errors_are_raised():
    with pytest.raises(ZeroDivisionError):
        cli.exit_code(lambda argv: 1 // 0, ['alexnet'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['prepare', '--max_bad=0.1'], '--max_bad was renamed to --max_corrupt_fraction'),
        (['figures', 'neighbours', 'run'], 'neighbours was renamed to neighbors'),
        (['evaluate', 'run', '--max_bad=0.1'], "Unknown command line flag 'max_bad'"),
        (['audit', '--config.data.max_bad=0'], 'config.data.max_bad was renamed to config.data.max_corrupt_fraction'),
    ],
)
def test_old_names_are_refused_with_the_new_name(tmp_path, arguments, message):
    assert usage_error(alexnet(*arguments, cwd=tmp_path)) == message


def test_several_sources_are_refused(tmp_path):
    for file in ('train-0.tar', 'train-1.tar'):
        (tmp_path / file).touch()
    for command, flag in (('prepare', '--source'), ('train', '--config.data.source')):
        sources = [f'{flag}=wds:{tmp_path}/train-{i}.tar' for i in (0, 1)]  # what a shell makes of train-{0..1}.tar
        message = usage_error(run_command('-m', 'alexnet_jax', command, *sources))
        assert 'several sources' in message
        assert 'quotation marks' in message


def test_old_names_of_switches_are_refused_too(monkeypatch, capsys):
    values = flags.FlagValues()
    flags.DEFINE_bool('neighbors', True, 'Help.', flag_values=values)
    monkeypatch.setattr(flags, 'FLAGS', values)
    for argument in ('--noneighbours', '--neighbours=false', '-neighbours'):
        with pytest.raises(SystemExit, match='2'):
            cli.parse_flags(['report', argument])
    assert capsys.readouterr().err.splitlines() == [
        'alexnet_jax: --noneighbours was renamed to --noneighbors',
        *['alexnet_jax: --neighbours was renamed to --neighbors'] * 2,
    ]


def test_configurations_are_found_by_name_and_files_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find('imagenet:caffe') == f'{ROOT}/configs/imagenet.py:caffe'
    assert config_files.call('quickstart', 'get_config').model.num_classes == 16
    assert config_files.call('imagenet:caffe', 'get_config').model.preset == 'caffe'
    (tmp_path / 'quickstart').write_text('def get_config():\n    return 3\n')
    assert config_files.call('quickstart', 'get_config') == 3


@pytest.mark.parametrize(
    ('config', 'reason'),
    [
        ('configs/imagenet.py:caffe', "no file 'configs/imagenet.py'; did you mean --config=imagenet:caffe?"),
        ('./quickstart', "no file './quickstart'; did you mean --config=quickstart?"),
        (f'{ROOT}/configs/quickstart', 'did you mean --config=quickstart?'),
        ('../quickstart', "no file '../quickstart'; did you mean --config=quickstart?"),
        ('nothing', "no file 'nothing'. The configs of this package are ablations, cifar10, "),
        ('', "no file ''. The configs of this package are"),
    ],
)
def test_missing_config_names_the_nearest_ones(tmp_path, monkeypatch, config, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(config_files.find, config)


def test_files_of_the_package_are_recorded_by_name(tmp_path, monkeypatch):
    assert config_files.name_of(f'{ROOT}/configs/imagenet.py:caffe') == 'imagenet:caffe'
    assert config_files.name_of(f'{ROOT}/configs/quickstart.py') == 'quickstart'
    monkeypatch.chdir(tmp_path)
    assert config_files.name_of('configs/quickstart.py:a') == f'{tmp_path}/configs/quickstart.py:a'
    assert config_files.name_of(f'{tmp_path}/quickstart.py') == f'{tmp_path}/quickstart.py'


def test_sweep_of_the_package_is_listed_from_any_folder(tmp_path):
    for config in (['--config=ablations:photos'], ['--config', 'ablations:photos']):
        run = alexnet('train', *config, '--sweep=list', '--workdir=w', cwd=tmp_path)
        assert (run.returncode, run.stderr) == (0, '')
        assert '40 runs;' in run.stdout
    assert os.listdir(tmp_path) == []


def test_command_line_is_recorded_as_typed(tmp_path):
    program = """
import sys
from alexnet_jax.cli import define_config_flag, parse_flags
config = define_config_flag()
parse_flags(sys.argv)
print(sys.argv[1:], config.value.model.num_classes)
"""
    run = alexnet('--config=quickstart', cwd=tmp_path, program=['-c', program])
    assert run.stdout == "['--config=quickstart'] 16\n"
    assert alexnet(cwd=tmp_path, program=['-c', program]).stdout == '[] 16\n'


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The script `alexnet` of an environment in which the package is installed from this repository, as make does."""
    packages = tmp_path / 'environment' / 'lib' / 'site-packages'
    record = packages / f'alexnet_jax-{__version__}.dist-info'
    record.mkdir(parents=True)
    (record / 'METADATA').write_text(f'Metadata-Version: 2.4\nName: alexnet_jax\nVersion: {__version__}\n')
    (record / 'RECORD').write_text('../../bin/alexnet,,\n')
    (record / 'direct_url.json').write_text(json.dumps({'url': ROOT.as_uri(), 'dir_info': {'editable': True}}))
    script = tmp_path / 'environment' / 'bin' / 'alexnet'
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setattr(sys, 'path', [str(packages), *sys.path])
    monkeypatch.setattr(sys, 'executable', str(script.parent / 'python'))
    monkeypatch.chdir(tmp_path)
    return script


def test_shell_command_names_the_installed_script(installed, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', '/usr/bin')
    assert commands.shell_command('report', 'my run') == f"{shlex.quote(str(installed))} report 'my run'"
    monkeypatch.setenv('PATH', f'/usr/bin:{installed.parent}')
    assert commands.shell_command('report', 'my run') == "alexnet report 'my run'"
    (tmp_path / 'links').mkdir()  # as pipx does
    (tmp_path / 'links' / 'alexnet').symlink_to(installed)
    monkeypatch.setenv('PATH', str(tmp_path / 'links'))
    assert commands.shell_command('report') == 'alexnet report'
    (tmp_path / 'links' / 'alexnet').unlink()
    shutil.copy(installed, tmp_path / 'links')  # another program of that name
    assert commands.shell_command('report') == f'{installed} report'


@pytest.mark.parametrize('origin', [{'url': 'file:///elsewhere', 'dir_info': {'editable': True}}, {}])
def test_shell_command_does_not_name_the_script_of_a_copy(installed, origin):
    [record] = installed.parent.parent.glob('lib/site-packages/*.dist-info')
    (record / 'direct_url.json').write_text(json.dumps(origin))
    assert commands.shell_command('report').startswith(f'PYTHONPATH={shlex.quote(str(ROOT))}$')


def test_shell_command_without_an_installed_package(installed, tmp_path, monkeypatch):
    installed.unlink()
    interpreter = installed.parent / 'python'
    interpreter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.base_prefix)}/bin/python3 "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.delenv('PYTHONPATH', raising=False)
    pasted = commands.shell_command('--version')
    paths = f'{shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}'
    assert pasted == f'PYTHONPATH={paths} {interpreter} -P -m alexnet_jax --version'
    run = subprocess.run(['sh', '-c', pasted], cwd='/', capture_output=True, text=True)
    assert run.stdout == f'alexnet_jax {__version__}\n'


def test_child_process_runs_this_package(tmp_path, monkeypatch):
    (tmp_path / 'alexnet_jax').mkdir()
    (tmp_path / 'alexnet_jax' / '__init__.py').touch()
    (tmp_path / 'alexnet_jax' / 'prepare.py').write_text('print("another one")\n')
    run = subprocess.run(
        commands.child_command('prepare', '--help'),
        cwd=tmp_path,
        env=commands.child_environment(),
        capture_output=True,
        text=True,
    )
    assert '    alexnet prepare' in run.stdout
