"""Tests environments against the packages themselves; only DeepMind Lab has a stand-in."""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest

import environments
from environments import (
    DeclarationError,
    EnvironmentConfig,
    LevelCache,
    LevelError,
    create_environment,
)
from impala import suites
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd

gymnasium.register_envs(ale_py)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAND_IN = os.path.join(ROOT, 'tests', 'deepmind_lab_stand_in')

# The Atari-57 suite as in Table C.1 of the paper.
ATARI_57 = re.findall(
    r'\w+',
    """
    Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling
    Boxing Breakout Centipede ChopperCommand CrazyClimber Defender DemonAttack DoubleDunk Enduro
    FishingDerby Freeway Frostbite Gopher Gravitar Hero IceHockey Jamesbond Kangaroo Krull
    KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix Pitfall Pong PrivateEye Qbert
    Riverraid RoadRunner Robotank Seaquest Skiing Solaris SpaceInvaders StarGunner Surround Tennis
    TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge Zaxxon
""",
)


@pytest.fixture
def make():
    """Makes environments and closes them, also when the test fails."""
    made = []

    def make_one(level_name, seed=1, **config):
        made.append(create_environment(level_name, seed, EnvironmentConfig(**config)))
        return made[-1]

    yield make_one
    for environment in made:
        environment.close()


@pytest.fixture
def deepmind_lab(monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.delitem(sys.modules, 'deepmind_lab', raising=False)
    yield
    sys.modules.pop('deepmind_lab', None)


def run_python(code, *arguments):
    variables = {**os.environ, 'PYTHONPATH': os.pathsep.join((ROOT, STAND_IN))}
    # Set by every DeepMind Lab environment, also by those of the tests before.
    variables.pop('LP_NUM_THREADS', None)
    # Some of it ends like the real module, with no time to clean up.
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, '-c', code, *arguments],
            env=variables | {'TMPDIR': folder},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=folder,
        )


def random_actions(environment, count, seed=0):
    actions = np.random.RandomState(seed).randint(environment.spec.num_actions, size=count)
    return [int(action) for action in actions]


def play(environment, actions):
    """Returns `(reward, end, observation)` of a reset and of each action, copied."""

    def copy(observation):
        return {name: array.copy() for name, array in observation.items()}

    rows = [(0.0, EpisodeEnd.NOT_ENDED, copy(environment.reset()))]
    for action in actions:
        reward, end, observation = environment.step(action)
        rows.append((reward, end, copy(observation)))
    return rows


def same(rows, other_rows):
    return all(
        reward == other_reward
        and end == other_end
        and all(np.array_equal(observation[name], other[name]) for name in observation)
        for (reward, end, observation), (other_reward, other_end, other) in zip(
            rows, other_rows, strict=True
        )
    )


# What every environment promises.


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
def test_observations_fit_the_spec_and_the_seed_decides_them(level_name, make, deepmind_lab):
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
        assert specs == environment.spec.observation
    for array in environment.step(0)[2].values():
        assert array.flags.c_contiguous

    assert same(rows, play(make(level_name, seed=5), actions))
    assert not same(rows, play(make(level_name, seed=6), actions))
    environment.close()
    environment.close()


