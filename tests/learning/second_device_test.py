"""Tests GPU code on a second device that stands in for a GPU; see `second_device`."""

import json
import math
import os
import pathlib

import pytest
import tensorflow as tf
from second_device import DEVICE, LEARNERS
from warm_process import WarmProcess

TESTS = pathlib.Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """Returns what `second_device` writes."""
    folder = tmp_path_factory.mktemp('second_device')
    environment = os.environ | {
        'TF_XLA_FLAGS': '--tf_xla_enable_xla_devices',
        'PYTHONPATH': f'{TESTS.parent}',
    }
    process = WarmProcess(
        TESTS / 'second_device.py', [folder / 'found', folder / 'run'], environment, folder,
        [folder / 'stdout', folder / 'stderr'],
    )  # fmt: skip
    try:
        assert process.wait(PATIENCE_SECONDS) == 0, (folder / 'stderr').read_text()
    finally:
        process.kill()
    return json.loads((folder / 'found').read_text())


def result(found, check):
    assert 'error' not in found[check], found[check]['error']
    return found[check]['result']


def test_batched_functions_use_variables_of_another_device(found):
    """Three times the variable; the graph also adds the variable."""
    assert result(found, 'batched function') == [[6, 8, 6], [15, 20, 15]]


def test_sparse_gradients_have_the_same_effect_as_on_the_cpu(found):
    assert result(found, 'sparse gradients') < 1e-6


@pytest.mark.parametrize('name', LEARNERS)
def test_learners_learn_on_a_second_device(found, name):
    first, second = result(found, name)['updates']
    assert {first['skipped'], second['skipped']} == {0}
    assert all(map(math.isfinite, [*first.values(), *second.values()]))
    assert first['loss/total'] != second['loss/total']
    assert (first['policy_lag_mean'], second['policy_lag_mean']) == (0, 1)


def test_a_run_is_trained_resumed_and_tested_on_a_second_device(found):
    run = result(found, 'whole run')
    assert [device.endswith(DEVICE) for device in run['batches']] == [True]
    assert [device.endswith(DEVICE) for device in run['variables']] == [True]
    # Batches of 2 unrolls of 10 steps, of one frame each: 100 frames in all.
    assert run['updates'] == 5
    # An episode's length is its return.
    assert run['returns'] == {'levels:short': [5, 5], 'levels:long': [20, 20]}


def test_the_policy_acts_on_a_second_device_and_the_learner_learns_on_the_cpu(found):
    run = result(found, 'inference device')
    for name in ('weights', 'published', 'rows'):
        assert [device.endswith(DEVICE) for device in run[name]] == [True], name
    assert [device.endswith('CPU:0') and 'XLA' not in device for device in run['learner']] == [True]
    # Weights of some update came there.
    assert [version > 0 for version in run['versions']] == [True]


@pytest.mark.skipif(
    not tf.sysconfig.get_build_info()['is_cuda_build'], reason='lists no kernels for GPUs'
)
@pytest.mark.parametrize('name', LEARNERS)
def test_every_operation_has_a_gpu_kernel_or_is_pinned_to_the_cpu(found, name):
    kernels = result(found, name)
    assert not kernels['missing']
    # The serving loop's ops have none, nor has UniqueV2, which finds equal instructions.
    assert {'UnrollBatcherGet', 'UnrollBatcherSet', 'UniqueV2'} <= kernels['pinned'].keys()
