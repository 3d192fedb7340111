"""What every environment guarantees, for each kind of level."""

import dataclasses
import json

import gymnasium
import pytest
from playing import play, random_actions, same

from impala.environments import EnvironmentConfig, create_environment
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd


@pytest.mark.parametrize(
    'level_name',
    [
        'ALE/Pong-v5',
        'CartPole-v1',
        'FrozenLake-v1',
        'VizdoomMyWayHome-v1',
        'BabyAI-GoToRedBall-v0',
        'language_select_described_object',
    ],
)
def test_observations_fit_the_spec_and_follow_from_the_seed(level_name, make, deepmind_lab):
    environment = make(level_name, seed=5)
    assert EnvironmentSpec.from_json(json.loads(json.dumps(environment.spec.to_json()))) == (
        environment.spec
    )
    actions = random_actions(environment, 60)
    rows = play(environment, actions)
    for reward, end, observation in rows:
        assert isinstance(reward, float)
        assert isinstance(end, EpisodeEnd)
        specs = {name: ArraySpec(x.shape, x.dtype.name) for name, x in observation.items()}
        declared = environment.spec.observation
        assert specs == {name: ArraySpec(x.shape, x.dtype) for name, x in declared.items()}
    for array in environment.step(0)[2].values():
        assert array.flags.c_contiguous

    assert same(rows, play(make(level_name, seed=5), actions))
    assert not same(rows, play(make(level_name, seed=6), actions))
    environment.close()
    environment.close()


def test_config_survives_json_and_refuses_invalid_values():
    config = EnvironmentConfig(
        width=64, num_action_repeats=2, sticky_actions=0.25, observation_keys=('a',)
    )
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    # JSON has no tuples.
    assert EnvironmentConfig.of(**values) == config
    for wrong in (
        {'width': 0},
        {'num_action_repeats': 0},
        {'sticky_actions': 1.5},
        {'max_noops': -1},
        {'frames_per_noop': 0},
        {'frame_stack': 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EnvironmentConfig(**wrong)
    with pytest.raises(ValueError, match='seed'):
        create_environment('CartPole-v1', -1)


@pytest.mark.parametrize(
    'level_name, config',
    [
        ('ALE/Breakout-v5', {'sticky_actions': 0.25}),
        ('CartPole-v1', {}),
        ('VizdoomBasic-v1', {}),
        ('BabyAI-GoToRedBall-v0', {}),
        ('explore_goal_locations_small', {}),
    ],
)
def test_a_seed_for_the_next_episode(level_name, config, make, deepmind_lab):
    """Its episode is the first one of a new environment with that seed."""
    environment = make(level_name, seed=5, **config)
    actions = random_actions(environment, 60)
    play(environment, actions)
    assert environment.seed_next(6)
    assert same(play(environment, actions), play(make(level_name, seed=6, **config), actions))


def frames_of_an_episode(environment, act):
    """Plays an episode; returns the number of frames that the environment reports."""
    environment.reset()
    frames = 0
    while True:
        _, end, _ = environment.step(act())
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            return frames + environment.last_action_frames
        frames += environment.spec.num_action_repeats


def test_frames_of_an_action_cut_short_by_the_end(make, register_atari):
    pong = {'game': 'pong', 'frameskip': 1, 'max_num_frames_per_episode': 50}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=pong)
    atari = make(name, max_noops=0)
    # Twelve actions of four frames and one of two, in both episodes.
    assert [frames_of_an_episode(atari, lambda: 0) for _ in range(2)] == [50, 50]

    cart = make('CartPole-v1', 3, num_action_repeats=7)
    truth = gymnasium.make('CartPole-v1')
    truth.reset(seed=3)
    for _ in range(2):
        steps, is_over = 0, False
        while not is_over:
            is_over = any(truth.step(1)[2:4])
            steps += 1
        assert steps % 7, 'this episode shows nothing'
        assert frames_of_an_episode(cart, lambda: 1) == steps
        truth.reset()

    # 300 tics, as configured.
    assert frames_of_an_episode(make('VizdoomBasic-v1', num_action_repeats=7), lambda: 0) == 300
