"""Command-line helpers: parse flags, check output files, and report errors as one line and an exit code.

This module imports neither jax nor matplotlib, so that a command answers --help and invalid flags at once.
"""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from alexnet_jax import config_files
from alexnet_jax.config import ConfigError, apply_overrides, check_accepts_none, field_names, unknown_field
from alexnet_jax.data.split_reader import DatasetError
from alexnet_jax.paths import check_path, check_writable, is_url
from alexnet_jax.runtime.console import log_error, protect_output
from alexnet_jax.runtime.workdir import CheckpointError

EXIT_INTERRUPTED = 128 + signal.SIGINT
RENAMED_FLAGS = {'max_bad': 'max_corrupt_fraction', 'neighbours': 'neighbors'}  # names of version 0.1
BARE_FLAGS = ('--help_config', '--print_config')  # flags of `train` that need no value

flags.disclaim_key_flags()  # --config belongs to the command that calls define_config_flag(), and --help shows it


def define_config_flag() -> flags.FlagHolder[ConfigDict]:
    """Defines --config=FILE[:PRESET] and its overrides --config.a.b=value; parse_flags() then checks both."""
    return config_flags.DEFINE_config_file(
        'config',
        None,
        'Path of a config file, or the name of a config of this package; :NAME adds a preset. Default: quickstart.',
    )


def parse_flags(argv: list[str], missing: str = '', max_arguments: float = 0) -> list[str]:
    """Parses the flags and returns the command and its positional arguments; on an error, logs it and exits with 2.

    Args:
      argv: the command line.
      missing: error message if there is no positional argument; '' makes positional arguments optional.
      max_arguments: maximum number of positional arguments.
    """
    protect_output()
    argv, config = list(argv), None  # sys.argv stays unchanged, because it is recorded and passed to child processes
    argv = [f'{argument}=' if argument in BARE_FLAGS else argument for argument in argv]
    try:
        _check_renamed(argv)
        _check_source(argv)
        if 'config' in flags.FLAGS:
            config = config_files.call(_find_config(argv), 'get_config')
            _check_overrides(argv, config)
            reset = _pop_none_overrides(argv)
        try:
            arguments = flags.FLAGS(argv)
        except ValueError as error:  # absl's error for --noNAME=VALUE
            raise ConfigError(str(error)) from None
        if config is not None:
            apply_overrides(flags.FLAGS['config'].value, reset)
        if missing and len(arguments) == 1:
            raise ConfigError(missing)
        if len(arguments) - 1 > max_arguments:
            extra = arguments[int(max_arguments) + 1]
            raise ConfigError(f'{extra!r} is not a flag; flags have the form --name=value')
        return arguments
    except flags.IllegalFlagValueError as error:
        sys.exit(report_usage_error(_wrong_type(str(error), config)))
    except (flags.Error, ConfigError) as error:
        sys.exit(report_usage_error(' '.join(str(error).split())))


def _check_renamed(argv: list[str]) -> None:
    """Raises ConfigError if `argv` contains a flag by its name of version 0.1."""
    for argument in argv[1:]:
        flag = re.match(r'--?(no)?(\w+)', argument)
        if flag and (new := RENAMED_FLAGS.get(flag[2])) and new in flags.FLAGS:
            prefix = f'--{flag[1] or ""}'
            raise ConfigError(f'{prefix}{flag[2]} was renamed to {prefix}{new}')


def _check_source(argv: list[str]) -> None:
    """Raises ConfigError if `argv` has several sources, as it has if a shell expands the braces of a pattern."""
    sources = dict.fromkeys(re.findall(r'^--?(?:config\.data\.)?source=(.*)$', '\n'.join(argv[1:]), re.MULTILINE))
    if len(sources) > 1:
        raise ConfigError(
            f'config.data.source: the command line has several sources, {" and ".join(list(sources)[:2])}; give one,'
            ' and put a pattern with braces in quotation marks'
        )


def _find_config(argv: list[str]) -> str:
    """Replaces the config names in `argv` by paths and returns the last path; inserts quickstart if there is none."""
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


def _check_overrides(argv: list[str], config: ConfigDict) -> None:
    """Raises ConfigError if an override names a field that does not exist."""
    known = field_names(config)
    for argument in argv:
        override = re.match(r'--?(?:no)?config\.([^=]+)', argument)
        if override and override[1] not in known:
            raise unknown_field(override[1], known)


def _pop_none_overrides(argv: list[str]) -> dict[str, None]:
    """Removes the overrides with the value None, which absl cannot parse, from `argv`.

    Returns the fields whose last override is None. Raises ConfigError: a field does not accept None.
    """
    last_is_none: dict[str, bool] = {}
    i = 1
    while i < len(argv) and argv[i] != '--':
        override = re.fullmatch(r'--?(no)?config\.([^=]+)(=.*)?', argv[i], re.DOTALL)
        is_pair = override is not None and not override[3] and argv[i + 1 : i + 2] == ['None']
        is_none = override is not None and not override[1] and (is_pair or override[3] == '=None')
        if override:
            last_is_none[override[2]] = is_none
        if override and is_none:
            check_accepts_none(override[2])
            del argv[i : i + 1 + is_pair]
        else:
            i += 1
    return {field: None for field, is_none in last_is_none.items() if is_none}


