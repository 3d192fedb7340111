"""Gymnasium environments: how their spaces are converted, and mistakes that they make."""

import warnings

import cv2
import gymnasium
import numpy as np
import pytest
from playing import random_actions

from impala.environments import (
    DeclarationError,
    EnvironmentConfig,
    create_environment,
    hash_instruction,
)
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.errors import LevelError
from impala.trajectory import ActionSpec, ArraySpec, EpisodeEnd, Part


class Toy(gymnasium.Env):
    """Episodes of two steps, which end as the test chooses."""

    def __init__(self, observation_space, action_space=None, end=(True, False)):
        self.observation_space = observation_space
        self.action_space = action_space or gymnasium.spaces.Discrete(3, start=-1)
        self.end = end
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        self.observation = self.observation_space.sample()
        return self.observation, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action)
        self.steps += 1
        self.observation = self.observation_space.sample()
        return self.observation, 1.0, *(self.end if self.steps == 2 else (False, False)), {}


@pytest.fixture
def register_toy():
    def register(**options):
        gymnasium.register('EnvironmentsTest/Toy-v0', Toy, kwargs=options)
        return 'EnvironmentsTest/Toy-v0'

    yield register
    gymnasium.registry.pop('EnvironmentsTest/Toy-v0', None)


def image_space(*shape, dtype=np.uint8):
    return gymnasium.spaces.Box(0, 255, shape, dtype)


def toy_of(environment):
    return environment._env.unwrapped


@pytest.mark.parametrize('level_name, end', [('CartPole-v1', 1), ('MountainCar-v0', 2)])
def test_gymnasium_vectors_rewards_and_ends(level_name, end, make):
    environment = make(level_name, 9, bootstrap_truncated=True)
    truth = gymnasium.make(level_name)
    expected, _ = truth.reset(seed=9)
    np.testing.assert_array_equal(environment.reset()['frame'], expected)
    ends = set()
    for action in random_actions(environment, 450):
        reward, ours, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert reward == expected_reward
        assert (ours != EpisodeEnd.NOT_ENDED) == (terminated or truncated)
        ends.add(ours)
        if truncated:
            # The reset has not overwritten it.
            np.testing.assert_array_equal(environment.last_observation['frame'], expected)
        if terminated or truncated:
            expected, _ = truth.reset()
        np.testing.assert_array_equal(observation['frame'], expected)
    assert (environment.last_observation is None) == (end == EpisodeEnd.TERMINATED)
    assert ends == {EpisodeEnd.NOT_ENDED, EpisodeEnd(end)}


def test_gymnasium_repeats_stop_at_the_end_of_the_episode(register_toy, make):
    level_name = register_toy(observation_space=image_space(3))
    environment = make(level_name, num_action_repeats=3)
    environment.reset()
    assert environment.spec.num_action_repeats == 3
    reward, end, _ = environment.step(2)
    assert (reward, end) == (2.0, EpisodeEnd.TERMINATED)
    assert toy_of(environment).actions == [1, 1]
    assert toy_of(environment).steps == 0


@pytest.mark.parametrize(
    'end, expected',
    [
        ((True, False), EpisodeEnd.TERMINATED),
        ((False, True), EpisodeEnd.TRUNCATED),
        ((True, True), EpisodeEnd.TERMINATED),
    ],
)
def test_gymnasium_ends(end, expected, register_toy, make):
    environment = make(register_toy(observation_space=image_space(3), end=end))
    environment.reset()
    assert environment.step(0)[1] == EpisodeEnd.NOT_ENDED
    assert environment.step(0)[1] == expected


@pytest.mark.parametrize('shape', [(120, 160, 3), (100, 50), (40, 40, 1), (72, 96, 3)])
def test_gymnasium_images_are_resized(shape, register_toy, make):
    environment = make(register_toy(observation_space=image_space(*shape)))
    frame = environment.reset()['frame']
    expected = cv2.resize(
        toy_of(environment).observation, (96, 72), interpolation=cv2.INTER_AREA
    ).reshape(72, 96, -1)
    np.testing.assert_array_equal(frame, expected)


def test_gymnasium_discrete_observations_become_one_hot(register_toy, make):
    space = gymnasium.spaces.Discrete(5, start=10)
    environment = make(register_toy(observation_space=space))
    for _ in range(5):
        frame = environment.reset()['frame']
        np.testing.assert_array_equal(frame, np.eye(5)[toy_of(environment).observation - 10])