def test_config_survives_json_and_refuses_nonsense():
    config = EnvironmentConfig(width=64, num_action_repeats=2, sticky_actions=0.25)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert EnvironmentConfig(**values) == config
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
    'level_name, free_of_gymnasium',
    [('ALE/Pong-v5', True), ('explore_goal_locations_small', True), ('VizdoomBasic-v1', False)],
)
def test_an_actor_process_does_not_load_what_it_does_not_need(level_name, free_of_gymnasium):
    result = run_python(
        'import sys, environments\n'
        'environment = environments.create_environment(sys.argv[1], 1)\n'
        'environment.reset(); environment.step(0); environment.close()\n'
        'print(*(n for n in ("tensorflow", "gymnasium", "matplotlib") if n in sys.modules))',
        level_name,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ([] if free_of_gymnasium else ['gymnasium'])
    assert result.stderr == ''


# Atari.


@pytest.mark.parametrize('frames_per_noop', [1, 4])
def test_no_ops_last_so_many_frames(frames_per_noop, make):
    environment = make('ALE/Pong-v5', frames_per_noop=frames_per_noop)
    frames = []
    for _ in range(200):
        environment.reset()
        frames.append(environment._ale.getEpisodeFrameNumber())
    assert set(frames) == {noops * frames_per_noop for noops in range(1, 31)}


def gymnasium_atari(game, frame_skip=4, noop_max=30, screen_size=84, **options):
    env = gymnasium.make(
        f'ALE/{game}-v5',
        frameskip=1,
        disable_env_checker=True,
        **{'repeat_action_probability': 0.0, **options},
    )
    env = gymnasium.wrappers.AtariPreprocessing(
        env, noop_max=noop_max, frame_skip=frame_skip, screen_size=screen_size
    )
    return gymnasium.wrappers.FrameStackObservation(env, 4)


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
    """It is the episode that an environment of that seed plays first."""
    environment = make(level_name, seed=5, **config)
    actions = random_actions(environment, 60)
    play(environment, actions)
    assert environment.seed_next(6)
    assert same(play(environment, actions), play(make(level_name, seed=6, **config), actions))


def test_every_game_of_atari57(make):
    for name in suites.load('atari57').level_names:
        environment = make(name, full_action_set=True)
        assert environment.spec.num_actions == 18
        first = environment.reset()['frame'].copy()
        # Some show a still picture for a while.
        actions = random_actions(environment, 2000)
        assert any(
            not np.array_equal(environment.step(action)[2]['frame'], first) for action in actions
        ), name
        environment.close()


@pytest.mark.parametrize(
    'game, seed, config, options',
    [
        ('Pong', 1, {}, {}),
        ('Breakout', 2, {}, {}),
        ('Boxing', 3, {'sticky_actions': 0.25}, {'repeat_action_probability': 0.25}),
        ('Seaquest', 4, {'num_action_repeats': 2}, {'frame_skip': 2}),
        ('Breakout', 5, {'num_action_repeats': 1}, {'frame_skip': 1}),
        ('Breakout', 6, {'full_action_set': True}, {'full_action_space': True}),
        ('MsPacman', 7, {'max_noops': 0}, {'noop_max': 0}),
        ('Pong', 8, {}, {'max_num_frames_per_episode': 300}),
        ('Pong', 9, {'width': 42, 'height': 42}, {'screen_size': 42}),
        ('Boxing', 10, {'width': 64, 'height': 48}, {'screen_size': (64, 48)}),
    ],
)
def test_atari_plays_as_gymnasium_does(game, seed, config, options, make, monkeypatch):
    limit = options.get('max_num_frames_per_episode')
    if limit:
        monkeypatch.setattr(environments, 'ATARI_MAX_EPISODE_FRAMES', limit)
    environment = make(f'ALE/{game}-v5', seed, **config)
    truth = gymnasium_atari(game, **options)
    assert environment.spec.num_actions == truth.action_space.n

    expected, _ = truth.reset(seed=seed)
    np.testing.assert_array_equal(environment.reset()['frame'], np.moveaxis(expected, 0, -1))
    ends = []
    for action in random_actions(environment, 500, seed):
        reward, end, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert reward == expected_reward
        assert end == (
            EpisodeEnd.TERMINATED
            if terminated
            else EpisodeEnd.TRUNCATED
            if truncated
            else EpisodeEnd.NOT_ENDED
        )
        if end:
            ends.append(end)
            expected, _ = truth.reset()
        np.testing.assert_array_equal(observation['frame'], np.moveaxis(expected, 0, -1))
    truth.close()
    if limit:
        assert len(ends) > 4 and set(ends) == {EpisodeEnd.TRUNCATED}
    elif game == 'Breakout' and not config:
        assert EpisodeEnd.TERMINATED in ends


def test_atari_plays_as_the_vector_environment_of_ale_does(make):
    environment = make('ALE/Pong-v5', max_noops=0)
    truth = ale_py.AtariVectorEnv(
        'pong', 1, num_threads=1, noop_max=0, use_fire_reset=False, reward_clipping=False
    )
    environment.reset()
    truth.reset(seed=1)
    rewards = 0
    for action in random_actions(environment, 300):
        reward, end, observation = environment.step(action)
        expected, expected_rewards, _, _, _ = truth.step(np.array([action]))
        assert reward == expected_rewards[0] and not end
        np.testing.assert_array_equal(observation['frame'][..., -1], expected[0, -1])
        rewards += abs(reward)
    truth.close()
    assert rewards > 0


def test_atari_limit_is_half_an_hour_of_play():
    assert environments.ATARI_MAX_EPISODE_FRAMES == 30 * 60 * 60


# With no life left Breakout is over, and in Bank Heist the last car still drives.
@pytest.mark.parametrize('game, lives', [('Breakout', 5), ('BankHeist', 4)])
def test_atari_reports_lost_lives_and_the_game_goes_on(game, lives, make):
    environment = make(f'ALE/{game}-v5', 3, end_episode_on_life_loss=True)
    undisturbed = make(f'ALE/{game}-v5', 3)
    raw = gymnasium.make(f'ALE/{game}-v5', frameskip=4, repeat_action_probability=0.0)
    raw.reset(seed=3)
    for _ in range(raw.unwrapped.np_random.integers(1, 31)):
        raw.unwrapped.ale.act(0)

    actions = random_actions(environment, 1200)
    rows = play(environment, actions)
    undisturbed_rows = play(undisturbed, actions)
    losses = 0
    for t, action in enumerate(actions, start=1):
        _, _, terminated, _, info = raw.step(action)
        np.testing.assert_array_equal(rows[t][2]['frame'], undisturbed_rows[t][2]['frame'])
        assert rows[t][0] == undisturbed_rows[t][0]
        if terminated:
            assert rows[t][1] == EpisodeEnd.TERMINATED
            break
        assert rows[t][1] == (EpisodeEnd.LIFE_LOST if info['lives'] < lives else 0)
        losses += info['lives'] < lives
        lives = info['lives']
    raw.close()
    assert losses == 4 and terminated


@pytest.mark.parametrize('frame_stack', [1, 3])
def test_atari_stack_holds_the_newest_frames_with_the_newest_last(frame_stack, make):
    environment = make('ALE/Pong-v5', frame_stack=frame_stack)
    whole = make('ALE/Pong-v5', frame_stack=8)
    actions = random_actions(environment, 30)
    for row, whole_row in zip(play(environment, actions), play(whole, actions), strict=True):
        np.testing.assert_array_equal(row[2]['frame'], whole_row[2]['frame'][..., -frame_stack:])


def test_every_atari_id_of_gymnasium_is_known(make):
    registered = {
        name: spec.kwargs['game']
        for name, spec in gymnasium.registry.items()
        if str(spec.entry_point).startswith('ale_py')
    }
    ours = {f'ALE/{name}-v5': rom for name, rom in environments._atari_games().items()}
    assert ours == {name: rom for name, rom in registered.items() if name.startswith('ALE/')}
    assert {f'ALE/{game}-v5' for game in ATARI_57} <= set(ours) and len(ATARI_57) == 57

    np.testing.assert_array_equal(
        make('PongNoFrameskip-v4').reset()['frame'], make('ALE/Pong-v5').reset()['frame']
    )
    assert make('SpaceInvaders-v0').spec.num_action_repeats == 4


@pytest.fixture
def register_atari():
    registered = []

    def register(name, entry_point='ale_py.env:AtariEnv', **options):
        registered.append(name)
        gymnasium.register(name, entry_point=entry_point, **options)
        return name

    builtin = dict(gymnasium.registry)
    yield register
    for name in registered:
        gymnasium.registry.pop(name)
        if name in builtin:
            gymnasium.registry[name] = builtin[name]


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
def test_atari_ids_of_ones_own_play_as_gymnasium_plays_them(
    kwargs, limit, config, actions_seen, register_atari, make
):
    """With the preprocessing, which wants a `frameskip` of 1 and repeats actions itself."""
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=kwargs, max_episode_steps=limit)
    environment = make(name, 3, **config)
    # Its own default is a fourth of sticky actions, and ours none.
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


def test_atari_ids_of_ones_own_and_flags(register_atari, make):
    pong = {'game': 'pong', 'frameskip': 3, 'repeat_action_probability': 0.5}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=pong, max_episode_steps=50)
    environment = make(name, max_noops=0)
    assert environment.spec.num_action_repeats == 3
    assert environment._ale.getFloat('repeat_action_probability') == 0.5
    rows = play(environment, [0] * 100)
    assert [t for t, row in enumerate(rows) if row[1]] == [50, 100]
    # What flags say comes first; the limit stays 50 steps of 3 frames.
    environment = make(name, max_noops=0, num_action_repeats=2, sticky_actions=0.1)
    assert environment._ale.getFloat('repeat_action_probability') == pytest.approx(0.1)
    rows = play(environment, [0] * 100)
    assert [t for t, row in enumerate(rows) if row[1]] == [75]

    # The package's own ids mean the game only; one that was changed means what it says.
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
def test_what_atari_ids_of_ones_own_cannot_have_is_refused(kwargs, part, register_atari):
    name = register_atari('EnvironmentsTest/Own-v0', 'ale_py:AtariEnv', kwargs=kwargs)
    with pytest.raises(LevelError) as error:
        create_environment(name, 1)
    assert repr(name) in str(error.value) and part in str(error.value)


def test_wrappers_of_atari_ids_of_ones_own_are_refused(register_atari):
    wrapper = gymnasium.envs.registration.WrapperSpec(
        'TimeAwareObservation', 'gymnasium.wrappers:TimeAwareObservation', {}
    )
    name = register_atari(
        'EnvironmentsTest/Own-v0', kwargs={'game': 'pong'}, additional_wrappers=(wrapper,)
    )
    with pytest.raises(LevelError, match=f'{name}.*the wrapper TimeAwareObservation'):
        create_environment(name, 1)


@pytest.mark.parametrize('game', ATARI_57[::4])
def test_atari_games_start(game, make):
    environment = make(f'ALE/{game}-v5')
    frames = [row[2]['frame'] for row in play(environment, random_actions(environment, 150))]
    assert any((frame != frames[0]).any() for frame in frames)


