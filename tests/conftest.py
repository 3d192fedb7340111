"""For all tests: hides GPUs, and checks that no temporary folders are left."""

import os
import tempfile

import pytest

# Set before anything imports TensorFlow. Expected values are those of a CPU, and each of the many
# processes would claim a GPU's memory.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


@pytest.fixture(scope='session', autouse=True)
def temporary_folder(tmp_path_factory):
    """Holds the temporary files of tests and their processes.

    Killed processes leave some, such as TensorFlow's of autographed functions; pytest removes them
    with its own folders a few runs later.
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
    # multiprocessing removes its folders when this process ends.
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    assert not [name for name in left if not name.startswith('pymp-')]
