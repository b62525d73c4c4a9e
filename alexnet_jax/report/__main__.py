"""Report the results of a run or of a sweep, as text and as a self-contained HTML page.

    alexnet report SWEEP_DIR [--views=10] [--markdown=FILE] [--csv=FILE] [--html=FILE.html]
    alexnet report WORKDIR [--html=FILE.html] [--data_dir=DIR] [--noneighbours]

For a sweep, the command prints a Markdown table: the errors of each variant over its seeds, and the measured and
published differences to the base. The command reads SWEEP_DIR/sweep.json and the result.json of each run; some runs may
be missing. For a run, the command prints the progress and the errors. The page also shows curves and kernels, and for a
run predictions and nearest training images. If a part is missing, the page gives the reason and the command that
creates the part.
"""

import os
import shlex
import sys
from typing import Any

from absl import app, flags, logging

from alexnet_jax.cli import check_output, parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.console import log, log_error
from alexnet_jax.runtime.files import atomic_write
from alexnet_jax.sweep.results import ReportError, choose_views, missing_runs, read_results, read_sweep
from alexnet_jax.sweep.table import as_csv, as_markdown, summarize


def _write(flag: str, content: str | bytes) -> None:
    """Atomically writes `content` to the file that `flag` names, if set. Raises ReportError: not writable."""
    path = flags.FLAGS[flag].value
    if path is None:
        return
    path = os.path.expanduser(path)
    try:
        with atomic_write(path, 'w' if isinstance(content, str) else 'wb') as file:
            file.write(content)
    except OSError as error:
        raise ReportError(f'--{flag}: {path} cannot be written: {error.strerror}') from None


def _report_sweep(folder: str, given: Any, made_by: str) -> str:
    """Writes the requested files and returns the text to print. Raises ReportError."""
    for name in ('data_dir', 'neighbours'):
        if given[name].present:
            raise ReportError(f'--{name}: {folder} is a sweep and no run; leave it out')
    sweep = read_sweep(folder)
    results = read_results(folder, sweep)
    views = choose_views(results, given.views)
    rows = summarize(sweep, results, views)
    missing = missing_runs(folder, sweep, results, views)
    text = as_markdown(sweep, rows, views, missing)
    _write('markdown', text)
    _write('csv', as_csv(rows))
    if given.html:
        from alexnet_jax.report import sweep_page  # takes a second to import

        _write('html', sweep_page.page(folder, sweep, results, rows, views, missing, made_by))
    return text


def _report_run(workdir: str, given: Any, made_by: str) -> str:
    """Writes the page if requested and returns the text to print. Raises ReportError."""
    for name in ('views', 'markdown', 'csv'):
        if given[name].value is not None:
            raise ReportError(f'--{name}: {workdir} is a run and no sweep; leave it out, --html makes a page')
    from alexnet_jax.report import run_files, run_page

    if given.html:
        _write('html', run_page.page(workdir, given.data_dir, given.neighbours, made_by))
    return run_files.summary(run_files.read_run(workdir))


def _is_run(folder: str) -> bool:
    there = [name for name in ('config.json', 'metrics.jsonl', 'result.json') if os.path.exists(f'{folder}/{name}')]
    return bool(there) and not os.path.exists(os.path.join(folder, 'sweep.json'))


def main(argv: list[str]) -> int:
    """Reports the sweep or the run in the folder argv[1]. Prints failures in one line; returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    given, folder = flags.FLAGS, os.path.expanduser(argv[1])
    try:
        if not _is_run(folder) and not os.path.exists(os.path.join(folder, 'sweep.json')):
            raise ReportError(f'{folder}: no run and no sweep; name the folder that was the --workdir of one')
        check_output('html', given.html, ('.html', '.htm'))
        made_by = shlex.join(['alexnet', 'report', *sys.argv[1:]])
        text = (_report_run if _is_run(folder) else _report_sweep)(folder, given, made_by)
    except (ReportError, ConfigError) as error:
        log_error(str(error))
        return 2
    except KeyboardInterrupt:
        log_error('stopped')
        return 130
    print(text, end='')
    if given.html:
        log(f'{given.html} is written')
    return 0


if __name__ == '__main__':
    flags.DEFINE_integer('views', None, 'Whose errors; by default the most that all results have.', lower_bound=1)
    flags.DEFINE_string('markdown', None, 'File to write the table to as well.')
    flags.DEFINE_string('csv', None, 'File to write the figures to, not rounded.')
    flags.DEFINE_string('html', None, 'FILE.html to write the page to.')
    flags.DEFINE_string('data_dir', None, "Where the prepared data lie; by default the run's data.data_dir.")
    flags.DEFINE_bool('neighbours', True, 'Find nearest training images for the page, by the features of all of them.')
    wanted = 'which sweep? Name its folder: alexnet report SWEEP_DIR, or that of a run: alexnet report WORKDIR'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, max_arguments=1))
