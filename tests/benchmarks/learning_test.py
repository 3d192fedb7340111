"""Tests of benchmarks/learning.py: the random actions that results are compared with."""

import numpy as np
import pytest

from benchmarks import learning
from impala.environments import EnvironmentConfig
from impala.trajectory import ActionSpec


def test_random_actions_are_uniform_among_allowed_categories():
    random = np.random.RandomState(0)
    spec = ActionSpec((3, 2), ((-2.0, 6.0), None))
    mask = np.array([True, False, True, False, True])
    actions = np.stack([learning.random_action(spec, random, mask) for _ in range(4000)])
    assert actions.dtype == np.float32
    assert set(actions[:, 0]) == {0, 2} and set(actions[:, 1]) == {1}
    # Means of a uniform choice, of one from -2 to 6, and of a standard normal variable.
    np.testing.assert_allclose(actions.mean(0), [1, 1, 2, 0], atol=0.15)
    np.testing.assert_allclose(actions.std(0), [1, 0, 8 / 12**0.5, 1], atol=0.1)
    scalars = [learning.random_action(ActionSpec.discrete(3), random) for _ in range(300)]
    assert set(scalars) == {0, 1, 2}
    assert isinstance(scalars[0], int)


@pytest.mark.parametrize(
    'config',
    [
        EnvironmentConfig(),
        EnvironmentConfig(info_action_mask=True, env_kwargs='{"mask_in": "info"}'),
    ],
)
def test_random_returns_are_those_of_allowed_actions(config):
    # A forbidden action would be an error.
    returns = learning.random_returns('examples.action_masks:make', 20, config)
    # 30 jobs, with a mean reward of 13 / 30.
    assert len(returns) == 20
    assert 11 < np.mean(returns) < 15
