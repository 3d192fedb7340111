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
        ({'game': 'breakout', 'mode': 12, 'frameskip': 1}, None, {}, 4),
        ({'game': 'freeway', 'difficulty': 1, 'frameskip': 1}, None, {}, 3),
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

    # Mode and difficulty as registered, unless there is a flag.
    hard = {'game': 'pong', 'frameskip': 1, 'mode': 1, 'difficulty': 3}
    name = register_atari('EnvironmentsTest/Hard-v0', kwargs=hard)
    played = {}
    for mode, difficulty in [(None, None), (None, 0), (0, None), (1, 3), (1, 0), (0, 3), (0, 0)]:
        environment = make(name, max_noops=0, atari_mode=mode, atari_difficulty=difficulty)
        rows = play(environment, [2] * 120)
        played[mode, difficulty] = np.stack([row[2]['frame'] for row in rows]).tobytes()
    assert played[None, None] == played[1, 3]
    assert played[None, 0] == played[1, 0]
    assert played[0, None] == played[0, 3]
    assert len({*played.values()}) == 4

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
        ({'game': 'pnog'}, "game='pnog', which is not one of the"),
        ({'game': 'pong', 'obs_type': 'colour'}, 'Invalid observation type: colour.'),
        ({'game': 'pong', 'frameskip': (2, 5)}, 'frameskip=(2, 5)'),
        ({'game': 'pong', 'frameskip': 0}, 'frameskip=0'),
        ({'game': 'pong', 'mode': 7}, "mode=7: the game 'pong' offers the modes 0, 1."),
        ({'game': 'pong', 'mode': 1.0}, "mode=1.0: the game 'pong' offers the modes 0, 1."),
        ({'game': 'pong', 'difficulty': 'hard'}, "difficulty='hard': the game 'pong' offers the"),
        (
            {'game': 'pong', 'mode': 7, 'obs_type': 'ram'},
            "mode=7: the game 'pong' offers the modes",
        ),
        ({'game': 'pnog', 'obs_type': 'ram'}, "game='pnog', which is not one of the"),
        ({'game': 'pong', 'obs_type': 'rgb', 'frameskip': (2, 5)}, 'frameskip=(2, 5)'),
        ({'game': 'pong', 'obs_type': 'rgb', 'render_mode': 'human'}, "render_mode='human'"),
        ({'game': 'pong', 'obs_type': 'rgb', 'paddles': 2}, 'paddles=2'),
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


@pytest.mark.parametrize(
    'kwargs, config, changed',
    [
        ({'obs_type': 'ram'}, {}, {}),
        ({'obs_type': 'rgb', 'mode': 1, 'difficulty': 2}, {'width': 160, 'height': 210}, {}),
        ({'obs_type': 'ram', 'frameskip': 2, 'max_num_frames_per_episode': 60}, {}, {}),
        ({'continuous': True, 'repeat_action_probability': 0.0}, {'width': 160, 'height': 210}, {}),
        ({'sound_obs': True}, {'width': 160, 'height': 210}, {}),
        (
            {'obs_type': 'ram', 'mode': 1},
            {
                'atari_mode': 0,
                'atari_difficulty': 3,
                'sticky_actions': 0.5,
                'full_action_set': True,
            },
            {
                'mode': 0,
                'difficulty': 3,
                'repeat_action_probability': 0.5,
                'full_action_space': True,
            },
        ),
    ],
)
def test_other_observations_and_actions_of_registered_ids_are_those_of_ale_py(
    kwargs, config, changed, register_atari, make
):
    """Pictures, memory and sound are those of Gymnasium, in the registered number of steps."""
    kwargs = {'game': 'pong', **kwargs}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=kwargs, max_episode_steps=40)
    environment = make(name, 3, **config)
    frames = kwargs.get('frameskip', 4)
    assert environment.spec.num_action_repeats == frames
    truth = gymnasium.make(name, disable_env_checker=True, **changed)
    space = truth.action_space
    if kwargs.get('continuous'):
        assert np.array(environment.spec.action.bounds).T.tolist() == [
            space.low.tolist(),
            space.high.tolist(),
        ]
    else:
        assert environment.spec.num_actions == space.n
    length = min(kwargs.get('max_num_frames_per_episode', 10**6) // frames, 40)

    expected, _ = truth.reset(seed=3)
    observation = environment.reset()
    space.seed(5)
    for step in range(1, 101):
        picture = expected['image'] if kwargs.get('sound_obs') else expected
        shown = observation['frame']
        np.testing.assert_array_equal(shown, picture)
        assert shown.dtype == ('uint8' if picture.ndim == 3 else 'float32')
        if kwargs.get('sound_obs'):
            np.testing.assert_array_equal(observation['vector'], expected['sound'])
        action = space.sample()
        reward, end, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert reward == expected_reward and not terminated
        assert (end == EpisodeEnd.TRUNCATED) == truncated == (step % length == 0)
        if truncated:
            assert environment.last_action_frames == frames
            expected, _ = truth.reset()
    truth.close()


def test_limits_and_frames_of_ale_pys_own_observations(register_atari, make):
    ram = {'game': 'pong', 'obs_type': 'ram', 'frameskip': 3, 'max_num_frames_per_episode': 100}
    environment = make(register_atari('EnvironmentsTest/Own-v0', kwargs=ram))
    rows = play(environment, [0] * 40)
    # A game runs at 60 frames a second, whatever the metadata of ale_py say.
    assert environment.frames_per_second == 60
    # The 34th action is cut short: 33 actions last 99 frames.
    assert [t for t, row in enumerate(rows) if row[1]] == [34]
    environment.reset()
    for _ in range(34):
        environment.step(0)
    assert environment.last_action_frames == 1
    # The limit stays 50 steps of 3 frames.
    ram['max_num_frames_per_episode'] = None
    name = register_atari('EnvironmentsTest/Own-v1', kwargs=ram, max_episode_steps=50)
    environment = make(name, num_action_repeats=2)
    assert [t for t, row in enumerate(play(environment, [0] * 100)) if row[1]] == [75]


@pytest.mark.parametrize(
    'config', [{'frame_stack': 1}, {'max_noops': 0}, {'end_episode_on_life_loss': True}]
)
def test_preprocessing_of_ale_pys_own_observations_is_refused(config, register_atari, make):
    ram = {'game': 'pong', 'obs_type': 'ram'}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=ram)
    with pytest.raises(LevelError, match=rf'^--{next(iter(config))}.* has no effect on {name!r}'):
        make(name, **config)
    with pytest.raises(LevelError, match=rf'^--env_kwargs=.* has no effect on {name!r}'):
        make(name, env_kwargs='{"mode": 1}')
