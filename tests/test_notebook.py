"""The notebook docs/notebook.ipynb: it agrees with its source docs/notebook.py, and executes."""

import json
import re
import sys

import jupytext
import nbformat
import pytest
from helpers import ROOT, run_command

NOTEBOOK = ROOT / 'docs/notebook.ipynb'
UPDATE = 'python -m jupytext --to ipynb docs/notebook.py'
EXECUTE = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
client = nbclient.NotebookClient(notebook, timeout=None, kernel_name='python3', resources={'metadata': {'path': '.'}})
try:
    client.execute()
finally:
    nbformat.write(notebook, 'executed.ipynb')
"""


def test_the_notebook_agrees_with_its_source():
    source, notebook = jupytext.read(ROOT / 'docs/notebook.py'), nbformat.read(NOTEBOOK, as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (source, notebook)]
    assert cells[0] == cells[1], UPDATE
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == 'code' and cell.outputs] == []
    badge = 'colab.research.google.com/github/OWNER/alexnet_jax/blob/main/docs/notebook.ipynb'
    assert badge in notebook.cells[0].source


@pytest.mark.slow
@pytest.mark.timeout(3600)  # executes in two minutes; a busy machine may take longer
def test_the_notebook_executes(tmp_path, compiled_programs):
    kernel = {'argv': [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], 'language': 'python'}
    (tmp_path / 'jupyter/kernels/python3').mkdir(parents=True)
    (tmp_path / 'jupyter/kernels/python3/kernel.json').write_text(json.dumps(kernel | {'display_name': 'Python 3'}))
    (tmp_path / 'work').mkdir()
    variables = {'JUPYTER_PATH': f'{tmp_path}/jupyter', 'PYTHONPATH': str(ROOT), 'IPYTHONDIR': f'{tmp_path}/ipython'}
    run = run_command('-c', EXECUTE, NOTEBOOK, cwd=tmp_path / 'work', timeout=3500, **variables)
    assert run.returncode == 0, run.stderr[-3000:]
    executed = nbformat.read(tmp_path / 'work/executed.ipynb', as_version=4)
    outputs = [output for cell in executed.cells if cell.cell_type == 'code' for output in cell.outputs]
    text = '\n'.join(output.text for output in outputs if output.output_type == 'stream')
    assert [output for output in outputs if output.output_type == 'error'] == []
    assert len([output for output in outputs if 'image/png' in output.get('data', {})]) == 4
    assert "{'conv1': (3, 15, 15, 24), 'conv5': (3, 3, 3, 64), 'fc7': (3, 1024)}" in text
    found = re.search(r'^top-1 error on 60 new pictures: ([\d.]+)%; by chance 66\.7%$', text, re.MULTILINE)
    assert found is not None, text
    assert float(found[1]) < 40, text
