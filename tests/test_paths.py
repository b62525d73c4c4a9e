"""Unusual paths: they work, or a command refuses them at the start in one line."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    as_earlier_version,
    config_flags,
    environment,
    read_json,
    read_result,
    refusal,
    run_command,
    usage_error,
)
from PIL import Image

from alexnet_jax import cli, config_files, paths
from alexnet_jax.config import default_config, resolve
from alexnet_jax.data.dataset import dataset_dir, open_prepared
from alexnet_jax.data.images import UnreadableImage, read_file, read_image
from alexnet_jax.inference.images import expand_paths
from alexnet_jax.prepare.writer import PrepareConfig, prepare
from alexnet_jax.runtime.checkpoint_ref import check_new, parse_checkpoint_ref
from alexnet_jax.runtime.files import atomic_write, write_json
from alexnet_jax.runtime.workdir import check_resumable, is_finished

ODD = '-a "b\' $HOME %20 #{x}{} = @2;& ü e\u0301 😀 a:b ~'  # and a newline in the name of the run
RUN = f'{ODD}/run\nof a'
NOT_UTF8 = os.fsdecode(b'caf\xe9')
SMALL = {
    'model.widths': '(8,0,0,0,16,0,32)',
    'model.lrn': 'False',
    'model.towers': '1',
    'model.num_classes': '2',
    'train.steps': '2',
    'train.batch_size': '8',
    'eval.views': '1',
}
LATIN = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}


def write_pictures(folder: Path, count: int = 8) -> None:
    for split in ('train', 'val'):
        for label, name in enumerate(('cat', 'dog')):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([label, number]).integers(0, 256, (72, 72, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, compiled_programs):
    """A folder with pictures and a run, trained there with relative paths; and what the command printed."""
    folder = tmp_path_factory.mktemp('odd') / ODD
    write_pictures(folder / 'pi ctures')
    shutil.copy(ROOT / 'configs' / 'quickstart.py', folder / 'my config.py')
    data = {'data.source': 'folder:pi ctures', 'data.data_dir': f'da*t?a [x] \\ {ODD}'}
    arguments = ['--config=my config.py', f'--workdir={RUN}', *config_flags(SMALL | data)]
    run = run_command('-m', 'alexnet_jax', 'train', *arguments, cwd=folder, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def alexnet(*arguments, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    return run_command('-m', 'alexnet_jax', *arguments, cwd=cwd, PYTHONPATH=str(ROOT), **variables)


@pytest.mark.slow
def test_commands_work_from_another_folder(trained, tmp_path):
    folder, printed = trained
    workdir = folder / RUN
    assert read_result(workdir)['status'] == 'done'
    assert read_json(workdir / 'config.json')['data']['data_dir'] == f'{folder}/da*t?a [x] \\ {ODD}'
    evaluated = alexnet('evaluate', workdir, '--views=1', '--json', cwd=tmp_path)
    assert f'"top1_error": {read_result(workdir)["top1_error"]}' in evaluated.stdout
    command = printed[printed.index('\nreport ') :].removeprefix('\nreport').strip()
    report = subprocess.run(['sh', '-c', command], cwd='/', env=environment(), capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    assert (workdir / 'report.html').stat().st_size > 1000


@pytest.mark.slow
def test_printed_train_command_is_that_of_the_run(trained, tmp_path):
    from alexnet_jax.report.run_files import read_run

    folder, _ = trained
    shutil.copytree(folder / RUN, tmp_path / 'moved')
    command = read_run(str(tmp_path / 'moved')).train_command
    program = shlex.join([sys.executable, '-P', '-m', 'alexnet_jax'])
    command = command.replace('alexnet train', f'{program} train')
    run = subprocess.run(
        ['sh', '-c', command], cwd='/', env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, '')
    assert run.stdout.startswith(f'{tmp_path}/moved is done')


@pytest.mark.slow
def test_links_to_checkpoints(trained, tmp_path, monkeypatch):
    """A link in place of a CHECKPOINT names the same run and step; predictions are made from one of them."""
    folder, _ = trained
    run = tmp_path / 'run'
    shutil.copytree(folder / RUN, run)
    (tmp_path / 'whole').symlink_to('run')
    (tmp_path / 'step').symlink_to('run/checkpoints/2')
    (tmp_path / 'lowest').symlink_to(f'{run}/best')  # there is no such file: `best` selects a checkpoint
    (run / 'checkpoints' / 'latest').symlink_to('2')
    monkeypatch.chdir(tmp_path)
    found = {
        name: parse_checkpoint_ref(name)
        for name in ('whole', 'whole/', 'whole/../run/.', 'whole/best', 'step', 'lowest', 'run/checkpoints/latest')
    }
    assert {name: ref.selector for name, ref in found.items()} == {
        **dict.fromkeys(('whole', 'whole/', 'whole/../run/.'), 'newest'),
        **dict.fromkeys(('whole/best', 'lowest'), 'best'),
        **dict.fromkeys(('step', 'run/checkpoints/latest'), '2'),
    }
    assert {os.path.realpath(ref.workdir) for ref in found.values()} == {os.path.realpath(run)}
    picture = f'{folder}/pi ctures/val/dog/1.png'
    expected = alexnet('predict', run, picture, '--json', cwd=tmp_path).stdout
    assert '"probability"' in expected
    assert alexnet('predict', 'step', picture, '--json', cwd=tmp_path).stdout == expected
    resumed = alexnet(
        'train', *config_flags(SMALL | {'data.source': f'folder:{folder}/pi ctures'}), '--workdir=whole', cwd=tmp_path
    )
    assert resumed.stdout.startswith('whole is done'), resumed.stderr  # the link `latest` is no obstacle


# One process per command would take minutes; launch and the commands call these functions first.
def refuse(path: str, check=paths.check_folder) -> str:
    message = refusal(check, '--workdir', path)
    assert message.startswith('--workdir: ')
    assert ' cannot be used: ' in message
    assert not {'corrupt', 'remove'} & set(message.replace(';', ' ').split())
    return message


def test_paths_that_are_not_utf8(tmp_path, monkeypatch):
    for path in (NOT_UTF8, f'{NOT_UTF8}/run', f'/x/{NOT_UTF8}/../{NOT_UTF8}/y'):
        assert 'contains bytes that are not UTF-8' in refuse(path)
    (tmp_path / NOT_UTF8).mkdir()
    monkeypatch.chdir(tmp_path / NOT_UTF8)
    assert f'{tmp_path}/caf\\udce9/run' in refuse('run')
    assert paths.check_folder('--workdir', '/x') == '/x'


@pytest.mark.parametrize(
    ('path', 'reason'),
    [
        ('file', 'file is a file, not a folder'),
        ('file/run', 'file is a file, not a folder'),
        ('file/a/b/c', 'file is a file, not a folder'),
        ('dangling', 'dangling cannot be used: it is a link to nowhere, which does not exist'),
        ('loop', 'Too many levels of symbolic links'),
        ('loop/run', 'Too many levels of symbolic links'),
        ('x' * 256, 'File name too long'),
        ('ü' * 128, 'File name too long'),
        ('/'.join(['y' * 250] * 16), 'File name too long'),
        ('a\0b', 'contains a NUL character'),
        ('/s3/runs', 'etils.epath takes it for s3://runs;'),
        ('/gs/bucket/x', 'etils.epath takes it for gs://bucket/x;'),
    ],
)
def test_unusable_folders_are_refused(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'loop').symlink_to('loop')
    message = refuse(path)
    assert reason in message
    assert len(message) < 500


@pytest.mark.parametrize('path', ['a\\b', 'run*', 'run?', 'run[1]', 'gs:/x', 'bags:/x', '*/run'])
def test_names_that_orbax_rewrites_are_refused(path):
    """Orbax 0.12 writes a checkpoint to such a folder and does not find it there: the run would be lost."""
    assert 'which Orbax takes for a' in refuse(path, paths.check_run_path)


@pytest.mark.slow
def test_orbax_finds_no_checkpoint_under_names_that_are_refused(tmp_path):
    """If this test fails, the newest Orbax reads such names, and they need no longer be refused."""
    import orbax.checkpoint as ocp

    for name in ('a\\b', 'run[1]'):
        path = tmp_path / name / '1'
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {'a': np.arange(3)})
            checkpointer.wait_until_finished()
            with pytest.raises(ValueError, match='NOT_FOUND'):
                checkpointer.restore(path)


@pytest.mark.parametrize(
    'path', [ODD, RUN, 'gs:x', 's3:', 'file:/x', 'e\u0301', 'x' * 255, '.', '..', 'a/../b/', '~', '5']
)
def test_other_names_are_accepted(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert paths.check_run_path('--workdir', path) == os.path.abspath(os.path.expanduser(path))
    assert paths.check_folder('--workdir', path) == os.path.abspath(os.path.expanduser(path))


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['train', '--workdir={}'], '--workdir: '),
        (['train', '--config.data.data_dir={}'], 'config.data.data_dir: '),
        (['predict', '{}', 'x.png'], ''),
        (['prepare', '--source=folder:{}'], 'config.data.source: '),
    ],
)
def test_each_command_refuses_paths_that_are_not_utf8(tmp_path, arguments, reason):
    (tmp_path / NOT_UTF8).mkdir()
    arguments = [argument.format(NOT_UTF8) for argument in arguments]
    message = usage_error(alexnet(*arguments, cwd=tmp_path))
    problem = 'cannot be used: it contains bytes that are not UTF-8; rename the folder or use another path'
    assert message.endswith(f"{reason}'{tmp_path}/caf\\udce9' {problem}")
    assert os.listdir(tmp_path / NOT_UTF8) == []


@pytest.mark.parametrize('arguments', [['train', '--workdir=ü'], ['evaluate', 'ü']])
def test_locale_without_unicode_is_named(tmp_path, arguments):
    (tmp_path / 'ü').mkdir()
    message = usage_error(alexnet(*arguments, cwd=tmp_path, **LATIN))
    assert 'is not ASCII, and the encoding of file names is ascii; set a UTF-8 locale' in message


@pytest.mark.parametrize('arguments', [['train', '--workdir=/x'], ['prepare'], ['predict', 'run', 'x.png']])
def test_deleted_current_folder_is_named(tmp_path, arguments):
    gone = shlex.quote(str(tmp_path / 'gone'))
    command = shlex.join([sys.executable, '-m', 'alexnet_jax', *arguments])
    run = subprocess.run(
        ['sh', '-c', f'mkdir {gone} && cd {gone} && rmdir {gone} && exec {command}'],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert usage_error(run).endswith(': the current folder was deleted; change to another folder')


def test_new_run_folder_is_checked(tmp_path):
    (tmp_path / 'file').touch()
    check_new(str(tmp_path / 'a' / 'b'))
    for name, reason in {
        'file': 'is a file',
        NOT_UTF8: 'not UTF-8',
        'x' * 250: 'File name too long',  # with the ending of its temporary name
        'a*': 'takes for a pattern',
        '../..': 'already exists',
    }.items():
        assert reason in refusal(check_new, str(tmp_path / name))
    assert 'not to a URL' in refusal(check_new, 'gs://b/x')


def test_output_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    os.mkfifo(tmp_path / 'pipe.png')
    for path, reason in {
        'file/x.png': 'is a file, not a folder',
        f'{"x" * 252}.png': 'File name too long',
        'pipe.png': 'cannot be written',
        'no/x.png': 'cannot be written',
        'https://x/y.png': 'cannot be written',
        '/sys/x.png': 'is not writable',
    }.items():
        assert reason in refusal(cli.check_output, 'out', path, ('.png',))
    for path in (f'{"x" * 251}.png', f'{ODD} \n.png', f'{NOT_UTF8}.png'):
        assert cli.check_output('out', path, ('.png',)) == path
        with atomic_write(path) as file:
            file.write('a')
    assert len(os.listdir(tmp_path)) == 5


def test_config_with_a_colon_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a:b.py').write_text('def get_config():\n    return 3\n')
    (tmp_path / 'a b').mkdir()
    (tmp_path / 'a b' / "c'.py").write_text('def get_config():\n    return 3\n')
    assert "'a:b.py' contains a colon" in refusal(config_files.find, 'a:b.py')
    assert config_files.call("a b/c'.py", 'get_config') == 3
    assert config_files.name_of("a b/c'.py:p") == f"{tmp_path}/a b/c'.py:p"


def test_folders_of_a_config_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/a')
    config = default_config()
    for given, expected in {
        'data': f'{tmp_path}/data',
        '../d/': f'{tmp_path.parent}/d',
        '~/d': '/home/a/d',
        '/d': '/d',
        'gs://bucket/d': 'gs://bucket/d',
    }.items():
        config.data.data_dir = config.data.prepared_dir = given
        data = resolve(config).data
        assert (data.data_dir, data.prepared_dir) == (expected, expected)
    assert resolve(default_config()).data.prepared_dir is None


def test_long_sources_get_short_names(tmp_path):
    settings = default_config().data
    names = []
    for source in (f'folder:{"x" * 200}', *(f'folder:/{"ü/" * 300}{i}' for i in range(2)), f'folder:{"y" * 400}'):
        settings.source = source
        names.append(os.path.basename(dataset_dir(str(tmp_path), settings)))
    assert names[0].startswith(f'{"x" * 200}_')
    assert len(set(names)) == 4
    for name in names:
        assert len(os.fsencode(f'{name}.incomplete')) <= 255
        (tmp_path / f'{name}.incomplete').mkdir()


# Read-only folders.

# Root may write to folders of mode 555 unless the program gives up CAP_DAC_OVERRIDE (1) by PR_CAPBSET_DROP (24).
WITHOUT_OVERRIDE = """
import ctypes, os, sys
if os.geteuid() == 0:
    assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def unprivileged(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return run_command('-c', WITHOUT_OVERRIDE, '-m', 'alexnet_jax', *arguments, cwd=cwd, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_read_only_data_folder(tmp_path):
    write_pictures(tmp_path / 'pictures', count=2)
    read_only = tmp_path / 'ro'
    read_only.mkdir(0o555)
    source = ['prepare', '--source=folder:pictures', '--image_size=72', '--validation_fraction=0.5', '--workers=1']
    remedy = 'is not writable (Permission denied); set config.data.prepared_dir to a folder for prepared data sets'
    expected = f'config.data.data_dir: {read_only}/prepared cannot be used: {read_only} {remedy}'
    assert usage_error(unprivileged(*source, '--data_dir=ro', cwd=tmp_path)) == expected
    fields = {'data.source': 'folder:pictures', 'data.data_dir': 'ro'}
    assert usage_error(unprivileged('train', *config_flags(fields), cwd=tmp_path)) == expected
    assert usage_error(unprivileged('train', '--workdir=ro/run', cwd=tmp_path)).startswith(
        f'--workdir: {read_only}/run/checkpoints cannot be used: {read_only} is not writable'
    )
    elsewhere = unprivileged(*source, '--data_dir=ro', '--prepared_dir=other', cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert os.listdir(read_only) == []
    settings = default_config().data
    settings.source, settings.image_size = f'folder:{tmp_path}/pictures', 72
    directory = dataset_dir(str(read_only), settings, str(tmp_path / 'other'))
    name = os.path.basename(directory)
    assert name.startswith('pictures_')
    assert len(open_prepared(directory, settings).train) == 4
    # A data set that is already there is used as it is.
    read_only.chmod(0o755)
    (tmp_path / 'other').rename(read_only / 'prepared')
    (read_only / 'prepared' / f'{name}.lock').unlink()
    for folder in (read_only / 'prepared', read_only):
        folder.chmod(0o555)
    again = unprivileged(*source, '--data_dir=ro', cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, '')
    assert os.listdir(read_only / 'prepared') == [name]
    # So is a data set of an earlier version, by `alexnet prepare` and in training.
    for data_dir, typed in (('ro1', 'folder:pictures'), ('ro2', f'folder:{tmp_path}/pictures')):
        copy = Path(shutil.copytree(read_only / 'prepared' / name, tmp_path / data_dir / 'prepared' / name))
        earlier = re.sub(r'\W+', '_', typed) + '_72px'
        as_earlier_version(copy, tmp_path / 'pictures', typed, earlier)
        for folder in (copy.parent, copy.parent.parent):
            folder.chmod(0o555)
        again = unprivileged(*source, f'--data_dir={data_dir}', cwd=tmp_path)
        assert (again.returncode, again.stderr) == (0, '')
        assert os.listdir(copy.parent) == [earlier]
    trained = unprivileged('train', *config_flags(SMALL | fields | {'data.data_dir': 'ro1'}), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


def test_prepared_dir_is_no_setting_of_a_run(tmp_path):
    config = default_config()
    (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
    write_json(str(tmp_path / 'config.json'), resolve(config).to_dict())
    write_json(str(tmp_path / 'result.json'), {'status': 'done'})
    config.data.prepared_dir, config.data.data_dir = '/prepared', '/data'
    assert is_finished(resolve(config), str(tmp_path))
    check_resumable(resolve(config), str(tmp_path), every_field=True)
    config.data.mean = 'none'
    assert not is_finished(resolve(config), str(tmp_path))
    assert refusal(check_resumable, resolve(config), str(tmp_path), every_field=True).startswith('config.data.mean')


# Files in the current folder with the names of modules.

SHADOWED = ('random', 'queue', 'logging', 'json', 'typing', 'tempfile', 'collections', 'numpy', 'jax', 'orbax', 'absl')


@pytest.mark.slow
@pytest.mark.parametrize('program', [['-m', 'alexnet_jax', 'prepare'], ['-m', 'alexnet_jax.prepare'], ['script']])
def test_modules_of_the_current_folder_are_not_imported(tmp_path, program):
    write_pictures(tmp_path / 'pictures', count=2)
    for name in SHADOWED:
        (tmp_path / f'{name}.py').write_text('raise SystemExit(f"{__file__} was imported")\n')
    for name in ('configs', 'training', 'google'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('raise SystemExit(f"{__file__} was imported")\n')
    script = tmp_path / 'bin' / 'alexnet'
    script.parent.mkdir()
    script.write_text('from alexnet_jax.__main__ import main\nmain()\n')
    program = [script, 'prepare'] if program == ['script'] else program
    arguments = ['--source=folder:pictures', '--data_dir=d', '--image_size=72', '--workers=2']
    run = run_command(*program, *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr + run.stdout
    assert 'prepared' in run.stderr


@pytest.mark.slow
def test_launch_ignores_modules_of_the_current_folder(tmp_path):
    write_pictures(tmp_path / 'pictures', count=2)
    for name in (*SHADOWED, 'types', 'alexnet_jax'):
        (tmp_path / f'{name}.py').write_text('raise SystemExit(f"{__file__} was imported")\n')
    fields = {'data.source': 'folder:pictures', 'data.data_dir': 'd', 'model.num_classes': '3'}
    run = run_command(ROOT / 'launch.py', *config_flags(fields), cwd=tmp_path)
    assert run.stderr.splitlines()[-1].startswith('alexnet_jax: config.model.num_classes: 3'), run.stderr
    assert run.returncode == 2


def test_import_of_the_package_leaves_the_path_alone(tmp_path):
    (tmp_path / 'tool').mkdir()
    (tmp_path / 'tool' / '__init__.py').write_text('import alexnet_jax\n')
    (tmp_path / 'tool' / '__main__.py').write_text('import sys; print(sys.path[0])\n')
    (tmp_path / 'script.py').write_text('import alexnet_jax, sys; print(sys.path[0])\n')
    for program in (['-m', 'tool'], ['-m', 'tool', 'alexnet_jax'], ['script.py']):
        run = run_command(*program, cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert run.stdout == f'{tmp_path}\n', run.stderr
    run = run_command('-c', 'import alexnet_jax, sys; print(repr(sys.path[0]))', cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.stdout == "''\n"


# Images.


@pytest.mark.parametrize('brand', [b'heic', b'heix', b'mif1', b'hevc'])
def test_heic_is_named(brand):
    header = b'\0\0\0\x18ftyp' + brand + b'\0\0\0\0mif1heic'
    with pytest.raises(UnreadableImage, match='HEIC or AVIF, which Pillow does not read; convert it to JPEG or PNG'):
        read_image(header)
    with pytest.raises(UnreadableImage, match='not an image'):
        read_image(b'\0\0\0\x18ftypmp42' + bytes(100))


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('pipe')
    for name, reason in {'pipe': 'a pipe', 'link': 'a pipe', '/dev/zero': 'a device'}.items():
        with pytest.raises(UnreadableImage, match=f'^{reason}, not an image file$'):
            read_file(str(tmp_path / name))
    with pytest.raises(IsADirectoryError):
        read_file(str(tmp_path))


def test_pipe_in_a_class_folder_is_skipped(tmp_path):
    write_pictures(tmp_path / 'pictures', count=2)
    os.mkfifo(tmp_path / 'pictures' / 'train' / 'cat' / 'pipe.png')
    given = PrepareConfig(f'folder:{tmp_path}/pictures', 72, max_corrupt_fraction=0.5, workers=1)
    target = prepare(given, str(tmp_path / 'd'))
    assert read_json(Path(target) / 'skipped.jsonl')['reason'] == 'a pipe, not an image file'


@pytest.mark.parametrize('name', ['https://example.com/cat.jpg', 's3://b/c.png', 'file:///x.png', '-'])
def test_urls_and_standard_input_are_not_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f'{name}: ' in refusal(expand_paths, ['a.png', name])
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if not name.startswith('file:'):  # which is the same path as file:/x.png
        Path(name).touch()
        assert expand_paths([name]) == [name]  # a file with that name


def test_checkpoints_that_cannot_be_read_are_refused(tmp_path):
    assert 'not read from URLs' in refusal(parse_checkpoint_ref, 'gs://bucket/run')
    (tmp_path / 'loop').symlink_to('loop')
    assert 'Too many levels of symbolic links' in refusal(parse_checkpoint_ref, str(tmp_path / 'loop'))
    assert 'there is no folder' in refusal(parse_checkpoint_ref, str(tmp_path / 'missing'))
