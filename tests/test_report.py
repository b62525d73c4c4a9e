"""The table of a sweep against SciPy's Welch test and manual calculations; missing runs, and errors."""

import csv
import io
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import run_command, usage_error
from scipy.stats import ttest_ind  # type: ignore[import-untyped]

from alexnet_jax.sweep.results import read_results, read_sweep
from alexnet_jax.sweep.table import Row, summarize, welch_interval

# Top-1 and top-5 errors of each run, in percent.
BASE = [(10.0, 1.0), (12.0, 2.0), (14.0, 3.0)]
NO_LRN = [(13.0, 1.5), (15.0, 1.0), (17.0, 2.0)]
HALF = [(9.0, 4.0), (19.0, 5.0)]
SOURCE = 'net #148 against #145, "ten views"'


def variant(name: str, published=None, source='', note='') -> dict:
    return {'name': name, 'overrides': {}, 'published': published, 'source': source, 'note': note}


def result(*errors: tuple[float, float], views=('10',), status='done', step=1600) -> dict:
    """Returns a result.json with a pair of errors in percent for each of `views`."""
    known = {
        name: {'loss': 1.0, 'top1_error': top1 / 100, 'top5_error': top5 / 100, 'examples': 1600}
        for name, (top1, top5) in zip(views, errors, strict=True)
    }
    return {'status': status, 'step': step, 'top1_error': None, 'top5_error': None, 'views': known}


def write_sweep(folder: Path, variants: list[dict], results: dict[str, list], base: str | None = 'base') -> str:
    """Writes a sweep. `results`: for each variant and seed, a result.json (dict or text), or None for no folder."""
    runs = []
    for name, found in results.items():
        for seed, content in enumerate(found):
            directory = f'{name}/seed_{seed}'
            runs.append({'variant': name, 'seed': seed, 'directory': directory, 'overrides': {}})
            if content is not None:
                (folder / directory).mkdir(parents=True)
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / directory / 'result.json').write_text(text)
    sweep = {'config': 'configs/ablations.py:photos', 'base': base, 'variants': variants, 'runs': runs}
    (folder / 'sweep.json').write_text(json.dumps(sweep))
    return str(folder)


def done(errors: list[tuple[float, float]]) -> list[dict]:
    return [result(pair) for pair in errors]


@pytest.fixture
def finished(tmp_path) -> str:
    """A finished sweep."""
    variants = [
        variant('base'),
        variant('no_lrn', [1.37, 1.15], SOURCE),
        variant('half', [-1.0, None], 'section 4.1', note='conv5 is as wide'),
        variant('one', note='a single run'),
    ]
    runs = {'base': done(BASE), 'no_lrn': done(NO_LRN), 'half': done(HALF), 'one': done([(11.0, 2.0)])}
    return write_sweep(tmp_path, variants, runs)


def report(*arguments) -> subprocess.CompletedProcess:
    return run_command('-W', 'error', '-m', 'alexnet_jax.report', *arguments)


def printed(*arguments) -> str:
    run = report(*arguments)
    assert (run.returncode, run.stderr) == (0, '')
    return run.stdout


def refused(*arguments) -> str:
    return usage_error(report(*arguments))


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def rows_of(folder: str, views=10) -> dict[str, Row]:
    sweep = read_sweep(folder)
    return {row.name: row for row in summarize(sweep, read_results(folder, sweep), views)}


def test_means_deviations_and_differences(finished):
    rows = rows_of(finished)
    assert list(rows) == ['base', 'no_lrn', 'half', 'one']
    base, no_lrn, half = rows['base'], rows['no_lrn'], rows['half']
    assert (base.top1.mean, base.top1.deviation) == pytest.approx((12.0, 2.0))
    assert (base.top5.mean, base.top5.deviation) == pytest.approx((2.0, 1.0))
    assert (no_lrn.top1.mean, no_lrn.top1.deviation, no_lrn.top1.difference) == pytest.approx((15.0, 2.0, 3.0))
    assert (no_lrn.top5.mean, no_lrn.top5.deviation, no_lrn.top5.difference) == pytest.approx((1.5, 0.5, -0.5))
    assert (half.top1.mean, half.top1.deviation, half.top1.difference) == pytest.approx((14.0, 50**0.5, 2.0))
    assert (base.top1.difference, base.top1.interval, base.top5.difference, base.top5.interval) == (None,) * 4
    # Equal variances of 4 and three runs each: 4 degrees of freedom, t = 2.776.
    half_width = 2.776 * (4 / 3 + 4 / 3) ** 0.5
    assert no_lrn.top1.interval == pytest.approx((3 - half_width, 3 + half_width), abs=1e-3)


