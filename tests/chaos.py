"""Chaos suite: breaks real training runs at random, and checks that nothing is lost and nothing goes unnoticed.

    python tests/chaos.py [--seeds=0,1,2] [--jobs=2] [--only=KIND/SEED/INDEX,...]

Each case breaks a small run in one way: kill -9, a signal, a suspended process, a closed pipe, a full disk, two
processes at once, or a corrupt file in a checkpoint or in the prepared data set. Then the same command runs to the end.
The result is compared with that of an uninterrupted run. The outcome of a fault is one of OUTCOMES; the exit code is 1
if any outcome is LOST. --only repeats cases. Moments are drawn as CPU time of the process or as number of files and
lines that it has written, so that they depend little on the load of the machine.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = {
    'unaffected': 'the final weights, metrics and result are those of the uninterrupted run, and there was no message',
    'noticed': 'a line names the problem, and the run ends as documented',
    'recovered': 'a line names what is resumed or replaced, and the run ends like the uninterrupted run',
    'refused': 'one line, exit code 1 or 2, and no checkpoint or metric has changed',
    'LOST': 'other weights, metrics or results; lost steps; a traceback; a hang; a corrupt file',
}
SETTINGS = {
    'model.widths': '(8,0,0,0,16,0,32)',  # few layers, because compiling takes most of the time
    'model.lrn': False,
    'model.towers': 1,
    'train.batch_size': 256,  # almost one epoch, so that a run reads almost all records
    'train.steps': 24,
    'train.log_every': 1,
    'optimizer.schedule': 'plateau',
    'optimizer.patience': 1,
    'eval.every': 6,
    'eval.views': 1,
    'eval.batch_size': 400,
    'checkpoint.every': 4,
    'checkpoint.keep': 3,
}
READERS = {'evaluate': ('--views=1', '--json'), 'predict': ('--validation=4', '--views=1', '--json')}
TIMED = {'images_per_second', 'input_wait'}  # differ between equal runs
HALF = 12  # last step of the half-way run; the schedule does not depend on the number of steps


class LostError(Exception):
    """The fault had a consequence that no fault may have."""


class Process:
    """A command in a process group of its own, with its output in the files PATH.out and PATH.err."""

    def __init__(self, path: Path, command: list[str], limit: float, **options: Any):
        self.out, self.err, self.deadline = Path(f'{path}.out'), Path(f'{path}.err'), time.monotonic() + limit
        with open(self.out, 'wb') as out, open(self.err, 'wb') as err:
            options = {'stdout': out, 'stderr': err, 'stdin': subprocess.DEVNULL, 'process_group': 0} | options
            self.popen = subprocess.Popen([sys.executable, *command], cwd=ROOT, **options)

    @property
    def errors(self) -> str:
        """What the process has written to standard error."""
        return self.err.read_text(errors='replace')

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the running process, without its child processes."""
        fields = Path(f'/proc/{self.popen.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def wait(self) -> int:
        """Returns the exit code. Raises LostError: the process hangs, or has printed a traceback."""
        try:
            code = self.popen.wait(max(self.deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            raise LostError(f'no end in time: {self.err.name}') from None
        for sign in ('Traceback (most recent call last)', 'Fatal Python error', 'no progress since'):
            if sign in self.errors or sign in self.out.read_text(errors='replace'):
                raise LostError(f'{sign!r} in {self.err.name}')
        return code

    def send(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.popen.pid, number)
            else:
                self.popen.send_signal(number)


@dataclasses.dataclass
class Suite:
    """What all cases share: a prepared data set, an uninterrupted run and a half-way run with three checkpoints."""

    root: Path
    data_dir: Path
    program: tuple[str, ...] = ('launch.py',)
    limit: float = 300.0  # seconds after which a process counts as stuck
    cpu_seconds: float = 0.0  # of an uninterrupted run whose programs are compiled
    answers: dict[str, str] = dataclasses.field(default_factory=dict)  # what the READERS print for the half-way run
    kills: int = 5  # of one run
    interrupted: bool = False

    def __post_init__(self):
        self.reference, self.halfway = self.root / 'reference', self.root / 'halfway'

    @property
    def environment(self) -> dict[str, str]:
        """The variables of all processes, which share compiled programs."""
        return os.environ | {
            'JAX_NUM_CPU_DEVICES': '1',
            'JAX_ENABLE_COMPILATION_CACHE': 'true',
            'JAX_COMPILATION_CACHE_DIR': str(self.root / 'compiled'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }

    def command(self, workdir: Path, **settings: Any) -> list[str]:
        given = {key.replace('__', '.'): value for key, value in settings.items()}
        fields = SETTINGS | {'data.data_dir': self.data_dir} | given
        return [*self.program, f'--workdir={workdir}', *(f'--config.{name}={value}' for name, value in fields.items())]

    def prepare(self) -> None:
        """Makes the runs that cases compare with and copy. The first one fills the compilation cache."""
        self.root.mkdir(parents=True, exist_ok=True)
        case = Case('setup', 0, 0, self)
        case.finish(self.root / 'first')
        process = case.start(self.reference)
        while process.popen.poll() is None:
            with contextlib.suppress(OSError):
                self.cpu_seconds = process.cpu_seconds()
            time.sleep(0.01)
        assert process.wait() == 0, process.errors
        case.check_equal(self.root / 'first')
        case.finish(self.halfway, train__steps=HALF)
        assert len(steps_in(self.halfway)) >= 3, steps_in(self.halfway)
        for name in READERS:
            code, self.answers[name], errors = case.read(self.halfway, name)
            assert code == 0, errors


@dataclasses.dataclass
class Case:
    """One way of breaking a run, with the outcome of each of its faults; its name is the seed of all random choices."""

    kind: str
    seed: int
    index: int
    suite: Suite
    outcomes: list[str] = dataclasses.field(default_factory=list)
    detail: str = ''
    processes: list[Process] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.name = f'{self.kind}/{self.seed}/{self.index}'
        self.random = random.Random(self.name)
        self.folder = self.suite.root / self.name.replace('/', '-')
        self.workdir, self.data_dir = self.folder / 'run', self.folder / 'data'  # a data set of its own, if it has one
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def start(self, workdir: Path, *flags: str, options: dict[str, Any] | None = None, **settings: Any) -> Process:
        """Starts training in `workdir`."""
        return self.start_command([*self.suite.command(workdir, **settings), *flags], **options or {})

    def start_command(self, command: list[str], **options: Any) -> Process:
        if self.suite.interrupted:
            raise LostError('the suite was interrupted')
        path = self.folder / f'process{len(self.processes)}'
        self.processes.append(Process(path, command, self.suite.limit, env=self.suite.environment, **options))
        return self.processes[-1]

    def kill_processes(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.send(signal.SIGKILL, group=True)
                process.popen.wait()

    def read(self, workdir: Path, name: str) -> tuple[int, str, str]:
        """Returns exit code, standard output and standard error of evaluate or predict on the newest checkpoint."""
        process = self.start_command(['-m', f'alexnet_jax.{name}', str(workdir), *READERS[name]])
        code = process.wait()
        return code, process.out.read_text().replace(str(workdir), 'RUN'), process.errors

    def at_random_moment(self, process: Process) -> bool:
        """Waits for a random moment in the life of `process`; returns False if the process ends before that moment."""
        by_files, delay = self.random.random() < 0.5, self.random.uniform(0, 0.02)
        seconds = self.random.uniform(0, self.suite.cpu_seconds)
        # The case's own data set has a dozen files.
        before, total = progress(self.folder), progress(self.suite.reference) + len(self.processes) * 2
        total += 12 if self.kind == 'kill' and self.index == 0 else 0
        count = before + self.random.random() * (total - before)
        with contextlib.suppress(OSError):  # the process has ended
            while process.popen.poll() is None and time.monotonic() < process.deadline:
                if (progress(self.folder) > count) if by_files else (process.cpu_seconds() >= seconds):
                    time.sleep(delay)
                    return True
                time.sleep(0.002)
        return False

    def finish(self, workdir: Path, **settings: Any) -> None:
        """Trains to the end. Raises LostError: the exit code is not 0, or steps before the newest checkpoint repeat."""
        newest, process = newest_step(workdir), self.start(workdir, **settings)
        if code := process.wait():
            raise LostError(f'exit code {code}: {process.errors[-300:]}')
        self.check_resumed(process, newest)

    def check_resumed(self, process: Process, newest: int) -> int:
        """Returns the step at which `process` has resumed. Raises LostError: that is before the step `newest`."""
        resumed = re.search(r' at step (\d+) of ', process.errors)
        step = int(resumed[1]) if resumed else 0
        if 'is done' not in process.out.read_text() and step < newest:
            raise LostError(f'resumed at step {step}, but checkpoint {newest} was complete')
        return step

    def check_equal(self, workdir: Path, reference: Path | None = None) -> None:
        """Raises LostError: the finished run in `workdir` has other results or metrics than the reference."""
        reference = reference or self.suite.reference
        results = [read_json(folder / 'result.json') for folder in (workdir, reference)]
        for key in results[1].keys() - TIMED:
            if results[0].get(key) != results[1][key]:
                raise LostError(f'result.json: {key} is {results[0].get(key)!r}, not {results[1][key]!r}')
        if read_lines(workdir / 'metrics.jsonl') != read_lines(reference / 'metrics.jsonl'):
            raise LostError('metrics.jsonl differs from that of the uninterrupted run')
        expected, steps = read_lines(reference / 'layers.jsonl'), set()
        for line in read_lines(workdir / 'layers.jsonl'):  # omits an evaluation directly after a resume
            if line not in expected or line['step'] in steps:
                raise LostError(f'layers.jsonl: wrong or repeated line of step {line["step"]}')
            steps.add(line['step'])

    def check_refused(self, process: Process, workdir: Path, before: Any) -> None:
        """Raises LostError: the error is not a single line, or checkpoints or metrics have changed."""
        lines = [
            line for line in process.errors.splitlines() if not re.match(r'\d\d:\d\d:\d\d |.*corrupt and skip', line)
        ]
        if process.popen.returncode not in (1, 2) or len(lines) != 1:
            raise LostError(f'exit code {process.popen.returncode}, {len(lines)} lines: {process.err}')
        self.detail += f' [{lines[0]}]'
        if process.popen.returncode == 2 and contents(workdir) != before:
            raise LostError(f'refused, but checkpoints or metrics have changed: {lines[0]}')


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LostError(f'{path}: {error}') from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSON Lines file without measured times."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise LostError(f'{path}: {error}') from None
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def steps_in(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, which have their final names."""
    folder = workdir / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def newest_step(workdir: Path) -> int:
    return max(steps_in(workdir), default=0)


def files_below(folder: Path) -> list[Path]:
    """Returns all files below `folder` in an order that does not depend on random parts of their names."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    return sorted(files, key=lambda path: (path.parent.relative_to(folder), path.stat().st_size, path.name))


def contents(workdir: Path) -> dict[str, bytes]:
    """Returns the bytes of checkpoints and metrics by name."""
    files = [path for path in files_below(workdir) if 'checkpoints' in path.parts or path.suffix == '.jsonl']
    return {str(path): path.read_bytes() for path in files}


def progress(folder: Path) -> int:
    """Returns the number of files and of lines of metrics below `folder`, without checkpoints, which come and go."""
    count = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != 'checkpoints']
        count += len(names)
        if 'metrics.jsonl' in names:
            with contextlib.suppress(OSError):
                count += Path(parent, 'metrics.jsonl').read_bytes().count(b'\n')
    return count


def check_files(workdir: Path) -> None:
    """Raises LostError: a file of the run that is not temporary is incomplete."""
    for path in files_below(workdir):
        if any('tmp' in part for part in path.relative_to(workdir).parts):
            continue
        if path.suffix == '.json' or path.name.endswith('_METADATA'):
            read_json(path)
        elif path.suffix == '.npz' and not zipfile.is_zipfile(path):
            raise LostError(f'{path} is incomplete')
    steps = steps_in(workdir)
    # Orbax removes older checkpoints file by file, so a kill may leave a part of one.
    if steps and not all((workdir / 'checkpoints' / str(steps[-1]) / part).is_dir() for part in ('state', 'progress')):
        raise LostError(f'checkpoint {steps[-1]} is incomplete')


def corrupt(chance: random.Random, files: list[Path]) -> tuple[Path, str]:
    """Corrupts a random file in a random way; returns the file and what was done.

    Half of the time all files have the same chance, otherwise large files have a larger one. A file is never changed in
    place, because it may be a hard link.
    """
    sizes = [path.stat().st_size for path in files]
    file = chance.choices(files, sizes if chance.random() < 0.5 else [min(size, 1) for size in sizes])[0]
    content = bytearray(file.read_bytes())
    way = chance.choice(['bit', 'bytes', 'truncate', 'remove', 'zero', 'replace'])
    length, start = len(content), chance.randrange(len(content))
    part = slice(start, start + (length if chance.random() < 0.2 else chance.randint(2, 100)))
    file.unlink()
    if way == 'bit':
        content[start] ^= 1 << chance.randrange(8)
    elif way == 'bytes':
        content[part] = chance.randbytes(len(content[part]))
    elif way == 'zero':
        content[part] = bytes(len(content[part]))
    elif way == 'truncate':
        del content[start:]
    elif way == 'replace':
        content = chance.choice([path for path in files if path != file]).read_bytes()
    if way != 'remove':
        file.write_bytes(content)
    return file, f'{way} at {start} of {length} bytes'


def kill(case: Case) -> None:
    """kill -9 of one run, several times; a run that ends before its kill is compared and begun again."""
    data_dir = case.suite.data_dir if case.index else case.data_dir  # the first run prepares its own data set
    while len(case.outcomes) < case.suite.kills:
        newest, process = newest_step(case.workdir), case.start(case.workdir, data__data_dir=data_dir)
        if case.at_random_moment(process):
            process.send(signal.SIGKILL, group=case.random.random() < 0.5)
        code = process.wait()
        if ' training and ' in process.errors:
            case.check_resumed(process, newest)
        if code == -signal.SIGKILL:
            check_files(case.workdir)
            case.outcomes.append('recovered' if newest_step(case.workdir) else 'unaffected')
        elif code:
            raise LostError(f'exit code {code}: {process.errors[-300:]}')
        else:
            case.check_equal(case.workdir)
            shutil.rmtree(case.workdir)
    case.finish(case.workdir, data__data_dir=data_dir)
    case.check_equal(case.workdir)


def checkpoint(case: Case) -> None:
    """A file or a part of one of several checkpoints is corrupt, missing or that of another checkpoint."""
    shutil.copytree(case.suite.halfway, case.workdir)
    folder, steps = case.workdir / 'checkpoints', steps_in(case.workdir)
    if case.index % 6 == 0:
        step, other = steps[-1], case.random.choice(steps[:-1])
        part = ['state', 'progress', ''][case.index // 6 % 3]
        shutil.rmtree(folder / str(step) / part)
        shutil.copytree(folder / str(other) / part, folder / str(step) / part)
        case.detail = f'{step}/{part} is a copy of {other}/{part}'
    else:
        # The newest checkpoint matters most.
        file, done = corrupt(case.random, files_below(folder / str(steps[-1]) if case.index % 2 else folder))
        case.detail, step = f'{file.relative_to(folder)}: {done}', int(file.relative_to(folder).parts[0])
    intact = max(other for other in steps if other != step)
    if case.index % 3 == 0:
        name = list(READERS)[case.index // 3 % 2]
        code, answer, errors = case.read(case.workdir, name)
        if code:
            case.check_refused(case.processes[-1], case.workdir, contents(case.workdir))
        elif answer != case.suite.answers[name] and not re.search('corrupt|cannot be read', errors):
            raise LostError(f'{name} answers differently without a message: {answer.strip()[:200]}')
    before, process = contents(case.workdir), case.start(case.workdir)
    if process.wait():
        case.check_refused(process, case.workdir, before)
        case.outcomes.append('refused')
        return
    named = re.search(rf'checkpoint .*\b{step}\b.*|.*corrupt.*', process.errors)
    if case.check_resumed(process, intact) < steps[-1] and not named:
        raise LostError(f'checkpoint {step} was passed over without a message')
    case.check_equal(case.workdir)
    case.detail += f' [{named[0]}]' if named else ''
    case.outcomes.append('recovered' if named else 'unaffected')


def files(case: Case) -> None:
    """A file of the run besides checkpoints and metrics, whose numbers have no digest, is corrupt or missing."""
    shutil.copytree(case.suite.halfway, case.workdir)
    own = [path for path in files_below(case.workdir) if path.parent == case.workdir and path.suffix]
    own = [path for path in own if path.name not in ('metrics.jsonl', 'layers.jsonl')]
    file, done = corrupt(case.random, own)
    case.detail, before, process = f'{file.name}: {done}', contents(case.workdir), case.start(case.workdir)
    if process.wait():
        case.check_refused(process, case.workdir, before)
        case.outcomes.append('refused')
        return
    case.check_resumed(process, HALF)
    named = re.search(rf'.*{file.name}.*', process.errors)
    case.check_equal(case.workdir)
    case.detail += f' [{named[0]}]' if named else ''
    case.outcomes.append('noticed' if named else 'unaffected')


def data(case: Case) -> None:
    """A file of the prepared data set is corrupt, missing or another one, for a new run or a resumed run."""
    shutil.copytree(case.suite.data_dir, case.data_dir, copy_function=os.link)
    if case.index % 2:
        shutil.copytree(case.suite.halfway, case.workdir)
    files = [path for path in files_below(case.data_dir / 'prepared') if path.suffix != '.lock']
    metadata = [path for path in files if 'array_record' not in path.name]
    file, done = corrupt(case.random, metadata if case.index % 4 < 2 else files)
    case.detail = f'{file.name}: {done}'
    before, process = contents(case.workdir), case.start(case.workdir, data__data_dir=case.data_dir)
    if code := process.wait():
        case.check_refused(process, case.workdir, before)
        case.outcomes.append('refused' if code == 2 else 'noticed')
    elif count := read_json(case.workdir / 'result.json')['corrupt_records']:
        if 'corrupt' not in process.errors:
            raise LostError(f'{count} corrupt records without a message')
        case.outcomes.append('noticed')
    else:
        case.check_equal(case.workdir)
        case.outcomes.append('unaffected')


def disk(case: Case) -> None:
    """The disk of the run becomes full at a random size; afterwards there is room."""
    used = sum(path.stat().st_size for path in files_below(case.suite.reference))
    size = int(2 ** case.random.uniform(14, math.log2(used)))
    settings = {'checkpoint__every': 7}
    case.workdir.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(case.workdir)], stderr=subprocess.DEVNULL
    )
    case.detail = f'{"tmpfs" if mounted else "RLIMIT_FSIZE"} of {size} bytes'
    try:
        command = case.suite.command(case.workdir, **settings)
        limited = f'import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));'
        limited += ' os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
        process = case.start_command(command if mounted else ['-c', limited, *command])
        code = process.wait()
        if code:
            case.check_refused(process, case.workdir, contents(case.workdir))
        if mounted:
            subprocess.check_call(['mount', '-o', 'remount,size=1G', str(case.workdir)])
        case.finish(case.workdir, **settings)
        case.check_equal(case.workdir)
        case.outcomes.append('recovered' if code else 'unaffected')
    finally:
        if mounted:
            subprocess.check_call(['umount', '--lazy', str(case.workdir)])


def twice(case: Case) -> None:
    """The same command twice at once: one trains, the other is refused; of two preparations, one waits."""
    if case.index % 2:
        runs = [case.folder / 'run', case.folder / 'other']
        both = [case.start(workdir, data__data_dir=case.data_dir) for workdir in runs]
        if [process.wait() for process in both] != [0, 0]:
            raise LostError(f'exit codes {[process.popen.returncode for process in both]}')
        if sum('prepared ' in process.errors for process in both) != 1:
            raise LostError('the data set was not prepared exactly once')
        for workdir in runs:
            case.check_equal(workdir)
        case.outcomes.append('unaffected')
        return
    both = [case.start(case.workdir) for _ in range(2)]
    case.at_random_moment(both[0])
    for process in both:
        process.send(signal.SIGKILL)
        process.wait()
    check_files(case.workdir)
    both = [case.start(case.workdir) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    if codes == [0, 0]:  # the second one was so late that the run was done
        if not any('is done' in process.out.read_text() for process in both):
            raise LostError('two processes have trained in one folder')
    elif codes != [0, 2]:
        raise LostError(f'exit codes {codes}')
    for process in both:
        if process.popen.returncode:
            case.check_refused(process, case.folder / 'none', {})
    case.check_equal(case.workdir)
    case.outcomes.append('refused')


def pair(case: Case, workdir: Path) -> list[Process]:
    """Starts a run of two processes."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port = listener.getsockname()[1]
    group = [f'--coordinator_address=localhost:{port}', '--num_processes=2']
    return [case.start(workdir, *group, f'--process_id={index}') for index in range(2)]


def suspend(case: Case) -> None:
    """SIGSTOP, later SIGCONT: of one process for longer than its watchdog allows, or of one of two processes."""
    reference, seconds, settings = None, case.random.uniform(0.5, 3), {}
    if case.index % 3 == 2:
        reference = case.folder / 'uninterrupted'
        if [process.wait() for process in pair(case, reference)] != [0, 0]:
            raise LostError('a run of two processes failed')
        processes = pair(case, case.workdir)
    else:
        if case.index % 3 == 0:
            # On a busy machine a run takes longer, and so does this wait.
            watchdog = max(10, int(5 * case.suite.cpu_seconds))
            seconds, settings = watchdog + 2, {'distributed__watchdog_timeout': watchdog}
        processes = [case.start(case.workdir, **settings)]
    stopped = case.random.choice(processes)
    if case.at_random_moment(stopped):
        stopped.send(signal.SIGSTOP)
        time.sleep(seconds)
        stopped.send(signal.SIGCONT)
    codes = [process.wait() for process in processes]
    if any(codes):
        raise LostError(f'exit codes {codes}')
    case.check_equal(case.workdir, reference)
    case.outcomes.append('unaffected')


def pipe(case: Case) -> None:
    """The reader of the output goes away; or Ctrl-C reaches a run and the `tee` that keeps its log."""
    if case.index % 3 < 2:
        both = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
        process = case.start(case.workdir, options=both if case.index % 3 else {'stderr': subprocess.PIPE})
        reader = process.popen.stdout or process.popen.stderr
        case.at_random_moment(process)
        reader.close()
        if code := process.wait():
            raise LostError(f'exit code {code} after the reader of the output had gone')
        case.outcomes.append('unaffected')
    else:
        process = case.start(case.workdir, options={'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT})
        tee = subprocess.Popen(
            ['tee', str(process.err)],
            stdin=process.popen.stdout,
            stdout=subprocess.DEVNULL,
            process_group=process.popen.pid,
        )
        process.popen.stdout.close()
        case.at_random_moment(process)
        process.send(signal.SIGINT, group=True)
        tee.wait()
        check_stopped(case, process, signal.SIGINT)
        case.finish(case.workdir)
    case.check_equal(case.workdir)


def stop(case: Case) -> None:
    """A signal asks the run to stop: it writes a checkpoint and exits with code 75."""
    number = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2][case.index % 5]
    process = case.start(case.workdir)
    case.at_random_moment(process)
    process.send(number)
    check_stopped(case, process, number)
    case.finish(case.workdir)
    case.check_equal(case.workdir)


def check_stopped(case: Case, process: Process, number: signal.Signals) -> None:
    """Raises LostError: the exit code is wrong, or a run that had started has no checkpoint of its last step."""
    code, steps, result = process.wait(), steps_in(case.workdir), case.workdir / 'result.json'
    last = read_json(result) if result.exists() else {'status': 'training', 'step': 0}
    case.detail = f'{number.name}: exit code {code}, {last["status"]} at step {last["step"]}, checkpoints {steps}'
    # Before the first file and after the last one, a signal may have its usual effect.
    outside = not (case.workdir / 'metrics.jsonl').exists() or last['status'] == 'done'
    if code not in (0, 75) and not (outside and code in (-number, 128 + number)):
        raise LostError('this exit code is wrong')
    if last['step'] not in (0, *steps):
        raise LostError('there is no checkpoint of the last step')
    case.outcomes.append('recovered' if code and steps else 'unaffected')


# Each kind of fault with its number of cases per seed.
KINDS: dict[str, tuple[Callable[[Case], None], int]] = {
    'kill': (kill, 4),
    'checkpoint': (checkpoint, 24),
    'files': (files, 6),
    'data': (data, 8),
    'disk': (disk, 4),
    'twice': (twice, 2),
    'suspend': (suspend, 3),
    'pipe': (pipe, 3),
    'stop': (stop, 5),
}


def run_case(case: Case) -> Case:
    """Runs a case; keeps its folder only if something is lost."""
    try:
        KINDS[case.kind][0](case)
    except LostError as error:
        case.outcomes.append('LOST')
        case.detail += f' {error}'
    finally:
        case.detail = case.detail.replace(f'{case.folder}/', '')
        case.kill_processes()
    if 'LOST' not in case.outcomes:
        shutil.rmtree(case.folder)
    return case


def run_cases(cases: list[Case], jobs: int) -> Iterator[Case]:
    """Yields the cases as they end; an interrupt ends their processes."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run_case, case) for case in cases]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for case in cases:
                case.suite.interrupted = True
                case.kill_processes()
            raise


def table(cases: list[Case]) -> str:
    """Returns the number of faults by kind and outcome as a table in Markdown."""
    lines = [['fault', 'number', *OUTCOMES], ['---', *['--:'] * (len(OUTCOMES) + 1)]]
    for kind, (function, _) in KINDS.items():
        counts = collections.Counter(outcome for case in cases if case.kind == kind for outcome in case.outcomes)
        if counts:
            name = (function.__doc__ or kind).splitlines()[0].split(';')[0].split(':')[0].rstrip('.')
            lines.append([name, str(counts.total()), *(str(counts[outcome] or '') for outcome in OUTCOMES)])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main() -> int:
    """Runs the cases, shows each as it ends, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', default='0,1,2', help='each seed has other random numbers')
    parser.add_argument('--jobs', type=int, default=2, help='cases at the same time')
    parser.add_argument('--only', default='', help='KIND, KIND/SEED or KIND/SEED/INDEX, separated by commas')
    given = parser.parse_args()
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)  # a background job or nohup ignores them, and all child processes would too
    root, start, ended = Path(tempfile.mkdtemp(prefix='chaos-')), time.monotonic(), []
    suite = Suite(root, root / 'data')
    suite.prepare()
    print(f'a run takes {suite.cpu_seconds:.1f} s of CPU time')
    seeds = [int(seed) for seed in given.seeds.split(',')]
    cases = [Case(kind, seed, i, suite) for seed in seeds for kind, (_, n) in KINDS.items() for i in range(n)]
    wanted = [f'{name}/' for name in given.only.split(',') if name]
    cases = [case for case in cases if not wanted or any(f'{case.name}/'.startswith(name) for name in wanted)]
    try:
        for case in run_cases(cases, given.jobs):
            ended.append(case)
            counts = ' '.join(f'{n} {outcome}' for outcome, n in collections.Counter(case.outcomes).items())
            print(f'[{time.monotonic() - start:5.0f} s] {len(ended)}/{len(cases)} {case.name}: {counts} {case.detail}')
    except KeyboardInterrupt:
        print('interrupted')
    lost = [case for case in ended if 'LOST' in case.outcomes]
    print(f'\n{table(ended)}\n')
    for case in lost:
        print(f'LOST {case.name}: {case.detail}; repeat with --only={case.name}; files in {case.folder}')
    if not lost:
        shutil.rmtree(root)
    return 1 if lost or len(ended) < len(cases) else 0


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
