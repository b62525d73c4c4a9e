"""Train AlexNet, or go on with a run: python launch.py --config=FILE [--workdir=W] [--config.a.b=value ...]"""

import json
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from alexnet_jax import startup
from alexnet_jax.config import ConfigError, resolve
from alexnet_jax.flags import CONFIG, parse_flags, refuse
from alexnet_jax.monitor import read_json

flags.declare_key_flag('config')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/ and the name of the config.')


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
        'data.crop_size',
        'train.batch_size',
        *(f'model.{name}' for name in now['model']),
    ]
    for field in fixed:
        *groups, name = field.split('.')
        old, new = before, now
        for group in groups:
            old, new = old.get(group, {}), new[group]
        if old.get(name) != new[name]:
            raise ConfigError(
                f'config.{field}: {new[name]!r}, but {workdir} was begun with {old.get(name)!r}:'
                ' give that, or another --workdir'
            )


def _finished(config: dict, workdir: str) -> bool:
    """Whether `workdir` holds the end of just this run."""
    result, before = (read_json(os.path.join(workdir, name)) for name in ('result.json', 'config.json'))
    return result is not None and result['status'] == 'done' and before == json.loads(json.dumps(config))


def _print_result(workdir: str) -> None:
    """The small table at the end."""
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
        config = resolve(CONFIG.value)
        _check_same_run(config.to_dict(), workdir)
        if _finished(config.to_dict(), workdir):
            print(f'{workdir} is done; another --workdir begins anew, a longer config.train.epochs goes on.')
            _print_result(workdir)
            return 0
        if config.cpu_tuning:
            startup.tune_cpu()
        from alexnet_jax import train  # after the flags, for it imports jax
        from alexnet_jax.checkpoint import CheckpointError
    except ConfigError as error:
        return refuse(str(error))
    try:
        code = train.run(config, workdir)
    except ConfigError as error:
        return refuse(str(error))
    except (train.TrainingError, CheckpointError) as error:
        print(f'alexnet_jax: {error}', file=sys.stderr)
        return train.EXIT_ERROR
    if code == train.EXIT_DONE:
        _print_result(workdir)
    return code


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
