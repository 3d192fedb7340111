"""Tests of dynamic_batching/op_library.py."""

import pytest

from dynamic_batching.op_library import load_ops


def test_a_library_is_loaded_once():
    assert load_ops('dynamic_batching') is load_ops('dynamic_batching')


def test_the_error_for_an_uncompiled_library_names_the_fix():
    with pytest.raises(ImportError, match='ops of impala.suites are not compiled; run `make inst'):
        load_ops('impala.suites')