# Gymnasium.


class Toy(gymnasium.Env):
    """Two steps an episode; says at their end what it is told to say."""

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
    environment = make(level_name, 9)
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
        if terminated or truncated:
            expected, _ = truth.reset()
        np.testing.assert_array_equal(observation['frame'], expected)
    assert ends == {EpisodeEnd.NOT_ENDED, EpisodeEnd(end)}


def test_gymnasium_repeats_stop_where_the_episode_does(register_toy, make):
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
        {'observation_space': gymnasium.spaces.Tuple([image_space(64, 64, 3)])},
        {'observation_space': gymnasium.spaces.Dict(depth=image_space(64, 64, 1))},
        {'observation_space': image_space(64, 64, 3, dtype=np.float32)},
        {'observation_space': image_space(7, 7, 3)},
        {'observation_space': image_space(3), 'action_space': gymnasium.spaces.MultiBinary(3)},
        {'observation_space': image_space(3), 'action_space': image_space(2)},
        {
            'observation_space': image_space(3),
            'action_space': gymnasium.spaces.MultiDiscrete([2, 2]),
        },
    ],
    ids=str,
)
def test_gymnasium_spaces_that_cannot_be_served_are_named(spaces, register_toy):
    level_name = register_toy(**spaces)
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1)
    assert level_name in str(error.value)
    assert str(list(spaces.values())[-1]) in str(error.value)


class Scripted(gymnasium.Env):
    """Returns what it is told to, whatever its spaces say."""

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
        return environments.GymnasiumEnvironment('Scripted-v0', env, 1, 1, EnvironmentConfig())

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
            ["'image' and 'mission'", "without 'mission'"],
        ),
        (SPOKEN, {'image': IMAGE, 'mission': ''}, IMAGE, ['Dict', 'uint8 [40, 40, 3]']),
        (
            SPOKEN,
            {'image': IMAGE, 'mission': ''},
            {'image': IMAGE[:3], 'mission': ''},
            ["'image' of its observation", 'uint8 [3, 40, 3]'],
        ),
    ],
)
def test_gymnasium_observations_are_what_their_space_declares(space, good, bad, parts, scripted):
    """Whether it is the first one, that of a later reset, or one in mid-episode."""
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
def test_gymnasium_rewards_and_ends_are_what_its_interface_says(changes, parts, scripted):
    with pytest.raises(DeclarationError) as error:
        environment = scripted(VECTOR, [FINE], **changes)
        environment.reset()
        environment.step(0)
    for part in ['Scripted-v0', *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize('reward', [1, True, np.float32(1), np.int64(1), np.array(1.0)])
def test_gymnasium_rewards_are_numbers_of_any_kind(reward, scripted):
    environment = scripted(VECTOR, [FINE], reward=reward)
    environment.reset()
    got, end, _ = environment.step(0)
    assert type(got) is float and got == 1 and end == EpisodeEnd.NOT_ENDED


@pytest.mark.parametrize('truth', [True, 1, np.bool_(True), np.array(True)])
def test_gymnasium_ends_are_truths_of_any_kind(truth, scripted):
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


def test_gymnasium_environments_have_its_interface(scripted):
    for name in ('action_space', 'observation_space'):
        env = Scripted(VECTOR, [FINE])
        setattr(env, name, None)
        with pytest.raises(LevelError, match=f"'Toy-v0' has no {name} out of gymnasium.spaces"):
            environments.GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())
    # What Gymnasium wraps around an environment takes everything.
    env = gymnasium.wrappers.TimeLimit(OldReset(Scripted(VECTOR, [FINE])), 5)
    with pytest.raises(LevelError, match=r'older interface .* OldReset.reset must take seed and'):
        environments.GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())


def test_methods_of_extension_modules_have_no_signature_to_be_looked_at():
    env = Scripted(VECTOR, [FINE])
    env.reset = {}.update
    environment = environments.GymnasiumEnvironment('Toy-v0', env, 1, 1, EnvironmentConfig())
    with pytest.raises(DeclarationError, match=r'returned None from reset\(\)'):
        environment.reset()


def test_gymnasium_needs_actions(scripted):
    space = gymnasium.spaces.Discrete(1)
    space.n = 0
    env = Scripted(VECTOR, [FINE])
    env.action_space = space
    with pytest.raises(LevelError, match=r"'Empty-v0' has no actions.*Discrete\(0\)"):
        environments.GymnasiumEnvironment('Empty-v0', env, 1, 1, EnvironmentConfig())


@pytest.mark.parametrize('space', [image_space(64, 64, 5), image_space(3, 64, 64)], ids=str)
def test_what_an_image_is_stands_in_the_refusal(space, scripted):
    with pytest.raises(LevelError, match=r'sides of at least 32 pixels and 1 to 4 channels'):
        scripted(space, [])


@pytest.mark.parametrize(
    'space', [gymnasium.spaces.Discrete(5), image_space(3), gymnasium.spaces.Tuple([VECTOR])]
)
def test_missions_are_texts(space, scripted):
    spoken = gymnasium.spaces.Dict(image=image_space(40, 40, 3), mission=space)
    with pytest.raises(LevelError) as error:
        scripted(spoken, [])
    assert f"{space} as 'mission'" in str(error.value) and 'texts' in str(error.value)


def minigrid_env(size=8, **options):
    from minigrid.envs import EmptyEnv

    return EmptyEnv(size=size, **options)


def minigrid_environment(env):
    return environments.GymnasiumEnvironment('Grid-v0', env, 1, 1, EnvironmentConfig())


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w, env: w.RGBImgObsWrapper(env),
        lambda w, env: w.RGBImgPartialObsWrapper(env, 12),
        lambda w, env: w.ImgObsWrapper(w.RGBImgObsWrapper(env)),
        lambda w, env: w.NoDeath(w.RGBImgObsWrapper(env, 7), ('lava',)),
        lambda w, env: w.FlatObsWrapper(env),
        lambda w, env: gymnasium.wrappers.FlattenObservation(w.ImgObsWrapper(env)),
    ],
)
def test_observation_wrappers_of_minigrid_stay_in_force(wrap):
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
        if action is not None:
            observation = environment.step(action)[2]
            expected = truth.step(action)[0]


def test_what_minigrid_itself_declares_wrongly_is_refused():
    """Its wrapper takes the size from the space and the picture from the environment below."""
    from minigrid.wrappers import RGBImgPartialObsWrapper, ViewSizeWrapper

    environment = minigrid_environment(RGBImgPartialObsWrapper(ViewSizeWrapper(minigrid_env(), 5)))
    with pytest.raises(DeclarationError, match=r'uint8 \[40, 40, 3\].*uint8 \[56, 56, 3\]'):
        environment.reset()


