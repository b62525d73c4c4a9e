"""The plan of --dry_run: the facts of the run that follows, the refusals of the real command, and no trace on disk."""

import dataclasses
import fcntl
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, config_flags, edit_manifest, read_lines, read_result, run_command, usage_error
from PIL import Image

from alexnet_jax.prepare import writer

SMALL = {
    'model.widths': '(8,0,0,0,16,0,32)',
    'model.lrn': False,
    'model.towers': 1,
    'model.num_classes': 2,
    'train.steps': 8,
    'train.batch_size': 4,
    'checkpoint.every': 4,
    'eval.batch_size': 4,
    'eval.every': '4 steps',
    'optimizer.schedule': 'constant',
}


CARD = [
    '12 training images (train/)',
    '3 validation images (val/)',
    '2 classes in this order: cat, dog',
    'smallest class: dog, 5 training images; largest class: cat, 7',
]


def train(*flags: str, home: Path | None = None, cwd: Path = ROOT, **variables: str):
    """Runs `alexnet train FLAGS`; the folders of the user are below `home`."""
    if home is not None:
        variables |= {'HOME': str(home), 'TMPDIR': str(home / 'tmp'), 'JAX_COMPILATION_CACHE_DIR': str(home / 'jax')}
        variables |= {'XDG_CACHE_HOME': str(home / 'cache'), 'JAX_ENABLE_COMPILATION_CACHE': 'true'}
        variables |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    return run_command('-m', 'alexnet_jax', 'train', *flags, cwd=cwd, PYTHONPATH=str(ROOT), **variables)


def plan(*flags: str, **options) -> dict[str, str]:
    """Returns the plan that --dry_run prints: the lines of each label, joined by newlines."""
    run = train('--dry_run', *flags, **options)
    assert (run.returncode, run.stderr) == (0, '')
    lines: dict[str, str] = {}
    label = ''
    for line in run.stdout.splitlines():
        label = line[:8].strip() or label
        lines[label] = f'{lines[label]}\n{line[8:]}' if label in lines else line[8:]
    return lines


def files_below(*folders: Path) -> dict[str, tuple]:
    """Returns type, size, time of the last change and content of everything below `folders`."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob('*')]:
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            found[str(path)] = status.st_mode, status.st_mtime_ns, content
    return found


def write_pictures(folder: Path) -> Path:
    """Writes 12 training and 3 validation images of two classes, and returns `folder`."""
    generator = np.random.default_rng(0)
    for split, name, count in (('train', 'cat', 7), ('train', 'dog', 5), ('val', 'cat', 2), ('val', 'dog', 1)):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(generator.integers(0, 255, (80, 80, 3), np.uint8))
            image.save(folder / split / name / f'{i}.png')
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of eight steps, in `workdir`, on the images in `pictures`, prepared in `data`."""

    pictures: Path
    data: Path
    workdir: Path

    @property
    def flags(self) -> list[str]:
        fields = SMALL | {'data.source': f'folder:{self.pictures}', 'data.data_dir': self.data}
        return [*config_flags(fields), f'--workdir={self.workdir}']


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp('run')
    run = Run(write_pictures(folder / 'pictures'), folder / 'data', folder / 'w')
    done = train(*run.flags)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def home(tmp_path) -> Path:
    folder = tmp_path / 'home'
    (folder / 'tmp').mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_plan_describes_the_run(run, home):
    folders = home, run.pictures, run.data, run.workdir
    before = files_below(*folders)
    new = plan(*run.flags, f'--workdir={home}/new', home=home)
    done = plan(*run.flags, home=home)
    longer = plan(*run.flags, '--config.train.steps=20', home=home)
    assert files_below(*folders) == before
    assert list(new) == list(longer) == ['config', 'data', 'mesh', 'steps', 'memory', 'disk', 'start']
    assert new['config'] == 'quickstart, preset paper'
    assert re.search(r'/data/prepared/\w+: prepared, \d+ kB\n', new['data'])
    assert new['data'].splitlines()[1:] == CARD
    assert new['mesh'].startswith('layout towers, data 1 x model 1, 4 images per device; this machine has 1 device (')
    assert new['steps'].startswith('8 steps of 4 images, 2.7 epochs; evaluation every 4 steps (2) and at')
    assert new['steps'].endswith('\nlearning rate 0.01, constant')
    assert new['start'] == f'starts at step 0 in {home}/new'
    assert list(done) == ['config', 'start']
    assert done['start'] == f'{run.workdir} is done; the command prints its result'
    assert longer['start'] == f'resumes {run.workdir} at step 8\nconfig.train.steps: 8 -> 20'
    # What the run did.
    assert read_result(run.workdir)['step'] == 8
    evaluated = [line['step'] for line in read_lines(run.workdir / 'metrics.jsonl') if line['split'] == 'validation']
    assert evaluated == [4, 8]


