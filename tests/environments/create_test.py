"""Level names: the environments they make, and the errors for wrong names."""

import sys

import gymnasium
import pytest
from playing import run_python

from impala.environments import EnvironmentConfig, create_environment
from impala.errors import LevelError


@pytest.mark.parametrize(
    'level_name, free_of_gymnasium',
    [('ALE/Pong-v5', True), ('explore_goal_locations_small', True), ('VizdoomBasic-v1', False)],
)
def test_actor_processes_do_not_import_unneeded_packages(level_name, free_of_gymnasium):
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


def test_user_defined_callables_and_registrations(tmp_path, monkeypatch):
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
        (':', ['nothing after its colon']),
        ('math:', ['nothing after its colon', 'my_module:make']),
        ('.math:make', ["the Python module '.math' cannot be imported"]),
        ('VizdoomBasics-v1', ["Did you mean 'VizdoomBasic-v1'?"]),
        ('explore_goal_locations_small', ['deepmind_lab', 'build.md', 'ALE/Pong-v5']),
        ('my_own_maze', ['deepmind_lab', 'ALE/Pong-v5']),
    ],
)
def test_unknown_levels(level_name, parts, monkeypatch):
    # As if it were not installed.
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
        ('HalfCheetah-v5', 'mujoco', "pip install -e '.[mujoco]'"),
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


@pytest.mark.parametrize('level_name', ['CartPole-v1', 'rooms_watermaze'])
@pytest.mark.parametrize('name', ['atari_mode', 'atari_difficulty'])
def test_settings_of_atari_games_are_refused_for_other_levels(level_name, name):
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1, EnvironmentConfig(**{name: 0}))
    assert str(error.value) == (
        f'--{name}=0 has no effect on {level_name!r}, which is not an Atari game.'
    )


@pytest.mark.parametrize(
    'config, flag',
    [
        ({'env_kwargs': '{"mode": 1}'}, '--env_kwargs={"mode": 1}'),
        ({'observation_keys': ('a', 'b')}, '--observation_keys=a,b'),
        ({'clip_actions': True}, '--clip_actions'),
        ({'info_action_mask': True}, '--info_action_mask'),
    ],
)
@pytest.mark.parametrize('level_name', ['ALE/Pong-v5', 'PongNoFrameskip-v4', 'rooms_watermaze'])
def test_settings_of_gymnasium_are_refused_for_other_levels(level_name, config, flag):
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1, EnvironmentConfig(**config))
    assert str(error.value) == (
        f'{flag} has no effect on {level_name!r}, since Atari games and levels of DeepMind Lab '
        'have fixed observations, discrete actions and flags of their own.'
    )


@pytest.mark.parametrize(
    'level_name, setting, reason',
    [
        ('CartPole-v1', 'clip_actions', 'which has no Box among its actions'),
        ('Pendulum-v1', 'info_action_mask', 'whose actions have no categories'),
        ('Masked', 'info_action_mask', "which has an 'action_mask' in its observation"),
    ],
)
def test_settings_without_an_effect_on_the_spaces_are_refused(level_name, setting, reason, module):
    name = module(
        'import numpy as np\n'
        'import gymnasium\n'
        'from gymnasium import spaces\n'
        'class Masked(gymnasium.Env):\n'
        '    action_space = spaces.Discrete(2)\n'
        '    observation_space = spaces.Dict(\n'
        '        {"x": spaces.Box(0, 1, (2,)), "action_mask": spaces.MultiBinary(2)}\n'
        '    )\n'
        '    def reset(self, seed=None, options=None):\n'
        '        return {"x": np.zeros(2, np.float32), "action_mask": np.ones(2, np.int8)}, {}\n'
        'gymnasium.register("OfOnesOwn-v0", Masked)\n'
    )
    if level_name == 'Masked':
        level_name = f'{name}:OfOnesOwn-v0'
        create_environment(level_name, 1).close()
    with pytest.raises(LevelError) as error:
        create_environment(level_name, 1, EnvironmentConfig(**{setting: True}))
    assert str(error.value) == f'--{setting} has no effect on {level_name!r}, {reason}.'
