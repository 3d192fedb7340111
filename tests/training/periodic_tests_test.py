"""Tests of impala/training/periodic_tests.py, with real processes."""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import types

import pytest
from command_line import PACED, PATIENCE_SECONDS, WarmRun, checkpoints
from warm_process import WarmProcess

from configs import config
from impala import training
from impala.evaluation import evaluate
from impala.training import periodic_tests


def _tests(logdir):
    lines = (pathlib.Path(logdir) / 'metrics.jsonl').read_text().splitlines()
    return [line for line in map(json.loads, lines) if 'test/agent_steps' in line]


def _children():
    return {*pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()}


class StopsWhen(training.Hook):
    """Stops a run when something has happened, or after a long time."""

    def __init__(self, has_happened):
        self.has_happened = has_happened
        self.deadline = time.monotonic() + PATIENCE_SECONDS

    def after_update(self, update):
        if self.has_happened(update) or time.monotonic() > self.deadline:
            update.stop()


def _run(logdir, **changes):
    """A run that would last for hours; it has few updates, which leave the test the processor."""
    settings = {
        'level_name': 'levels:paced',
        'total_environment_frames': 10_000_000,
        'unroll_length': 100,
        'log_secs': 0.1,
        'test_every_secs': 0.1,
    }
    return config(logdir, **(settings | changes))


def test_a_test_during_training_has_the_scores_of_test_mode(tmp_path):
    """The weights do not change, so that they can be tested again."""
    before = _children()
    run = _run(tmp_path, learning_rate=0.0, test_num_episodes=4)
    training.train(run, hooks=[StopsWhen(lambda update: _tests(tmp_path))])
    assert _children() == before
    first = _tests(tmp_path)[0]
    (returns,) = evaluate(run.replace(mode='test'), lambda text: None).values()
    assert len(returns) == 4
    assert first['test_return/levels:paced'] == pytest.approx(sum(returns) / 4, rel=1e-6)
    # It was tested when the time had come, and recorded when it was done.
    assert 0 < first['test/agent_steps'] < first['agent_steps']
    assert first['test/frames'] == first['test/agent_steps']
    assert 0.1 <= first['test/wall_seconds'] < first['wall_seconds']
    assert checkpoints(tmp_path) == [1]


class WarmTest(WarmProcess):
    """Stands in for `subprocess.Popen` of a test: it starts at once, and has normal priority."""

    def __init__(self, parent, command, stdin, stdout, stderr, start_new_session, env):
        assert command[1:] == ['-m', 'impala.evaluation.test_process']
        assert (stdin, stderr, start_new_session) == (subprocess.PIPE, stdout, True)
        folder = pathlib.Path(tempfile.mkdtemp(dir=parent))
        os.mkfifo(folder / 'stdin')
        # This does not wait for the other end.
        self.stdin = os.fdopen(os.open(folder / 'stdin', os.O_RDWR), 'wb')
        program = folder / 'program.py'
        program.write_text(
            'import json, sys\n'
            'sys.stdin = open(sys.argv[1])\n'
            'from impala.evaluation import test_process\n'
            'test_process.NICENESS = 0\n'
            'sys.exit(test_process.main(json.loads(sys.stdin.readline())))\n'
        )
        outputs = [stdout.name, folder / 'stderr']
        super().__init__(program, [folder / 'stdin'], env, folder, outputs)

    def terminate(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def test_a_failing_test_is_one_warning(tmp_path):
    shown = []

    class Listens(training.Hook):
        def after_update(self, update):
            if update.log.message != shown.append:
                update.log.message = shown.append

    started = []
    start = periodic_tests.PeriodicTests._start

    def note(tests, update):
        started.append(update.updates)
        start(tests, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(periodic_tests.PeriodicTests, '_start', note)
        # Actor processes start as usual.
        patch.setattr(
            periodic_tests,
            'subprocess',
            types.SimpleNamespace(
                Popen=functools.partial(WarmTest, tmp_path),
                PIPE=subprocess.PIPE,
                TimeoutExpired=subprocess.TimeoutExpired,
            ),
        )
        run = _run(tmp_path, level_name='levels:fails_in_tests', max_actor_restarts=0)
        # The second failure is the same as the first.
        path = training.train(run, hooks=[Listens(), StopsWhen(lambda update: len(started) == 3)])
    assert path == str(tmp_path / 'checkpoints' / 'ckpt-1')
    (warning,) = [text for text in shown if 'WARNING' in text]
    assert warning.startswith('WARNING: a test during training failed, and training continues: ')
    assert 'the joystick is broken' in warning
    assert not _tests(tmp_path)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_test_ends_with_the_run(tmp_path, number):
    logdir = tmp_path / 'run'
    flags = (
        PACED, f'--logdir={logdir}', '--num_actors=2', '--batch_size=2', '--unroll_length=100',
        '--test_every_secs=0.01', '--test_num_episodes=100000',
    )  # fmt: skip
    with WarmRun(tmp_path, *flags) as run:
        # Its actors have sessions of their own.
        run.wait_until(lambda: len(run.actors()) > 2)
        if number == signal.SIGKILL:
            run.process.kill()
            run.process.wait(PATIENCE_SECONDS)
            run.assert_nothing_left()
        else:
            run.send(number)
            assert run.wait() == 0, run.stderr
            assert checkpoints(logdir) == [1]
    assert 'WARNING' not in run.stderr


def test_a_test_plays_all_levels_with_few_processes(monkeypatch):
    monkeypatch.setattr(periodic_tests.os, 'cpu_count', lambda: 20)
    run = config(
        '/nowhere', num_actors=500, inference_batch_size=300, job_name='learner', task=1,
        learner_addresses=('a:1', 'b:1'), test_policy='greedy', test_num_episodes=7,
        learner_devices=('/gpu:0',), replay_fraction=0.5, replay_addresses=('c:1',),
        test_every_secs=60.0, watch=True, sticky_actions=0.25, batch_size=4,
    )  # fmt: skip
    test = run.of(**periodic_tests.test_settings(run, 5, '/folder'))
    assert (test.actors.num_actors, test.actors.num_processes) == (5, 2)
    assert test.test == run.test.__class__(test_policy='greedy', test_num_episodes=7)
    assert test.environment == run.environment
    assert (test.run.mode, test.run.logdir) == ('test', '/folder')
    one = run.of(**periodic_tests.test_settings(run, 1, '/folder'))
    assert (one.actors.num_actors, one.actors.num_processes) == (2, 2)