def test_plan_of_a_new_data_set_writes_nothing(tmp_path, home):
    work = tmp_path / 'work'
    work.mkdir()
    before = files_below(tmp_path)
    lines = plan(home=home, cwd=work)
    assert files_below(tmp_path) == before
    assert 'not prepared yet; the command prepares it from photos' in lines['data']
    assert '6,400 training images\n1,600 validation images\n16 classes in this order: astronaut, brick' in lines['data']
    assert 'training images per class: unknown before the preparation' in lines['data']
    assert f'about {8000 * 72 * 72 * 3 / 1e6:.0f} MB' in lines['data']
    assert lines['steps'].startswith(
        '1,600 steps of 64 images, 16.0 epochs; evaluation every 100 steps (16) and at the'
    )
    assert 'divided by 10 at steps 1,100, 1,400, 1,500' in lines['steps']
    assert lines['start'] == 'starts at step 0 in runs/quickstart'


def test_plan_looks_at_a_folder_of_images(tmp_path, home):
    pictures = write_pictures(tmp_path / 'pictures')
    flags = [*config_flags(SMALL | {'data.source': f'folder:{pictures}', 'train.steps': None}), '--workdir=w']
    before = files_below(tmp_path)
    lines = plan(*flags, home=home, cwd=home)
    assert files_below(tmp_path) == before
    assert 'not prepared yet' in lines['data']
    assert lines['data'].splitlines()[2:] == CARD
    assert f'about {15 * 72 * 72 * 3 / 1e3:.0f} kB' in lines['data']
    assert lines['steps'].startswith('48 steps of 4 images, 16.0 epochs')
    names = train('--dry_run', *flags, "--config.data.class_names=('cat','dgo')", home=home, cwd=home)
    assert f"'dgo' is not a class of folder:{pictures}; the nearest is 'dog'" in usage_error(names)


@pytest.mark.slow
def test_plan_of_a_corrupt_data_set_and_of_an_interrupted_preparation(run, tmp_path, home, monkeypatch):
    shutil.copytree(run.data, tmp_path / 'data')
    (prepared,) = (folder for folder in (tmp_path / 'data' / 'prepared').iterdir() if folder.is_dir())
    flags = [*run.flags, f'--config.data.data_dir={tmp_path}/data', f'--workdir={home}/new']
    shard = next(prepared.glob('prepared-train.array_record*'))
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    assert f'{shard} is 100 bytes, not {len(content)} bytes' in usage_error(train('--dry_run', *flags, home=home))
    shutil.rmtree(prepared)
    assert 'earlier run' not in plan(*flags, home=home)['data']
    monkeypatch.setattr(writer, '_write_metadata', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        writer.prepare(writer.PrepareConfig(f'folder:{run.pictures}', image_size=72), str(tmp_path / 'data'))
    before = files_below(tmp_path)
    assert '15 images were prepared by an earlier run' in plan(*flags, home=home)['data']
    assert 'earlier run' not in plan(*flags, '--config.data.image_size=76', home=home)['data']
    assert files_below(tmp_path) == before


@pytest.mark.slow
def test_plan_of_tfds_data_says_what_is_needed(tmp_path, home):
    flags = ['--config=imagenet', f'--config.data.data_dir={tmp_path}/data']
    missing = usage_error(train('--dry_run', *flags, home=home, cwd=home))
    assert missing.startswith('ImageNet: put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar')
    manual = tmp_path / 'data' / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    for name in ('train', 'val'):
        (manual / f'ILSVRC2012_img_{name}.tar').touch()
    before = files_below(tmp_path)
    lines = plan(*flags, home=home, cwd=home)
    assert 'about 197 kB per image' in lines['data']
    assert 'the number of images is unknown until TFDS has downloaded the data' in lines['data']
    assert '1,000 classes in this order: n01440764, n01443537, ' in lines['data']
    assert ', ..., n15075141\n' in lines['data']
    assert lines['steps'].startswith('90 epochs, evaluation every 1 epoch')
    assert 'TFDS downloads 31 MB' in plan('--config=fashion_mnist', home=home, cwd=home)['data']
    assert files_below(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'has_checkpoints'),
    [
        (['--config.mesh.data=3'], True),
        (['--config.mesh.data=2'], True),  # there is one device
        (['--config.seed=1'], True),
        (['--config.model.num_classes=3'], False),
        (['--config.data.source=folder:{folder}/nothing'], False),
        (['--config.data.data_dir={folder}/other', '--config.train.steps=20'], True),
        (['--config=imagenet', '--config.data.source=tfds:imagenet2012', '--config.train.batch_size=128'], False),
    ],
)
def test_plan_is_refused_as_the_command_is(flags, has_checkpoints, run, tmp_path):
    workdir = tmp_path / 'w'
    shutil.copytree(run.workdir, workdir)
    if not has_checkpoints:
        shutil.rmtree(workdir / 'checkpoints')
    if 'other' in flags[0]:  # the data set of other images
        picture = run.pictures / 'train' / 'cat' / 'new.png'
        shutil.copy(run.pictures / 'train' / 'dog' / '0.png', picture)
        given = writer.PrepareConfig(f'folder:{run.pictures}', image_size=72)
        edit_manifest(writer.prepare(given, str(tmp_path / 'other')), inventory=None)  # so the commands see no change
        picture.unlink()
    command = [*run.flags, f'--workdir={workdir}', *(flag.format(folder=tmp_path) for flag in flags)]
    before = files_below(tmp_path)
    refusal = usage_error(train('--dry_run', *command, cwd=tmp_path))
    assert files_below(tmp_path) == before
    assert refusal == usage_error(train(*command, cwd=tmp_path))


