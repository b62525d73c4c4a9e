"""Writes a folder for a model hub: the weights, their settings, a model card and the kernels of conv1 as a picture."""

import json
import os
import re
import shutil
from typing import TYPE_CHECKING

import numpy as np

from alexnet_jax import __version__
from alexnet_jax.config import ConfigError
from alexnet_jax.config_checks import shown_classes
from alexnet_jax.evaluate import stored
from alexnet_jax.paths import check_folder, check_path, check_writable, is_url
from alexnet_jax.runtime.checkpoint_ref import HUB_WEIGHTS
from alexnet_jax.runtime.console import log
from alexnet_jax.runtime.files import JsonObject, read_json
from alexnet_jax.runtime.workdir import read_result_json
from alexnet_jax.shapes import layer_table

if TYPE_CHECKING:  # convert checks its flags before it imports jax
    from alexnet_jax.inference.trained_model import TrainedModel

Rows = list[tuple[str, ...]]


def check_target(path: str) -> None:
    """Raises ConfigError if `path` exists and is not an empty folder, or cannot be created."""
    if is_url(path):
        raise ConfigError(f'{path}: a folder is written to a local disk, not to a URL; name a new folder')
    folder = check_folder(path, path)
    if os.path.lexists(folder) and os.listdir(folder):
        raise ConfigError(f'{path} already exists and is not empty; name a new folder')
    check_path(path, folder, suffix='.0000000000.tmp')  # its name while it is written
    check_writable(path, os.path.dirname(folder))


