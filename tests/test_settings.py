"""The description of the settings, --help_config and --print_config, and the value None on the command line."""

import ast
import math
import re
import runpy
import types
import typing
from pathlib import Path

import ml_collections
import pytest
from helpers import ROOT, config_flags, refusal, run_command, usage_error

from alexnet_jax.config import ConfigError, apply_overrides, default_config, field_names, get_by_path, resolve
from alexnet_jax.config_schema import PRESET_NAMES, RENAMED, Config
from alexnet_jax.presets import PRESETS

COMMAND = ('-m', 'alexnet_jax', 'train')


def ask(*flags: str, cwd: Path = ROOT) -> str:
    """Returns the output of `alexnet train FLAGS`, which must end with exit code 0 and without messages."""
    run = run_command(*COMMAND, *flags, cwd=cwd, PYTHONPATH=str(ROOT))
    assert (run.returncode, run.stderr) == (0, '')
    return run.stdout


def refused(*flags: str) -> str:
    return usage_error(run_command(*COMMAND, *flags))


def printed_values(*flags: str) -> dict[str, object]:
    """Returns the values that --print_config prints, by field."""
    pairs = (line.removeprefix('config.').split(' = ', 1) for line in ask('--print_config', *flags).splitlines())
    return {field: ast.literal_eval(value) for field, value in pairs}


def with_value(field: str, value: object) -> ml_collections.ConfigDict:
    """Returns the default configuration with one field set to any value."""
    config = default_config().to_dict()
    *groups, name = field.split('.')
    (config[groups[0]] if groups else config)[name] = value
    return ml_collections.ConfigDict(config)


def problem(field: str, value: object) -> str:
    """Returns the error of resolve() for the default configuration with `field` set to `value`, or ''."""
    try:
        resolve(with_value(field, value))
    except ConfigError as error:
        return str(error)
    return ''


@pytest.fixture(scope='module')
def listing() -> dict[str, tuple[str, str]]:
    """The output of --help_config with the default settings: (type, values and default; meaning) by field."""
    lines = ask('--help_config', '--config=imagenet').splitlines()
    entries = {}
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        field, facts = first.removeprefix('config.').split(': ', 1)
        assert second.startswith('    ')
        entries[field] = facts, second.strip()
    return entries


def test_every_field_is_listed_with_a_meaning(listing):
    assert sorted(listing) == sorted(field_names(default_config()))
    meanings = [re.sub(r' \(in version 0.1: .*\)$', '', meaning) for _, meaning in listing.values()]
    assert all(len(meaning) >= 10 and not meaning.endswith('.') for meaning in meanings)


def test_listed_defaults_are_the_defaults(listing):
    config, preset = default_config(), PRESETS['paper'].model
    for field, (facts, _) in listing.items():
        of_preset = field.removeprefix('model.') in preset and field.startswith('model.')
        default = re.search(r'default of the preset paper: (.*)$' if of_preset else r'default: (.*)$', facts)
        assert default is not None, field
        expected = preset[field.removeprefix('model.')] if of_preset else get_by_path(config, field)
        assert ast.literal_eval(default[1]) == expected, field


def test_listed_types_are_those_of_the_dataclasses(listing):
    names = {bool: 'bool', int: 'int', float: 'float', str: 'str|duration', tuple: 'tuple of .*'}
    for field, (facts, _) in listing.items():
        group, _, name = field.rpartition('.')
        kind = typing.get_type_hints(typing.get_type_hints(Config)[group] if group else Config)[name]
        members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        expected = ' or '.join(
            f'({names[typing.get_origin(each) or each]})'
            for each in members
            if each in names or typing.get_origin(each)
        )
        expected += ' or None' if type(None) in members else ''
        expected += ' or auto' if field == 'model.num_classes' else ''
        assert re.fullmatch(expected, facts.split('; ')[0]), field


def test_preset_names_are_those_of_the_presets():
    assert tuple(PRESETS) == PRESET_NAMES


def choices_of(facts: str) -> list[str]:
    parts = facts.split('; ')
    return parts[1].removeprefix('each ').split(' | ') if ' | ' in parts[1] else []