@pytest.mark.parametrize(('name', 'errors'), [('no_lrn', NO_LRN), ('half', HALF)])
@pytest.mark.parametrize(('kind', 'which'), [('top1', 0), ('top5', 1)])
def test_intervals_match_welch_test(finished, name, errors, kind, which):
    values, base = [[run[which] for run in runs] for runs in (errors, BASE)]
    expected = ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
    assert getattr(rows_of(finished)[name], kind).interval == pytest.approx((expected.low, expected.high))


def test_intervals_of_unequal_samples_match_welch_test():
    values, base = [1.0, 1.1, 0.9, 1.3, 1.2, 1.05], [3.0, 9.0, 5.0]
    expected = ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
    assert welch_interval(values, base) == pytest.approx((expected.low, expected.high))
    assert welch_interval(base, values) == pytest.approx((-expected.high, -expected.low))


def test_single_run_has_no_deviation_or_interval(finished):
    one = rows_of(finished)['one'].top1
    assert one.mean == pytest.approx(11.0)
    assert one.difference == pytest.approx(-1.0)
    assert (one.deviation, one.interval) == (None, None)
    assert table(printed(finished))[-1] == ['one', '1/1', '11.00', '-1.00', '', '2.00', '+0.00', '']


def test_no_interval_without_variance():
    assert welch_interval([1.0], [1.0, 2.0]) is None
    assert welch_interval([1.0, 2.0], [1.0]) is None
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) is None
    assert welch_interval([1.0, 1.0], [2.0, 3.0]) is not None


def test_table_cells(finished):
    head, rule, base, no_lrn, half, _ = table(printed(finished))
    columns = ['error, %', 'difference', 'difference, published']
    assert head == ['variant', 'runs', *(f'{kind} {column}' for kind in ('top-1', 'top-5') for column in columns)]
    assert rule == ['---', *['--:'] * 7]
    assert base == ['base', '3/3', '12.00 +- 2.00', '', '', '2.00 +- 1.00', '', '']
    assert no_lrn[:5] == ['no_lrn', '3/3', '15.00 +- 2.00', '+3.00 [-1.53, +7.53]', '+1.37']
    assert no_lrn[5] == '1.50 +- 0.50'
    assert no_lrn[6].startswith('-0.50 [-')
    assert no_lrn[7] == '+1.15'
    assert (half[4], half[7]) == ('-1.00', '')


def test_caption_sources_and_notes(finished):
    caption, *lines = printed(finished).split('\n\n', 1)[1].splitlines()
    for words in ('`configs/ablations.py:photos`', '10 views', 'standard deviation', '`base`', 'Welch'):
        assert words in caption
    notes = [f'* no_lrn: {SOURCE}', '* half: section 4.1', '* half: conv5 is as wide', '* one: a single run']
    assert [line for line in lines if line.startswith('*')] == notes
    assert not any('Missing' in line for line in lines)


def test_missing_runs_are_listed_with_their_progress(tmp_path):
    no_lrn = [
        result((13.0, 1.0)),
        result((0.0, 0.0), status='preempted', step=400),
        '{"status": "done", "views',
        None,
        result((17.0, 3.0)),
        '[]',
        {'status': 'done', 'step': 1600, 'views': {}},
        result((float('nan'), 1.0)),
        {'step': 3},
        {'status': 'preempted'},
    ]
    runs: dict[str, list] = {'base': done(BASE), 'no_lrn': no_lrn, 'tanh': [None, None, None, None]}
    folder = write_sweep(tmp_path, [variant('base'), variant('no_lrn'), variant('tanh')], runs)
    for seed, lines in enumerate([['{"step": 20, "split": "train"}', '{"step": 40}', '{"ste'], ['{"split": 1}'], None]):
        (tmp_path / 'tanh' / f'seed_{seed}').mkdir(parents=True)
        if lines:
            (tmp_path / 'tanh' / f'seed_{seed}' / 'metrics.jsonl').write_text('\n'.join(lines))
    text = printed(folder, f'--csv={tmp_path}/table.csv')
    missing = text.splitlines()[-1]
    assert missing.startswith('Missing: ')
    progress = dict(re.findall(r'(\w+ seed \d) \((.*?)\)', missing))
    assert len(progress) == 12
    assert progress['no_lrn seed 1'] == 'at step 400'
    assert progress['tanh seed 0'] == 'at step 40'
    assert {progress[f'no_lrn seed {seed}'] for seed in (2, 5, 6, 7, 8)} == {'unreadable result.json'}
    assert progress['no_lrn seed 3'] == progress['tanh seed 3']  # has no folder
    assert progress['no_lrn seed 9'] == progress['tanh seed 1'] == progress['tanh seed 2']  # has no step
    rows = table(text)
    assert rows[3][:3] == ['no_lrn', '2/10', '15.00 +- 2.83']
    assert rows[4] == ['tanh', '0/4', *[''] * 6]
    assert (tmp_path / 'table.csv').read_text().splitlines()[3] == 'tanh,0,4' + ',' * 13


