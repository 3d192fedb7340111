import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import ablation

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_all_first_seeds_precede_all_second_seeds():
    plan = {
        'levels': {'a': {'learned': 1}, 'b': {'learned': 2, 'seeds': 1}},
        'settings': {
            'x': {'seeds': 2, 'flags': []},
            'y': {'seeds': 1, 'flags': []},
            'z': {'seeds': 2, 'flags': [], 'levels': ['b']},
        },
    }
    assert list(ablation.plan_runs(plan)) == [
        (1, 'a', 'x'),
        (1, 'a', 'y'),
        (1, 'b', 'x'),
        (1, 'b', 'y'),
        (1, 'b', 'z'),
        (2, 'a', 'x'),
    ]


@pytest.mark.parametrize('name', ['ablation', 'atari5', 'generality'])
def test_plans_have_separate_folders_and_existing_flag_files(name):
    plan = json.loads((ROOT / 'configs' / f'{name}.json').read_text(encoding='utf-8'))
    runs = list(ablation.plan_runs(plan))
    folders = {ablation.folder(name, setting, level, seed, []) for seed, level, setting in runs}
    assert len(folders) == len(runs) > 8
    # A run with other flags is not mistaken for a run of the plan.
    assert ablation.folder(name, 'a', 'b', 1, ['--c']) != ablation.folder(name, 'a', 'b', 1, [])
    for setting in plan['settings'].values():
        (path,) = (flag for flag in setting['flags'] if flag.startswith('--flagfile='))
        assert (ROOT / path.partition('=')[2]).exists()


def episode(steps, episode_return):
    return {
        'agent_steps': str(steps),
        'wall_seconds': str(steps * 6),
        'episode_return': str(episode_return),
    }


def test_curves_are_thinned_means_of_the_last_100_returns():
    # Returns 0, 1, 2, ...: the mean of those from n - 99 to n is n - 49.5.
    curve = ablation.thin_curve([episode(10 * i, i) for i in range(1000)])
    assert curve.shape == (200, 3)
    steps, minutes, means = curve.T
    assert steps[0] == 0 and steps[-1] == 9990 and (steps[1:] > steps[:-1]).all()
    assert minutes == pytest.approx(steps / 10)
    assert means[-1] == 949.5 and means[0] == 0
    assert len(ablation.thin_curve([episode(1, 2), episode(3, 4)])) == 2


def test_filed_runs_are_dropped_when_the_plan_changes_their_flags(tmp_path):
    plan = {
        'frames': 100, 'levels': {'ALE/Pong-v5': {'learned': 1}, 'CartPole-v1': {'learned': 2}},
        'settings': {'x': {'seeds': 2, 'flags': ['--a=1']}, 'y': {'seeds': 1, 'flags': []}},
    }  # fmt: skip
    runs = []
    for seed, level_name, setting in ablation.plan_runs(plan):
        row = {
            'seed': seed,
            'level': level_name,
            'threshold': plan['levels'][level_name]['learned'],
        }
        flags = ablation.flags_of(plan, setting, level_name)
        curve = np.array([[1, 0.5, seed], [2, 1.0, len(runs)]])
        runs.append(ablation.FiledRun(setting, flags, row, curve))
    random = {'ALE/Pong-v5': [-20.0, -21.0, -19.0]}
    assert ablation.read_filed(tmp_path, 'plan', plan) == ablation.Filed()
    ablation.write_filed(tmp_path, 'plan', ablation.Filed(runs, random))

    filed = ablation.read_filed(tmp_path, 'plan', plan)
    assert filed.random == random and len(filed.runs) == 6
    for read, written in zip(filed.runs, runs, strict=True):
        assert (read.settings, read.flags, read.row) == (
            written.settings,
            written.flags,
            written.row,
        )
        np.testing.assert_array_equal(read.curve, written.curve)

    def kept():
        return [
            (r.row['level'], r.settings) for r in ablation.read_filed(tmp_path, 'plan', plan).runs
        ]

    plan['settings']['x']['flags'] = ['--a=2']
    assert kept() == [('ALE/Pong-v5', 'y'), ('CartPole-v1', 'y')]
    plan['levels']['CartPole-v1']['learned'] = 3
    assert kept() == [('ALE/Pong-v5', 'y')]
    plan['frames'] = 200
    assert kept() == []


PONG_AND_BREAKOUT = {
    'levels': {'ALE/Pong-v5': {}, 'ALE/Breakout-v5': {}},
    'settings': {'x': {}, 'y': {}},
}


def run_of(setting, level_name, score):
    row = {'level': level_name, 'tested': [score]}
    return ablation.FiledRun(setting, [], row, np.zeros([1, 3]))


def test_scores_are_human_normalized_for_settings_with_runs_of_every_level():
    # Random and human scores of DQN Zoo's table: -20.7 and 14.6, 1.7 and 30.5.
    runs = [
        run_of('x', 'ALE/Pong-v5', 14.6),
        run_of('x', 'ALE/Breakout-v5', 1.7),
        run_of('x', 'ALE/Pong-v5', -20.7 + 35.3 / 2),
        run_of('y', 'ALE/Pong-v5', 0.0),
    ]
    scores = ablation.normalized_scores(PONG_AND_BREAKOUT, ablation.Filed(runs))
    assert list(scores) == ['x']
    assert scores['x'][0] == pytest.approx([100, 50]) and scores['x'][1] == pytest.approx([0])


def test_profiles_have_a_line_for_each_setting_that_falls_from_one():
    scores = {'x': [[-10.0, 30.0], [50.0, 60.0]], 'y_z': [[20.0], [5.0]]}
    (axes,) = ablation.draw_profiles(scores).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['x', 'y z']
    for line in axes.lines:
        shares = line.get_ydata()
        assert shares[0] == 1 and (np.diff(shares) <= 0).all()
        assert shares[-1] == 0


def run(*args):
    command = [sys.executable, '-m', 'benchmarks.ablation', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('text', [None, '{'])
def test_a_plan_that_cannot_be_read_prints_one_sentence(tmp_path, text):
    path = tmp_path / 'plan.json'
    if text is not None:
        path.write_text(text)
    result = run(path)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert f'{path} is not a plan' in result.stderr.splitlines()[-1]


def test_a_refused_setting_ends_the_benchmark_with_its_sentence(tmp_path):
    plan = {
        'title': 'None', 'frames': 100, 'levels': {'CartPole-v1': {'learned': 1}},
        'settings': {'x': {'seeds': 1, 'flags': ['--sample_reuse=0']}},
    }  # fmt: skip
    path = tmp_path / 'plan.json'
    path.write_text(json.dumps(plan))
    result = run(path)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert '--sample_reuse=0' in result.stderr


TRAIN_AND_TEST = """
import sys
from benchmarks import learning
learning.train_and_test(sys.argv[1], sys.argv[2:], seed=1, test_episodes=2)
"""


def test_ctrl_c_leaves_training_time_to_save(tmp_path):
    logdir = tmp_path / 'run'
    flags = ['--level_name=CartPole-v1', '--num_actors=2', '--log_secs=1']
    process = subprocess.Popen(
        [sys.executable, '-c', TRAIN_AND_TEST, logdir, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ctrl-C in a terminal goes to all its processes.
        start_new_session=True,
    )
    try:
        metrics = logdir / 'metrics.jsonl'
        deadline = time.monotonic() + 60
        while not metrics.exists() or not metrics.stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 1 and 'Traceback' not in errors
    last_line = errors.strip().splitlines()[-1]
    assert last_line == f'{logdir} is not complete; the same command resumes it.'
    assert list((logdir / 'checkpoints').glob('ckpt-*.index'))