def test_listed_choices_are_the_accepted_ones(listing):
    checked = 0
    for field, (facts, _) in listing.items():
        is_tuple, is_number = facts.startswith('tuple'), facts.startswith('int')
        choices = [int(choice) if is_number else choice for choice in choices_of(facts)]
        for choice in choices:
            assert 'is not one of' not in problem(field, (choice,) if is_tuple else choice), (field, choice)
        for other in (
            (max(choices) + 1, min(choices) - 1) if choices and is_number else ('None', 'x') if choices else ()
        ):
            assert 'is not one of' in problem(field, (other,) if is_tuple else other), (field, other)
            checked += 1
        if not choices:
            value = 'no such choice' if facts.startswith('str') else get_by_path(resolve(default_config()), field)
            assert 'is not one of' not in problem(field, value), field
    assert checked >= 2 * 18


def test_listed_bounds_are_the_accepted_ones(listing):
    checked = 0
    for field, (facts, _) in listing.items():
        found = re.search(r'; (?:each )?(?:from (\S+)|(\S+) to (\S+)); default', facts)
        if not found:
            assert not re.match(r'float|tuple of \d', facts) or field == 'model.bias_init', field
            continue
        convert = int if re.match(r'int|tuple of \d int', facts) else float
        least = convert(found[1] or found[2])
        greatest = convert(float(found[3])) if found[3] else None
        count = re.match(r'tuple of (\d)', facts)

        def value_of(number, count=count):
            return (number,) * int(count[1]) if count else number

        below = least - 1 if convert is int else least - 1e-9
        complaint = 'number from' if count else 'is outside'
        assert complaint not in problem(field, value_of(least)), field
        assert complaint in problem(field, value_of(below)), field
        if greatest is not None:
            above = greatest + 1 if convert is int else math.nextafter(greatest, math.inf)
            assert complaint not in problem(field, value_of(greatest)), field
            assert complaint in problem(field, value_of(above)), field
        checked += 1
    assert checked >= 46


def test_listed_numbers_of_items_are_the_accepted_ones(listing):
    checked = 0
    for field, (facts, _) in listing.items():
        lengths = re.match(r'tuple of (\d)(?: or (\d))? ', facts)
        for length in range(10) if lengths else ():
            complaint = 'are needed' in problem(field, (1,) * length)
            assert complaint != (str(length) in lengths.groups()), (field, length)
            checked += 1
    assert checked >= 70


def test_listed_durations_are_checked_as_durations(listing):
    for field, (facts, _) in listing.items():
        value = ('soon',) if facts.startswith('tuple of duration') else 'soon'
        if re.match(r'str|tuple of str|duration|tuple of duration', facts):
            assert ('is no duration' in problem(field, value)) == ('duration' in facts), field


@pytest.mark.parametrize('name', ['quickstart', 'imagenet:krizhevsky2012', 'fashion_mnist'])
def test_printed_values_given_back_as_flags_are_the_same_settings(name):
    file, _, preset = name.partition(':')
    function = runpy.run_path(str(ROOT / 'configs' / f'{file}.py'))['get_config']
    expected = resolve(function(preset) if preset else function())
    values = printed_values(f'--config={name}')
    assert values == {field: get_by_path(expected, field) for field in field_names(expected)}
    # Another config, so that every value comes from a flag.
    assert printed_values('--config=cifar10', *config_flags(values)) == values


def test_printed_lines_are_a_config_file(tmp_path):
    file = tmp_path / 'mine.py'
    lines = ask('--print_config', '--config=fashion_mnist', '--config.seed=7').splitlines()
    body = '\n    '.join(['config = default_config()', *lines, 'return config'])
    file.write_text(f'from alexnet_jax.config import default_config\n\ndef get_config():\n    {body}\n')
    assert ask('--print_config', f'--config={file}').splitlines() == lines


