"""Which module imports which, and where TensorFlow and jax.sharding are named; by parsing, without an import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'alexnet_jax'

# What each module may take from the package; train is on top and only launch reaches it.
ALLOWED = {
    '': set(),
    '__main__': {'monitor'},
    'config_files': {'config'},
    'launch': {
        'checkpoint',
        'command',
        'config',
        'config_files',
        'data.pipeline',
        'flags',
        'instruments',
        'monitor',
        'processes',
        'run_folder',
        'startup',
        'sweep',
        'train',
    },
    'presets': set(),
    'shapes': set(),
    'config': {'presets', 'shapes'},
    'run_folder': {'config', 'monitor'},
    'command': {'config', 'monitor'},
    'sweep_results': {'monitor'},
    'sweep_table': {'sweep_results'},
    'report': {
        'command',
        'config',
        'monitor',
        'page.of_run',
        'page.of_sweep',
        'page.run_files',
        'sweep_results',
        'sweep_table',
    },
    'formats': set(),
    'formats.pickles': set(),
    'formats.torch_file': {'formats', 'formats.pickles'},
    'formats.caffe_file': {'formats'},
    'formats.safetensors_file': {'formats'},
    'formats.layouts': {'formats', 'shapes'},
    'onnx_graph': {'model', 'shapes'},
    'export': {'config', 'monitor', 'onnx_graph', 'run_folder', 'step', 'trained'},
    'convert': {
        'checkpoint',
        'command',
        'config',
        'export',
        'formats',
        'formats.caffe_file',
        'formats.layouts',
        'formats.safetensors_file',
        'formats.torch_file',
        'monitor',
        'presets',
        'shapes',
        'startup',
        'trained',
    },
    'sweep': {'command', 'config', 'monitor', 'run_folder'},
    'flags': {'config', 'config_files', 'monitor', 'sweep'},
    'startup': {'monitor'},
    'monitor': set(),
    'layers': set(),
    'augment': set(),
    'optimizer': {'config', 'shapes'},
    'parallel': {'config'},
    'model': {'layers', 'parallel', 'shapes'},
    'step': {'augment', 'model', 'optimizer', 'parallel'},
    'processes': {'config', 'monitor'},
    'ensemble': set(),
    'trained': {
        'augment',
        'checkpoint',
        'config',
        'data.pipeline',
        'data.store',
        'monitor',
        'parallel',
        'run_folder',
        'step',
    },
    'pictures': {'config', 'data.images', 'data.pipeline'},
    'predict': {
        'checkpoint',
        'command',
        'config',
        'data.pipeline',
        'ensemble',
        'figures.predictions',
        'figures.style',
        'monitor',
        'pictures',
        'startup',
        'step',
        'trained',
    },
    'figures': set(),
    'figures.style': {'monitor'},
    'figures.confusion': {'ensemble', 'figures.style'},
    'figures.curves': {'config', 'figures.style'},
    'figures.kernels': {'figures.style'},
    'figures.maps': {'figures.style'},
    'figures.neighbours': {'figures.style'},
    'figures.network': {'figures.style', 'shapes'},
    'figures.predictions': {'figures.style'},
    'figures.runs': {
        'config',
        'data.pipeline',
        'evaluate',
        'features',
        'figures.confusion',
        'figures.curves',
        'figures.kernels',
        'figures.maps',
        'figures.neighbours',
        'figures.network',
        'pictures',
        'step',
        'sweep_results',
        'trained',
    },
    'figures.__main__': {
        'checkpoint',
        'command',
        'config',
        'data.pipeline',
        'figures.neighbours',
        'figures.runs',
        'figures.style',
        'monitor',
        'pictures',
        'presets',
        'shapes',
        'startup',
        'trained',
    },
    'page': set(),
    'page.html': set(),
    'page.run_files': {'config', 'figures.curves', 'monitor', 'run_folder', 'sweep_results'},
    'page.settings': {'config', 'presets', 'sweep_results'},
    'page.of_weights': {
        'checkpoint',
        'config',
        'data.pipeline',
        'ensemble',
        'features',
        'figures.kernels',
        'page.html',
        'startup',
        'step',
        'trained',
    },
    'page.of_run': {
        'figures.curves',
        'figures.network',
        'figures.style',
        'page.html',
        'page.of_weights',
        'page.run_files',
        'page.settings',
        'sweep_results',
    },
    'page.of_sweep': {
        'config',
        'monitor',
        'page.html',
        'page.of_run',
        'page.of_weights',
        'page.run_files',
        'sweep_table',
    },
    'instruments': {
        'config',
        'data.pipeline',
        'ensemble',
        'figures.kernels',
        'figures.predictions',
        'figures.style',
        'monitor',
        'parallel',
        'processes',
        'step',
    },
    'features': {'config', 'data.pipeline', 'monitor', 'parallel', 'shapes', 'step', 'trained'},
    'evaluate': {
        'checkpoint',
        'command',
        'config',
        'data.pipeline',
        'ensemble',
        'monitor',
        'parallel',
        'startup',
        'step',
        'totals',
        'trained',
    },
    'checkpoint': {'monitor', 'processes'},
    'data': set(),
    'data.photos': set(),
    'data.images': set(),
    'data.examples': set(),
    'data.sources': {'data.examples', 'data.photos', 'monitor'},
    'data.shards': set(),
    'data.pipeline': {'config', 'monitor'},
    'data.store': {'command', 'config', 'data.pipeline', 'monitor'},
    'data.workers': {'data.images', 'data.pipeline', 'data.shards', 'monitor'},
    'prepare': {
        'command',
        'config',
        'data.examples',
        'data.pipeline',
        'data.shards',
        'data.sources',
        'data.workers',
        'monitor',
    },
    'totals': set(),
    'collectives': set(),
    'costs': {'shapes'},
    'audit': {'collectives', 'config', 'costs', 'flags', 'monitor', 'parallel', 'shapes', 'step'},
    'train': {
        'augment',
        'checkpoint',
        'config',
        'data.pipeline',
        'data.store',
        'evaluate',
        'instruments',
        'monitor',
        'optimizer',
        'parallel',
        'processes',
        'run_folder',
        'startup',
        'step',
        'totals',
    },
}


def module_name(file):
    """Dotted name below the package, '' of the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(part for part in parts if part != '__init__')


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob('*.py'))}


