"""Compares ViZDoom with what Gymnasium plays; checks that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time

import cv2
import gymnasium
import numpy as np
import pytest
from playing import ROOT, play, random_actions

from impala.trajectory import ActionSpec, ArraySpec, EpisodeEnd


def test_vizdoom_matches_gymnasium(make, tmp_path, monkeypatch):
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
        assert rows[t][2]['vector'].tolist() == expected['gamevariables'].tolist()
        assert rows[t][2].keys() == {'frame', 'vector'}
    truth.close()
    assert environment.spec.observation['vector'] == ArraySpec((1,), 'float32')
    chosen = make('VizdoomBasic-v1', observation_keys=('screen',))
    assert chosen.spec.observation.keys() == {'frame'}
    assert ends == {EpisodeEnd.NOT_ENDED, EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED}


@pytest.mark.parametrize('repeats', [4, 7])
def test_the_last_observation_of_vizdoom_is_that_of_a_game_without_a_limit(make, repeats):
    import vizdoom.gymnasium_wrapper  # noqa: F401

    level, options = 'VizdoomBasic-v1', {'num_action_repeats': repeats}
    environment = make(level, 4, bootstrap_truncated=True, **options)
    plain = make(level, 4, **options)
    # Without a shot (action 1), which could end the episode earlier.
    actions = [(0, 2, 3)[action % 3] for action in random_actions(environment, 300 // repeats + 1)]
    rows, expected = [], []
    for each, its_rows in ((environment, rows), (plain, expected)):
        each.reset()
        for action in actions:
            reward, end, observation = each.step(action)
            its_rows.append((reward, end, each.last_action_frames, observation['frame'].copy()))
            if end:
                break
    # It ends by the same limit of 300 tics, and the next episode begins alike.
    assert plain.last_observation is None
    assert rows[-1][1] == EpisodeEnd.TRUNCATED and len(rows) == -(-300 // repeats)
    assert rows[-1][2] == (300 % repeats or repeats)
    for row, expected_row in zip(rows, expected, strict=True):
        assert row[:3] == expected_row[:3]
        np.testing.assert_array_equal(row[3], expected_row[3])

    endless = gymnasium.make(level, frame_skip=repeats).unwrapped
    endless.game.set_episode_timeout(0)
    endless.reset(seed=4)
    for number, action in enumerate(actions[: len(rows)], 1):
        endless.frame_skip = min(repeats, 300 - (number - 1) * repeats)
        truth = endless.step(action)[0]
    endless.close()
    frame = cv2.resize(truth['screen'], (96, 72), interpolation=cv2.INTER_AREA)
    assert frame.any()
    np.testing.assert_array_equal(environment.last_observation['frame'], frame)


def test_vizdoom_takes_several_buttons_at_once(make):
    """Two buttons for opposite directions leave the player where it is, one does not."""
    environment = make('VizdoomBasic-MultiBinary-v1')
    assert environment.spec.action == ActionSpec((2, 2, 2))
    first = environment.reset()['frame'].copy()
    both, left = np.array([1, 1, 0], np.int32), np.array([1, 0, 0], np.int32)
    stayed = environment.step(both)[2]['frame'].copy()
    for _ in range(4):
        moved = environment.step(left)[2]['frame']
    difference = [np.abs(each.astype(int) - first).mean() for each in (stayed, moved)]
    assert difference[1] > 3 * difference[0]


def test_registered_vizdoom_ids_set_the_action_repeats(make):
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


def test_vizdoom_ends_with_a_killed_actor(tmp_path):
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
        pytest.fail('ViZDoom keeps running without its actor')


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False
