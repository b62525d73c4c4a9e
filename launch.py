"""Train AlexNet, or go on with a run: python launch.py --config=FILE [--workdir=W] [--config.a.b=value ...]"""

import json
import os
import re
import traceback
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax import monitor, startup
from alexnet_jax.config import ConfigError, resolve
from alexnet_jax.flags import CONFIG, parse_flags, refuse
from alexnet_jax.monitor import complain, read_json

flags.declare_key_flag('config')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/ and the name of the config.')
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT on which process 0 of several answers the others.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes train together.', lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Several processes, found by JAX on SLURM, TPU or Kubernetes.')


def _process_group() -> dict[str, Any] | None:
    """What processes.start() is to be told. Raises ConfigError: the flags do not go together."""
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
    monitor.belong_to(group['process_id'], group['num_processes'])
    return group


def _check_same_run(config: dict, workdir: str) -> None:
    """Raise ConfigError where the checkpoints in `workdir` belong to another network or another order of the data."""
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')) or not os.listdir(os.path.join(workdir, 'checkpoints')):
        return
    before = read_json(os.path.join(workdir, 'config.json'))
    if before is None:
        raise ConfigError(f'--workdir: {workdir} has checkpoints but no readable config.json; name another one')
    now = json.loads(json.dumps(config))
    fixed = [
        'seed',
        'data.source',
        'data.image_size',
        'data.channels',
        'data.encoding',
        'data.crop_size',
        'train.batch_size',
        *(f'model.{name}' for name in now['model']),
    ]
    for field in fixed:
        *groups, name = field.split('.')
        old, new = before, now
        for group in groups:
            old, new = old.get(group, {}), new[group]
        if name not in old:
            raise ConfigError(f'--workdir: {workdir} was begun with an older version; name another one')
        if old[name] != new[name]:
            raise ConfigError(
                f'config.{field}: {new[name]!r}, but {workdir} was begun with {old[name]!r}:'
                ' give that, or another --workdir'
            )


def _finished(config: dict, workdir: str) -> bool:
    """Whether `workdir` holds the end of just this run; where the data lay does not count."""
    result, before = (read_json(os.path.join(workdir, name)) for name in ('result.json', 'config.json'))
    if result is None or before is None or result['status'] != 'done':
        return False
    now = json.loads(json.dumps(config))
    return before | {'data': before.get('data', {}) | {'data_dir': now['data']['data_dir']}} == now


def _print_result(workdir: str) -> None:
    """The small table at the end, of several processes from the first one."""
    if monitor.is_silent():
        return
    with open(os.path.join(workdir, 'result.json')) as file:
        result = json.load(file)
    print(f'\n{"validation":<12}{"loss":>8}{"top-1 error":>14}{"top-5 error":>14}')
    for views, errors in result['views'].items():
        name = f'{views} view{"s" * (views != "1")}'
        print(f'{name:<12}{errors["loss"]:>8.4f}{errors["top1_error"]:>14.2%}{errors["top5_error"]:>14.2%}')
    if result['images_per_second']:
        print(f'\ntraining    {result["images_per_second"]:.1f} images/s, {result["step"]} steps')
    print(f'files       {workdir}/: result.json, metrics.jsonl, checkpoints/, config.json')


def main(argv: list[str]) -> int:
    """Check the settings, train, print the result; returns the exit code."""
    del argv
    logging.set_verbosity(logging.ERROR)
    file = config_flags.get_config_filename(flags.FLAGS['config'])
    name = os.path.basename(file).replace('.py', '').replace(':', '_')
    workdir = os.path.expanduser(_WORKDIR.value or os.path.join('runs', name))
    try:
        group = _process_group()
        config = resolve(CONFIG.value)
        _check_same_run(config.to_dict(), workdir)
        if _finished(config.to_dict(), workdir):
            if not monitor.is_silent():
                print(f'{workdir} is done; another --workdir begins anew, a longer config.train.epochs goes on.')
            _print_result(workdir)
            return 0
        if config.cpu_tuning:
            startup.tune_cpu()
    except ConfigError as error:
        return refuse(str(error))
    from alexnet_jax import processes, train  # after the flags, for they import jax

    try:
        code = train.run(config, workdir, group)
    except Exception as error:
        code = _explain(error)
        processes.leave(code)
    if code == train.EXIT_DONE:
        _print_result(workdir)
    return code


def _explain(error: Exception) -> int:
    """Say why training ended, in one line where the cause is known; returns the exit code."""
    from alexnet_jax import processes, train
    from alexnet_jax.checkpoint import CheckpointError
    from alexnet_jax.data.pipeline import StoreError

    if isinstance(error, ConfigError):
        return refuse(str(error))
    lost = processes.lost_another(error)
    if lost or isinstance(error, train.TrainingError | CheckpointError | StoreError | processes.ProcessError):
        complain(lost or str(error))
    else:
        complain('ended by an error:')
        traceback.print_exception(error)
    return train.EXIT_ERROR


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
