"""Train AlexNet, or resume a run.

    alexnet train [--config=FILE|NAME[:PRESET]] [--workdir=W] [--config.a.b=value ...]

In a checkout of the repository `python launch.py` is the same command.
"""

import errno
import json
import os
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax import config_files
from alexnet_jax.cli import define_config_flag, parse_flags, report_usage_error
from alexnet_jax.config import Config, ConfigError, resolve
from alexnet_jax.config_help import changes_of, describe, find_fields, values_of
from alexnet_jax.paths import absolute_path, check_current_folder, check_folder, check_run_path, check_writable, is_url
from alexnet_jax.runtime import backend, console
from alexnet_jax.runtime.checkpoint_ref import is_hub_folder
from alexnet_jax.runtime.commands import child_command, shell_command
from alexnet_jax.runtime.console import log_error
from alexnet_jax.runtime.files import JsonObject
from alexnet_jax.runtime.workdir import check_resumable, is_finished, with_settings_of_run
from alexnet_jax.sweep.sweep import Variant, apply_variant, load_sweep, print_runs, run_all, write_manifest
from alexnet_jax.training.init_source import with_settings_of_init
from alexnet_jax.training.profiler import parse_profile
from alexnet_jax.training.trackers import TrackingConfig, check_wandb

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/ and the name of the config.')
_INIT = flags.DEFINE_string(
    'init',
    None,
    'Weights to start from, config.train.init: a run, one of its checkpoints, a file, or a folder of a model hub.',
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0, to which the other processes connect.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.', lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.', lower_bound=0)
_SWEEP = flags.DEFINE_string(
    'sweep',
    None,
    'list | all | K: list the runs of the sweep in the config, run all that are not done, or run number K.',
)
_SWEEP_JOBS = flags.DEFINE_integer(
    'sweep_jobs', 1, 'Number of runs of --sweep=all at the same time; they share the cores.', lower_bound=1
)
_TENSORBOARD = flags.DEFINE_bool('tensorboard', False, 'Write event files for TensorBoard to WORKDIR/tensorboard.')
_WANDB = flags.DEFINE_string('wandb', None, 'Project of Weights & Biases for the run; requires the package wandb.')
_PROFILE = flags.DEFINE_string('profile', None, "Steps to trace to WORKDIR/profile, such as --profile='steps 20:25'.")
_ALLOW_CHANGES = flags.DEFINE_bool(
    'allow_changes', False, 'Resume although settings changed that change what the network sees, such as data.mean.'
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Several processes, detected by JAX on SLURM, TPU or Kubernetes.'
)

_HELP_CONFIG = flags.DEFINE_string(
    'help_config', None, 'List all fields, or with =PATTERN those whose name or meaning matches PATTERN.'
)
_PRINT_CONFIG = flags.DEFINE_string(
    'print_config', None, 'Print all settings of the run, or with =diff those that differ from the defaults.'
)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Check settings, data, devices and workdir, print the plan, and exit.')


def _apply_init() -> None:
    """Sets train.init to --init. Raises ConfigError: the command line has another value for the field."""
    if _INIT.value is None:
        return
    init = absolute_path('--init', _INIT.value)
    other = config_flags.get_override_values(flags.FLAGS['config']).get('train.init')
    if other is not None and absolute_path('config.train.init', other) != init:
        raise ConfigError(f'--init: {_INIT.value}, but --config.train.init={other}; give one of them')
    CONFIG.value.train.init = init


def _process_group() -> JsonObject | None:
    """Returns the arguments of distributed.initialize(): None for one process, {} to detect the processes.

    Raises ConfigError: the flags contradict each other, are incomplete or have invalid values.
    """
    given = {'coordinator_address': _COORDINATOR_ADDRESS, 'num_processes': _NUM_PROCESSES, 'process_id': _PROCESS_ID}
    group = {name: flag.value for name, flag in given.items() if flag.value is not None}
    if _DISTRIBUTED.value and group:
        raise ConfigError(f'--distributed finds the processes itself; leave out --{min(group)}, or --distributed')
    if not group:
        return {} if _DISTRIBUTED.value else None
    missing = [f'--{name}' for name in given if name not in group]
    if missing:
        raise ConfigError(f'--{min(group)}: {" and ".join(missing)} must be given with it')
    if not re.fullmatch(r'\S+:\d{1,5}', group['coordinator_address']):
        raise ConfigError(f'--coordinator_address: {group["coordinator_address"]!r} is not HOST:PORT')
    if group['process_id'] >= group['num_processes']:
        raise ConfigError(
            f'--process_id: {group["process_id"]} is not below --num_processes={group["num_processes"]};'
            f' the nearest is {group["num_processes"] - 1}'
        )
    console.set_process_index(group['process_id'], group['num_processes'])
    return group


