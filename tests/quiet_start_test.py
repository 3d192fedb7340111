import os

import pytest

from impala.quiet_start import quiet_tensorflow


def test_what_was_said_is_shown_if_the_start_fails(monkeypatch, capfd):
    # Set first, so that it is as it was behind the test.
    monkeypatch.setenv('TF_CPP_MIN_LOG_LEVEL', '0')
    monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL')
    with pytest.raises(ImportError), quiet_tensorflow():
        os.write(2, b'a library is missing\n')
        raise ImportError
    assert capfd.readouterr().err == 'a library is missing\n'
    monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL')
    with quiet_tensorflow():
        os.write(2, b'all is well\n')
    assert capfd.readouterr().err == ''
