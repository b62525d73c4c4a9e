"""Configurations: presets fill empty fields, errors are one line with the nearest valid value, and durations."""

import dataclasses
import runpy

import ml_collections
import pytest
from helpers import ROOT, refusal, run_command

from alexnet_jax.config import ConfigError, default_config, duration_in_steps, get_by_path, resolve, total_steps
from alexnet_jax.presets import PRESETS


def changed(fields):
    """Returns the default configuration with some fields set, by dotted name, to any values."""
    config = default_config().to_dict()
    for field, value in fields.items():
        *groups, name = field.split('.')
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return ml_collections.ConfigDict(config)


def test_preset_fills_the_empty_fields():
    model = resolve(default_config()).model
    assert model.widths == (96, 256, 384, 384, 256, 4096, 4096)
    assert (model.towers, model.num_classes, model.activation) == (2, 1000, 'relu')
    assert (model.lrn, model.lrn_size, model.lrn_k, model.lrn_alpha, model.lrn_beta) == (True, 5, 2.0, 1e-4, 0.75)
    assert (model.overlapping_pool, model.dropout) == (True, 0.5)
    assert model.kernel_std == (0.01,) * 8
    assert model.bias_init == (0, 1, 0, 1, 1, 1, 1, 0)


@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_fills_every_field(preset):
    model = resolve(changed({'model.preset': preset})).model
    fields = dataclasses.asdict(model)
    assert None not in fields.values()
    assert set(PRESETS[preset].model) <= set(fields)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('model.towers', 1),
        ('model.lrn', False),  # False counts as set.
        ('model.dropout', 0.0),
        ('model.lrn_k', 1.0),
        ('model.widths', (24, 64, 96, 96, 64, 1024, 1024)),
        ('optimizer.learning_rate', 0.02),
        ('optimizer.learning_rate', 1),  # a whole number for a float
        ('train.steps', 0),
        ('mesh.data', 8),
    ],
)
def test_set_fields_override_the_preset(field, value):
    expected = resolve(default_config()).to_dict()
    group, name = field.split('.')
    expected[group][name] = value
    assert resolve(changed({field: value})).to_dict() == expected


def test_source_has_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/me')
    for given, expected in {
        'folder:pets/': f'folder:{tmp_path}/pets',
        'folder:./a/../pets//': f'folder:{tmp_path}/pets',
        'folder://pets': 'folder:/pets',
        'idx:~/mnist': 'idx:/home/me/mnist',
        'tfds:a/b': 'tfds:a/b',
        'photos': 'photos',
    }.items():
        assert resolve(changed({'data.source': given})).data.source == expected