def test_sweep_without_seeds_or_finished_runs(tmp_path):
    sweep = {
        'config': 'c.py',
        'base': 'base',
        'variants': [variant('base'), variant('no_lrn', [1.37, None])],
        'runs': [{'variant': name, 'seed': None, 'directory': name, 'overrides': {}} for name in ('base', 'no_lrn')],
    }
    (tmp_path / 'sweep.json').write_text(json.dumps(sweep))
    text = printed(str(tmp_path))
    assert re.fullmatch(r'Missing: base \(.*\), no_lrn \(.*\)', text.splitlines()[-1])
    assert table(text)[2:] == [['base', '0/1', *[''] * 6], ['no_lrn', '0/1', '', '', '+1.37', '', '', '']]
    assert printed(str(tmp_path), '--views=10').splitlines()[-1] == text.splitlines()[-1]


def test_no_differences_without_finished_base(tmp_path):
    runs: dict[str, list] = {'base': [None], 'no_lrn': done(NO_LRN)}
    folder = write_sweep(tmp_path, [variant('base'), variant('no_lrn')], runs)
    assert table(printed(folder))[3] == ['no_lrn', '3/3', '15.00 +- 2.00', '', '', '1.50 +- 0.50', '', '']


def test_no_differences_without_base(tmp_path):
    variants = [variant('towers=1', [1.0, 2.0], 'a source', 'a note'), variant('a|b')]
    folder = write_sweep(tmp_path, variants, {'towers=1': done(BASE), 'a|b': done(NO_LRN)}, base=None)
    assert rows_of(folder)['a|b'].top1.difference is None
    text = printed(folder)
    assert text.splitlines()[:4] == [
        '| variant | runs | top-1 error, % | top-5 error, % |',
        '| --- | --: | --: | --: |',
        '| towers=1 | 3/3 | 12.00 +- 2.00 | 2.00 +- 1.00 |',
        r'| a\|b | 3/3 | 15.00 +- 2.00 | 1.50 +- 0.50 |',
    ]
    assert 'difference' not in text
    assert text.endswith('\nNotes:\n\n* towers=1: a note\n')


def test_views_can_be_chosen(tmp_path):
    both = [result((20.0, 8.0), (10.0, 4.0), views=('1', '10')), result((24.0, 8.0), (12.0, 4.0), views=('1', '10'))]
    folder = write_sweep(tmp_path, [variant('base')], {'base': both})
    assert table(printed(folder))[2][2] == '11.00 +- 1.41'
    text = printed(folder, '--views=1')
    assert table(text)[2][2] == '22.00 +- 2.83'
    assert '1 view' in text
    message = refused(folder, '--views=5')
    assert message.startswith('--views=5: ')
    assert message.endswith('1, 10')


def test_default_views_are_common_to_all_results(tmp_path):
    unlike = [
        result((20.0, 8.0), (10.0, 4.0), views=('1', '10')),
        result((24.0, 8.0), views=('1',)),
        result((50.0, 8.0), views=('5',), status='preempted', step=7),
    ]
    folder = write_sweep(tmp_path, [variant('base')], {'base': unlike})
    text = printed(folder)
    assert '1 view' in text
    assert table(text)[2][1:3] == ['2/3', '22.00 +- 2.83']
    text = printed(folder, '--views', '10')
    assert table(text)[2][1:3] == ['1/3', '10.00']
    assert re.search(r'Missing: base seed 1 \(done, .*10 views\), base seed 2 \(at step 7\)\n$', text)


def test_results_without_common_views_are_refused(tmp_path):
    runs = [result((20.0, 8.0), views=('1',)), result((10.0, 4.0), views=('10',))]
    folder = write_sweep(tmp_path, [variant('base')], {'base': runs})
    assert refused(folder).endswith('1, 10')