def test_diff_shows_what_differs_from_the_defaults_of_the_preset():
    assert ask('--print_config=diff', '--config=imagenet').startswith('no field differs')
    lines = ask('--print_config=diff', '--config=imagenet:caffe', '--config.model.dropout=0.25').splitlines()
    fields = {line.split(':')[0] for line in lines}
    assert "config.model.preset: 'paper' -> 'caffe'" in lines
    assert 'config.model.dropout: 0.5 -> 0.25' in lines
    assert fields == {f'config.{field}' for field in (*PRESETS['caffe'].recipe, 'model.preset', 'model.dropout')}
    quickstart = ask('--print_config=diff').splitlines()
    assert 'config.train.batch_size: 128 -> 64' in quickstart
    assert not any('train.log_every' in line for line in quickstart)  # set to its default


def test_settings_of_one_run_of_a_sweep(tmp_path):
    assert printed_values('--config=relu_tanh', '--sweep=1')['model.activation'] == 'tanh'
    assert printed_values('--config=relu_tanh', '--sweep=0')['model.activation'] == 'relu'
    assert '--print_config needs --sweep=K' in refused('--config=relu_tanh', '--sweep=all', '--print_config')
    ask('--config=relu_tanh', '--sweep=1', '--print_config', cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('pattern', 'fields'),
    [
        ('train.log_every', ['train.log_every']),
        ('config.train.log_every', ['train.log_every']),
        ('TRAIN.LOG', ['train.log_every']),
        (r'^config\.checkpoint\.', ['checkpoint.every', 'checkpoint.keep']),
        ('; odd', ['model.lrn_size', 'model.spatial_lrn_size']),  # of the meaning
        ('(before, after', ['model.conv1_padding']),  # no regular expression
        ('max_bad', ['data.max_corrupt_fraction']),
        ('config.optimizer.drops', ['optimizer.milestones']),
    ],
)
def test_pattern_selects_fields(pattern, fields):
    lines = ask(f'--help_config={pattern}').splitlines()
    assert [line.split(':')[0] for line in lines[::2]] == [f'config.{field}' for field in fields]


def test_every_old_name_leads_to_the_new_field():
    from alexnet_jax.config_help import find_fields

    for old, new in RENAMED.items():
        assert new in find_fields(old)
        assert new in find_fields(old.rsplit('.', 1)[-1])


def test_values_of_the_command_are_shown_beside_the_default():
    lines = ask('--help_config=train.batch_size', '--config=quickstart')
    assert 'default: 128; this command: 64\n' in lines
    assert 'this command' not in ask('--help_config=train.batch_size', '--config=imagenet')
    owt = ask('--help_config=model.towers', '--config=imagenet:owt')
    assert 'default of the preset owt: 1\n' in owt


def test_pattern_without_a_match_names_the_nearest_fields():
    assert refused('--help_config=learning_rat3').endswith('the nearest are config.optimizer.learning_rate')
    assert 'the nearest are config.' in refused('--help_config=zzzz')


def test_flag_without_a_pattern_leaves_the_next_argument_alone():
    assert 'default of the preset caffe' in ask('--help_config', '--config', 'imagenet:caffe')
    assert "config.data.source = 'photos'" in ask('--print_config', '--config=quickstart')
    assert refused('--help_config', 'batch') == "'batch' is not a flag; flags have the form --name=value"
    assert refused('--print_config=all').startswith("--print_config: 'all' is not diff")


@pytest.mark.parametrize('flag', ['--help_config', '--print_config', '--print_config=diff'])
def test_settings_are_printed_without_heavy_imports(flag):
    run = run_command('-X', 'importtime', 'launch.py', flag)
    assert run.returncode == 0
    imported = set(re.findall(r'^import time:.*\| +(\w+)', run.stderr, re.MULTILINE))
    assert 'ml_collections' in imported
    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'matplotlib'}
    assert not imported & heavy


WIDTHS = (24, 64, 96, 96, 64, 1024, 1024)  # of the quickstart
PAPER_WIDTHS = (96, 256, 384, 384, 256, 4096, 4096)


