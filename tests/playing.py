"""Plays environments, and runs Python code in a process of its own."""

import os
import subprocess
import sys
import tempfile

import numpy as np

from impala.trajectory import EpisodeEnd

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAND_IN = os.path.join(ROOT, 'tests', 'deepmind_lab_stand_in')


def run_python(code, *arguments):
    variables = {**os.environ, 'PYTHONPATH': os.pathsep.join((ROOT, STAND_IN))}
    # Every DeepMind Lab environment sets this, including those of earlier tests.
    variables.pop('LP_NUM_THREADS', None)
    # The stand-in crashes like the real module, which leaves files behind.
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
