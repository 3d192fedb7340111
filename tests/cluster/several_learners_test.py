"""Compares several learners, or devices of one, with one learner on the joined batch."""

import os

import numpy as np
import pytest
from command_line import PATIENCE_SECONDS, TESTS
from ports import free_ports
from replica import (
    BATCH_SIZE,
    INTRINSIC,
    PIPELINED,
    POISONED,
    UPDATES,
    agents,
    create_learner,
    train,
)
from warm_process import WarmProcess


@pytest.fixture(scope='module')
def alone():
    """Results of one learner on the joined batches."""
    results = {}
    for name, (agent, changes) in agents().items():
        learner = create_learner(agent, changes, BATCH_SIZE)
        updates = train(learner, has_intrinsic_rewards=name == INTRINSIC)
        for update, (metrics, variables) in enumerate(updates):
            for key, value in metrics.items():
                results[f'{name}/{update}/{key}'] = value.numpy()
            for i, variable in enumerate(variables):
                results[f'{name}/{update}/variable {i}'] = variable.numpy()
    return results


def run_replicas(folder, *commands):
    """Runs one process per command; returns what each wrote."""
    environment = os.environ | {'PYTHONPATH': f'{TESTS.parent}{os.pathsep}{TESTS}'}
    processes = []
    try:
        for i, (kind, *rest) in enumerate(commands):
            flags = [kind, folder / f'{i}.npz', *rest]
            outputs = [folder / f'{i}.{name}' for name in ('stdout', 'stderr')]
            processes.append(WarmProcess(TESTS / 'replica.py', flags, environment, folder, outputs))
        for i, process in enumerate(processes):
            assert process.wait(PATIENCE_SECONDS) == 0, (folder / f'{i}.stderr').read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [dict(np.load(folder / f'{i}.npz')) for i in range(len(commands))]


def assert_same(results, alone):
    """Asserts that replicas match one learner closely, and each other exactly."""
    seen = {}
    for result in results:
        for key in result:
            expected = key.partition('/replica')[0]
            np.testing.assert_allclose(
                result[key], alone[expected], rtol=2e-5, atol=1e-6, err_msg=key
            )
            np.testing.assert_array_equal(result[key], seen.setdefault(expected, result[key]), key)
    assert seen.keys() == alone.keys()


def test_the_joined_batches_exercise_everything(alone):
    for name in agents():
        skipped = [bool(alone[f'{name}/{update}/skipped']) for update in range(UPDATES)]
        assert skipped == [update == POISONED for update in range(UPDATES)]
        # Gradients are clipped to a norm of 0.5.
        assert alone[f'{name}/0/gradient_norm'] > 1
        assert alone[f'{name}/1/policy_lag_max'] == 2
        assert (f'{name}/1/intrinsic_reward' in alone) == (name == INTRINSIC)
        rates = [alone[f'{name}/{update}/learning_rate'] for update in range(UPDATES)]
        np.testing.assert_allclose(rates, [0.05, 0.045, 0.04, 0.035], rtol=1e-6)


def test_devices_match_one_learner_on_the_joined_batch(tmp_path, alone):
    results = run_replicas(tmp_path, ('devices', '2'))
    replicas = {key.partition('/replica ')[2] for key in results[0]} - {''}
    assert replicas == {'0', '1'}
    restored = [key for key in results[0] if '/restored/' in key]
    assert len(restored) == sum(f'/{UPDATES - 1}/variable' in key for key in results[0])
    for key in restored:
        last = key.replace('restored', str(UPDATES - 1))
        np.testing.assert_array_equal(results[0].pop(key), results[0][last], key)
    assert_same(results, alone)


def test_devices_with_their_own_pipelines_match_one_learner(tmp_path, alone):
    results = run_replicas(tmp_path, ('pipelines', '2'))
    assert_same(results, {key: alone[key] for key in alone if key.partition('/')[0] in PIPELINED})


def test_learners_match_one_learner_on_the_joined_batch(tmp_path, alone):
    addresses = [f'localhost:{port}' for port in free_ports(2)]
    results = run_replicas(
        tmp_path, *[('learner', '2', str(task), *addresses) for task in range(2)]
    )
    assert_same(results, alone)
