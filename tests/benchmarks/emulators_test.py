import json
import pathlib
import subprocess
import sys

import ale_py
import gymnasium

from benchmarks import emulators

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_environments_are_compared_in_turns():
    command = [sys.executable, '-m', 'benchmarks.emulators', '--seconds=0.3', '--rounds=2']
    done = subprocess.run(
        [*command, '--num_envs=4'], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rates = json.loads(lines[-1])
    assert list(rates) == ['this project', 'ale_py, together', 'ale_py, half at a time']
    assert all(rate > 0 for rate in rates.values())
    (row,) = (line for line in lines if line.startswith('| this project'))
    assert row.split('|')[3].split() == ['1.00', '1.00']


def test_games_of_several_words_are_found():
    gymnasium.register_envs(ale_py)
    for game in ('pong', 'space_invaders', 'up_n_down'):
        assert gymnasium.spec(f'ALE/{emulators.camel_case(game)}-v5')
