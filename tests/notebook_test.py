"""The notebook of examples/ runs, and is stored with what it printed and drew."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'examples' / 'cartpole.ipynb'


def kinds_of_outputs(notebook):
    """Returns the kinds of data that the code cells show, each as often as it occurs."""
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    assert not [output for output in outputs if output.output_type == 'error']
    return [kind for output in outputs for kind in output.get('data', ())]


def check(notebook):
    kinds = kinds_of_outputs(notebook)
    # Two plots and a strip of frames.
    assert kinds.count('image/png') == 3
    assert any(
        '<video' in output.get('data', {}).get('text/html', '')
        for cell in notebook.cells
        for output in cell.get('outputs', ())
    )


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('CARTPOLE_FRAMES', '2000')
    monkeypatch.setenv('PYTHONPATH', str(ROOT), prepend=':')
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.pop('outputs', None)
        if cell.cell_type == 'code':
            cell.outputs = []
    client = NotebookClient(
        notebook,
        startup_timeout=300,
        timeout=300,
        kernel_name='python3',
        resources={'metadata': {'path': str(tmp_path)}},
    )
    client.execute()
    check(notebook)
    assert (tmp_path / 'runs' / 'cartpole_notebook' / 'learning_curve.png').exists()


def test_the_stored_notebook_has_its_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    check(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == 'code']
    assert counts == [*range(1, len(counts) + 1)]
    # A page that is slow to load helps nobody.
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.parametrize('name', ['FRAMES', 'LOGDIR'])
def test_parameters_are_in_the_first_code_cell(name):
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == 'code')
    assert f'{name} = ' in first.source
