import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import ablation

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_all_have_their_first_seed_before_any_has_its_second():
    plan = {
        'levels': {'a': {'learned': 1}, 'b': {'learned': 2, 'seeds': 1}},
        'settings': {'x': {'seeds': 2, 'flags': []}, 'y': {'seeds': 1, 'flags': []}},
    }
    assert list(ablation.plan_runs(plan)) == [
        (1, 'a', 'x'),
        (1, 'a', 'y'),
        (1, 'b', 'x'),
        (1, 'b', 'y'),
        (2, 'a', 'x'),
    ]


@pytest.mark.parametrize('name', ['ablation', 'generality'])
def test_plans_have_runs_in_folders_of_their_own_and_flag_files_that_exist(name):
    plan = json.loads((ROOT / 'configs' / f'{name}.json').read_text(encoding='utf-8'))
    runs = list(ablation.plan_runs(plan))
    folders = {ablation.folder(name, setting, level, seed) for seed, level, setting in runs}
    assert len(folders) == len(runs) > 8
    for setting in plan['settings'].values():
        (path,) = (flag for flag in setting['flags'] if flag.startswith('--flagfile='))
        assert (ROOT / path.partition('=')[2]).exists()


def run(*args):
    command = [sys.executable, '-m', 'benchmarks.ablation', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('text', [None, '{'])
def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path, text):
    path = tmp_path / 'plan.json'
    if text is not None:
        path.write_text(text)
    result = run(path)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert f'{path} is not a plan' in result.stderr.splitlines()[-1]


def test_a_setting_that_is_refused_ends_it_with_that_sentence(tmp_path):
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


def test_ctrl_c_leaves_training_the_time_to_save(tmp_path):
    logdir = tmp_path / 'run'
    flags = ['--level_name=CartPole-v1', '--num_actors=2', '--log_secs=1']
    process = subprocess.Popen(
        [sys.executable, '-c', TRAIN_AND_TEST, logdir, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A terminal's Ctrl-C goes to all that runs in it.
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
    assert last_line == f'{logdir} is not complete; the same command goes on with it.'
    assert list((logdir / 'checkpoints').glob('ckpt-*.index'))
