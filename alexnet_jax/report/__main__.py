"""Report the results of a run or of a sweep, as text and as a self-contained HTML page.

    alexnet report SWEEP_DIR [--views=10] [--markdown=FILE] [--csv=FILE] [--html=FILE.html]
    alexnet report WORKDIR [--html=FILE.html] [--data_dir=DIR] [--prepared_dir=DIR] [--noneighbors]

For a sweep, the command prints a Markdown table: the errors of each variant over its seeds, and the measured and
published differences to the base. The command reads SWEEP_DIR/sweep.json and the result.json of each run; some runs may
be missing. For a run, the command prints the progress, the errors and the results of `alexnet evaluate --source`. The
page also shows curves and kernels and, for a run, predictions and nearest training images. If a part is missing, the
page gives the reason and the command that creates the part.
"""

import os
import shlex

from absl import flags

from alexnet_jax import cli
from alexnet_jax.paths import absolute_path
from alexnet_jax.report.evaluations import evaluation_lines
from alexnet_jax.report.run_files import load_sweep, read_run, summary
from alexnet_jax.runtime.console import log, make_stdout_optional
from alexnet_jax.runtime.files import atomic_write
from alexnet_jax.sweep.results import ReportError
from alexnet_jax.sweep.table import as_csv, as_markdown

_RUN_FILES = ('config.json', 'metrics.jsonl', 'result.json', 'checkpoints')  # a folder with one of them is a run


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


def _report_sweep(folder: str, given: flags.FlagValues, command: str) -> str:
    """Writes the requested files and returns the text to print. Raises ReportError."""
    for name in ('data_dir', 'prepared_dir', 'neighbors'):
        if given[name].present:
            raise ReportError(f'--{name} is a flag for runs, and {folder} is a sweep; omit the flag')
    sweep = load_sweep(folder, given.views)
    text = as_markdown(sweep.plan, sweep.rows, sweep.views, sweep.missing)
    _write('markdown', text)
    _write('csv', as_csv(sweep.rows))
    if given.html:
        from alexnet_jax.report.page import sweep_page  # takes a second to import

        _write('html', sweep_page(sweep, command))
    return text


def _report_run(workdir: str, given: flags.FlagValues, command: str) -> str:
    """Writes the page if requested and returns the text to print. Raises ReportError."""
    for name in ('views', 'markdown', 'csv'):
        if given[name].value is not None:
            raise ReportError(f'--{name} is a flag for sweeps, and {workdir} is a run; omit the flag')
    if given.html:
        from alexnet_jax.report.page import run_page  # takes a second to import

        _write('html', run_page(workdir, given.data_dir, given.neighbors, command, given.prepared_dir))
    return summary(read_run(workdir)) + ''.join(f'{line}\n' for line in evaluation_lines(workdir))


def _this_command(folder: str, given: flags.FlagValues) -> str:
    """Returns the running command with absolute paths."""
    arguments = [os.path.abspath(folder)]
    for name in ('html', 'markdown', 'csv', 'data_dir', 'prepared_dir'):
        if given[name].value is not None:
            arguments.append(f'--{name}={absolute_path(f"--{name}", given[name].value)}')
    arguments += [] if given.views is None else [f'--views={given.views}']
    arguments += [] if given.neighbors else ['--noneighbors']
    return shlex.join(['alexnet', 'report', *arguments])


def main(argv: list[str]) -> int:
    """Reports the sweep or the run in the folder argv[1]; returns the exit code."""
    given, folder = flags.FLAGS, os.path.expanduser(argv[1])
    is_sweep, *is_run = (os.path.exists(os.path.join(folder, name)) for name in ('sweep.json', *_RUN_FILES))
    if not is_sweep and not any(is_run):
        raise ReportError(f'{folder} contains neither a run nor a sweep; name the --workdir of one')
    cli.check_output('html', given.html, ('.html', '.htm'))
    for name in ('markdown', 'csv'):
        cli.check_output(name, given[name].value)
    command = _this_command(folder, given)
    if given.html or given.markdown or given.csv:
        make_stdout_optional()
    print((_report_sweep if is_sweep else _report_run)(folder, given, command), end='')
    if given.html:
        log(f'{given.html} is written')
    return 0


if __name__ == '__main__':
    flags.DEFINE_integer('views', None, 'Number of views; by default the largest that all results have.', lower_bound=1)
    flags.DEFINE_string('markdown', None, 'File to write the table to.')
    flags.DEFINE_string('csv', None, 'File to write the unrounded values to.')
    flags.DEFINE_string('html', None, 'FILE.html to write the page to.')
    flags.DEFINE_string('data_dir', None, "Folder of the prepared images; by default the run's data.data_dir.")
    flags.DEFINE_string('prepared_dir', None, 'Folder of the prepared data sets. Default: `prepared` in data.data_dir.')
    flags.DEFINE_bool('neighbors', True, 'Show nearest training images, which needs the features of all of them.')
    wanted = 'no folder is named; write alexnet report WORKDIR for a run, or alexnet report SWEEP_DIR for a sweep'
    cli.run(main, missing=wanted, max_arguments=1, usage_errors=(ReportError,))
