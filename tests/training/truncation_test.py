"""What short runs learn where a time limit ends the episodes.

In both levels each step has reward 1, and an episode lasts 10 steps.
"""

import numpy as np
import pytest
import tensorflow as tf
from command_line import episodes

from configs import config
from impala import training
from impala.errors import LevelError
from impala.training.hooks import Hook
from impala.trajectory import StepOutput, StepOutputInfo

DISCOUNT = 0.9


class _Keep(Hook):
    """Keeps the learner for the test."""

    def after_update(self, update):
        self.learner = update.learner


def _values(learner, frames):
    """Values of one frame after the other, from the second row of an episode on."""
    rows = (len(frames), 1)
    numbers = np.zeros(rows, np.float32), *2 * [np.zeros(rows, np.int32)]
    env_outputs = StepOutput(
        np.ones(rows, np.float32), StepOutputInfo(*numbers), np.zeros(rows, bool),
        {'frame': np.array(frames, np.float32)[:, np.newaxis]},
    )  # fmt: skip
    agent = learner.agent
    outputs, _ = agent.unroll(
        tf.zeros(rows, tf.int32),
        tf.nest.map_structure(tf.constant, env_outputs),
        agent.initial_state(1),
    )
    baseline = outputs.baseline
    if agent.popart is not None:
        baseline = agent.popart.values(baseline, tf.constant([0]))
    return baseline.numpy()[:, 0]


def _trained(logdir, level_name, **changes):
    run = config(
        logdir,
        **{
            'level_name': level_name,
            'num_actors': 4,
            'envs_per_process': 4,
            'batch_size': 4,
            'discounting': DISCOUNT,
            'total_environment_frames': 8000,
            'entropy_cost': 0.0,
            'baseline_cost': 1.0,
            'optimizer': 'adam',
            'learning_rate': 0.01,
            'gradient_clip_norm': 40.0,
            'log_secs': 5.0,
            **changes,
        },
    )
    keep = _Keep()
    training.train(run, [keep])
    return keep.learner


@pytest.mark.parametrize(
    'changes',
    [
        {'core': 'lstm', 'replay_fraction': 0.5, 'replay_capacity': 100},
        {'popart': True, 'num_actors': 3},
        {'loss': 'appo', 'gae_advantages': True, 'sample_reuse': 2, 'vtrace_lambda': 0.9},
        {'loss': 'appo', 'target_update_steps': 5, 'normalize_advantages': True},
    ],
    ids=['LSTM and replay', 'PopArt', 'reuse and GAE', 'target network'],
)
def test_a_return_that_continues_is_that_of_an_endless_episode(tmp_path, changes):
    learner = _trained(tmp_path, 'levels:timeless', bootstrap_truncated=True, **changes)
    # 1 + 0.9 + 0.81 + ... = 10.
    values = _values(learner, [[1, 1]] * 9)
    np.testing.assert_allclose(values, 10.0, atol=0.5)
    # What the files say of episodes is what the environment played.
    assert {
        (row['episode_return'], row['episode_frames'], row['ended_by'])
        for row in episodes(tmp_path)
    } == {('10.0', '10', 'truncated')}


def test_a_return_that_ends_is_a_finite_sum(tmp_path):
    learner = _trained(tmp_path, 'levels:timed')
    sums = [(1 - DISCOUNT**left) / (1 - DISCOUNT) for left in range(10, 0, -1)]
    values = _values(learner, np.eye(10))
    np.testing.assert_allclose(values, sums, atol=0.5)


def test_a_level_without_its_last_observation_ends_the_run_by_name(tmp_path):
    with pytest.raises(LevelError, match=r"^'levels:timed' ended .* --bootstrap_truncated needs: "):
        _trained(tmp_path, 'levels:timed', bootstrap_truncated=True)
