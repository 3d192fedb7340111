"""Tests of what installs the project: pyproject.toml, setup.py, Makefile, Dockerfile, CI.

They cover what happens before anything is installed or compiled.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from setuptools import Distribution

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def without_a_compiler(tmp_path):
    """An environment whose PATH has no programs."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    return {'PATH': str(folder)}


def lines(*, beginning_with, path):
    """Returns the rest of every line that begins with the given text."""
    text = (ROOT / path).read_text(encoding='utf-8')
    return re.findall(rf'^\s*{re.escape(beginning_with)} *(.*)$', text, re.MULTILINE)


def test_make_without_a_compiler_prints_one_sentence(tmp_path, without_a_compiler):
    make = shutil.which('make')
    if make is None:
        pytest.skip('make is not installed')
    result = subprocess.run(
        [
            make,
            '--no-print-directory',
            'train',
            f'VENV={tmp_path}/venv',
            f'PYTHON={sys.executable}',
        ],
        cwd=ROOT,
        env=without_a_compiler,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    sentence, makes_own = result.stderr.splitlines()
    assert sentence == (
        'A C++ compiler is needed to build the TensorFlow ops and g++ was not found; install it '
        '(Debian, Ubuntu: apt-get install g++).'
    )
    assert re.fullmatch(r'make: \*\*\* .* Error 2', makes_own)
    assert result.stdout == ''
    assert not (tmp_path / 'venv').exists()


def test_setup_without_a_compiler_prints_one_sentence(tmp_path, without_a_compiler):
    build = [f'--build-lib={tmp_path}/lib', f'--build-temp={tmp_path}/temp']
    result = subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_ext', *build],
        cwd=ROOT,
        env=without_a_compiler,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        'A C++ compiler is needed to build the TensorFlow ops and g++ was not found; install it '
        '(Debian, Ubuntu: apt-get install g++ make) and run this again.'
    )
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'lib').exists()


def test_the_image_runs_the_same_tests_as_make():
    (of_make,) = lines(beginning_with='$(VENV)/bin/python -m pytest', path='Makefile')
    (of_image,) = lines(beginning_with='RUN python -m pytest', path='Dockerfile')
    assert of_image == of_make != ''


def test_only_the_flag_file_of_make_train_is_described_as_such():
    (arguments,) = lines(beginning_with='$(VENV)/bin/python experiment.py', path='Makefile')
    trained = pathlib.PurePath(re.match(r'--flagfile=(\S+)', arguments)[1])
    for path in ROOT.glob('configs/*.flags'):
        is_trained = path.name == trained.name
        assert ('what `make train` runs' in path.read_text(encoding='utf-8')) == is_trained
        (documented,) = lines(beginning_with=f'| `{path.name}` |', path='docs/training.md')
        assert ('what `make train` runs' in documented) == is_trained
    assert (ROOT / trained).exists()


def test_make_docs_builds_the_site_that_clean_and_git_know():
    (command,) = lines(beginning_with='$(VENV)/bin/mkdocs', path='Makefile')
    assert command == 'build --quiet --strict'
    (site,) = lines(beginning_with='site_dir:', path='mkdocs.yml')
    (cleaned,) = lines(beginning_with='rm -rf $(VENV)', path='Makefile')
    assert site in cleaned.split()
    assert f'/{site}/' in (ROOT / '.gitignore').read_text().splitlines()


@pytest.fixture
def distribution(monkeypatch):
    """The package as pyproject.toml describes it."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    return distribution


def test_every_folder_of_python_files_is_installed(distribution):
    folders = {
        str(path.parent.relative_to(ROOT)).replace('/', '.')
        for top in ('impala', 'dynamic_batching')
        for path in (ROOT / top).rglob('*.py')
    }
    assert set(distribution.packages) == folders
    assert all((ROOT / f'{module}.py').exists() for module in distribution.py_modules)


def test_the_version_is_the_same_everywhere(distribution):
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    newest, *_ = re.findall(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert distribution.metadata.version == citation['version'] == newest


def test_continuous_integration_runs_every_supported_python():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text(encoding='utf-8'))
    pythons = workflow['jobs']['test']['strategy']['matrix']['python']
    assert pythons == ['3.10', '3.11', '3.12', '3.13']
    (supported,) = lines(beginning_with='requires-python =', path='pyproject.toml')
    assert supported == '">=3.10,<3.14"'
