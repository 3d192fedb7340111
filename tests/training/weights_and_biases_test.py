"""Tests of impala/training/weights_and_biases.py, with the real package and without a network."""

import importlib.util
import json
import struct
import sys

import pytest
from command_line import CARTPOLE, WarmRun, metrics

from configs import config
from impala import training
from impala.config import ConfigError

# Of the log format of LevelDB, in which the package writes its files.
_BLOCK_BYTES, _HEADER_BYTES = 32768, 7
_FULL, _LAST = 1, 4


def records(content):
    """Yields the records of a file that the package has written."""
    assert content.startswith(b':W&B')
    position, parts = _HEADER_BYTES, []
    while position + _HEADER_BYTES <= len(content):
        if _BLOCK_BYTES - position % _BLOCK_BYTES < _HEADER_BYTES:
            position += _BLOCK_BYTES - position % _BLOCK_BYTES
            continue
        length, kind = struct.unpack_from('<HB', content, position + 4)
        position += _HEADER_BYTES
        parts.append(content[position : position + length])
        position += length
        if kind in (_FULL, _LAST):
            yield b''.join(parts)
            parts = []


@pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='wandb is not installed')
def test_every_line_the_flags_and_the_name_of_the_run_are_recorded(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ('CONFIG', 'CACHE', 'DATA'):
        monkeypatch.setenv(f'WANDB_{name}_DIR', str(tmp_path / name))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    logdir = tmp_path / 'my_run'
    flags = (*CARTPOLE, f'--logdir={logdir}', '--total_environment_frames=2000', '--log_secs=0.1')
    with WarmRun(tmp_path, *flags, '--wandb_project=my_project') as run:
        assert run.wait() == 0, run.stderr
    assert 'wandb' not in run.stdout + run.stderr
    (path,) = logdir.glob('wandb/offline-run-*/run-*.wandb')
    found = [Record.FromString(record) for record in records(path.read_bytes())]
    (begun,) = (record.run for record in found if record.HasField('run'))
    assert (begun.project, begun.display_name) == ('my_project', 'my_run')
    assert begun.run_id == (logdir / 'run_id.txt').read_text().strip()
    settings = {each.key: json.loads(each.value_json) for each in begun.config.update}
    assert settings['learning_rate'] == 0.003 and settings['level_name'] == 'CartPole-v1'
    lines = [
        {
            (item.key or '/'.join(item.nested_key)): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in found
        if record.HasField('history')
    ]
    assert len(lines) > 1
    assert [
        {name: value for name, value in line.items() if not name.startswith('_')} for line in lines
    ] == metrics(logdir)
    steps = {record.metric.step_metric for record in found if record.HasField('metric')}
    assert 'agent_steps' in steps
    assert [record.exit.exit_code for record in found if record.HasField('exit')] == [0]


def test_a_missing_package_is_one_sentence_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ConfigError, match=r"^--wandb_project=mine needs .*\.\[wandb\]'.*\.$"):
        training.train(config(tmp_path, wandb_project='mine'))
    assert not (tmp_path / 'checkpoints').exists()


def test_hooks_see_every_line_that_is_written(tmp_path):
    class Lines(training.Hook):
        def __init__(self):
            self.lines = []

        def after_line(self, line):
            self.lines.append(dict(line))

    watch = Lines()
    training.train(config(tmp_path, log_secs=1000.0), hooks=[watch])
    # The only one is that at the end.
    assert watch.lines == metrics(tmp_path) and len(watch.lines) == 1
