"""Sweeps: named variants of a configuration, each with one or more seeds, run sequentially or several at once.

A config file defines a sweep by a function `sweep` that returns or yields Variants. This module does not import jax.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import ml_collections

from alexnet_jax import config_files
from alexnet_jax.config import Config, ConfigError, apply_overrides, resolve
from alexnet_jax.runtime.commands import child_environment
from alexnet_jax.runtime.console import ProgressBar, log, log_error
from alexnet_jax.runtime.files import read_json, write_json
from alexnet_jax.runtime.preemption import PreemptionHandler
from alexnet_jax.runtime.workdir import is_finished
from alexnet_jax.sweep.results import PlannedVariant, SweepPlan


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a sweep's table or, if `seed` is set, one run of that row.

    Args:
      name: Name of the row and of its folder.
      overrides: Field values by dotted name. They take precedence over the config and the command line.
      published: Published top-1 and top-5 error minus those of the row 'base', in percentage points; None if unknown.
      source: Source of the published differences.
      note: Remark for the reader of the table.
      seed: Replaces the seed of the config.
    """

    name: str
    overrides: dict[str, object] = dataclasses.field(default_factory=dict)
    published: tuple[float | None, float | None] | None = None
    source: str = ''
    note: str = ''
    seed: int | None = None

    @property
    def directory(self) -> str:
        """Folder of the run, relative to the folder of the sweep."""
        return self.name if self.seed is None else os.path.join(self.name, f'seed_{self.seed}')


def grid(fields: Mapping[str, Sequence[object]]) -> list[Variant]:
    """Returns the Cartesian product of the values of `fields` (by dotted name), named like 'towers=1,dropout=0.5'."""
    return [_named(fields, values) for values in itertools.product(*fields.values())]


def zip_(fields: Mapping[str, Sequence[object]]) -> list[Variant]:
    """Returns one variant per position in the value lists. Raises ValueError: the lists differ in length."""
    return [_named(fields, values) for values in zip(*fields.values(), strict=True)]


def _named(fields: Iterable[str], values: Iterable[object]) -> Variant:
    overrides = dict(zip(fields, values, strict=True))
    return Variant(','.join(f'{field.rsplit(".", 1)[-1]}={value}' for field, value in overrides.items()), overrides)


def seeds(variants: Iterable[Variant], count: int) -> list[Variant]:
    """Returns each variant with the seeds 0 to count - 1, ordered by seed, so that a partial sweep covers all rows."""
    variants = list(variants)
    return [dataclasses.replace(variant, seed=seed) for seed in range(count) for variant in variants]


def apply_variant(config: ml_collections.ConfigDict, variant: Variant) -> Config:
    """Returns `config` with the changes of `variant`, resolved. Raises ConfigError: unknown field or invalid value."""
    config = config.copy_and_resolve_references()
    try:
        apply_overrides(config, variant.overrides)
        if variant.seed is not None:
            config.seed = variant.seed
        return resolve(config)
    except ConfigError as error:
        raise ConfigError(f'sweep, {variant.name}: {error}') from None


def load_sweep(file: str) -> list[Variant]:
    """Returns the sweep of the config file `file`. Raises ConfigError: the file has no sweep, or an invalid sweep."""
    variants = list(config_files.call(file, 'sweep'))
    validate(variants)
    return variants


def validate(variants: list[Variant]) -> None:
    """Checks the runs of a sweep.

    Raises ConfigError: there are no runs, two runs share a folder, variants of one name have different overrides apart
      from train.init, or a name is not valid for a folder.
    """
    if not variants:
        raise ConfigError('--sweep: the sweep of this config is empty')
    directories = [variant.directory for variant in variants]
    for i, variant in enumerate(variants):
        if variant.directory in directories[:i]:
            raise ConfigError(f'--sweep: two runs are named {variant.directory!r}')
        if any(row.name == variant.name and _of_row(row) != _of_row(variant) for row in variants[:i]):
            raise ConfigError(f'--sweep: {variant.name!r} is the name of two variants with different overrides')
        usable = variant.name.isprintable() and len(variant.name.encode()) < 256 and variant.name != 'sweep.json'
        if not usable or variant.name != os.path.basename(variant.name) or variant.name[:1] in ('', '.'):
            raise ConfigError(f'--sweep: {variant.name!r} cannot be the name of a folder')


def _of_row(variant: Variant) -> dict[str, object]:
    """Returns the overrides that all seeds of a row have in common; each seed may start from weights of its own."""
    return {field: value for field, value in variant.overrides.items() if field != 'train.init'}


def _common_overrides(row: Variant, variants: list[Variant]) -> dict[str, object]:
    """Returns the overrides of `row` that all of its runs have."""
    runs = [variant.overrides for variant in variants if variant.name == row.name]
    return {field: value for field, value in row.overrides.items() if all(run.get(field) == value for run in runs)}


def write_manifest(variants: list[Variant], config_file: str, workdir: str) -> None:
    """Writes WORKDIR/sweep.json for `alexnet report`: the planned runs, and the published results of each variant.

    Raises ConfigError: the folder is not writable.
    """
    rows = {variant.name: variant for variant in variants}
    plan: SweepPlan = {
        'config': config_file,
        'base': 'base' if 'base' in rows else None,
        'variants': [
            PlannedVariant(
                name=row.name,
                overrides=_common_overrides(row, variants),
                published=row.published,
                source=row.source,
                note=row.note,
            )
            for row in rows.values()
        ],
        'runs': [
            {'variant': run.name, 'seed': run.seed, 'directory': run.directory, 'overrides': run.overrides}
            for run in variants
        ],
    }
    try:
        os.makedirs(workdir, exist_ok=True)
        write_json(os.path.join(workdir, 'sweep.json'), plan)
    except OSError as error:
        raise ConfigError(f'--workdir: {workdir} cannot be used: {error}') from None


