"""Compares MiniGrid and BabyAI with the pictures of their own wrappers."""

import json
import zlib

import gymnasium
import numpy as np
import pytest
from playing import play, random_actions

from impala.environments import DeclarationError, EnvironmentConfig
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.environments.instructions import hash_instruction
from impala.errors import LevelError
from impala.trajectory import ArraySpec, EpisodeEnd


def minigrid_env(size=8, **options):
    from minigrid.envs import EmptyEnv

    return EmptyEnv(size=size, **options)


def minigrid_environment(env):
    return GymnasiumEnvironment('Grid-v0', env, 1, 1, EnvironmentConfig())


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w, env: w.RGBImgObsWrapper(env),
        lambda w, env: w.RGBImgPartialObsWrapper(env, 12),
        lambda w, env: w.ImgObsWrapper(w.RGBImgObsWrapper(env)),
        lambda w, env: w.NoDeath(w.RGBImgObsWrapper(env, 7), ('lava',)),
        lambda w, env: w.RGBImgPartialObsWrapper(w.ViewSizeWrapper(env, 7)),
        lambda w, env: w.FlatObsWrapper(env),
        lambda w, env: gymnasium.wrappers.FlattenObservation(w.ImgObsWrapper(env)),
    ],
)
def test_minigrid_observation_wrappers_stay_in_effect(wrap):
    from minigrid import wrappers

    environment = minigrid_environment(wrap(wrappers, minigrid_env()))
    truth = wrap(wrappers, minigrid_env())
    expected, _ = truth.reset(seed=1)
    observation = environment.reset()
    for action in [*random_actions(environment, 30), None]:
        frame = expected['image'] if isinstance(expected, dict) else expected
        np.testing.assert_array_equal(observation['frame'], frame)
        assert observation['frame'].dtype == (np.uint8 if frame.ndim == 3 else np.float32)
        assert ('instruction' in observation) == isinstance(expected, dict)
        if isinstance(expected, dict):
            assert observation['vector'].tolist() == np.eye(4)[expected['direction']].tolist()
        if action is not None:
            observation = environment.step(action)[2]
            expected = truth.step(action)[0]


OWN_LEVELS = """
import gymnasium
from gymnasium.envs.registration import WrapperSpec
from minigrid import wrappers
from minigrid.envs import EmptyEnv

def make(seed, config, wrapper, options, size=8):
    return getattr(wrappers, wrapper)(EmptyEnv(size=size), **options)

for wrapper, options in {wrapped}:
    gymnasium.register(
        f'OfOnesOwn{{wrapper}}-v0',
        EmptyEnv,
        kwargs={{'size': 8}},
        additional_wrappers=(WrapperSpec(wrapper, f'minigrid.wrappers:{{wrapper}}', options),),
    )
gymnasium.register('OfOnesOwnWithout-v0', EmptyEnv, kwargs={{'size': 8}})
"""
WRAPPED = [
    ('FullyObsWrapper', {}),
    ('RGBImgObsWrapper', {'tile_size': 5}),
    ('RGBImgPartialObsWrapper', {'tile_size': 10}),
    ('OneHotPartialObsWrapper', {}),
    ('SymbolicObsWrapper', {}),
    ('ViewSizeWrapper', {'agent_view_size': 9}),
    ('DirectionObsWrapper', {}),
    ('ImgObsWrapper', {}),
    ('FlatObsWrapper', {}),
    ('DictObservationSpaceWrapper', {'max_words_in_mission': 30}),
]


@pytest.mark.parametrize('wrapper, options', WRAPPED)
def test_wrappers_of_own_levels_stay_in_effect(wrapper, options, module, make):
    """By the registration of an id, or by a callable that returns a wrapped environment."""
    from minigrid import wrappers

    name = module(OWN_LEVELS.format(wrapped=WRAPPED))
    kwargs = json.dumps({'wrapper': wrapper, 'options': options})
    environments = [make(f'{name}:OfOnesOwn{wrapper}-v0'), make(f'{name}:make', env_kwargs=kwargs)]
    truth = getattr(wrappers, wrapper)(minigrid_env(), **options)
    expected, _ = truth.reset(seed=1)
    observations = [dict(environment.reset()) for environment in environments]
    space = truth.observation_space
    for action in [*random_actions(environments[0], 30), None]:
        for observation in observations:
            for array, value in expected_arrays(space, expected).items():
                np.testing.assert_array_equal(observation.pop(array), value)
            assert not observation
        if action is not None:
            observations = [dict(each.step(action)[2]) for each in environments]
            expected = truth.step(action)[0]


