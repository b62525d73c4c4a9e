"""Which libraries the import of a module loads, and where device meshes are named.

The order of the modules is checked by lint-imports, with the contracts in pyproject.toml.
"""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / 'alexnet_jax'
FILES = {
    '.'.join(part for part in file.relative_to(PACKAGE).with_suffix('').parts if part != '__init__'): file
    for file in sorted(PACKAGE.rglob('*.py'))
}

# Modules whose import loads a library that takes long to load. Commands must answer --help and invalid flags without.
LOADED_BY = {
    'jax': (
        'augment',
        'convert.onnx_graph',
        'dry_run',
        'evaluate.elsewhere',
        'evaluate.own_data',
        'evaluate.predictions',
        'evaluate.predictor',
        'figures.from_model',
        'inference.feature_index',
        'inference.forward',
        'inference.loading',
        'inference.trained_model',
        'layers',
        'layers.*',
        'model',
        'optimizer',
        'parallel',
        'predict.classify',
        'report.model_section',
        'report.page',
        'runtime.distributed',
        'runtime.environment',
        'training.checkpoint_reader',
        'training.checkpointing',
        'training.diagnostics',
        'training.eval_step',
        'training.evaluation',
        'training.initial_weights',
        'training.input_pipeline',
        'training.metric_sum',
        'training.metrics_logger',
        'training.mixing',
        'training.state',
        'training.train_step',
        'training.trainer',
        'weight_layers',
    ),
    'grain': ('training.trainer',),
    'matplotlib': ('figures.from_*', 'plots.*', 'report.[!_]*'),
    'tensorflow_datasets': (
        'dry_run',
        'evaluate.elsewhere',
        'evaluate.other_data',
        'evaluate.own_data',
        'evaluate.predictor',
        'prepare.*',
    ),
    'tensorflow': (),
}
IMPORT_ALL = """
import importlib, sys
library, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    if library in sys.modules:
        sys.exit(f'the import of {module} loads {library}')
"""


@pytest.mark.parametrize('library', LOADED_BY)
def test_import_loads_library_only_in_listed_modules(library):
    modules = [
        f'alexnet_jax.{name}'.rstrip('.')
        for name in FILES
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in LOADED_BY[library])
    ]
    command = [sys.executable, '-c', IMPORT_ALL, library, *modules]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, '')


def names_in(file: Path) -> set[str]:
    """Every dotted name that an import binds or an attribute spells; `from a import b` may mean the module a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize('module', FILES)
def test_only_parallel_names_meshes_and_shardings(module):
    """lint-imports cannot check this: it knows libraries only as a whole."""
    mesh_names = ('jax.sharding', 'jax.shard_map', 'jax.NamedSharding', 'jax.P', 'jax.make_mesh', 'jax.set_mesh')
    found = any(f'{name}.'.startswith(f'{mesh_name}.') for name in names_in(FILES[module]) for mesh_name in mesh_names)
    assert found == (module == 'parallel')
