"""The configuration flags, --config=FILE[:PRESET] and overrides --config.a.b=value, and their error messages."""

import re
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax import config_files
from alexnet_jax.config import ConfigError, field_names, unknown_field
from alexnet_jax.runtime.console import log_error
from alexnet_jax.sweep.sweep import Variant, validate

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Path of a config file, or name of one in this package (default: quickstart); :NAME adds a preset.'
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; on an error, logs one line and exits with code 2."""
    argv = list(argv)  # sys.argv stays unchanged, because it is recorded and passed to the runs of a sweep
    try:
        file = _find_config(argv)
        config = config_files.call(file, 'get_config')
        _check_overrides(argv, config)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ConfigError(f'{rest[1]!r} is no flag; flags are written --name=value')
        return rest
    except flags.IllegalFlagValueError as error:
        sys.exit(report_usage_error(_wrong_type(str(error), config)))
    except (flags.Error, ConfigError) as error:
        sys.exit(report_usage_error(str(error)))


def _find_config(argv: list[str]) -> str:
    """Replaces the config names in `argv` by paths and returns the last path; adds the default, quickstart, if none."""
    file = None
    for i, argument in enumerate(argv[1:], 1):
        if re.match('--?config=', argument):
            flag, name = argument.split('=', 1)
            file = config_files.find(name)
            argv[i] = f'{flag}={file}'
        elif argv[i - 1] in ('--config', '-config'):
            file = argv[i] = config_files.find(argument)
    if file is None:
        file = config_files.find('quickstart')
        argv.insert(1, f'--config={file}')
    return file


def load_sweep(file: str) -> list[Variant]:
    """Returns the sweep of the config file `file`. Raises ConfigError: the file has no sweep, or an invalid sweep."""
    variants = list(config_files.call(file, 'sweep'))
    validate(variants)
    return variants


def _check_overrides(argv: list[str], config: ConfigDict) -> None:
    """Raises ConfigError if an override names a field that does not exist."""
    known = field_names(config)
    for argument in argv:
        override = re.match(r'--?(?:no)?config\.([^=]+)', argument)
        if override and override[1] not in known:
            raise unknown_field(override[1], known)


def _wrong_type(message: str, config: ConfigDict) -> str:
    """Returns absl's `message` about an invalid flag value as one line, with the expected type of a config field."""
    match = re.match(r'flag --(config\.([\w.]+))=(.*?): ', message)
    if not match:
        return ' '.join(message.split())
    *groups, name = match[2].split('.')
    for group in groups:
        config = config[group]
    return f'{match[1]}: {match[3]!r} is not {config.get_type(name).__name__}'


def report_usage_error(reason: str) -> int:
    """Logs `reason`, one line, as an error and returns the exit code for a usage error, 2."""
    log_error(reason)
    return 2