def imported(node):
    """Every dotted name that an import statement could bind; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, 'imports are absolute'
        return {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return set()


def imports(tree):
    return set().union(*map(imported, ast.walk(tree)))


def module_level_imports(tree):
    """Imports that run when the module is loaded: those outside of functions."""
    names, nodes = set(), list(tree.body)
    while nodes:
        node = nodes.pop()
        names |= imported(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def within_package(names):
    """The package's modules among `names`."""
    below = {name.removeprefix('alexnet_jax').removeprefix('.') for name in names if name.startswith('alexnet_jax')}
    return {name for name in below if name in FILES} - {'', 'data', 'figures', 'page'}


def is_of(names, library):
    return any(name == library or name.startswith(library + '.') for name in names)


def parse(file):
    return ast.parse(file.read_text())


def test_every_module_has_its_place():
    assert set(FILES) == set(ALLOWED)


@pytest.mark.parametrize('module', FILES)
def test_imports_go_one_way(module):
    assert within_package(imports(parse(FILES[module]))) <= ALLOWED[module]


def test_only_launch_imports_train_and_only_when_it_runs():
    files = [*FILES.values(), ROOT / 'launch.py', *(ROOT / 'configs').glob('*.py')]
    names = {file: imports(parse(file)) for file in files}
    assert [file for file in names if is_of(names[file], 'alexnet_jax.train')] == [FILES['launch']]
    assert [file for file in names if is_of(names[file], 'alexnet_jax.launch')] == []
    assert not is_of(module_level_imports(parse(FILES['launch'])), 'alexnet_jax.train')


@pytest.mark.parametrize(
    'module',
    [
        '',
        '__main__',
        'presets',
        'config',
        'config_files',
        'flags',
        'launch',
        'collectives',
        'costs',
        'audit',
        'startup',
        'monitor',
        'data',
        'data.photos',
        'data.images',
        'data.examples',
        'data.sources',
        'data.shards',
        'data.workers',
        'data.pipeline',
        'data.store',
        'convert',
        'ensemble',
        'evaluate',
        'export',
        'features',
        'formats',
        'formats.caffe_file',
        'formats.layouts',
        'formats.pickles',
        'formats.safetensors_file',
        'formats.torch_file',
        'instruments',
        'onnx_graph',
        'pictures',
        'predict',
        'report',
        'run_folder',
        'sweep',
        'trained',
    ],
)
def test_no_jax_on_import(module):
    names = module_level_imports(parse(FILES[module]))
    assert not any(is_of(names, library) for library in ('jax', 'jaxlib', 'flax', 'optax', 'orbax'))


def test_launch_sets_flags_before_jax_is_imported():
    names = module_level_imports(parse(FILES['launch']))
    assert 'alexnet_jax.startup' in names
    assert not is_of(names, 'jax')


@pytest.mark.parametrize('module', FILES)
def test_tensorflow_is_not_imported(module):
    names = module_level_imports(parse(FILES[module]))
    assert not is_of(names, 'tensorflow')
    if module not in ('prepare', 'data.photos', 'data.examples', 'data.sources', 'data.shards', 'data.workers'):
        assert not is_of(names, 'tensorflow_datasets')


@pytest.mark.parametrize('module', FILES)
def test_sharding_is_named_in_parallel_alone(module):
    tree = parse(FILES[module])
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = imports(tree) | attributes
    named = any(
        is_of(names, name)
        for name in ('jax.sharding', 'jax.shard_map', 'jax.NamedSharding', 'jax.P', 'jax.make_mesh', 'jax.set_mesh')
    )
    assert named == (module == 'parallel')