def _print_result(workdir: str) -> None:
    """Prints the final results on the primary process."""
    if not console.is_primary():
        return
    with open(os.path.join(workdir, 'result.json')) as file:
        result = json.load(file)
    print(f'\n{"validation":<12}{"loss":>8}{"top-1 error":>14}{"top-5 error":>14}')
    for views, errors in result.get('views', {}).items():
        name = f'{views} view{"s" * (views != "1")}'
        print(f'{name:<12}{errors["loss"]:>8.4f}{errors["top1_error"]:>14.2%}{errors["top5_error"]:>14.2%}')
    if isinstance(rate := result.get('images_per_second'), int | float) and rate:
        print(f'\ntraining    {rate:.1f} images/s, {result.get("step")} steps')
    print(f'files       {workdir}/: result.json, metrics.jsonl, checkpoints/, config.json')
    folder = os.path.abspath(workdir)
    print(f'report      {shell_command("report", folder, f"--html={folder}/report.html")}')


def _select_variant(variants: list[Variant]) -> Variant:
    """Returns the variant whose number is --sweep. Raises ConfigError: there is no such variant."""
    if not re.fullmatch(r'\d+', _SWEEP.value) or int(_SWEEP.value) >= len(variants):
        raise ConfigError(f'--sweep: {_SWEEP.value!r} is not list, all or a number from 0 to {len(variants) - 1}')
    return variants[int(_SWEEP.value)]


def _print_config(config: Config) -> int:
    """Prints the settings that --print_config selects and returns the exit code. Raises ConfigError: invalid value."""
    if _PRINT_CONFIG.value not in ('', 'diff'):
        raise ConfigError(f'--print_config: {_PRINT_CONFIG.value!r} is not diff; leave the value out or write =diff')
    lines = changes_of(config) if _PRINT_CONFIG.value else values_of(config)
    print('\n'.join(lines) or f'no field differs from the defaults of the preset {config.model.preset}')
    return 0


def _select_run(file: str, workdir: str) -> tuple[Config, str]:
    """Returns the resolved configuration and the folder of the run; with --sweep=K, those of that run.

    Raises ConfigError: an invalid setting, or there is no such run.
    """
    if _SWEEP.value is None:
        config = with_settings_of_run(resolve(CONFIG.value), workdir)
        return with_settings_of_init(config, workdir), workdir
    variants = load_sweep(file)
    variant = _select_variant(variants)
    folder = os.path.join(workdir, variant.directory)
    config = with_settings_of_init(with_settings_of_run(apply_variant(CONFIG.value, variant), folder), folder)
    if console.is_primary() and _PRINT_CONFIG.value is None and not _DRY_RUN.value:
        # The runs of a job array have no parent process that writes the manifest.
        write_manifest(variants, config_files.name_of(file), workdir)
    return config, folder


def _sweep(file: str, workdir: str, process_group: JsonObject | None) -> int:
    """Lists or runs the sweep of the config and returns the exit code. Raises ConfigError: a run cannot start."""
    if process_group is not None:
        raise ConfigError('--sweep: several processes can only run one run of a sweep, --sweep=K')
    if _PRINT_CONFIG.value is not None:
        raise ConfigError(f'--sweep: {_SWEEP.value!r} is not a single run; --print_config needs --sweep=K')
    variants = load_sweep(file)
    configs = [
        with_settings_of_run(apply_variant(CONFIG.value, variant), os.path.join(workdir, variant.directory))
        for variant in variants
    ]
    if _SWEEP.value == 'list':
        print_runs(variants, configs, workdir)
        return 0
    for variant, config in zip(variants, configs, strict=True):
        folder = os.path.join(workdir, variant.directory)
        check_resumable(config, folder, every_field=True)
        with_settings_of_init(config, folder, is_logged=False)  # raises ConfigError; the run itself logs
    if _DRY_RUN.value:
        print_runs(variants, configs, workdir)
        return 0
    write_manifest(variants, config_files.name_of(file), workdir)
    command = child_command('launch', *sys.argv[1:])  # if a flag is repeated, absl uses the last value
    return run_all(variants, configs, workdir, command, _SWEEP_JOBS.value)


