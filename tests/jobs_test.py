"""Learner and actor jobs as real commands on this machine, killed and started again."""

import os
import re
import signal
import socket

import pytest
from experiment_test import CARTPOLE, Run, assert_one_sentence, checkpoints, frames, metrics

ENVIRONMENTS = 4


@pytest.fixture
def address():
    """A free one on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return f'localhost:{probe.getsockname()[1]}'


def learner(folder, logdir, address, *flags):
    return Run(folder, *CARTPOLE, '--task=0', f'--learner_address={address}', f'--logdir={logdir}',
               '--trusted_network', *flags)  # fmt: skip


def actor(folder, task, address, *flags):
    return Run(folder, '--job_name=actor', f'--task={task}', f'--learner_address={address}',
               f'--envs_per_actor={ENVIRONMENTS}', *flags)  # fmt: skip


def tasks(logdir):
    """Numbers of the actors in the last line of metrics."""
    lines = metrics(logdir)
    return {row['task'] for row in lines[-1]['actors']} if lines else set()


def test_jobs_come_and_go_and_training_goes_on(tmp_path, address):
    logdir = tmp_path / 'run'
    endless = '--total_environment_frames=1000000000'
    with (
        actor(tmp_path / 'early', 0, address) as early,
        learner(tmp_path / 'first', logdir, address, endless) as first,
    ):
        # Whoever comes first waits and says so.
        first.wait_until(lambda: re.search(r'Waiting for actors on port \d+', first.stderr))
        first.wait_until(lambda: tasks(logdir) == {0})
        with actor(tmp_path / 'killed', 1, address) as killed:
            first.wait_until(lambda: tasks(logdir) == {0, 1})
            row = metrics(logdir)[-1]['actors'][1]
            assert row['level'] == 'CartPole-v1'
            assert row['host'] == socket.gethostname()
            assert row['rejected'] == row['duplicates'] == 0
            os.kill(killed.id, signal.SIGKILL)
            killed.process.wait()
            killed.assert_nothing_left()
        reached = frames(logdir)
        first.wait_until(lambda: frames(logdir) > reached + 2000)

        with (
            actor(tmp_path / 'misled', 2, address, '--unroll_length=7') as misled,
            actor(tmp_path / 'lost', 3, address, '--level_name=Acrobot-v1') as lost,
            learner(tmp_path / 'second', tmp_path / 'other', address, endless) as second,
        ):
            assert_one_sentence(misled, 2, r'--unroll_length=7 does not fit .* has 20')
            assert_one_sentence(lost, 2, '--level_name=Acrobot-v1 is none of the levels')
            assert_one_sentence(second, 2, f'cannot listen on {address}: another process does')

        with actor(tmp_path / 'late', 1, address) as late:
            first.wait_until(lambda: frames(logdir) > reached + 4000)
            last = checkpoints(logdir)[-1]
            first.wait_until(lambda: checkpoints(logdir)[-1] > last)
            reached = frames(logdir)
            os.kill(first.id, signal.SIGKILL)
            first.process.wait()
            for each in (early, late):
                each.wait_until(lambda each=each: each.stderr.count('Waiting for it') >= 1)
            enough = f'--total_environment_frames={reached + 20_000}'
            with learner(tmp_path / 'third', logdir, address, enough) as third:
                assert third.wait() == 0
                assert 'Going on from' in third.stderr
            for each in (early, late):
                assert each.wait() == 0
                assert 'Training is complete.' in each.stdout
                assert 'Traceback' not in each.stderr
    lines = metrics(logdir)
    assert lines[-1]['frames'] >= reached + 20_000
    # Every update is of 8 unrolls of 20 steps, whatever happened to those who sent them.
    assert all(line['frames'] == 8 * 20 * line['updates'] for line in lines)
    assert all(row['rejected'] == 0 for row in lines[-1]['actors'])


def test_actors_hear_of_the_end_of_a_run_that_was_short(tmp_path, address):
    enough = '--total_environment_frames=2000'
    with (
        actor(tmp_path / 'actor', 0, address) as only,
        learner(tmp_path / 'learner', tmp_path / 'run', address, enough) as short,
    ):
        assert short.wait() == 0
        assert only.wait() == 0
    assert 'Training is complete.' in only.stdout


def test_a_learner_that_is_not_there(tmp_path, address):
    with actor(tmp_path, 0, address, '--reconnect_timeout=1') as run:
        assert run.wait() == 3
    assert re.search(rf'The learner at {address} was not there for 1 seconds', run.stderr)
    assert 'Traceback' not in run.stderr


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['--job_name=actor'], '--job_name=actor needs a number of its own'),
        (['--task=1'], '--task=1: there can be one learner only'),
        (['--job_name=actor', '--task=0', '--learner_address=nowhere'], "'nowhere' is no address"),
        (['--job_name=actor', '--task=0', '--envs_per_actor=0'], '--envs_per_actor=0'),
    ],
)
def test_bad_flags(tmp_path, flags, sentence):
    with Run(tmp_path, *flags) as run:
        assert_one_sentence(run, 2, sentence)
