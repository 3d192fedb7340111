"""Fixtures of the tests of environments."""

import importlib
import sys

import ale_py
import gymnasium
import pytest
from playing import STAND_IN

from impala.environments import EnvironmentConfig, create_environment

gymnasium.register_envs(ale_py)


@pytest.fixture
def make():
    """Makes environments and closes them, even if the test fails."""
    made = []

    def make_one(level_name, seed=1, **config):
        config = EnvironmentConfig(**({'level_cache_dir': ''} | config))
        made.append(create_environment(level_name, seed, config))
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


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a user's module, which is removed after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / 'module_of_ones_own.py').write_text(text)
        importlib.invalidate_caches()
        return 'module_of_ones_own'

    yield write
    sys.modules.pop('module_of_ones_own', None)
    for name in [name for name in gymnasium.registry if name.startswith('OfOnesOwn')]:
        gymnasium.registry.pop(name)
