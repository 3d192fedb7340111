"""Tests of the actor job of `--inference=learner`, and of learner and jobs as real commands."""

import os
import pathlib
import re
import signal
import socket
import threading

import pytest
from command_line import CARTPOLE, Run, WarmRun, episodes, frames, metrics
from remote_inference_test import SPEC, Learner, make_rows
from threads import start

from benchmarks import numbered_level
from dynamic_batching.activity import ActorState
from impala.cluster.channel import Closed
from impala.cluster.environment_job import GroupedRows, RemotePolicy, group_of_each
from impala.cluster.job_start import Finished, Retry, Start
from impala.config import Config, ConfigError

TIMEOUT = 30  # Seconds; reached only by a deadlock.
ENVIRONMENTS = 4
NUMBERED = 'benchmarks.numbered_level:cart_pole'


@pytest.mark.parametrize(
    ('num_environments', 'envs_per_process', 'expected'),
    [
        (1, 1, [0]),
        (4, 1, [0, 1, 0, 1]),
        (4, 4, [0, 0, 1, 1]),
        (1, 8, [0]),
        # Of an odd number, the larger part alternates.
        (6, 3, [0, 0, 1, 0, 1, 1]),
        (7, 4, [0, 0, 1, 1, 0, 1, 1]),
    ],
)
def test_environments_of_a_process_take_turns(num_environments, envs_per_process, expected):
    assert group_of_each(num_environments, envs_per_process) == expected


def test_groups_look_like_one_batcher():
    rows = GroupedRows([0, 1, 1, 0], SPEC, unroll_length=2)
    first, second = rows.batchers
    assert [rows.segment_of(actor) for actor in range(4)] == [
        (first.fd, 0),
        (second.fd, 0),
        (second.fd, 1),
        (first.fd, 1),
    ]
    assert rows.split('abcd') == [['a', 'd'], ['b', 'c']]
    assert rows.activity() == ([ActorState.IDLE] * 4, [0] * 4, False)
    assert rows.completed_unrolls() == [0] * 4
    second.close()
    assert rows.activity().closed
    rows.close()


class NoStop:
    """A signal that never comes."""

    received = False


def policy_of(address, *groups):
    """The policy of a job with these levels in its groups, and the lines that it reports."""
    lines = []
    config = Config.of(job_name='actor', task=0, learner_address=address, reconnect_timeout=TIMEOUT)
    retry = Retry(config.cluster, lines.append, NoStop())
    start_of_job = Start(config, [], {}, None, NoStop(), retry, lines.append)
    return RemotePolicy(start_of_job, SPEC, groups), lines


def test_both_groups_continue_when_the_learner_restarts():
    with Learner() as learner:
        learner.play()
        port = learner.jobs.port
        policy, lines = policy_of(learner.address, ['one'] * 2, ['two'])
        with policy:
            policy.join()
            assert policy.act(0, make_rows([1, 2])).tolist() == [1, 2]
            assert policy.act(1, make_rows([3])).tolist() == [3]
            learner.__exit__()
            waiting = [start(policy.act, group, rows) for group, rows in
                       enumerate((make_rows([4, 5]), make_rows([6])))]  # fmt: skip
            while not lines:
                threading.Event().wait(0.01)
            with Learner(port=port) as second:
                second.play()
                assert [each.result(TIMEOUT).tolist() for each in waiting] == [[4, 5], [6]]
                # Each says it once.
                assert re.match(r'The learner at .* is not there: .* Waiting for it', lines[0])
                assert lines[1:] == [f'The learner at {learner.address} is there']
                policy.leave()
                assert not second.jobs.has_jobs
                with pytest.raises(Closed):
                    policy.act(0, make_rows([1, 2]))


def test_a_broken_connection_is_made_again():
    with Learner() as learner:
        learner.play()
        policy, lines = policy_of(learner.address, ['one'] * 2, ['two'])
        with policy:
            policy.join()
            for round_ in range(3):
                for connection in policy._connections:
                    assert policy.act(0, make_rows([1, round_])).tolist() == [1, round_]
                    assert policy.act(1, make_rows([3])).tolist() == [3]
                    connection._channel.shut()
        assert lines == []


def test_training_may_be_complete():
    with Learner() as learner:
        policy, _ = policy_of(learner.address, ['one'])
        with policy:
            policy.join()
            waiting = start(policy.act, 0, make_rows([1]))
            learner.wait_until(lambda: any(learner.batcher.activity().states))
            learner.jobs.finish()
            learner.batcher.close()
            with pytest.raises(Finished):
                waiting.result(TIMEOUT)
            assert policy.finished
            # That took its slots, too.
            assert not learner.jobs.has_jobs


def test_a_job_with_other_environments_is_refused():
    with Learner() as learner:
        policy, _ = policy_of(learner.address, ['three'])
        with policy, pytest.raises(ConfigError, match='This job does not fit .*: The job has lev'):
            policy.join()


