"""What all tests share: no GPU, and a folder for temporary files in which none leaves anything."""

import os
import tempfile

import pytest

# Before TensorFlow is imported here or in a process of a test. What tests compare is computed on
# the CPU, and each of many processes would want a GPU's memory.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


@pytest.fixture(scope='session', autouse=True)
def temporary_folder(tmp_path_factory):
    """Holds what tests, and the processes that they start, write to the system's folder.

    A test that is killed leaves files behind, TensorFlow's of its autographed functions for
    instance; pytest removes them with its own folders some runs later.
    """
    folder = tmp_path_factory.mktemp('temporary')
    before = os.environ.get('TMPDIR')
    os.environ['TMPDIR'] = tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = None
    if before is None:
        del os.environ['TMPDIR']
    else:
        os.environ['TMPDIR'] = before
    # What multiprocessing has there goes with this process.
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    assert not [name for name in left if not name.startswith('pymp-')]