def _wrong_type(message: str, config: ConfigDict | None) -> str:
    """Returns absl's `message` about an invalid flag value as one line, with the expected type of a config field."""
    match = re.match(r'flag --(config\.([\w.]+))=(.*?): ', message)
    if not match or config is None:
        return ' '.join(message.split())
    *groups, name = match[2].split('.')
    for group in groups:
        config = config[group]
    return f'{match[1]}: {match[3]!r} is not {config.get_type(name).__name__}'


def check_output(flag: str, path: str | None, endings: tuple[str, ...] = ()) -> str | None:
    """Expands ~ in `path`, the value of --`flag`, and checks that the file can be written; None stays None.

    Raises ConfigError: `path` has none of the `endings`, or cannot be written.
    """
    if path is None:
        return None
    path = os.path.expanduser(path)
    if endings and not path.lower().endswith(endings):
        raise ConfigError(f'--{flag}: {path!r} does not end with {" or ".join(endings)}')
    absolute = check_path(f'--{flag}', path)
    is_other = os.path.lexists(absolute) and not os.path.isfile(absolute)  # such as a folder or a device
    if not path or is_url(path) or is_other or not os.path.isdir(os.path.dirname(absolute)):
        raise ConfigError(f'--{flag}: {path!r} cannot be written; name a file in a writable folder')
    check_writable(f'--{flag}', os.path.dirname(absolute), 'name a file in a writable folder')
    return path


def report_usage_error(reason: str) -> int:
    """Logs `reason`, one line, as an error and returns the exit code for a usage error, 2."""
    log_error(reason)
    return 2


def run(
    main: Callable[[list[str]], int],
    *,
    missing: str = '',
    max_arguments: float = 0,
    usage_errors: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (),
    interrupted: str = 'stopped',
) -> None:
    """Parses the flags, calls exit_code(main, ...) and exits with the code that it returns.

    Args:
      main: takes the command and its positional arguments, and returns the exit code.
      missing: see parse_flags().
      max_arguments: see parse_flags().
      usage_errors: further exceptions that end the command with code 2.
      failures: further exceptions that end the command with code 1.
      interrupted: message if the user interrupts the command.
    """
    logging.set_verbosity(logging.ERROR)
    command = functools.partial(exit_code, main, usage_errors=usage_errors, failures=failures, interrupted=interrupted)
    app.run(
        functools.partial(_interruptible, command, interrupted),
        flags_parser=functools.partial(parse_flags, missing=missing, max_arguments=max_arguments),
    )


def _interruptible(command: Callable[[list[str]], int], interrupted: str, argv: list[str]) -> int:
    """Returns command(argv), or 130 after Ctrl-C. A second Ctrl-C ends the process at once.

    Ctrl-C raises KeyboardInterrupt, so that temporary files are removed. The code is also 130 if a library catches or
    converts the exception. If Python cannot raise it, for example in a destructor, the process ends.
    """
    received = []
    show = sys.unraisablehook

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in prepare, where SIGTERM would interrupt the cleanup
        received.append(number)
        raise KeyboardInterrupt

    def end_if_interrupted(unraisable: 'sys.UnraisableHookArgs') -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            show(unraisable)
            return
        log_error(interrupted)
        os._exit(EXIT_INTERRUPTED)

    sys.unraisablehook = end_if_interrupted
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = command(argv)
    except Exception:
        if not received:
            raise
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the end of the interpreter
    if received and code != EXIT_INTERRUPTED:
        log_error(interrupted)
        return EXIT_INTERRUPTED
    return code


def exit_code(
    main: Callable[[list[str]], int],
    argv: list[str],
    usage_errors: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (),
    interrupted: str = 'stopped',
) -> int:
    """Returns the exit code of main(argv). Logs known errors as one line; other errors are raised.

    The codes are 2 for an invalid flag, configuration or checkpoint, 1 for another failure, and 130 for an interrupt.
    The arguments are those of run().
    """
    usage_errors = (ConfigError, CheckpointError, *usage_errors)
    failures = (DatasetError, OSError, *failures)
    try:
        return main(argv)
    except usage_errors as error:
        return report_usage_error(str(error))
    except failures as error:
        log_error(_reason(error))
        return 1
    except KeyboardInterrupt:
        log_error(interrupted)
        return EXIT_INTERRUPTED


def _reason(error: Exception) -> str:
    """Returns the message of `error`; for an OSError, the file name and the cause."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.filename}: {error.strerror}'
    return str(error)