@pytest.mark.parametrize(
    ('flags', 'values'),
    [
        (['--config.train.steps=5', '--config.train.steps=None'], {'train.steps': None}),
        (['--config.train.steps=None', '--config.train.steps=7'], {'train.steps': 7}),
        (['--config.train.steps', 'None', '--config.seed=3'], {'train.steps': None, 'seed': 3}),
        (['-config.train.steps=5', '-config.train.steps', 'None'], {'train.steps': None}),
        (['--config.model.widths=None'], {'model.widths': PAPER_WIDTHS}),
        ([f'--config.model.widths={WIDTHS}', '--config.model.widths=None'], {'model.widths': PAPER_WIDTHS}),
        (['--config.model.widths=None', f'--config.model.widths={WIDTHS}'], {'model.widths': WIDTHS}),
        (['--noconfig.model.lrn', '--config.model.lrn=None'], {'model.lrn': True}),
        (['--config.model.lrn', 'None', '--noconfig.model.lrn'], {'model.lrn': False}),
        (['--config.model.activation=None', '--config.model.lrn_k=None'], {'model.activation': 'relu'}),
        (['--config', 'fashion_mnist', '--config.data.class_names=None'], {'data.class_names': None}),
        (
            ['--config=imagenet:krizhevsky2012', '--config.data.color_augmentation_until=None'],
            {'data.color_augmentation_until': None},
        ),
        (['--config.optimizer.layer_weight_decay=None'], {'optimizer.layer_weight_decay': None}),
    ],
)
def test_none_resets_a_field(flags, values):
    printed = printed_values(*flags)
    assert {field: printed[field] for field in values} == values


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.seed=None'], 'config.seed: None is not allowed; the default is 0'),
        (['--config.seed', 'None'], 'config.seed: None is not allowed; the default is 0'),
        (['--config.cpu_tuning=None'], 'config.cpu_tuning: None is not allowed; the default is True'),
        (['--config.data.mean=None'], 'config.data.mean: None is not allowed; the values are image, channel, none'),
        (['--config.data.source=None'], "config.data.source: None is not allowed; the default is 'tfds:imagenet2012'"),
        (['--config.data.color_until=None'], 'config.data.color_until was renamed to config.data.color_augmentation'),
        (['--config.train.stepz=None'], 'config.train.stepz: no such field; the nearest is config.train.steps'),
        (['--noconfig.model.lrn=None'], '--noconfig.model.lrn=None does not take an argument'),
        (['--config.train.steps=none'], "config.train.steps: 'none' is not int"),
        (['--config.train.steps=x', '--config.train.steps=None'], "config.train.steps: 'x' is not int"),
    ],
)
def test_none_is_refused_where_it_means_nothing(flags, message):
    assert refused('--print_config', *flags).startswith(message)


def test_none_in_a_config_file_and_in_a_sweep(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from configs import quickstart\n'
        'from alexnet_jax.sweep import Variant\n'
        'def get_config():\n'
        '    config = quickstart.get_config()\n'
        '    config.train.steps = 5\n'
        '    config.train.steps = config.model.widths = None\n'
        '    return config\n'
        'def sweep():\n'
        "    return [Variant('a', {'train.steps': None}), Variant('b', {'seed': None})]\n"
    )
    values = printed_values(f'--config={file}')
    assert (values['train.steps'], values['model.widths']) == (None, PAPER_WIDTHS)
    assert printed_values(f'--config={file}', '--config.train.steps=9')['train.steps'] == 9
    assert printed_values(f'--config={file}', '--config.train.steps=9', '--sweep=0')['train.steps'] is None
    assert refused(f'--config={file}', '--print_config', '--sweep=1').startswith('sweep, b: config.seed: None is')


def test_none_is_accepted_where_the_listing_says_so(listing):
    for field, (facts, _) in listing.items():
        accepts = 'or None' in facts or 'default of the preset' in facts
        config = default_config()
        apply_overrides(config, {field: None})
        if accepts:
            resolve(config)
        else:
            assert refusal(resolve, config).startswith(f'config.{field}: None is NoneType'), field


def test_document_lists_all_fields():
    command = 'python -m alexnet_jax.config_help > docs/settings.md'
    generated = run_command('-m', 'alexnet_jax.config_help').stdout
    assert (ROOT / 'docs' / 'settings.md').read_text() == generated, f'run: {command}'
    assert set(re.findall(r'^\| `([\w.]+)` \|', generated, re.MULTILINE)) == set(field_names(default_config()))
    assert '](settings.md)' in (ROOT / 'docs' / 'training.md').read_text()
    assert '](docs/settings.md)' in (ROOT / 'README.md').read_text()