def write(network: 'TrainedModel', path: str, settings: JsonObject, described: dict[str, str], weights: bytes) -> None:
    """Writes the folder `path` atomically: model.safetensors, config.json, README.md and kernels.png.

    Args:
      network: the network.
      path: a new or empty folder.
      settings: the settings of the run, see export.settings_of().
      described: the description of the input, see export.input_metadata().
      weights: the content of model.safetensors.

    Raises OSError: writing failed.
    """
    folder = os.path.realpath(os.path.expanduser(path))
    name = os.path.basename(folder)
    contents = {HUB_WEIGHTS: weights, 'config.json': _config_json(network, settings, described)}
    picture = kernels_picture(network)
    if picture is not None:
        contents['kernels.png'] = picture
    contents['README.md'] = model_card(network, name, settings, described, has_picture=picture is not None).encode()
    staging = f'{folder}.{os.getpid()}.tmp'
    try:
        os.makedirs(staging)
        for file_name, content in contents.items():
            with open(os.path.join(staging, file_name), 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    log(f'{path}: {", ".join(contents)}')


def _config_json(network: 'TrainedModel', settings: JsonObject, described: dict[str, str]) -> bytes:
    """Returns config.json, whose first keys are those that model hubs and the library transformers use."""
    labels = dict(enumerate(network.class_names))
    content = {
        'model_type': 'alexnet_jax',
        'architectures': ['AlexNet'],
        'num_labels': len(labels),
        'id2label': {str(label): name for label, name in labels.items()},
        'label2id': {name: label for label, name in labels.items()},
        'preset': network.config.model.preset,
        'step': network.step,
        'alexnet_jax_version': __version__,
        'input': described,
        'settings': settings,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + '\n').encode()


def kernels_picture(network: 'TrainedModel') -> bytes | None:
    """Returns the kernels of conv1 as PNG, or None if conv1 is locally connected."""
    from alexnet_jax.plots import kernels, style

    if 'conv1' in network.config.model.locally_connected:
        return None
    kernel = np.asarray(network.state.params['conv1']['kernel'])
    return style.as_png(kernels.draw(kernel, network.config.model.towers))


def model_card(
    network: 'TrainedModel', name: str, settings: JsonObject, described: dict[str, str], has_picture: bool
) -> str:
    """Returns the model card: Markdown with YAML front matter. It contains no path of this machine.

    Args:
      network: the network.
      name: name of the folder.
      settings, described: see write().
      has_picture: whether the folder has kernels.png.
    """
    config, source = network.config, str(settings['data']['source'])
    table = layer_table(config.model, config.data.crop_size, config.data.channels)
    errors, evaluations = _errors(network), _evaluations(network)
    parts = [
        _front_matter(name, source, errors),
        f'# {name}',
        f'AlexNet (Krizhevsky, Sutskever and Hinton, 2012) in the variant `{config.model.preset}`, written by'
        f' alexnet_jax {__version__}.',
        '![Kernels of the first layer](kernels.png)' if has_picture else '',
        '## Network',
        _table(
            [
                ('', ''),
                ('feature maps and units', ', '.join(str(row.spec.features) for row in table)),
                ('parameters', f'{sum(row.parameters for row in table):,}'),
                ('classes', f'{len(network.class_names)}: {shown_classes(network.class_names)}'),
                ('step', f'{network.step:,}'),
            ]
        ),
        f'## Input\n\n{described["preparation"]}',
        '## Training\n\n' + _table(_training(network, settings)),
        '## Errors\n\n' + (_errors_text(errors) if errors else 'The errors of these weights were not recorded.'),
        '## Evaluations on other data\n\n' + _table(evaluations) if evaluations else '',
        _loading(name),
        '## License\n\nThe person who publishes these weights chooses their license, and adds it as `license:` to the'
        ' first lines of this file. The terms of the training images may restrict the choice.',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _front_matter(name: str, source: str, errors: JsonObject) -> str:
    """Returns the YAML block of model hubs. JSON is YAML, so json.dumps() writes the values."""
    values: JsonObject = {
        'library_name': 'alexnet_jax',
        'pipeline_tag': 'image-classification',
        'tags': ['alexnet', 'image-classification', 'jax', 'flax'],
    }
    if dataset := re.fullmatch(r'hf:([\w.-]+/[\w.-]+)', source):
        values['datasets'] = [dataset[1]]
    if errors:
        metrics = [
            {'type': 'accuracy', 'name': f'top-{k} accuracy, {_views(views)}', 'value': round(1 - error, 6)}
            for views, measured in errors.items()
            for k in (1, 5)
            if (error := measured.get(f'top{k}_error')) is not None
        ]
        result = {
            'task': {'type': 'image-classification'},
            'dataset': {'name': f'{source}, validation', 'type': source},
            'metrics': metrics,
        }
        values['model-index'] = [{'name': name, 'results': [result]}]
    lines = [f'{key}: {json.dumps(value, ensure_ascii=False)}' for key, value in values.items()]
    return '\n'.join(['---', *lines, '---'])


def _errors(network: 'TrainedModel') -> JsonObject:
    """Returns the errors in result.json by the number of views; {} if they are those of another step or missing."""
    result = read_result_json(network.workdir) if network.workdir else None
    views = (result or {}).get('views')
    if result is None or result.get('step') != network.step or not isinstance(views, dict):
        return {}
    return {key: value for key, value in views.items() if isinstance(value, dict)}


def _errors_text(errors: JsonObject) -> str:
    rows: Rows = [('validation', 'loss', 'top-1 error', 'top-5 error', 'images')]
    for views, measured in errors.items():
        shares = [_percent(measured.get(f'top{k}_error')) for k in (1, 5)]
        loss = measured.get('loss')
        examples = measured.get('examples')
        rows.append((
            _views(views),
            f'{loss:.4f}' if isinstance(loss, float) else '',
            *shares,
            f'{examples:,.0f}' if isinstance(examples, int | float) else '',
        ))  # fmt: skip
    return _table(rows)


def _evaluations(network: 'TrainedModel') -> Rows:
    """Returns a table of the evaluations of these weights on other data, which are in WORKDIR/evaluations/."""
    rows: Rows = []
    for content in stored.read_all(network.workdir).values() if network.workdir else ():
        if content.get('digest') != network.digest:
            continue
        errors = [
            f'{key.replace("_", " ")} {_percent(value)}'
            for key, value in content.items()
            if isinstance(value, float) and re.fullmatch(r'top\d_error|mce', key)
        ]
        data = f'`{without_folder(str(content.get("source")))}`'
        if content.get('real_labels'):
            data += f', right labels of {os.path.basename(str(content["real_labels"]))}'
        views, images = _views(str(content.get('views'))), content.get('images')
        counted = f'{images:,}' if isinstance(images, int) else ''
        rows.append((data, str(content.get('split')), views, counted, ', '.join(errors)))
    return [('data', 'split', 'views', 'images', 'errors'), *rows] if rows else []


def without_folder(source: str) -> str:
    """Returns `source`, a value of data.source, with the last name of its path in place of an absolute path."""
    kind, _, location = source.partition(':')
    if not location.startswith(('/', '{/')):
        return source
    return f'{kind}:{location.rstrip("/").rpartition("/")[2] or "data"}'


def _training(network: 'TrainedModel', settings: JsonObject) -> Rows:
    images = int(network.statistics['class_counts'].sum())
    recorded = read_json(os.path.join(network.workdir, 'environment.json')) if network.workdir else None
    if not images:
        return [('', ''), ('weights', 'imported; they were not trained by this program')]
    train, optimizer = settings['train'], settings['optimizer']
    rows: Rows = [
        ('', ''),
        ('data', f'`{settings["data"]["source"]}`, {images:,} training images'),
        ('seed', str(settings['seed'])),
        ('batch size', f'{train["batch_size"]:,}'),
        ('steps', f'{network.step:,}'),
        ('learning rate', f'{optimizer["learning_rate"]:g}, schedule {optimizer["schedule"]}'),
    ]
    if network.config.train.init:
        rows.append(('initial weights', f'`{os.path.basename(network.config.train.init.rstrip("/"))}`'))
    if recorded is not None:
        count, processes = recorded.get('device_count'), recorded.get('processes')
        where = f'{count} x {recorded.get("devices")}, processes: {processes}; {recorded.get("processor")}'
        rows.append(('hardware', where))
        versions = recorded.get('versions')
        if isinstance(versions, dict):
            rows.append(('versions', ', '.join(f'{package} {version}' for package, version in versions.items())))
    return rows


def _loading(name: str) -> str:
    return f"""## Use

`pip install alexnet_jax`, and in Python, with the folder of this file:

```python
import alexnet_jax

model = alexnet_jax.load({name!r})
model.predict(['cat.jpg'])
```

From a model hub, `hf download USER/{name} --local-dir {name}` downloads the folder first.
`alexnet convert {name} WORKDIR` makes a run of it, which the commands of alexnet_jax evaluate, plot and train further.
The weights of each layer are in `model.safetensors` (`conv1.kernel` in the order height, width, inputs, outputs), with
the settings in its metadata."""


def _views(views: str) -> str:
    return f'{views} view{"s" * (views != "1")}'


def _percent(value: object) -> str:
    return f'{100 * value:.2f} %' if isinstance(value, int | float) else ''


def _table(rows: Rows) -> str:
    """Returns a Markdown table, whose first row is the heading."""
    lines = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
    return '\n'.join([lines[0], '| ' + ' | '.join(['---'] * len(rows[0])) + ' |', *lines[1:]])