@pytest.mark.slow
def test_plan_is_refused_while_a_run_uses_the_folder(run, tmp_path):
    flags = ['--dry_run', *run.flags, f'--workdir={tmp_path}']
    with open(tmp_path / 'lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = f'--workdir: another process is training in {tmp_path}; name another folder'
        assert usage_error(train(*flags)) == message
    assert train(*flags).returncode == 0


@pytest.mark.slow
def test_plan_needs_a_folder_that_can_be_created(run, tmp_path):
    file = tmp_path / 'file'
    file.touch()
    for workdir in (file, file / 'w'):
        assert usage_error(train('--dry_run', *run.flags, f'--workdir={workdir}')).startswith('--workdir: ')


@pytest.mark.slow
def test_plan_of_several_processes_does_not_connect(run, home):
    flags = [*run.flags, f'--workdir={home}/new', '--config.mesh.model=2', '--config.train.batch_size=32']
    group = ['--num_processes=4', '--process_id=2', '--coordinator_address=localhost:1']
    lines = plan(*flags, '--config.model.towers=2', *group, home=home, JAX_NUM_CPU_DEVICES='2')
    assert lines['mesh'].startswith(
        'layout towers, data 4 x model 2, 8 images per device; process 2 of 4 has 2 devices'
    )
    detected = plan(*flags, '--config.model.towers=2', '--distributed', home=home, JAX_NUM_CPU_DEVICES='2')
    assert 'model 2; JAX detects the processes; this process has 2 devices' in detected['mesh']


def test_plans_of_a_sweep(tmp_path, home):
    before = files_below(tmp_path)
    listed = train('--dry_run', '--config=relu_tanh', '--sweep=all', home=home, cwd=home)
    assert (listed.returncode, listed.stderr) == (0, '')
    assert listed.stdout == train('--config=relu_tanh', '--sweep=list', home=home, cwd=home).stdout
    lines = plan('--config=ablations:photos', '--sweep=2', home=home, cwd=home)
    assert lines['start'].startswith('starts at step 0 in runs/ablations_photos/')
    assert files_below(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize('multipliers', [(), (('conv*', 0.0),)])
def test_memory_is_that_of_the_compiled_step(home, multipliers):
    """Compares the estimate, without the copy for checkpoints, with the memory that XLA reports."""
    flag = f'--config.optimizer.lr_multipliers={multipliers}'
    lines = plan(flag, home=home, cwd=home)
    freezes = 'optimizer.lr_multipliers freezes conv1, conv2, conv3, conv4, conv5'
    assert lines['steps'].endswith(freezes) == bool(multipliers)
    memory = lines['memory']
    total, copy = (float(re.search(pattern, memory)[1]) for pattern in (r'about (\S+) MB', r'checkpoints (\S+) MB'))
    audit = run_command('-m', 'alexnet_jax', 'audit', '--json', flag)
    peak = json.loads(audit.stdout)['peak_bytes_per_device'] / 1e6
    assert total - copy == pytest.approx(peak, rel=0.1)