class OtherSymbols(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return observation | {'image': observation['image'] + 1}


@pytest.mark.parametrize(
    'name, wrap',
    [
        ('FullyObsWrapper', lambda w, env: w.FullyObsWrapper(env)),
        ('OneHotPartialObsWrapper', lambda w, env: w.OneHotPartialObsWrapper(env)),
        ('SymbolicObsWrapper', lambda w, env: w.SymbolicObsWrapper(env)),
        ('ViewSizeWrapper', lambda w, env: w.ViewSizeWrapper(env, 5)),
        ('ImgObsWrapper', lambda w, env: w.ImgObsWrapper(env)),
        ('DictObservationSpaceWrapper', lambda w, env: w.DictObservationSpaceWrapper(env)),
        ('OtherSymbols', lambda w, env: OtherSymbols(env)),
        ('OtherSymbols', lambda w, env: gymnasium.wrappers.TimeLimit(OtherSymbols(env), 9)),
    ],
)
def test_observation_wrappers_of_minigrid_that_make_no_picture_are_refused(name, wrap):
    from minigrid import wrappers

    # 7x7 cells, so that the whole grid has the shape of what the agent sees of it.
    with pytest.raises(LevelError, match=f"'Grid-v0' has .* of its wrapper {name}|{name},"):
        minigrid_environment(wrap(wrappers, minigrid_env(size=7)))


def test_minigrid_with_a_class_of_ones_own_that_sees_otherwise():
    from minigrid.envs import EmptyEnv

    class Blind(EmptyEnv):
        def gen_obs(self):
            observation = super().gen_obs()
            return observation | {'image': observation['image'] * 0}

    with pytest.raises(LevelError, match='of its class Blind'):
        minigrid_environment(Blind(size=7))


class Secret(gymnasium.Wrapper):
    """Changes observations where no one can see it beforehand."""

    def step(self, action):
        observation, *others = self.env.step(action)
        return observation | {'image': observation['image'] + 1}, *others


class Copies(gymnasium.Wrapper):
    def step(self, action):
        observation, reward, *others = self.env.step(action)
        return observation | {'image': observation['image'].copy()}, reward - 1, *others


def test_minigrid_shows_its_picture_where_a_wrapper_leaves_observations_alone():
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


def test_vizdoom_plays_as_gymnasium_does(make, tmp_path, monkeypatch):
    import vizdoom.gymnasium_wrapper  # noqa: F401

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'temporary'
    folder.mkdir()
    environment = make('VizdoomBasic-v1', 4, temp_folder=str(folder))
    assert environment.spec.num_action_repeats == 4
    rows = play(environment, random_actions(environment, 250))
    environment.close()
    assert os.listdir(tmp_path) == ['temporary'] and not os.listdir(folder)

    truth = gymnasium.make('VizdoomBasic-v1', frame_skip=4)
    expected, _ = truth.reset(seed=4)
    ends = set()
    for t, action in enumerate([None, *random_actions(environment, 250)]):
        if action is not None:
            expected, reward, terminated, truncated, _ = truth.step(action)
            assert rows[t][0] == reward
            assert (rows[t][1] == EpisodeEnd.TRUNCATED) == truncated
            assert (rows[t][1] != EpisodeEnd.NOT_ENDED) == terminated
            ends.add(rows[t][1])
            if terminated:
                expected, _ = truth.reset()
        frame = cv2.resize(expected['screen'], (96, 72), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(rows[t][2]['frame'], frame)
    truth.close()
    assert ends == {EpisodeEnd.NOT_ENDED, EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED}

    with pytest.raises(LevelError, match=r'VizdoomBasic-MultiBinary-v1.*MultiBinary\(3\)'):
        create_environment('VizdoomBasic-MultiBinary-v1', 1)


def test_vizdoom_ids_of_ones_own_say_how_often_actions_are_repeated(make):
    import vizdoom.gymnasium_wrapper  # noqa: F401

    builtin = gymnasium.registry['VizdoomBasic-v1']
    name = 'VizdoomOfOnesOwn-v0'
    gymnasium.register(name, builtin.entry_point, kwargs={**builtin.kwargs, 'frame_skip': 7})
    try:
        for config, expected in (({}, 7), ({'num_action_repeats': 2}, 2)):
            environment = make(name, **config)
            assert environment.spec.num_action_repeats == expected
            assert environment._env.unwrapped.frame_skip == expected
    finally:
        gymnasium.registry.pop(name)


def test_nothing_of_vizdoom_outlives_an_actor_that_is_killed(tmp_path):
    before = set(os.listdir('/dev/shm'))
    actor = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import glob, sys, time, environments as e\n'
            'config = e.EnvironmentConfig(temp_folder=sys.argv[1])\n'
            'environment = e.create_environment("VizdoomBasic-v1", 1, config)\n'
            'environment.reset(); environment.step(0)\n'
            'children = [open(f).read() for f in glob.glob("/proc/self/task/*/children")]\n'
            'print(*children, flush=True); time.sleep(60)',
            str(tmp_path),
        ],
        env={**os.environ, 'PYTHONPATH': ROOT},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        children = [int(child) for child in actor.stdout.readline().split()]
        assert len(children) == 1
        assert not {name for name in set(os.listdir('/dev/shm')) - before if 'ViZDoom' in name}
    finally:
        actor.kill()
        actor.wait()
        actor.stdout.close()
    deadline = time.monotonic() + 20
    while is_running(children[0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_running(children[0]):
        os.kill(children[0], signal.SIGKILL)
        pytest.fail('ViZDoom goes on without its actor')


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_babyai_shows_the_picture_of_what_the_agent_sees_and_the_mission(make, capfd):
    import minigrid  # noqa: F401
    from minigrid.wrappers import RGBImgPartialObsWrapper

    environment = make('BabyAI-GoToObj-v0', 3)
    assert environment.spec.observation == {
        'frame': ArraySpec((56, 56, 3), 'uint8'),
        'instruction': ArraySpec((32,), 'int32'),
    }
    actions = random_actions(environment, 150)
    rows = play(environment, actions)
    # It draws levels until one can be solved, and says so on stdout.
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


def test_instruction_hash():
    # The check value of the catalogue of CRC algorithms for CRC-32/ISO-HDLC.
    bucket = 0xCBF43926 % 999 + 1
    hashed = environments.hash_instruction('  123456789, "123456789"')
    assert hashed.dtype == np.int32
    assert hashed.tolist() == [bucket, bucket] + [0] * 30
    assert (environments.hash_instruction('Go TO the_ball!') > 0).sum() == 4
    np.testing.assert_array_equal(
        environments.hash_instruction('GO to'), environments.hash_instruction('go TO')
    )
    assert not environments.hash_instruction('').any()
    many = environments.hash_instruction(' '.join(f'w{i}' for i in range(5000)))
    assert many.shape == (32,) and many.min() >= 1
    buckets = {int(environments.hash_instruction(f'w{i}')[0]) for i in range(20_000)}
    assert buckets == set(range(1, 1000))


def frames_of_an_episode(environment, act):
    """Plays an episode; returns the frames that its actions lasted by the environment's account."""
    environment.reset()
    frames = 0
    while True:
        _, end, _ = environment.step(act())
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            return frames + environment.last_action_frames
        frames += environment.spec.num_action_repeats


def test_frames_of_an_action_that_the_end_cuts_short(make, register_atari):
    pong = {'game': 'pong', 'frameskip': 1, 'max_num_frames_per_episode': 50}
    name = register_atari('EnvironmentsTest/Own-v0', kwargs=pong)
    atari = make(name, max_noops=0)
    # Twelve actions of four frames, and two frames; in the second episode, too.
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

    # 300 tics, by its configuration.
    assert frames_of_an_episode(make('VizdoomBasic-v1', num_action_repeats=7), lambda: 0) == 300


# Environments of one's own.


def test_a_callable_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / 'own_environments_for_test.py').write_text(
        'import numpy as np\n'
        'from environments import Environment\n'
        'from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd\n'
        'class Fixed(Environment):\n'
        '    def __init__(self, seed, config):\n'
        '        self.seed, self.config = seed, config\n'
        '        frame = ArraySpec((2,), "float32")\n'
        '        self.spec = EnvironmentSpec({"frame": frame}, 2, 1)\n'
        '    def reset(self):\n'
        '        return {"frame": np.float32([self.seed, self.config.width])}\n'
        '    def step(self, action):\n'
        '        return 0.0, EpisodeEnd.NOT_ENDED, self.reset()\n'
        'def wrong(seed, config):\n'
        '    return 5\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = EnvironmentConfig(width=4)
    environment = create_environment('own_environments_for_test:Fixed', 7, config)
    assert environment.reset()['frame'].tolist() == [7, 4]
    environment.close()
    for name, part in (
        ('own_environments_for_test:nothing', "'nothing'"),
        ('own_environments_that_are_not_there:make', "'own_environments_that_are_not_there'"),
        ('own_environments_for_test:wrong', 'int'),
    ):
        with pytest.raises(LevelError, match=part):
            create_environment(name, 1)

    (tmp_path / 'own_registration_for_test.py').write_text(
        'import gymnasium\n'
        'gymnasium.register("Own-v3", "gymnasium.envs.classic_control:CartPoleEnv")\n'
    )
    environment = create_environment('own_registration_for_test:Own-v3', 7)
    assert environment.spec.num_actions == 2
    environment.close()
    with pytest.raises(LevelError, match="did you mean 'own_registration_for_test:Own-v3'"):
        create_environment('own_registration_for_test:Own', 7)
    with pytest.raises(LevelError, match="Did you mean 'own_registration_for_test:Own-v3'"):
        create_environment('own_registration_for_test:Own-v4', 7)
    gymnasium.registry.pop('Own-v3')


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of one's own, which is gone with the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / 'module_of_ones_own.py').write_text(text)
        importlib.invalidate_caches()
        return 'module_of_ones_own'

    yield write
    sys.modules.pop('module_of_ones_own', None)
    for name in [name for name in gymnasium.registry if name.startswith('OfOnesOwn')]:
        gymnasium.registry.pop(name)


@pytest.mark.parametrize('attribute', ['make', 'OfOnesOwn-v0'])
@pytest.mark.parametrize(
    'text, parts',
    [
        ('\nimport no_such_package', ['ModuleNotFoundError', "'no_such_package'", 'line 2']),
        ('from math import no_such_name', ['ImportError', 'no_such_name', 'line 1']),
        ('def make(:', ['SyntaxError', 'module_of_ones_own.py, line 1']),
        ('raise ImportError("first\\n\\nsecond line.")', ['ImportError: first second line (']),
        ('import math\nmath.nothing', ['AttributeError', "'nothing'", 'line 2']),
        ('raise KeyError(3)', ['KeyError: 3', 'line 1']),
    ],
)
def test_modules_that_cannot_be_imported(text, parts, attribute, module):
    with pytest.raises(LevelError) as error:
        create_environment(f'{module(text)}:{attribute}', 1)
    for part in [f"'module_of_ones_own:{attribute}' asks for", 'cannot be imported', *parts]:
        assert part in str(error.value)
    assert '\n' not in str(error.value)


def test_errors_of_several_lines_become_one_sentence_with_all_their_words(module):
    name = module(
        'import gymnasium\n'
        'from environments import LevelError\n'
        'def imports(seed=0, config=None):\n'
        '    raise ImportError("no\\njoystick\\n\\nhere")\n'
        'def levels(seed, config):\n'
        '    raise LevelError("no\\njoystick\\n\\nhere")\n'
        'def gymnasiums():\n'
        '    raise gymnasium.error.DependencyNotInstalled("no\\njoystick\\n\\nhere")\n'
        'gymnasium.register("OfOnesOwnImports-v0", imports)\n'
        'gymnasium.register("OfOnesOwnGymnasiums-v0", gymnasiums)\n'
    )
    for each in ('imports', 'levels', 'OfOnesOwnImports-v0', 'OfOnesOwnGymnasiums-v0'):
        with pytest.raises(LevelError) as error:
            create_environment(f'{name}:{each}', 1)
        assert 'no joystick here' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'attribute, parts',
    [
        ('narrow', ['must be a callable that takes (seed, config)']),
        ('broken', ['cannot be made', "AttributeError: module 'math' has no", 'line 5']),
        ('NotOne', ['is an int, not a callable that takes (seed, config)']),
        ('OfOnesOwnBroken-v0', ['cannot be made', 'NameError', 'module_of_ones_own.py, line 7']),
        ('OfOnesOwnNarrow-v0', ['cannot be made', 'TypeError', 'positional argument']),
        ('OfOnesOwnNowhere-v0', ['cannot be made', 'AttributeError', "'Nowhere'"]),
    ],
)
def test_environments_that_are_wrong_in_their_making(attribute, parts, module):
    name = module(
        'import gymnasium, math\n'
        'def narrow(seed):\n'
        '    pass\n'
        'def broken(seed, config):\n'
        '    math.nothing\n'
        'def broken_env():\n'
        '    return nothing\n'
        'NotOne = 1\n'
        'gymnasium.register("OfOnesOwnBroken-v0", broken_env)\n'
        'gymnasium.register("OfOnesOwnNarrow-v0", narrow)\n'
        'gymnasium.register("OfOnesOwnNowhere-v0", "module_of_ones_own:Nowhere")\n'
    )
    with pytest.raises(LevelError) as error:
        create_environment(f'{name}:{attribute}', 1)
    for part in [f"'module_of_ones_own:{attribute}' ", *parts]:
        assert part in str(error.value)


def test_failures_that_may_pass_are_not_taken_for_bad_input(module):
    name = module(
        'import gymnasium\n'
        'def make(seed=0, config=None):\n'
        '    raise RuntimeError("no memory")\n'
        'gymnasium.register("OfOnesOwnFailing-v0", make)\n'
    )
    for each in ('make', 'OfOnesOwnFailing-v0'):
        with pytest.raises(RuntimeError, match='no memory'):
            create_environment(f'{name}:{each}', 1)


def test_classes_of_gymnasium_are_played_by_their_ids(module, make):
    name = module(
        'import gymnasium\n'
        'from gymnasium.envs.classic_control import CartPoleEnv as OfOnesOwnPole\n'
        'from gymnasium.envs.classic_control import MountainCarEnv as OfOnesOwnCar\n'
        'from gymnasium.envs.classic_control import AcrobotEnv as Unregistered\n'
        'gymnasium.register("OfOnesOwnPole", OfOnesOwnPole)\n'
        'gymnasium.register("OfOnesOwnCar-v2", OfOnesOwnCar)\n'
    )
    assert make(f'{name}:OfOnesOwnPole').spec.num_actions == 2
    with pytest.raises(LevelError, match=f"lacks the version .* '{name}:OfOnesOwnCar-v2'"):
        make(f'{name}:OfOnesOwnCar')
    with pytest.raises(LevelError, match='is a gymnasium.Env, which is played by an id'):
        make(f'{name}:Unregistered')


# Names that cannot be played.


@pytest.mark.parametrize(
    'level_name, parts',
    [
        ('ALE/Pnog-v5', ['ALE/Pong-v5']),
        ('ALE/Nonsense-v5', ['ALE/Pong-v5', 'ALE/Breakout-v5']),
        ('ALE/Pong-v6', ['ALE/Pong-v5']),
        ('CartPol-v1', ["Did you mean 'CartPole-v1'?"]),
        ('cartpole', ["lacks the version of a Gymnasium id: did you mean 'CartPole-v1'?"]),
        ('CartPole', ["lacks the version of a Gymnasium id: did you mean 'CartPole-v1'?"]),
        ('Pong', ["did you mean 'ALE/Pong-v5'?"]),
        ('MyGame', ['has no version at its end', 'my_module:MyGame-v0', 'deepmind_lab']),
        (':make', ['no Python module in front of its colon', 'my_module:make']),
        (':CartPole-v1', ['no Python module in front of its colon', 'my_module:MyGame-v0']),
        (':', ['nothing behind its colon']),
        ('math:', ['nothing behind its colon', 'my_module:make']),
        ('.math:make', ["'.math', which cannot be imported"]),
        ('VizdoomBasics-v1', ["Did you mean 'VizdoomBasic-v1'?"]),
        ('explore_goal_locations_small', ['deepmind_lab', 'build.md', 'ALE/Pong-v5']),
        ('my_own_maze', ['deepmind_lab', 'ALE/Pong-v5']),
    ],
)
def test_unknown_levels(level_name, parts, monkeypatch):
    # As on a machine that does not have it.
    monkeypatch.setitem(sys.modules, 'deepmind_lab', None)
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1)
    for part in [level_name, *parts]:
        assert part in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'level_name, module, install',
    [
        ('VizdoomBasic-v1', 'vizdoom', "pip install -e '.[vizdoom]'"),
        ('BabyAI-GoToObj-v0', 'minigrid', "pip install -e '.[minigrid]'"),
    ],
)
def test_missing_packages(level_name, module, install):
    result = run_python(
        'import sys, environments\n'
        'sys.modules[sys.argv[2]] = None\n'
        'try:\n'
        '    environments.create_environment(sys.argv[1], 1)\n'
        'except environments.LevelError as error:\n'
        '    print(error)',
        level_name,
        module,
    )
    assert level_name in result.stdout and install in result.stdout, result.stderr