@pytest.fixture
def address():
    """A free address on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return f'localhost:{probe.getsockname()[1]}'


def learner_job(folder, logdir, address, *flags):
    return WarmRun(folder, *CARTPOLE, '--task=0', f'--learner_address={address}',
                   f'--logdir={logdir}', '--trusted_network', '--inference=learner',
                   *flags)  # fmt: skip


def actor_job(folder, task, address, *flags, run=WarmRun):
    return run(folder, '--job_name=actor', f'--task={task}', f'--learner_address={address}',
               f'--envs_per_actor={ENVIRONMENTS}', f'--envs_per_process={ENVIRONMENTS}',
               *flags)  # fmt: skip


def tasks(logdir):
    """Numbers of the actors in the last line of metrics."""
    lines = metrics(logdir)
    return {row['task'] for row in lines[-1]['actors']} if lines else set()


def test_training_continues_while_jobs_come_and_go(tmp_path, address, monkeypatch):
    numbers = tmp_path / 'numbers'
    numbers.mkdir()
    monkeypatch.setenv(numbered_level.FOLDER_VARIABLE, str(numbers))
    level = f'--level_name={NUMBERED}'
    logdir = tmp_path / 'run'
    endless = '--total_environment_frames=1000000000'

    def account():
        return numbered_level.account(episodes(logdir), str(numbers))

    with (
        actor_job(tmp_path / 'early', 0, address) as early,
        learner_job(tmp_path / 'first', logdir, address, endless, level) as first,
    ):
        first.wait_until(lambda: 'Waiting for actors on port' in first.stderr)
        first.wait_until(lambda: tasks(logdir) == {0})
        with actor_job(tmp_path / 'killed', 1, address) as killed:
            first.wait_until(lambda: tasks(logdir) == {0, 1})
            row = metrics(logdir)[-1]['actors'][1]
            assert (row['level'], row['host']) == (NUMBERED, socket.gethostname())
            assert (row['environments'], row['rejected']) == (ENVIRONMENTS, 0)
            os.kill(killed.id, signal.SIGKILL)
            killed.process.wait()
            killed.assert_nothing_left()
        reached = frames(logdir)
        first.wait_until(lambda: frames(logdir) > reached + 1000)
        # The number is free soon, and so are the slots: there are no others.
        with actor_job(tmp_path / 'late', 1, address) as late:
            late.wait_until(lambda: 'Actor job 1: ' in late.stderr)
            first.wait_until(lambda: tasks(logdir) == {0, 1})
            # An environment's process is killed: the job restarts it.
            os.kill(late.actors()[0], signal.SIGKILL)
            late.wait_until(lambda: late.stderr.count('signal 9') == 1)
            reached = frames(logdir)
            first.wait_until(lambda: frames(logdir) > reached + 1000)
            os.kill(first.id, signal.SIGKILL)
            first.process.wait()
            # So far, no episode is missing or duplicated.
            so_far = account()
            assert so_far.episodes > 100
            assert (so_far.duplicates, so_far.gaps) == (0, {})
            for each in (early, late):
                each.wait_until(lambda each=each: 'Waiting for it' in each.stderr)
            enough = f'--total_environment_frames={reached + 8000}'
            with learner_job(tmp_path / 'second', logdir, address, enough, level) as second:
                assert second.wait() == 0
                assert 'Resuming from' in second.stderr
            for each in (early, late):
                assert each.wait() == 0
                assert 'Training is complete.' in each.stdout
                assert 'Traceback' not in each.stderr
    lines = metrics(logdir)
    assert lines[-1]['frames'] >= reached + 8000
    assert all(line['frames'] == 8 * 20 * line['updates'] for line in lines)
    # What the learner had not saved is lost.
    result = account()
    assert result.duplicates == 0
    assert 0 < len(result.gaps) <= 3 * ENVIRONMENTS
    assert max(result.gaps.values()) == 1


def test_a_job_is_light(tmp_path, address):
    """It does not load TensorFlow. It has the secret of the run, without which it gets nothing."""
    secret = tmp_path / 'secret'
    secret.write_text('5ec2e7' * 10)
    flags = (f'--cluster_secret_file={secret}', '--total_environment_frames=100000000')
    with (
        learner_job(tmp_path / 'learner', tmp_path / 'run', address, *flags) as learner,
        actor_job(tmp_path / 'actor', 0, address, flags[0], run=Run) as job,
    ):
        with actor_job(tmp_path / 'stranger', 1, address) as stranger:
            assert stranger.wait() == 2
        assert 'has a secret, and this job has none' in stranger.stderr
        learner.wait_until(lambda: tasks(tmp_path / 'run') == {0})
        assert 'tensorflow' not in pathlib.Path(f'/proc/{job.id}/maps').read_text()
        job.send(signal.SIGTERM)
        assert job.wait() == 0
        assert job.stdout == 'Stopped.\n'
        assert 'Traceback' not in job.stderr
        learner.wait_until(lambda: 'is gone: 0 in all' in learner.stderr)


def test_more_environments_than_the_learner_provides_for(tmp_path, address):
    with learner_job(tmp_path / 'learner', tmp_path / 'run', address, '--num_actors=3') as learner:
        learner.wait_until(lambda: 'Waiting for actors' in learner.stderr)
        with actor_job(tmp_path / 'actor', 0, address) as job:
            assert job.wait() == 2
    assert re.search(
        rf'The learner at {address} has room for 3 more environments of 3 \(its --num_actors\), '
        r'and this job has 4 \(--envs_per_actor\): give the learner a larger --num_actors\.$',
        job.stderr.strip(),
    )
    assert 'Traceback' not in job.stderr
