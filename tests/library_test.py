"""Tests of the public names in impala/__init__.py and of the example in docs/library.md."""

import csv
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import impala

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _run(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_documented_script_trains_and_tests_cartpole(tmp_path):
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'library.md').read_text(), re.S)
    script = ROOT / 'examples' / 'train_from_python.py'
    assert code == script.read_text()
    done = _run(tmp_path, script)
    assert done.returncode == 0, done.stderr
    # The hook prints after every 100 of the 312 updates.
    printed = re.findall(r'^([\d,]+) frames, mean return ([\d.]+)$', done.stdout, re.M)
    assert [frames for frames, _ in printed] == ['16,000', '32,000', '48,000']
    logdir = tmp_path / 'runs' / 'cartpole'
    with open(logdir / 'episodes.csv', encoding='utf-8', newline='') as file:
        episodes = [row for row in csv.DictReader(file) if int(row['frames']) <= 48_000]
    last = [float(row['episode_return']) for row in episodes[-100:]]
    assert printed[-1][1] == f'{sum(last) / 100:.1f}'
    assert {'checkpoints', 'episodes.csv', 'flags.txt', 'metrics.jsonl'} <= {*os.listdir(logdir)}
    assert '--level_name=CartPole-v1' in (logdir / 'flags.txt').read_text()
    scores = json.loads((logdir / 'test_scores.json').read_text())
    level = scores['levels']['CartPole-v1']
    assert scores['frames'] >= 50_000 and len(level['returns']) == 20
    assert done.stdout.endswith(
        f'runs/cartpole/checkpoints/ckpt-1: mean return {level["mean"]:.1f}\n'
    )
    # Random actions reach 22, with a standard error of 2.6 over 20 episodes.
    assert level['mean'] > 28


def test_public_names_are_loaded_lazily(tmp_path):
    code = "import sys, impala; impala.Config.of(seed=3); assert 'tensorflow' not in sys.modules"
    done = _run(tmp_path, '-c', code)
    assert done.returncode == 0, done.stderr
    for name in impala.__all__:
        assert getattr(impala, name).__name__ == name
    with pytest.raises(AttributeError, match="'impala' has no attribute 'Trainer'"):
        impala.Trainer  # noqa: B018