def expected_arrays(space, value):
    """Returns the arrays of an observation: its picture, all its numbers, and its mission."""
    parts = dict(value) if isinstance(value, dict) else {'image': value}
    spaces = space.spaces if isinstance(value, dict) else {'image': space}
    text = parts.pop('mission') if isinstance(parts.get('mission'), str) else None
    arrays = {} if text is None else {'instruction': hash_instruction(text)}
    picture = parts['image'] if parts['image'].ndim == 3 and len(parts['image']) >= 32 else None
    if picture is not None:
        arrays['frame'] = parts.pop('image')
    if parts:
        numbers = [gymnasium.spaces.flatten(spaces[key], parts[key]) for key in sorted(parts)]
        arrays['frame' if picture is None else 'vector'] = np.concatenate(numbers)
    return arrays


def test_levels_without_a_wrapper_show_the_picture(module, make):
    from minigrid.wrappers import RGBImgPartialObsWrapper

    name = module(
        OWN_LEVELS.format(wrapped=[]) + 'def bare(seed, config):\n    return EmptyEnv(size=8)\n'
    )
    truth = RGBImgPartialObsWrapper(minigrid_env())
    expected, _ = truth.reset(seed=1)
    for level_name in ('OfOnesOwnWithout-v0', 'bare'):
        observation = make(f'{name}:{level_name}').reset()
        assert observation.keys() == {'frame', 'instruction'}
        np.testing.assert_array_equal(observation['frame'], expected['image'])


def test_the_symbols_of_a_large_grid_are_an_image(module, make):
    name = module(OWN_LEVELS.format(wrapped=[]))
    kwargs = json.dumps({'wrapper': 'FullyObsWrapper', 'options': {}, 'size': 33})
    environment = make(f'{name}:make', env_kwargs=kwargs)
    assert environment.spec.observation['frame'] == ArraySpec((33, 33, 3), 'uint8')
    frame = environment.reset()['frame']
    # A wall is object 2 of colour 5, the agent is object 10.
    assert frame[0, 0].tolist() == [2, 5, 0] and frame[1, 1, 0] == 10


def test_wrong_declarations_of_minigrid_itself_are_refused():
    """Its wrapper takes the size from the space, but the picture from the wrapped environment."""
    from minigrid.wrappers import RGBImgPartialObsWrapper, ViewSizeWrapper

    environment = minigrid_environment(RGBImgPartialObsWrapper(ViewSizeWrapper(minigrid_env(), 5)))
    with pytest.raises(DeclarationError, match=r'uint8 \[40, 40, 3\].*uint8 \[56, 56, 3\]'):
        environment.reset()


class OtherSymbols(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return observation | {'image': observation['image'] + 1}


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w, env: w.FullyObsWrapper(env),
        lambda w, env: w.OneHotPartialObsWrapper(env),
        lambda w, env: w.SymbolicObsWrapper(env),
        lambda w, env: w.ViewSizeWrapper(env, 5),
        lambda w, env: w.ImgObsWrapper(env),
        lambda w, env: w.DictObservationSpaceWrapper(env),
        lambda w, env: OtherSymbols(env),
        lambda w, env: gymnasium.wrappers.TimeLimit(OtherSymbols(env), 90),
    ],
)
def test_symbols_of_minigrid_wrappers_become_numbers(wrap):
    from minigrid import wrappers

    # 7x7 cells, so that the whole grid has the shape of the agent's view.
    environment = minigrid_environment(wrap(wrappers, minigrid_env(size=7)))
    truth = wrap(wrappers, minigrid_env(size=7))
    expected, _ = truth.reset(seed=1)
    observation = environment.reset()
    for action in [*random_actions(environment, 30), None]:
        if isinstance(expected, dict):
            text = expected['mission']
            numbers = {**expected, 'mission': ''} if isinstance(text, str) else expected
            flat = [flat_of(truth.observation_space[key], numbers[key]) for key in sorted(numbers)]
            expected = np.concatenate(flat)
            assert ('instruction' in observation) == isinstance(text, str)
        np.testing.assert_array_equal(observation['frame'], np.ravel(expected))
        assert observation['frame'].dtype == np.float32
        if action is not None:
            observation = environment.step(action)[2]
            expected = truth.step(action)[0]


def flat_of(space, value):
    """Returns a value flattened by Gymnasium; nothing for a text."""
    return [] if isinstance(value, str) else gymnasium.spaces.flatten(space, value)


def test_minigrid_classes_with_other_observations_keep_them():
    from minigrid.envs import EmptyEnv

    class Blind(EmptyEnv):
        def gen_obs(self):
            observation = super().gen_obs()
            return observation | {'image': observation['image'] * 0}

    observation = minigrid_environment(Blind(size=7)).reset()
    # The direction, and then the symbols.
    assert observation['frame'].tolist() == [1, 0, 0, 0] + 7 * 7 * 3 * [0]
    assert 'instruction' in observation


