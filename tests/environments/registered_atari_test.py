"""Compares Atari ids that users register with what Gymnasium plays."""

import ale_py
import gymnasium
import numpy as np
import pytest
from playing import play, random_actions

from impala.environments import create_environment
from impala.errors import LevelError
from impala.trajectory import EpisodeEnd


@pytest.mark.parametrize(
    'kwargs, limit, config, actions_seen',
    [
        ({'game': 'breakout', 'mode': 4, 'difficulty': 1, 'frameskip': 1}, None, {}, 4),
        ({'game': 'pong', 'max_num_frames_per_episode': 400, 'frameskip': 1}, None, {}, 6),
        ({'game': 'pong', 'max_num_frames_per_episode': None, 'frameskip': 1}, 300, {}, 6),
        ({'game': 'pong', 'full_action_space': True, 'frameskip': 1}, 300, {}, 18),
        ({'game': 'boxing', 'repeat_action_probability': 0.5, 'frameskip': 1}, None, {}, 18),
        ({'game': 'pong', 'obs_type': 'grayscale', 'frameskip': 1}, 100, {'max_noops': 0}, 6),
    ],
)
def test_registered_atari_ids_match_gymnasium(
    kwargs, limit, config, actions_seen, register_atari, make
):
    """With Gymnasium's preprocessing, which needs `frameskip` 1 and repeats actions itself."""
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=kwargs, max_episode_steps=limit)
    environment = make(name, 3, **config)
    # Gymnasium's default is 0.25, ours is 0.
    options = {} if 'repeat_action_probability' in kwargs else {'repeat_action_probability': 0.0}
    truth = gymnasium.wrappers.FrameStackObservation(
        gymnasium.wrappers.AtariPreprocessing(
            gymnasium.make(name, disable_env_checker=True, **options),
            noop_max=config.get('max_noops', 30),
        ),
        4,
    )
    assert environment.spec.num_actions == truth.action_space.n == actions_seen
    assert environment.spec.num_action_repeats == 4
    expected, _ = truth.reset(seed=3)
    np.testing.assert_array_equal(environment.reset()['frame'], np.moveaxis(expected, 0, -1))
    ends = 0
    for action in random_actions(environment, 250):
        reward, end, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert (reward, end == EpisodeEnd.TRUNCATED) == (expected_reward, truncated)
        if terminated or truncated:
            ends += 1
            expected, _ = truth.reset()
        np.testing.assert_array_equal(observation['frame'], np.moveaxis(expected, 0, -1))
    truth.close()
    assert ends >= 2 or kwargs['game'] != 'pong'


def test_flags_override_registered_atari_ids(register_atari, make):
    pong = {'game': 'pong', 'frameskip': 3, 'repeat_action_probability': 0.5}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=pong, max_episode_steps=50)
    environment = make(name, max_noops=0)
    assert environment.spec.num_action_repeats == 3
    assert environment._ale.getFloat('repeat_action_probability') == 0.5
    rows = play(environment, [0] * 100)
    assert [t for t, row in enumerate(rows) if row[1]] == [50, 100]
    # Flags take precedence; the limit stays 50 steps of 3 frames.
    environment = make(name, max_noops=0, num_action_repeats=2, sticky_actions=0.1)
    assert environment._ale.getFloat('repeat_action_probability') == pytest.approx(0.1)
    rows = play(environment, [0] * 100)
    assert [t for t, row in enumerate(rows) if row[1]] == [75]

    # The package's own ids only name the game; of a changed id all settings count.
    assert make('PongNoFrameskip-v0').spec.num_action_repeats == 4
    changed = {**gymnasium.registry['ALE/Pong-v5'].kwargs, 'max_num_frames_per_episode': 40}
    register_atari('ALE/Pong-v5', ale_py.AtariEnv, kwargs=changed)
    environment = make('ale_py:ALE/Pong-v5', max_noops=0)
    assert environment._ale.getFloat('repeat_action_probability') == 0.25
    rows = play(environment, [0] * 20)
    assert [t for t, row in enumerate(rows) if row[1]] == [10, 20]


@pytest.mark.parametrize(
    'kwargs, part',
    [
        ({}, 'names no game'),
        ({'game': 'pnog'}, "game='pnog', which is none of the"),
        ({'game': 'pong', 'obs_type': 'ram'}, "obs_type='ram'"),
        ({'game': 'pong', 'obs_type': 'rgb'}, "obs_type='rgb'"),
        ({'game': 'pong', 'frameskip': (2, 5)}, 'frameskip=(2, 5)'),
        ({'game': 'pong', 'frameskip': 0}, 'frameskip=0'),
        ({'game': 'pong', 'mode': 7}, "'pong' has no mode 7, but 0, 1."),
        ({'game': 'pong', 'difficulty': 'hard'}, "'pong' has no difficulty 'hard'"),
        ({'game': 'pong', 'continuous': True}, 'continuous=True'),
        ({'game': 'pong', 'sound_obs': True}, 'sound_obs=True'),
        ({'game': 'pong', 'render_mode': 'human'}, "render_mode='human'"),
        ({'game': 'pong', 'paddles': 2}, 'paddles=2'),
        ({'game': 'pong', 'max_num_frames_per_episode': -1}, 'max_num_frames_per_episode=-1'),
        ({'game': 'pong', 'repeat_action_probability': 1.5}, 'repeat_action_probability=1.5'),
    ],
)
def test_unsupported_settings_of_registered_atari_ids_are_refused(kwargs, part, register_atari):
    name = register_atari('EnvironmentsTest/Own-v0', 'ale_py:AtariEnv', kwargs=kwargs)
    with pytest.raises(LevelError) as error:
        create_environment(name, 1)
    assert repr(name) in str(error.value) and part in str(error.value)


def test_wrappers_of_registered_atari_ids_are_refused(register_atari):
    wrapper = gymnasium.envs.registration.WrapperSpec(
        'TimeAwareObservation', 'gymnasium.wrappers:TimeAwareObservation', {}
    )
    name = register_atari(
        'EnvironmentsTest/Own-v0', kwargs={'game': 'pong'}, additional_wrappers=(wrapper,)
    )
    with pytest.raises(LevelError, match=f'{name}.*the wrapper TimeAwareObservation'):
        create_environment(name, 1)
