"""For all tests: hides GPUs, and checks that no temporary folders are left."""

import gc
import os
import tempfile

import pytest

# Set before anything imports TensorFlow. Expected values are those of a CPU, and each of the many
# processes would claim a GPU's memory.
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'


# The files that take longest, longest first. With pytest-xdist, one of them that began last would
# keep one process busy while the others have ended.
LONGEST = (
    'experiment_test.py',
    'replay_jobs_test.py',
    'sweep_test.py',
    'several_learners_jobs_test.py',
    'setting_pairs_test.py',
    'test_mode_test.py',
    'jobs_test.py',
    'loop_test.py',
    'fuzz_test.py',
    'several_learners_test.py',
    'learner_test.py',
    'network_test.py',
    'environment_job_test.py',
    'periodic_tests_test.py',
)


def pytest_configure(config):
    # pytest-xdist would begin with the files that have most tests.
    if hasattr(config.option, 'loadscopereorder'):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """Exempts what has been imported, nearly a million objects of TensorFlow, from collection.

    Otherwise each full collection would take half a second, and a training run causes several.
    """
    gc.freeze()


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