def _workdir(file: str) -> str:
    """Returns the folder of the run or sweep. Raises ConfigError: the folder cannot be used."""
    name = os.path.basename(file).replace('.py', '').replace(':', '_')
    workdir = os.path.expanduser(_WORKDIR.value or os.path.join('runs', name))
    check_current_folder('train')
    if is_url(workdir):
        raise ConfigError(f'--workdir: {workdir} is a URL; runs are written to a local disk')
    check_folder('--workdir', check_run_path('--workdir', workdir))
    if is_hub_folder(workdir):
        raise ConfigError(
            f'--workdir: {workdir} has weights for a model hub; use another --workdir, and --init={workdir} to start'
            ' from the weights'
        )
    return workdir


def main(argv: list[str]) -> int:
    """Checks the settings, trains, prints the result, and returns the exit code."""
    del argv
    logging.set_verbosity(logging.FATAL)  # Orbax logs pages for each error that it raises
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    try:
        if _HELP_CONFIG.value is not None:
            print('\n'.join(describe(field, CONFIG.value) for field in find_fields(_HELP_CONFIG.value)))
            return 0
        workdir = _workdir(file)
        _apply_init()
        process_group = _process_group()
        check_wandb(_WANDB.value)
        tracking = TrackingConfig(_TENSORBOARD.value, _WANDB.value, parse_profile(_PROFILE.value))
        if _SWEEP.value in ('list', 'all'):
            return _sweep(file, workdir, process_group)
        config, workdir = _select_run(file, workdir)
        if _PRINT_CONFIG.value is not None:
            return _print_config(config)
        check_resumable(config, workdir, every_field=_SWEEP.value is not None, allow_changes=_ALLOW_CHANGES.value)
        finished = is_finished(config, workdir)
        if not finished:
            check_writable('--workdir', check_folder('--workdir', os.path.join(workdir, 'checkpoints')))
        if _DRY_RUN.value:
            from alexnet_jax.dry_run import print_plan  # imports jax

            return print_plan(config, config_files.name_of(file), workdir, process_group)
        console.make_stdout_optional()
        if finished:
            if console.is_primary():
                print(
                    f'{workdir} is done; use another --workdir to start over, or raise config.train.epochs to continue.'
                )
            _print_result(workdir)
            return 0
        if config.cpu_tuning:
            backend.configure_cpu_backend()
        if process_group is None:
            backend.enable_compilation_cache()
    except ConfigError as error:
        return report_usage_error(str(error))
    from alexnet_jax.runtime import distributed  # these modules import jax, so they follow flag parsing
    from alexnet_jax.training.trainer import EXIT_DONE, train_and_evaluate

    try:
        code = train_and_evaluate(config, workdir, process_group, tracking)
    except Exception as error:
        code = _report_failure(error, workdir)
        distributed.hard_exit(code)
    if code == EXIT_DONE:
        _print_result(workdir)
    return code


def _report_failure(error: Exception, workdir: str) -> int:
    """Logs a known error in one line, or the traceback of an unexpected error; returns the exit code."""
    from alexnet_jax.data.split_reader import DatasetError
    from alexnet_jax.runtime import distributed
    from alexnet_jax.training.checkpointing import CheckpointError
    from alexnet_jax.training.diagnostics import TrainingError
    from alexnet_jax.training.trainer import EXIT_ERROR

    if isinstance(error, ConfigError):
        return report_usage_error(str(error))
    peer_failure = distributed.describe_peer_failure(error)
    if peer_failure or isinstance(
        error, TrainingError | CheckpointError | DatasetError | distributed.DistributedInitError
    ):
        log_error(peer_failure or str(error))
    elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        log_error(f'{error.filename or workdir}: {error.strerror}; run the same command again to resume')
    else:
        log_error('the run failed with an unexpected error:')
        traceback.print_exception(error)
    return EXIT_ERROR


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
