"""Users' modules and callables that fail."""

import pathlib

import pytest

import impala.environments
from impala.environments import EnvironmentConfig, create_environment
from impala.errors import LevelError
from impala.user_code import describe_failure


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
    for part in [
        f"'module_of_ones_own:{attribute}' cannot be made: ",
        'cannot be imported',
        *parts,
    ]:
        assert part in str(error.value)
    assert '\n' not in str(error.value)


def test_multi_line_errors_become_one_sentence(module):
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
        (
            'OfOnesOwnNarrow-v0',
            [
                'cannot be made: narrow (module_of_ones_own.py) does not take its keyword '
                "arguments: missing a required argument: 'seed'."
            ],
        ),
        ('OfOnesOwnNowhere-v0', ['cannot be made', 'AttributeError', "'Nowhere'"]),
    ],
)
def test_environments_that_cannot_be_created(attribute, parts, module):
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


def test_transient_failures_are_not_treated_as_bad_input(module):
    name = module(
        'import gymnasium\n'
        'def make(seed=0, config=None):\n'
        '    raise RuntimeError("no memory")\n'
        'gymnasium.register("OfOnesOwnFailing-v0", make)\n'
    )
    for each in ('make', 'OfOnesOwnFailing-v0'):
        with pytest.raises(RuntimeError, match='no memory'):
            create_environment(f'{name}:{each}', 1)


def test_failures_are_located_in_the_users_code(module):
    """Whichever module of the package calls it."""
    name = module(
        'import gymnasium\n'
        'class OfOnesOwn(gymnasium.Env):\n'
        '    action_space = gymnasium.spaces.Discrete(2)\n'
        '    observation_space = gymnasium.spaces.Discrete(2)\n'
        '    def reset(self, *, seed=None, options=None):\n'
        '        return options["map"], {}\n'
        'gymnasium.register("OfOnesOwnFailing-v0", OfOnesOwn)\n'
    )
    environment = create_environment(f'{name}:OfOnesOwnFailing-v0', 1)
    with pytest.raises(TypeError) as error:
        environment.reset()
    assert describe_failure(error.value).endswith('(module_of_ones_own.py, line 6)')

    package = pathlib.Path(impala.environments.__file__).parent
    for path in package.glob('*.py'):
        with pytest.raises(KeyError) as error:
            exec(compile('\n{}["map"]', path, 'exec'), {})
        # The innermost code outside the package is this test.
        assert describe_failure(error.value).startswith("KeyError: 'map' (user_code_test.py, ")


@pytest.mark.parametrize('is_named', [False, True])
def test_keyword_arguments_that_a_constructor_rejects_are_blamed_on_it(is_named, module):
    entry_point = '"module_of_ones_own:Maze"' if is_named else 'Maze'
    name = module(
        'from gymnasium.envs.classic_control import CartPoleEnv\n'
        'import gymnasium\n'
        'class Maze(CartPoleEnv):\n'
        '    def __init__(self, size, **kwargs):\n'
        '        super().__init__(**kwargs)\n'
        f'gymnasium.register("OfOnesOwnMaze-v0", {entry_point})\n'
        'def without_name():\n'
        '    return nothing\n'
        'gymnasium.register("OfOnesOwnNothing-v0", without_name)\n'
    )
    with pytest.raises(LevelError) as error:
        create_environment(f'{name}:OfOnesOwnMaze-v0', 1)
    assert str(error.value) == (
        f"'{name}:OfOnesOwnMaze-v0' cannot be made: Maze (module_of_ones_own.py) does not take its "
        "keyword arguments: missing a required argument: 'size'."
    )
    config = EnvironmentConfig(env_kwargs='{"size": 2, "colour": 3}')
    with pytest.raises(LevelError) as error:
        create_environment(f'{name}:OfOnesOwnMaze-v0', 1, config)
    # Maze takes it, but passes it on.
    assert str(error.value).endswith('(module_of_ones_own.py, line 5).')
    config = EnvironmentConfig(env_kwargs='{"gravity": 2}')
    with pytest.raises(LevelError) as error:
        create_environment('CartPole-v1', 1, config)
    assert str(error.value) == (
        "'CartPole-v1' cannot be made: CartPoleEnv (cartpole.py) does not take its keyword "
        "arguments: got an unexpected keyword argument 'gravity'."
    )
    # This one is Gymnasium's own and does not reach the constructor.
    config = EnvironmentConfig(env_kwargs='{"max_episode_steps": 9}')
    with pytest.raises(LevelError, match=r'cannot be made: NameError: .*_own.py, line 8\)\.$'):
        create_environment(f'{name}:OfOnesOwnNothing-v0', 1, config)
