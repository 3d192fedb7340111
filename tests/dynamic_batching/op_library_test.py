"""Tests of dynamic_batching/op_library.py."""

import pytest

from dynamic_batching.op_library import load_ops


def test_a_library_is_loaded_once():
    assert load_ops('dynamic_batching') is load_ops('dynamic_batching')


def test_a_library_that_is_not_compiled_is_named_with_the_cure():
    with pytest.raises(ImportError, match='ops of impala.suites are not compiled; run `make inst'):
        load_ops('impala.suites')