@pytest.mark.parametrize(
    'spaces',
    [
        {'observation_space': gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(3))},
        {'observation_space': gymnasium.spaces.Graph(gymnasium.spaces.Discrete(3), None)},
        {'observation_space': gymnasium.spaces.OneOf([gymnasium.spaces.Discrete(3)] * 2)},
        {'observation_space': gymnasium.spaces.Box(-np.inf, np.inf, (64, 64, 3))},
        {'observation_space': gymnasium.spaces.Discrete(10_001)},
        {'observation_space': gymnasium.spaces.Dict()},
        {'observation_space': gymnasium.spaces.Tuple([gymnasium.spaces.Text(3)])},
        {'observation_space': image_space(3), 'action_space': gymnasium.spaces.Text(3)},
        {'observation_space': image_space(3), 'action_space': image_space(2)},
    ],
    ids=str,
)
def test_unsupported_gymnasium_spaces_are_named(spaces, register_toy):
    level_name = register_toy(**spaces)
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1)
    assert level_name in str(error.value)
    assert str(list(spaces.values())[-1]) in str(error.value)


def test_the_parts_of_gymnasium_observations_become_arrays(register_toy, make):
    spaces = gymnasium.spaces
    space = spaces.Dict(
        camera=image_space(3, 72, 96),
        screen=image_space(120, 160, 3),
        depth=spaces.Box(0, 1, (72, 96, 1)),
        inventory=spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(3)]),
        speech=spaces.Text(9),
        action_mask=spaces.Box(np.int8([1, 0, 0]), np.ones(3, np.int8), dtype=np.int8),
    )
    level_name = register_toy(observation_space=space)
    environment = make(level_name)
    assert environment.spec.observation == {
        'frame': ArraySpec((72, 96, 3), 'uint8'),
        'camera': ArraySpec((72, 96, 3), 'uint8'),
        'depth': ArraySpec((72, 96, 1), 'float32'),
        'vector': ArraySpec((5,), 'float32', parts=(Part('bits', (2,)), Part('categories', (3,)))),
        'instruction': ArraySpec((32,), 'int32'),
        'action_mask': ArraySpec((3,), 'bool'),
    }
    observation = environment.reset()
    for action in (None, 0, 1, 2):
        if action is not None:
            observation = environment.step(action)[2]
        truth = toy_of(environment).observation
        screen = cv2.resize(truth['screen'], (96, 72), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(observation['frame'], screen)
        np.testing.assert_array_equal(observation['camera'], truth['camera'].transpose(1, 2, 0))
        np.testing.assert_array_equal(observation['depth'], truth['depth'])
        bits, number = truth['inventory']
        np.testing.assert_array_equal(observation['vector'], [*bits, *np.eye(3)[number]])
        np.testing.assert_array_equal(observation['instruction'], hash_instruction(truth['speech']))
        np.testing.assert_array_equal(observation['action_mask'], truth['action_mask'])

    environment = make(level_name, observation_keys=('inventory', 'depth'))
    assert list(environment.spec.observation) == ['frame', 'vector', 'action_mask']
    observation = environment.reset()
    np.testing.assert_array_equal(observation['frame'], toy_of(environment).observation['depth'])
    with pytest.raises(LevelError, match=r'--observation_keys=depth,sound: .* the keys .*camera, '):
        make(level_name, observation_keys=('depth', 'sound'))


@pytest.mark.parametrize('space', [image_space(3), gymnasium.spaces.Tuple([image_space(3)])])
def test_observation_keys_need_a_dict(space, register_toy, make):
    level_name = register_toy(observation_space=space)
    with pytest.raises(LevelError, match=f"=a: the observation of '{level_name}' has no keys"):
        make(level_name, observation_keys=('a',))


@pytest.mark.parametrize('has_mask', [False, True])
def test_more_arrays_than_fit_into_shared_memory_are_refused(has_mask, scripted):
    images = {f'image_{number}': image_space(40, 40) for number in range(12 - has_mask)}
    mask = {'action_mask': gymnasium.spaces.MultiBinary(2)} if has_mask else {}
    with pytest.raises(LevelError, match='12 arrays, .* may be 11: .* by --observation_keys') as e:
        scripted(gymnasium.spaces.Dict(**images, **mask), [])
    assert '\n' not in str(e.value)
    images.pop('image_3')
    assert len(scripted(gymnasium.spaces.Dict(**images, **mask), []).spec.observation) == 11


class Scripted(gymnasium.Env):
    """Returns what the test gives it, whatever its spaces declare."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, observation_space, observations, **changes):
        self.observation_space = observation_space
        self.observations = observations
        self.changes = changes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.changes.get('reset', (self.observations[0], {}))

    def step(self, action):
        self.steps += 1
        values = {'reward': 1.0, 'terminated': False, 'truncated': False, 'info': {}}
        observation = self.observations[min(self.steps, len(self.observations) - 1)]
        return self.changes.get('step', (observation, *(values | self.changes).values()))


@pytest.fixture
def scripted():
    def make(*arguments, **changes):
        env = Scripted(*arguments, **changes)
        return GymnasiumEnvironment('Scripted-v0', env, 1, 1, EnvironmentConfig())

    return make


VECTOR = gymnasium.spaces.Box(-1, 1, (2,))

FINE = np.zeros(2, np.float32)

SPOKEN = gymnasium.spaces.Dict(image=image_space(40, 40, 3), mission=gymnasium.spaces.Text(30))

IMAGE = np.zeros((40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    'space, good, bad, parts',
    [
        (VECTOR, FINE, np.zeros(3, np.float32), ['float32 [2]', 'float32 [3]']),
        (gymnasium.spaces.Discrete(5), 4, 5, ['Discrete(5)', 'returned 5']),
        (image_space(40, 40, 3), IMAGE, IMAGE / 255, ['uint8 [40, 40, 3]', 'float64 [40, 40, 3]']),
        (
            SPOKEN,
            {'image': IMAGE, 'mission': 'go to the door'},
            {'image': IMAGE, 'mission': 3},
            ["a text as 'mission'", 'returned 3'],
        ),
        (
            SPOKEN,
            {'image': IMAGE, 'mission': ''},
            {'image': IMAGE},
            ["'mission' in its observation", 'returned one without it'],
        ),
        (
            SPOKEN,
            {'image': IMAGE, 'mission': ''},
            IMAGE,
            ["'image' in its observation", 'uint8 [40, 40, 3]'],
        ),
        (
            SPOKEN,
            {'image': IMAGE, 'mission': ''},
            {'image': IMAGE[:3], 'mission': ''},
            ["'image' of its observation", 'uint8 [3, 40, 3]'],
        ),
    ],
)
def test_gymnasium_observations_must_match_their_space(space, good, bad, parts, scripted):
    """In the first observation, after a later reset, and in mid-episode."""
    environment = scripted(space, [good, good, bad])
    environment.reset()
    environment.step(0)
    errors = [pytest.raises(DeclarationError) for _ in range(3)]
    with errors[0] as in_mid_episode:
        environment.step(0)
    with errors[1] as at_first:
        scripted(space, [bad]).reset()
    environment = scripted(space, [good, good, good], terminated=True)
    environment.reset()
    environment.step(0)
    toy_of(environment).observations = [bad]
    with errors[2] as at_reset:
        environment.step(0)
    assert str(in_mid_episode.value) == str(at_first.value) == str(at_reset.value)
    for part in ['Scripted-v0', *parts]:
        assert part in str(at_first.value)


@pytest.mark.parametrize(
    'changes, parts',
    [
        ({'reward': None}, ['None as a reward']),
        ({'reward': '1.0'}, ["'1.0' as a reward"]),
        ({'reward': np.array([1.0])}, ['float64 [1] as a reward']),
        ({'reward': 1j}, ['1j as a reward']),
        ({'terminated': None}, ["None as 'terminated'"]),
        ({'terminated': np.array([False, True])}, ["bool [2] as 'terminated'"]),
        ({'truncated': 0.5}, ["0.5 as 'truncated'"]),
        ({'truncated': {}}, ["a dict as 'truncated'"]),
        ({'step': (FINE, 1.0, False, {})}, ['4 values from step()', 'truncated']),
        ({'step': None}, ['None from step()']),
        ({'reset': FINE[:1]}, ['float32 [1] from reset()', '(observation, info)']),
        ({'reset': (FINE, 1, 2)}, ['3 values from reset()']),
    ],
)
def test_gymnasium_rewards_and_ends_must_match_the_interface(changes, parts, scripted):
    with pytest.raises(DeclarationError) as error:
        environment = scripted(VECTOR, [FINE], **changes)
        environment.reset()
        environment.step(0)
    for part in ['Scripted-v0', *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize('reward', [1, True, np.float32(1), np.int64(1), np.array(1.0)])
def test_gymnasium_rewards_may_be_numbers_of_any_type(reward, scripted):
    environment = scripted(VECTOR, [FINE], reward=reward)
    environment.reset()
    got, end, _ = environment.step(0)
    assert type(got) is float and got == 1 and end == EpisodeEnd.NOT_ENDED


@pytest.mark.parametrize('truth', [True, 1, np.bool_(True), np.array(True)])
def test_gymnasium_ends_may_be_truth_values_of_any_type(truth, scripted):
    untrue = truth != truth
    for changes, end in (
        ({'terminated': truth, 'truncated': untrue}, EpisodeEnd.TERMINATED),
        ({'terminated': untrue, 'truncated': truth}, EpisodeEnd.TRUNCATED),
        ({'terminated': untrue, 'truncated': untrue}, EpisodeEnd.NOT_ENDED),
    ):
        environment = scripted(VECTOR, [FINE], **changes)
        environment.reset()
        assert environment.step(0)[1] == end


class OldReset(gymnasium.Wrapper):
    def reset(self):
        return self.env.reset()[0]


def test_gymnasium_environments_must_implement_its_interface(scripted):
    for name in ('action_space', 'observation_space'):
        env = Scripted(VECTOR, [FINE])
        setattr(env, name, None)
        with pytest.raises(LevelError, match=f"'Toy-v0' has no {name} out of gymnasium.spaces"):
            GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())
    # Gymnasium's own wrappers accept any arguments.
    env = gymnasium.wrappers.TimeLimit(OldReset(Scripted(VECTOR, [FINE])), 5)
    with pytest.raises(LevelError, match=r'older interface .* OldReset.reset must take seed and'):
        GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())


def test_methods_without_a_signature_are_accepted():
    env = Scripted(VECTOR, [FINE])
    # A method of an extension module.
    env.reset = {}.update
    environment = GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())
    with pytest.raises(DeclarationError, match=r'returned None from reset\(\)'):
        environment.reset()


def test_gymnasium_environments_without_actions_are_refused(scripted):
    space = gymnasium.spaces.Discrete(1)
    space.n = 0
    env = Scripted(VECTOR, [FINE])
    env.action_space = space
    with pytest.raises(LevelError, match=r"'Empty-v0' has no actions.*Discrete\(0\)"):
        GymnasiumEnvironment('Empty-v0', env, 1, 1, EnvironmentConfig())


def test_a_mask_of_actions_without_categories_is_refused():
    masked = gymnasium.spaces.Dict(x=VECTOR, action_mask=gymnasium.spaces.MultiBinary(2))
    env = Scripted(masked, [{'x': FINE, 'action_mask': np.ones(2, np.int8)}])
    env.action_space = VECTOR
    with pytest.raises(LevelError) as error:
        GymnasiumEnvironment('Masked-v0', env, 1, 1, EnvironmentConfig())
    assert str(error.value) == (
        "'Masked-v0' has an 'action_mask' in its observation, but its actions have no categories."
    )


@pytest.mark.parametrize(
    'space, mission, expected',
    [
        (gymnasium.spaces.Discrete(5), 3, [0, 0, 0, 1, 0]),
        (image_space(3), np.array([1, 2, 3], np.uint8), [1, 2, 3]),
        (gymnasium.spaces.Tuple([VECTOR]), (np.array([0.5, -1], np.float32),), [0.5, -1]),
    ],
)
def test_missions_need_not_be_texts(space, mission, expected, scripted):
    spoken = gymnasium.spaces.Dict(image=image_space(40, 40, 3), mission=space)
    environment = scripted(spoken, [{'image': IMAGE, 'mission': mission}])
    observation = environment.reset()
    assert list(observation) == ['frame', 'vector']
    assert observation['vector'].tolist() == expected


def test_mujoco_matches_gymnasium(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = make('HalfCheetah-v5', 3)
    assert environment.spec.action == ActionSpec(bounds=((-1.0, 1.0),) * 6)
    truth = gymnasium.make('HalfCheetah-v5', disable_env_checker=True)
    expected, _ = truth.reset(seed=3)
    observation = environment.reset()
    rng = np.random.default_rng(5)
    for step in range(1, 1001):
        np.testing.assert_array_equal(observation['frame'], expected.astype(np.float32))
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        reward, end, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert (reward, terminated) == (expected_reward, False)
        assert (end == EpisodeEnd.TRUNCATED) == truncated == (step == 1000)
    truth.close()
    # MuJoCo would write its warnings, one of which is about this robot, to a file here.
    assert not any(tmp_path.iterdir())


def test_mujoco_without_a_display_plays_without_pictures(make, monkeypatch):
    for variable in ('DISPLAY', 'WAYLAND_DISPLAY', 'MUJOCO_GL'):
        monkeypatch.delenv(variable, raising=False)
    environment = make('InvertedPendulum-v5', render=True)
    environment.reset()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert environment.render() is None
    environment.step(environment.spec.action.zero)