# DeepMind Lab.


def first_pixels(rows):
    return [row[2]['frame'][0, 0].tolist() for row in rows]


def digest_pixel(digest):
    return [digest & 255, digest >> 8 & 255, digest >> 16 & 255]


def test_deepmind_lab_actions_seeds_and_throw_away_reset(make, deepmind_lab):
    # Look left-right, look down-up, strafe, move, fire, jump, crouch.
    expected_actions = [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, -1, 0, 0, 0],
        [0, 0, -1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [-20, 0, 0, 0, 0, 0, 0],
        [20, 0, 0, 0, 0, 0, 0],
        [-20, 0, 0, 1, 0, 0, 0],
        [20, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ]
    environment = make('explore_goal_locations_small', 11)
    assert environment.spec == EnvironmentSpec(
        {
            'frame': ArraySpec((72, 96, 3), 'uint8'),
            'instruction': ArraySpec((32,), 'int32'),
        },
        9,
        4,
        'dmlab',
    )
    rows = play(environment, range(9))
    seed = np.random.RandomState(11).randint(2**31, dtype=np.int64)
    # The stand-in's frames carry what it was told: the level, the seed, whether this is the first
    # episode of its Lab, and the actions.
    text = f'contributed/dmlab30/explore_goal_locations_small {seed} False'
    digest = zlib.crc32(text.encode())
    assert first_pixels(rows)[0] == digest_pixel(digest)
    for t, action in enumerate(expected_actions, start=1):
        digest = zlib.crc32(np.array(action, np.intc).tobytes(), digest)
        assert first_pixels(rows)[t] == digest_pixel(digest)
        assert rows[t][0] == 4 * action[3]


def test_deepmind_lab_episodes_end_and_begin_in_one_step(make, deepmind_lab):
    environment = make('rooms_select_nonmatching_object', 2, num_action_repeats=7)
    rows = play(environment, [0] * 250)
    ends = [t for t, row in enumerate(rows) if row[1]]
    # 720 frames are 102 steps of 7 frames and one of 6.
    assert ends == [103, 206]
    assert rows[103][1] == EpisodeEnd.TERMINATED
    assert [rows[102][0], rows[103][0], rows[104][0]] == [7, 6, 7]
    assert not np.array_equal(rows[0][2]['frame'], rows[103][2]['frame'])


def test_deepmind_lab_speaks(make, deepmind_lab):
    environment = make('language_select_described_object', 2)
    instructions = {tuple(environment.reset()['instruction'].tolist()) for _ in range(20)}
    assert instructions == {
        tuple(zlib.crc32(word.encode()) % 999 + 1 for word in ('get', 'the', colour, 'hat'))
        + (0,) * 28
        for colour in ('red', 'green', 'blue')
    }
    silent = make('seekavoid_arena_01', 2)
    assert not silent.reset()['instruction'].any()


def test_deepmind_lab_keeps_quiet_and_its_files_to_itself(make, deepmind_lab, tmp_path, capfd):
    environment = make('contributed/dmlab30/rooms_watermaze', temp_folder=str(tmp_path))
    environment.reset()
    assert os.environ['LP_NUM_THREADS'] == '0'
    assert capfd.readouterr().out == ''
    assert len(os.listdir(tmp_path)) == 1
    environment.close()
    environment.close()
    assert not os.listdir(tmp_path)
    # The real Lab would take this process with it.
    with pytest.raises(RuntimeError, match='closed'):
        environment.reset()
    with pytest.raises(RuntimeError, match='closed'):
        environment.step(0)


def test_deepmind_lab_levels_that_cannot_be_made(make, deepmind_lab, tmp_path):
    for level_name, config, parts in (
        ('explore_goal_location_small', {}, ["Did you mean 'explore_goal_locations_small'?"]),
        ('rooms_collect_good_objects_test', {}, ['hold-out']),
        ('rooms_watermaze', {'width': 98}, ['98', 'multiples of 4']),
    ):
        with pytest.raises(LevelError) as error:
            create_environment(level_name, 1, EnvironmentConfig(temp_folder=tmp_path, **config))
        for part in parts:
            assert part in str(error.value)
        assert not os.listdir(tmp_path)
    make('rooms_collect_good_objects_test', is_test=True).reset()


def make_images(folder, name='0001.jpg'):
    """Makes what stands for the data set that two levels need."""
    (folder / 'brady_konkle_oliva2008').mkdir(parents=True, exist_ok=True)
    (folder / 'brady_konkle_oliva2008' / name).write_bytes(b'a picture')


@pytest.mark.parametrize('is_test', [False, True])
@pytest.mark.parametrize('prefix', ['', 'contributed/dmlab30/'])
def test_deepmind_lab_levels_with_images_want_them_before_anything_starts(
    is_test, prefix, make, deepmind_lab, tmp_path
):
    """The module itself, like its stand-in, misses them in mid-episode and ends the process."""
    level_name = f'{prefix}psychlab_continuous_recognition'
    folder = tmp_path / 'brady_konkle_oliva2008'

    def assert_refused(dataset_path, why):
        with pytest.raises(LevelError) as error:
            make(level_name, dataset_path=dataset_path, is_test=is_test)
        for part in (repr(level_name), why, '--dataset_path'):
            assert part in str(error.value)

    assert_refused('', 'there is no --dataset_path')
    assert_refused(str(tmp_path / 'nowhere'), 'nowhere/brady_konkle_oliva2008')
    assert_refused(str(tmp_path), f'there is no folder {folder}')
    make_images(tmp_path, 'README.md')
    (folder / '0001.jpg').touch()
    (folder / '0002.jpg').mkdir()
    (folder / 'thumb_0001.jpg').write_bytes(b'a picture')
    assert_refused(str(tmp_path), f'{folder} has no numbered pictures')
    for name in ('7.png', '00013.JPEG', '0001.jpg'):
        make_images(tmp_path, name)
        environment = make(level_name, dataset_path=str(tmp_path), is_test=is_test)
        environment.check()
        play(environment, random_actions(environment, 100))
        (folder / name).unlink()


@pytest.mark.parametrize('is_test', [False, True])
def test_every_level_of_dmlab30(is_test, make, deepmind_lab, tmp_path):
    make_images(tmp_path)
    suite = suites.load('dmlab30')
    for name in (suite.for_testing() if is_test else suite).level_names:
        environment = make(name, dataset_path=str(tmp_path), is_test=is_test)
        environment.check()
        rows = play(environment, random_actions(environment, 3))
        assert rows[-1][2]['frame'].shape == (72, 96, 3) and environment.spec.num_actions == 9
        environment.close()


def test_the_mixer_seed_of_tests(make, deepmind_lab, monkeypatch):
    configs = []
    lab = importlib.import_module('deepmind_lab')
    real = lab.Lab
    monkeypatch.setattr(lab, 'Lab', lambda *a, **k: configs.append(a[2]) or real(*a, **k))
    for is_test in (True, False):
        make('rooms_watermaze', is_test=is_test)
    assert configs[0]['mixerSeed'] == str(0x600D5EED)
    assert 'mixerSeed' not in configs[1]


def test_deepmind_lab_compiles_a_map_once_for_all_environments(make, deepmind_lab, tmp_path):
    folder = tmp_path / 'not' / 'there' / 'yet'
    rows = play(make('rooms_watermaze', level_cache_dir=str(folder)), [])
    (name,) = maps_in(folder)
    written = (folder / name).stat()
    again = play(make('rooms_watermaze', level_cache_dir=str(folder)), [])
    assert same(rows, again)
    assert (folder / name).stat().st_ino == written.st_ino

    # A broken map would end the process; it is thrown away and compiled anew.
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    assert same(rows, play(make('rooms_watermaze', level_cache_dir=str(folder)), []))
    with zipfile.ZipFile(folder / name) as archive:
        assert archive.testzip() is None


def write_map(path, text):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('map', text)


def maps_in(folder):
    return [name for name in os.listdir(folder) if name.endswith('.pk3')]


def test_level_cache(tmp_path, caplog):
    folder = tmp_path / 'cache'
    cache = LevelCache(str(folder))
    path = tmp_path / 'map.pk3'
    assert not cache.fetch('some/../key', str(path)) and not path.exists()
    write_map(path, 'one')
    cache.write('some/../key', str(path))
    first = path.read_bytes()
    write_map(path, 'another')
    # What stands at the path from an earlier episode is replaced.
    assert LevelCache(str(folder)).fetch('some/../key', str(path))
    assert path.read_bytes() == first
    assert not cache.fetch('other', str(path))
    assert len(maps_in(folder)) == 1 and not caplog.records

    # A map that was not written to its end is not kept.
    path.write_bytes(first[:-1])
    cache.write('broken', str(path))
    assert len(maps_in(folder)) == 1 and len(caplog.records) == 1
    # A flipped bit inside a map that looks whole from the outside.
    (name,) = maps_in(folder)
    spoilt = bytearray(first)
    spoilt[first.index(b'one')] ^= 1
    (folder / name).write_bytes(spoilt)
    assert not cache.fetch('some/../key', str(path))
    assert not maps_in(folder)
    assert sorted(os.listdir(tmp_path)) == ['cache', 'map.pk3']


def test_level_cache_forgets_what_was_not_used_for_longest(tmp_path):
    folder, path = tmp_path / 'cache', tmp_path / 'map.pk3'
    size = 5000
    cache = LevelCache(str(folder), limit_bytes=4.5 * size)
    (tmp_path / 'cache').mkdir()
    abandoned, fresh, foreign = (
        folder / name for name in ('impala_map_old.tmp', 'impala_map_new.tmp', 'notes.txt')
    )
    for each in (abandoned, fresh, foreign):
        each.write_bytes(bytes(10 * size))
    for each in (abandoned, foreign):
        os.utime(each, (1e9, 1e9))

    def write(key):
        write_map(path, bytes(size))
        cache.write(key, str(path))

    for number in range(4):
        write(f'map {number}')
        os.utime(cache._path(f'map {number}'), (1.5e9 + number, 1.5e9 + number))
    assert len(maps_in(folder)) == 4
    # The oldest is used again, so two others go with the fifth map: nine tenths are 4.05 maps.
    assert LevelCache(str(folder)).fetch('map 0', str(path))
    write('map 4')
    there = [number for number in range(5) if os.path.exists(cache._path(f'map {number}'))]
    assert there == [0, 3, 4]
    assert sum(os.path.getsize(folder / name) for name in maps_in(folder)) <= 4.05 * size
    seconds = [name for name in os.listdir(folder) if name.endswith('.seconds')]
    assert len(seconds) == len(there)
    assert not abandoned.exists() and fresh.exists() and foreign.exists()


@pytest.mark.parametrize(
    ('folder_mode', 'file_mode'),
    [(0o700, 0o644), (0o755, 0o644), (0o2775, 0o664), (0o777, 0o666)],
)
def test_a_level_cache_is_open_to_whom_its_folder_is(tmp_path, folder_mode, file_mode):
    folder = tmp_path / 'cache'
    folder.mkdir()
    folder.chmod(folder_mode)
    write_map(tmp_path / 'map.pk3', 'one')
    LevelCache(str(folder)).write('key', str(tmp_path / 'map.pk3'))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()]
    assert modes == [file_mode] * 2