def print_runs(variants: list[Variant], configs: list[Config], workdir: str) -> None:
    """Prints one line per run: its number for --sweep=K, folder, state and overrides."""
    width = max(len(variant.directory) for variant in variants)
    for i, (variant, config) in enumerate(zip(variants, configs, strict=True)):
        folder = os.path.join(workdir, variant.directory)
        state = 'done' if is_finished(config, folder) else 'started' if os.path.isdir(folder) else ''
        shown = ' '.join(f'{field}={value}' for field, value in variant.overrides.items())
        print(f'{i:>4}  {variant.directory:<{width}}  {state:<5}  {shown}'.rstrip())
    print(
        f'\n{len(variants)} runs; --sweep=all runs all unfinished ones, --sweep=K runs one:'
        f' a job array of 0-{len(variants) - 1}'
    )


def run_all(variants: list[Variant], configs: list[Config], workdir: str, command: list[str], jobs: int) -> int:
    """Runs the unfinished runs of the sweep, each in its own process, and returns the exit code.

    If this process is killed, Linux kills its runs too.

    Args:
      variants: All runs of the sweep.
      configs: Resolved configuration of each run.
      workdir: Folder of the sweep.
      command: Command that runs one of the runs when '--sweep=K' is appended.
      jobs: Number of concurrent runs. If more than one, each gets an equal part of the cores of this machine.

    Returns:
      0: All runs are done.
      1: Some runs failed; the log names these runs and their log files.
      75: A signal preempted the sweep. The active runs received SIGTERM and save; the same command resumes them.
    """
    folders = [os.path.join(workdir, variant.directory) for variant in variants]
    waiting = [i for i, folder in enumerate(folders) if not is_finished(configs[i], folder)]
    log(f'{workdir}: {len(variants) - len(waiting)} of {len(variants)} runs are done; running {jobs} at a time')
    progress = ProgressBar('sweep', len(variants), 'runs', done=len(variants) - len(waiting))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    slots = [set(cores[slot::jobs]) for slot in range(jobs)] if 1 < jobs <= len(cores) else [set()] * jobs
    running: dict[int, tuple[int, subprocess.Popen]] = {}  # slot -> (run number, process)
    failed, forwarded = [], False
    with PreemptionHandler() as preemption:
        while running or (waiting and not preemption.requested):
            for slot, cpus in enumerate(slots):
                if slot not in running and waiting and not preemption.requested:
                    i = waiting.pop(0)
                    try:
                        running[slot] = i, _start([*command, f'--sweep={i}'], folders[i], cpus)
                    except OSError as error:  # a full disk, for example
                        failed.append(i)
                        log_error(f'{variants[i].directory} cannot be started: {error}')
            if preemption.requested and not forwarded:
                forwarded = True
                for _, process in running.values():
                    process.terminate()
            time.sleep(0.1)
            for slot, (i, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[slot]
                if code == 0:
                    result = read_json(os.path.join(folders[i], 'result.json')) or {}
                    log(f'{variants[i].directory}: top-1 error {result.get("top1_error", math.nan):.2%}')
                    progress.update()
                elif not preemption.requested:
                    failed.append(i)
                    log_error(f'{variants[i].directory} ended with {code}: {_last_line(_log_of(folders[i]))}')
    progress.close()
    if preemption.requested:
        log('the sweep was stopped; rerun the same command to run what is missing')
        return 75
    if failed:
        names = ', '.join(variants[i].directory for i in failed)
        log_error(f'{len(failed)} of {len(variants)} runs failed: {names}; see log.txt in their folders in {workdir}')
    return 1 if failed else 0


def _log_of(folder: str) -> str:
    return os.path.join(folder, 'log.txt')


# Each run executes this script before the command. The script pins the process to its cores (argv[2]) and sets prctl's
# PR_SET_PDEATHSIG, so that no run outlives the sweep process (argv[1]).
_CHILD_BOOTSTRAP = """
import os, signal, sys
sweep, cpus = int(sys.argv[1]), sys.argv[2]
if cpus:
    os.sched_setaffinity(0, map(int, cpus.split(',')))
if sys.platform == 'linux':
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != sweep:
        sys.exit('the sweep has ended')
os.execv(sys.argv[3], sys.argv[3:])
"""


def _start(command: list[str], folder: str, cpus: set[int]) -> subprocess.Popen:
    os.makedirs(folder, exist_ok=True)
    become = [sys.executable, '-ISc', _CHILD_BOOTSTRAP, str(os.getpid()), ','.join(map(str, sorted(cpus)))]
    # In a new session the run receives neither Ctrl-C nor the SIGHUP of a lost terminal; the sweep forwards one signal.
    with open(_log_of(folder), 'ab') as log_file:
        return subprocess.Popen(
            [*become, *command],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
            env=child_environment(),
        )


def _last_line(path: str) -> str:
    try:
        with open(path, errors='replace') as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError as error:
        return str(error)
    return lines[-1] if lines else 'no output'