def test_files_contain_the_printed_table(finished, tmp_path):
    markdown, figures = tmp_path / 'table.md', tmp_path / 'table.csv'
    markdown.write_text('replaced by the table ' * 1000)
    text = printed(finished, f'--markdown={markdown}', f'--csv={figures}')
    assert text == printed(finished)
    assert markdown.read_text() == text
    assert not list(tmp_path.glob('*.tmp'))
    kinds = ('error_mean', 'error_std', 'difference', 'interval_low', 'interval_high', 'published')
    columns = [f'{top}_{kind}' for top in ('top1', 'top5') for kind in kinds]
    lines = list(csv.DictReader(io.StringIO(figures.read_text())))
    assert list(lines[0]) == ['variant', 'runs_done', 'runs_planned', *columns, 'source']
    assert [line['variant'] for line in lines] == ['base', 'no_lrn', 'half', 'one']
    found = [float(lines[1][f'top1_{kind}']) for kind in kinds]
    interval = ttest_ind([run[0] for run in NO_LRN], [run[0] for run in BASE], equal_var=False).confidence_interval()
    assert found == pytest.approx([15.0, 2.0, 3.0, interval.low, interval.high, 1.37])
    assert lines[1]['source'] == SOURCE
    one = [lines[3][f'top1_{kind}'] for kind in kinds]
    assert [bool(value) for value in one] == [True, False, True, False, False, False]
    assert (lines[3]['runs_done'], lines[3]['runs_planned']) == ('1', '1')


def test_unwritable_file_is_refused(finished, tmp_path):
    path = tmp_path / 'nowhere' / 'table.md'
    assert refused(finished, f'--markdown={path}').startswith(f"--markdown: '{path}' cannot be written")
    assert refused(finished, f'--csv={tmp_path}').startswith(f"--csv: '{tmp_path}' cannot be written")


@pytest.mark.parametrize(
    'text',
    [
        '{"config": "c.py", "ba',
        '[]',
        '{}',
        '{"config": "c.py", "base": null, "variants": [], "runs": {}}',
        '{"config": "c.py", "base": null, "variants": [], "runs": [3]}',
        '{"config": "c.py", "base": null, "variants": [{"name": "base"}], "runs": []}',
        json.dumps({'config': 'c.py', 'base': None, 'variants': [variant('a', [1.0])], 'runs': []}),
        json.dumps({'config': 'c.py', 'base': None, 'variants': [variant('a', ['1', '2'])], 'runs': []}),
    ],
)
def test_corrupt_sweep_is_refused(tmp_path, text):
    (tmp_path / 'sweep.json').write_text(text)
    message = refused(str(tmp_path))
    assert message.startswith(f'{tmp_path}/sweep.json is ')
    assert f'--sweep=all --workdir={tmp_path}' in message


def test_folder_without_sweep_or_run_is_refused(tmp_path):
    for folder in (str(tmp_path), os.path.join(tmp_path, 'nowhere')):
        assert refused(folder).startswith(f'{folder} contains neither a run nor a sweep')


def test_flags_for_runs_are_refused_for_sweeps(finished):
    for flag in ('--noneighbors', '--data_dir=d'):
        assert f'is a flag for runs, and {finished} is a sweep' in refused(finished, flag)


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ([], 'no folder is named'),
        (['a', 'b'], "'b' "),
        (['a', '--views=0'], 'flag --views=0: 0 is not a positive integer'),
        (['a', '--vews=1'], "Unknown command line flag 'vews'"),
    ],
)
def test_wrong_flags_are_refused(arguments, reason):
    assert refused(*arguments).startswith(reason)


@pytest.mark.parametrize('arguments', [['--help'], ['SWEEP']])
def test_jax_is_not_imported(finished, arguments):
    program = """
import runpy, sys
try:
    runpy.run_module('alexnet_jax.report', run_name='__main__', alter_sys=True)
except SystemExit:
    print('scipy' in sys.modules, 'jax' in sys.modules, file=sys.stderr)
"""
    arguments = [finished if argument == 'SWEEP' else argument for argument in arguments]
    run = run_command('-c', program, *arguments)
    assert ('SWEEP_DIR [--views=10]' if arguments == ['--help'] else '| no_lrn | 3/3 |') in run.stdout
    assert run.stderr.split() == [str(arguments != ['--help']), 'False']