# zipfile loads a module when it is used, which other users need not be able to read.
LEVEL_CACHE_OF_ANOTHER_USER = """
import encodings.cp437, os, sys
from environments import LevelCache
folder, path = sys.argv[1:]
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
cache = LevelCache(folder)
assert cache.fetch('key', path), 'cannot read the map'
print(cache.seconds_saved)
"""


@pytest.mark.skipif(os.getuid() != 0, reason='only root can act as another user')
def test_another_users_level_cache(tmp_path):
    """The map counts as used, and the seconds that it saves are known."""
    # The folders of tests are closed to others.
    with tempfile.TemporaryDirectory(dir='/tmp') as name:
        os.chmod(name, 0o755)
        shared, own = pathlib.Path(name, 'shared'), pathlib.Path(name, 'own')
        for folder in (shared, own):
            folder.mkdir()
            folder.chmod(0o777)
        write_map(tmp_path / 'map.pk3', 'one')
        cache = LevelCache(str(shared))
        cache.write('key', str(tmp_path / 'map.pk3'))
        (cached,) = shared.glob('*.pk3')
        cached.with_name(cached.name + '.seconds').write_text('7.5')
        os.utime(cached, (1e9, 1e9))
        output = subprocess.run(
            [sys.executable, '-c', LEVEL_CACHE_OF_ANOTHER_USER, str(shared), str(own / 'map.pk3')],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (output.stdout, output.stderr) == ('7.5\n', '')
        assert cached.stat().st_mtime > 1.5e9


def test_level_cache_tells_what_it_saves(tmp_path, make, deepmind_lab, monkeypatch):
    monkeypatch.setenv('DEEPMIND_LAB_COMPILE_SECONDS', '0.2')
    assert environments.level_cache_statistics(str(tmp_path)) == {}
    # Maps repeat after four seeds; each environment resets once more at its start.
    for _ in range(3):
        temp_folder = tmp_path / 'temp'
        temp_folder.mkdir(exist_ok=True)
        lab = make(
            'rooms_watermaze',
            level_cache_dir=str(tmp_path / 'maps'),
            temp_folder=str(temp_folder),
        )
        lab.reset()
    statistics = environments.level_cache_statistics(str(temp_folder))
    assert statistics['hits'] == 5 and statistics['misses'] == 1
    assert 5 * 0.2 <= statistics['seconds_saved'] < 5 * 0.2 + 5


LEVEL_CACHE_PROCESS = """
import sys, zipfile
from environments import LevelCache
folder, path = sys.argv[1:]
cache = LevelCache(folder, limit_bytes=30_000)
for repetition in range(6):
    for number in range(8):
        if not cache.fetch(f'key {number}', path):
            with zipfile.ZipFile(path, 'w') as archive:
                archive.writestr('map', str(number) * 5000)
            cache.write(f'key {number}', path)
        with zipfile.ZipFile(path) as archive:
            assert archive.read('map') == str(number).encode() * 5000
"""


def test_processes_share_a_level_cache_that_is_too_small(tmp_path):
    """They write, use and remove the same maps at the same time, and one spoils them."""
    folder = tmp_path / 'cache'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', LEVEL_CACHE_PROCESS, str(folder), str(tmp_path / f'{i}.pk3')],
            stderr=subprocess.PIPE,
        )
        for i in range(4)
    ]
    while any(process.poll() is None for process in processes):
        for name in maps_in(folder) if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                os.truncate(folder / name, 100)
        time.sleep(0.01)
    assert [process.communicate()[1].decode() for process in processes if process.returncode] == []
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]