def test_resolved_config_is_frozen_and_its_source_unchanged():
    config = default_config()
    resolved = resolve(config)
    assert config.model.widths is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.train.batch_size = 64
    assert resolve(ml_collections.ConfigDict(resolved.to_dict())) == resolved
    assert hash(resolve(config)) == hash(resolved)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        # fields that do not exist
        ({'model.dropuot': 0.5}, 'config.model.dropuot: no such field; the nearest is config.model.dropout'),
        ({'optimiser': 1}, 'config.optimiser: no such field; the nearest is config.optimizer.'),
        # types
        ({'train.batch_size': '128'}, "config.train.batch_size: '128' is str, not int"),
        ({'train.batch_size': True}, 'config.train.batch_size: True is bool, not int'),
        ({'optimizer.momentum': True}, 'config.optimizer.momentum: True is bool, not float'),
        ({'model.widths': 96}, 'config.model.widths: 96 is int, not tuple'),
        ({'model.preset': None}, 'config.model.preset: None is NoneType, not str'),
        ({'model': 5}, 'config.model: 5 must be a group of fields'),
        # choices
        (
            {'model.preset': 'papre'},
            f"config.model.preset: 'papre' is not one of {', '.join(PRESETS)}; the nearest is 'paper'",
        ),
        ({'model.activation': 'relu6'}, "'relu6' is not one of relu, tanh; the nearest is 'relu'"),
        ({'eval.views': 9}, 'config.eval.views: 9 is not one of 1, 10; the nearest is 10'),
        # ranges
        ({'model.dropout': 1.0}, 'config.model.dropout: 1.0 is outside 0 to 0.95; the nearest is 0.95'),
        (
            {'optimizer.learning_rate': -0.1},
            'config.optimizer.learning_rate: -0.1 is outside 0 to 100; the nearest is 0',
        ),
        (
            {'optimizer.weight_decay': float('nan')},
            'config.optimizer.weight_decay: nan is outside 0 to 1; the nearest is',
        ),
        ({'seed': -1}, 'config.seed: -1 is outside 0 to 4294967295; the nearest is 0'),
        ({'data.source': 'folder:'}, "config.data.source: 'folder:' is not photos"),
        ({'data.color_augmentation_until': 'soon'}, "config.data.color_augmentation_until: 'soon' is no duration"),
        (
            {'data.source': 'imagenet'},
            "config.data.source: 'imagenet' is not photos, tfds:NAME[:config]",
        ),
        # what contradicts another field
        (
            {'data.crop_size': 300},
            'config.data.crop_size: 300 is larger than data.image_size=256; the nearest is 256',
        ),
        ({'data.crop_size': 62}, 'config.data.crop_size: 62 leaves nothing after pool5; the nearest is 64'),
        (
            {'data.crop_size': 32, 'data.image_size': 32},
            'config.data.image_size: 32 leaves nothing after pool5; the nearest is 64',
        ),
        ({'model.lrn_size': 4}, 'config.model.lrn_size: 4 is even; the nearest is 5'),
        ({'model.widths': (96, 256)}, 'config.model.widths: 2 values; 7 are needed, one a layer'),
        (
            {'model.towers': 3},
            'config.model.widths (conv2): 256 is not divisible by model.towers=3; the nearest is 255',
        ),
        (
            {'model.widths': (96, 256, 384, 383, 256, 4096, 4096)},
            'config.model.widths (conv4): 383 is not divisible by model.towers=2; the nearest is',
        ),
        ({'model.kernel_sizes': (5000, 5, 3, 3, 3)}, 'config.model.kernel_sizes: (5000, 5, 3, 3, 3) are larger than'),
        ({'model.kernel_sizes': (11, 5, 3)}, 'config.model.kernel_sizes: 3 values; 5 are needed'),
        ({'model.cross_tower': ('conv1',)}, "config.model.cross_tower: 'conv1' is not one of conv2"),
        ({'model.conv_ops': ('relu',) * 5}, "config.model.conv_ops: 'relu' is no order of some of activation"),
        ({'model.widths': (0, 256, 384, 384, 256, 4096, 4096)}, 'config.model.widths: conv1 cannot be left out'),
        # the mesh
        (
            {'mesh.data': 3},
            'config.train.batch_size: 128 is not divisible by mesh.data=3; the nearest is 129',
        ),
        ({'mesh.data': 0}, 'config.mesh.data: 0 devices; the nearest is 1'),
        ({'mesh.model': 4}, 'config.mesh.model: 4 does not divide model.towers=2; the nearest is 2'),
        (
            {'mesh.model': 2, 'model.num_classes': 1001},
            'config.mesh.model: 2 does not divide model.num_classes=1001; the nearest is 1',
        ),
        (
            {'mesh.model': 2, 'model.widths': (96, 256, 384, 384, 256, 4095, 4096)},
            'config.model.widths (fc6): 4095 is not divisible by mesh.model=2; the nearest is 4096',
        ),
        (
            {'mesh.model': 2, 'mesh.layout': 'data'},
            "config.mesh.model: 2 with mesh.layout='data', which has no model axis; the nearest is 1",
        ),
        # durations
        (
            {'train.log_every': '5 hours'},
            "config.train.log_every: '5 hours' is no duration; write for example '5 epochs', '100 steps' or",
        ),
        ({'optimizer.milestones': ('1 epoch', '-3')}, "config.optimizer.milestones[1]: '-3' is no duration"),
        ({'eval.every': '0 epochs'}, "config.eval.every: '0 epochs' is no time at all; the nearest is '1 step'"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    assert message in refusal(resolve, changed(fields))


@pytest.mark.parametrize(
    ('field', 'value', 'named'),
    [
        ('model.widths', (96, 256, 384, '384', 256, 4096, 4096), "'384'"),
        ('model.kernel_std', (0.01,) * 7 + (-0.5,), '-0.5'),
        ('model.bias_init', (0.0,) * 7 + (True,), 'True'),
        ('model.lrn_k', 0.0, '0.0'),  # a pixel without activation would be 0 / 0
        ('model.lrn_alpha', -1e-4, '-0.0001'),
    ],
)
def test_values_for_which_the_network_is_undefined(field, value, named):
    message = refusal(resolve, changed({field: value}))
    assert message.startswith(f'config.{field}')
    assert named in message


def test_missing_field_is_refused():
    config = default_config().to_dict()
    del config['train']['log_every']
    with pytest.raises(ConfigError, match=r'^config\.train\.log_every: missing; start from .*default_config\(\)$'):
        resolve(ml_collections.ConfigDict(config))


@pytest.mark.parametrize(
    ('nearest', 'field'),
    [
        (64, 'data.crop_size'),
        (5, 'model.lrn_size'),
        (10, 'eval.views'),
        (0.95, 'model.dropout'),
    ],
)
def test_the_nearest_is_accepted(nearest, field):
    assert get_by_path(resolve(changed({field: nearest})), field) == nearest


@pytest.mark.parametrize(
    ('duration', 'steps'),
    [
        # 1000 images in batches of 100: 10 steps an epoch.
        ('0', 0),
        ('7', 7),
        ('1 step', 1),
        ('100 steps', 100),
        ('1 epoch', 10),
        ('5 epochs', 50),
        ('0.5 epochs', 5),
        ('2.5epochs', 25),
        ('  3 epochs ', 30),
        ('1000 images', 10),
        ('100 images', 1),
        ('1 image', 1),  # at least one
        ('0.001 epochs', 1),
        ('0 images', 0),
        ('260 images', 3),  # rounded
    ],
)
def test_duration_in_steps(duration, steps):
    assert duration_in_steps(duration, batch_size=100, examples=1000) == steps


@pytest.mark.parametrize('duration', ['', 'epoch', '1 week', '1e3 steps', '-1 steps', '5 epochs 3 steps', '1,5 epochs'])
def test_invalid_durations_are_refused(duration):
    assert 'is no duration' in refusal(duration_in_steps, duration, batch_size=100, examples=1000)


@pytest.mark.parametrize(
    ('fields', 'steps'),
    [
        ({}, 900_821),  # 90 epochs of ImageNet in batches of 128: 900820.5...
        ({'train.epochs': 1.5, 'train.batch_size': 1000}, 1922),
        ({'train.steps': 17}, 17),
        ({'train.steps': 0}, 0),
        ({'train.epochs': 0.0}, 0),
    ],
)
def test_total_steps(fields, steps):
    assert total_steps(resolve(changed(fields)).train, 1_281_167) == steps


def test_config_does_not_import_jax():
    code = 'import sys, alexnet_jax.config as config; config.resolve(config.default_config()); print(*sys.modules)'
    modules = set(run_command('-c', code).stdout.split())
    assert 'alexnet_jax.config' in modules
    assert not modules & {'jax', 'jaxlib', 'flax', 'optax', 'tensorflow'}


FILES = sorted((ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('file', FILES, ids=[file.stem for file in FILES])
def test_every_config_file_resolves(file):
    config = runpy.run_path(str(file))['get_config']()
    resolved = resolve(config)
    assert len(resolved.model.widths) == 7


@pytest.mark.parametrize('preset', PRESETS)
def test_imagenet_with_every_preset(preset):
    config = runpy.run_path(str(ROOT / 'configs' / 'imagenet.py'))['get_config'](preset)
    assert resolve(config).model.preset == preset