def test_the_direction_of_minigrid_is_part_of_its_picture_unless_it_is_chosen():
    def observation_of(*keys):
        config = EnvironmentConfig(observation_keys=keys)
        return GymnasiumEnvironment('Grid-v0', minigrid_env(), 1, 1, config).reset()

    assert observation_of().keys() == {'frame', 'instruction'}
    assert observation_of('image').keys() == {'frame'}
    chosen = observation_of('image', 'direction')
    assert chosen['frame'].shape == (56, 56, 3) and chosen['vector'].tolist() == [1, 0, 0, 0]


class Secret(gymnasium.Wrapper):
    """Changes observations, which only a step reveals."""

    def step(self, action):
        observation, *others = self.env.step(action)
        return observation | {'image': observation['image'] + 1}, *others


class Copies(gymnasium.Wrapper):
    def step(self, action):
        observation, reward, *others = self.env.step(action)
        return observation | {'image': observation['image'].copy()}, reward - 1, *others


def test_minigrid_shows_its_picture_if_wrappers_keep_observations():
    from minigrid.wrappers import PositionBonus, ReseedWrapper, RGBImgPartialObsWrapper

    truth = RGBImgPartialObsWrapper(minigrid_env(agent_view_size=5))
    expected, _ = truth.reset()
    for wrap in (PositionBonus, ReseedWrapper, Copies):
        environment = minigrid_environment(wrap(minigrid_env(agent_view_size=5)))
        np.testing.assert_array_equal(environment.reset()['frame'], expected['image'])
        assert environment.step(2)[1] == EpisodeEnd.NOT_ENDED

    environment = minigrid_environment(Copies(Secret(minigrid_env())))
    environment.reset()
    with pytest.raises(LevelError, match="'Grid-v0' changes .* in Copies or Secret"):
        environment.step(2)


def test_babyai_shows_the_agents_view_and_the_mission(make, capfd):
    import minigrid  # noqa: F401
    from minigrid.wrappers import RGBImgPartialObsWrapper

    environment = make('BabyAI-GoToObj-v0', 3)
    assert environment.spec.observation == {
        'frame': ArraySpec((56, 56, 3), 'uint8'),
        'instruction': ArraySpec((32,), 'int32'),
    }
    actions = random_actions(environment, 150)
    rows = play(environment, actions)
    assert environment.last_observation is None
    # BabyAI draws levels until one is solvable, and prints about it.
    make('BabyAI-GoToRedBall-v0', 8).reset()
    assert capfd.readouterr().out == ''

    truth = RGBImgPartialObsWrapper(gymnasium.make('BabyAI-GoToObj-v0'))
    expected, _ = truth.reset(seed=3)
    missions = set()
    for t, action in enumerate([None, *actions]):
        if action is not None:
            expected, reward, terminated, truncated, _ = truth.step(action)
            end = EpisodeEnd.TERMINATED if terminated else EpisodeEnd.TRUNCATED
            assert rows[t][:2] == (reward, end if terminated or truncated else 0)
            if terminated or truncated:
                expected, _ = truth.reset()
        missions.add(expected['mission'])
        np.testing.assert_array_equal(rows[t][2]['frame'], expected['image'])
        words = [zlib.crc32(word.encode()) % 999 + 1 for word in expected['mission'].split()]
        assert rows[t][2]['instruction'].tolist() == words + [0] * (32 - len(words))
    truth.close()
    assert len(missions) > 1


def test_the_last_observation_of_a_truncated_episode_is_the_picture_and_the_mission(make):
    import minigrid  # noqa: F401
    from minigrid.wrappers import RGBImgPartialObsWrapper

    environment = make('BabyAI-GoToObj-v0', 3, bootstrap_truncated=True)
    truth = RGBImgPartialObsWrapper(gymnasium.make('BabyAI-GoToObj-v0'))
    first = environment.reset()['instruction'].copy()
    truth.reset(seed=3)
    truncated = False
    while not truncated:
        # It turns in place, right and left and back.
        action = [1, 1, 0][environment._env.unwrapped.step_count % 3]
        _, end, _ = environment.step(action)
        expected, _, _, truncated, _ = truth.step(action)
        assert (end == EpisodeEnd.TRUNCATED) == truncated
    np.testing.assert_array_equal(environment.last_observation['frame'], expected['image'])
    np.testing.assert_array_equal(environment.last_observation['instruction'], first)
    truth.close()