@pytest.mark.parametrize('num_caches', [1, 200])
def test_a_level_cache_is_bounded_however_many_write(tmp_path, num_caches):
    path, folder = tmp_path / 'map.pk3', tmp_path / 'cache'
    write_map(path, 'one')
    # 300 maps fit.
    limit = 300 * path.stat().st_size
    caches = [LevelCache(str(folder), limit) for _ in range(num_caches)]
    largest = 0
    for number in range(900):
        caches[number % num_caches].write(f'key {number}', str(path))
        if number % 20 == 0:
            largest = max(largest, len(maps_in(folder)))
    # Looked at once in three maps, on the average.
    assert 270 <= largest <= 400


def test_level_cache_never_raises(tmp_path, caplog):
    path = tmp_path / 'map.pk3'
    write_map(path, 'one')
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        cache = LevelCache(str(folder))
        cache.write('key', str(path))
        assert not cache.fetch('key', str(path))
    cache = LevelCache(str(tmp_path / 'cache'))
    cache.write('key', str(tmp_path / 'nothing.pk3'))
    cache.write('key', str(path))
    assert not cache.fetch('key', str(tmp_path / 'nowhere' / 'map.pk3'))
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    'code, exit_code, message',
    [
        ('lab.close(); lab.reset()', 139, 'reset of a closed Lab'),
        ('lab.close(); lab.observation_spec()', 139, 'observation_spec of a closed Lab'),
        ('lab = Lab(LEVEL, [], level_cache=Liar()); lab.reset()', 1, 'without a valid map'),
        ('lab.step(FORWARD)', 1, 'RuntimeError'),
        ('lab.reset(seed=np.int64(3))', 1, 'ValueError'),
        ('lab.reset(); lab.step(np.zeros(7))', 1, 'ValueError'),
        ('lab.reset(); lab.step(np.zeros((7, 2), np.intc)[:, 0])', 1, 'MisuseError'),
        ('lab.reset(); lab.step(FORWARD, 999999); lab.observations()', 1, 'RuntimeError'),
        ('Lab(LEVEL, ())', 1, 'TypeError'),
        ('Lab(LEVEL, [], {"with": "96"})', 1, 'MisuseError'),
        ('Lab(LEVEL, [], {"width": "98"})', 1, 'multiple of 4'),
        ('Lab(LEVEL, [], {"width": 96})', 1, 'TypeError'),
        ('Lab("no_such_level", [])', 1, 'Level not found'),
        (
            'os.mkdir("brady_konkle_oliva2008")\n'
            'lab = Lab("contributed/dmlab30/psychlab_continuous_recognition", [])\n'
            'lab.reset(); lab.step(FORWARD, 60); lab.step(FORWARD)',
            -signal.SIGABRT,
            'cannot read the image',
        ),
        ('lab.name = 3', 1, 'AttributeError'),
        ('class Mine(Lab): pass', 1, 'TypeError'),
        ('lab.reset(); assert os.fork() or os._exit(0); sys.exit(os.wait()[1] >> 8)', 139, 'fork'),
        ('lab.reset(); lab.step(FORWARD); lab.close() and sys.exit(lab.close())', 0, 'Lua log'),
    ],
)
def test_the_stand_in_is_as_strict_as_the_real_module(code, exit_code, message):
    result = run_python(
        'import os, sys, numpy as np\n'
        'from deepmind_lab import Lab\n'
        'class Liar:\n'
        '    def fetch(self, key, path): return True\n'
        '    def write(self, key, path): pass\n'
        'LEVEL = "seekavoid_arena_01"\n'
        'FORWARD = np.array([0, 0, 0, 1, 0, 0, 0], np.intc)\n'
        'lab = Lab(LEVEL, ["RGB_INTERLEAVED"], {"width": "96", "height": "72"})\n' + code
    )
    assert result.returncode == exit_code, result.stderr
    assert message in result.stdout + result.stderr
