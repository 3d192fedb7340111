import gc
import os
import platform
import subprocess
import sys
import threading

import pytest

from impala.runs import tensorflow_start
from impala.runs.tensorflow_start import starting_tensorflow

ASK = """
from impala.runs.tensorflow_start import starting_tensorflow
with starting_tensorflow():
    import tensorflow
from tensorflow.python.util import _pywrap_util_port
print(_pywrap_util_port.IsMklEnabled())
"""


def test_output_is_shown_if_the_start_fails(monkeypatch, capfd):
    # Set first, so that monkeypatch restores them after the test.
    for name in ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS', 'TF_FORCE_GPU_ALLOW_GROWTH'):
        monkeypatch.setenv(name, '0')
    monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL')
    with pytest.raises(ImportError), starting_tensorflow():
        os.write(2, b'a library is missing\n')
        raise ImportError
    assert capfd.readouterr().err == 'a library is missing\n'
    monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL')
    with starting_tensorflow():
        os.write(2, b'all is well\n')
    assert capfd.readouterr().err == ''


def test_a_slow_start_is_reported_while_other_output_is_hidden(monkeypatch, capfd):
    for name in ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS', 'TF_FORCE_GPU_ALLOW_GROWTH'):
        monkeypatch.setenv(name, '0')
    monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL')
    is_told = threading.Event()
    write = tensorflow_start._write

    def write_and_tell(*args):
        write(*args)
        is_told.set()

    monkeypatch.setattr(tensorflow_start, '_write', write_and_tell)
    monkeypatch.setattr(tensorflow_start, '_LONG_SECONDS', 0.01)
    with starting_tensorflow():
        os.write(2, b'all is well\n')
        assert is_told.wait(60)
    assert capfd.readouterr().err == 'Starting: TensorFlow is loaded\n'


@pytest.mark.parametrize(('value', 'expected'), [(None, 'true'), ('false', 'false')])
def test_gpu_memory_grows_on_demand_by_default(monkeypatch, value, expected):
    for name in ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS', 'TF_FORCE_GPU_ALLOW_GROWTH'):
        monkeypatch.setenv(name, '0')
    if value is None:
        monkeypatch.delenv('TF_FORCE_GPU_ALLOW_GROWTH')
    else:
        monkeypatch.setenv('TF_FORCE_GPU_ALLOW_GROWTH', value)
    with starting_tensorflow():
        # TensorFlow's allocator reads this variable.
        assert os.environ['TF_FORCE_GPU_ALLOW_GROWTH'] == expected


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='left to TensorFlow')
@pytest.mark.parametrize(('value', 'is_used'), [(None, True), ('0', False)])
def test_onednn_is_used_on_every_x86_processor_by_default(value, is_used):
    environment = {key: text for key, text in os.environ.items() if not key.startswith('TF_')}
    if value is not None:
        environment['TF_ENABLE_ONEDNN_OPTS'] = value
    # Ask TensorFlow itself.
    said = subprocess.run(
        [sys.executable, '-c', ASK], env=environment, check=True, capture_output=True, text=True
    )
    assert said.stdout == f'{is_used}\n'
    # A start on a busy machine may be slow.
    assert said.stderr.replace('Starting: TensorFlow is loaded\n', '') == ''


def test_garbage_collection_resumes_afterwards():
    frozen = gc.get_freeze_count()
    with starting_tensorflow():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    with pytest.raises(ImportError), starting_tensorflow():
        raise ImportError
    assert gc.isenabled()
