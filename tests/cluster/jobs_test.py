"""Learner and actor jobs as real commands on this machine, killed and restarted."""

import contextlib
import os
import re
import signal
import socket

import pytest
from command_line import (
    CARTPOLE,
    TESTS,
    WarmRun,
    assert_one_sentence,
    checkpoints,
    episodes,
    frames,
    metrics,
)

from benchmarks import numbered_level
from impala.cluster import remote_actors
from impala.cluster.calls import Function, Server
from impala.cluster.job_start import PROTOCOL, notes_of_job
from impala.config import Config
from impala.networks.agent import AgentConfig
from impala.runs.run_settings import network_settings
from impala.trajectory import ArraySpec, EnvironmentSpec

ENVIRONMENTS = 4
NUMBERED = 'benchmarks.numbered_level:cart_pole'


@pytest.fixture
def address():
    """A free address on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return f'localhost:{probe.getsockname()[1]}'


def learner(folder, logdir, address, *flags):
    return WarmRun(folder, *CARTPOLE, '--task=0', f'--learner_address={address}',
                   f'--logdir={logdir}', '--trusted_network', *flags)  # fmt: skip


def actor(folder, task, address, *flags, **options):
    # An empty --replay_addresses, as in the flags.txt of a run, has no effect.
    return WarmRun(folder, '--job_name=actor', f'--task={task}', f'--learner_address={address}',
                   f'--envs_per_actor={ENVIRONMENTS}', f'--envs_per_process={ENVIRONMENTS}',
                   '--replay_addresses=', *flags, **options)  # fmt: skip


def tasks(logdir):
    """Numbers of the actors in the last line of metrics."""
    lines = metrics(logdir)
    return {row['task'] for row in lines[-1]['actors']} if lines else set()


def write_secret(path, text='a secret of at least 16 bytes\n'):
    """Writes a file with a secret; returns the flag that names it."""
    path.write_text(text)
    return f'--cluster_secret_file={path}'


def test_training_continues_while_jobs_come_and_go(tmp_path, address, monkeypatch):
    numbers = tmp_path / 'numbers'
    numbers.mkdir()
    monkeypatch.setenv(numbered_level.FOLDER_VARIABLE, str(numbers))
    secret = write_secret(tmp_path / 'secret')
    level = f'--level_name={NUMBERED}'
    logdir = tmp_path / 'run'
    endless = '--total_environment_frames=1000000000'

    def account():
        return numbered_level.account(episodes(logdir), str(numbers))

    with (
        # With this many environments, the next learner would refuse the job too often to survive
        # if the job sent it the unrolls begun with the killed one.
        actor(
            tmp_path / 'early', 0, address, '--envs_per_actor=12', '--envs_per_process=12', secret
        ) as early,
        learner(tmp_path / 'first', logdir, address, endless, level, secret) as first,
    ):
        # A learner without actors waits and says so.
        first.wait_until(lambda: re.search(r'Waiting for actors on port \d+', first.stderr))
        first.wait_until(lambda: tasks(logdir) == {0})
        with actor(tmp_path / 'killed', 1, address, secret, '--wire_compression=zstd') as killed:
            first.wait_until(lambda: tasks(logdir) == {0, 1})
            row = metrics(logdir)[-1]['actors'][1]
            assert row['level'] == NUMBERED
            assert row['host'] == socket.gethostname()
            assert row['rejected'] == row['duplicates'] == 0
            os.kill(killed.id, signal.SIGKILL)
            killed.process.wait()
            killed.assert_nothing_left()
        reached = frames(logdir)
        first.wait_until(lambda: frames(logdir) > reached + 2000)

        with actor(tmp_path / 'late', 1, address, secret, '--bfloat16_weights') as late:
            first.wait_until(lambda: frames(logdir) > reached + 4000)
            last = checkpoints(logdir)[-1]
            first.wait_until(lambda: checkpoints(logdir)[-1] > last)
            late.wait_until(lambda: 'Actor job 1: ' in late.stderr)
            reached = frames(logdir)
            waited = [each.stderr.count('Waiting for it') for each in (early, late)]
            os.kill(first.id, signal.SIGKILL)
            first.process.wait()
            # Although an actor was killed in mid-unroll, no episode is missing or duplicated.
            so_far = account()
            assert so_far.episodes > 100
            assert (so_far.duplicates, so_far.gaps) == (0, {})
            for each, before in zip((early, late), waited, strict=True):
                each.wait_until(lambda each=each, n=before: each.stderr.count('Waiting for it') > n)
            enough = f'--total_environment_frames={reached + 20_000}'
            with learner(tmp_path / 'third', logdir, address, enough, level, secret) as third:
                assert third.wait() == 0
                assert 'Resuming from' in third.stderr
            for each in (early, late):
                assert each.wait() == 0
                assert 'Training is complete.' in each.stdout
                assert 'Traceback' not in each.stderr
    lines = metrics(logdir)
    assert lines[-1]['frames'] >= reached + 20_000
    # Every update takes 8 unrolls of 20 steps, whatever happened to their senders.
    assert all(line['frames'] == 8 * 20 * line['updates'] for line in lines)
    assert all(row['rejected'] == 0 for row in lines[-1]['actors'])
    # What the learner had not saved is lost, as are unrolls begun with weights that it had not
    # saved. An unroll of older weights between the two may split a gap.
    result = account()
    assert result.duplicates == 0
    assert 0 < len(result.gaps) <= 12 + ENVIRONMENTS
    assert max(result.gaps.values()) <= 2


def test_environments_differ_between_jobs_and_restarts(tmp_path, address):
    """Each return of this level is a function of the environment's seed."""
    logdir = tmp_path / 'run'
    flags = ['--level_name=levels:seeded', '--total_environment_frames=1000000000']

    def seeds():
        if not (logdir / 'episodes.csv').exists():
            return set()
        return {row['episode_return'] for row in episodes(logdir)}

    with learner(tmp_path / 'learner', logdir, address, *flags) as run:
        for number, task in enumerate((0, 1, 0)):
            with actor(tmp_path / str(number), task, address) as only:
                if task:
                    # The first job to come has the number.
                    only.wait_until(lambda: 'Actor job 1: ' in only.stderr)
                    with actor(tmp_path / 'twice', task, address) as second:
                        assert second.wait() == 2
                    assert 'Traceback' not in second.stderr
                    assert re.search(
                        rf'--task={task} is taken by a job on {socket.gethostname()}, .* give each '
                        'actor job a number of its own',
                        second.stderr,
                    )
                run.wait_until(lambda number=number: len(seeds()) >= (number + 1) * ENVIRONMENTS)
        assert len(seeds()) == 3 * ENVIRONMENTS


def test_actors_learn_of_the_end_of_a_short_run(tmp_path, address):
    enough = '--total_environment_frames=2000'
    with (
        actor(tmp_path / 'actor', 0, address) as only,
        learner(
            tmp_path / 'learner', tmp_path / 'run', address, enough, '--inference_batch_size=99'
        ) as short,
    ):
        assert short.wait() == 0
        assert only.wait() == 0
    # A flag file for all jobs may have it, although only actors use it.
    assert '--inference_batch_size=99 has no effect on a learner' in short.stderr
    assert 'Training is complete.' in only.stdout


class Show:
    """Publishes settings as a learner does; a call returns the address."""

    def __init__(self):
        self._servers = []

    def __call__(self, **changes):
        return self.with_secret(None, **changes)

    def with_secret(self, secret, **changes):
        spec = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)
        agreed = Config.of(unroll_length=20).agreed('jobs')
        del agreed['level_name']
        settings = {
            'protocol': PROTOCOL,
            'network': network_settings(AgentConfig(torso='mlp', core='none'), spec),
            'level_names': ['CartPole-v1'],
            'agreed': agreed,
            'num_action_repeats': 1,
        }
        assert changes.keys() <= settings.keys()
        functions = {
            'settings': Function(lambda values, body: (settings | changes, ())),
            'status': Function(lambda values, body: ({'version': 0, 'finished': False}, ())),
        }
        self._servers.append(Server('localhost:0', functions, 'learner', secret, print))
        return f'localhost:{self._servers[-1].port}'

    def close(self):
        for server in self._servers:
            server.close()


@pytest.fixture
def show():
    with contextlib.closing(Show()) as show:
        yield show


def test_statistics_of_level_caches_reach_the_learner(tmp_path, address):
    """Two jobs have their own caches; the stand-in compiles in no time."""
    lab = {'pythonpath': [TESTS / 'deepmind_lab_stand_in']}
    logdir = tmp_path / 'run'
    flags = ('--task=0', f'--learner_address={address}', f'--logdir={logdir}', '--trusted_network',
             '--level_name=rooms_watermaze', '--batch_size=2', '--unroll_length=5',
             '--torso=shallow', '--log_secs=1')  # fmt: skip
    with WarmRun(tmp_path / 'learner', *flags, **lab) as first, contextlib.ExitStack() as jobs:
        for task in (0, 1):
            caches = f'--level_cache_dir={tmp_path}/maps{task}'
            command = actor(tmp_path / f'actor{task}', task, address, caches, **lab)
            jobs.enter_context(command)
        first.wait_until(
            lambda: metrics(logdir) and metrics(logdir)[-1].get('level_cache/misses', 0) >= 2
        )
        line = metrics(logdir)[-1]
        assert line['level_cache/hits'] >= 0
        assert line['level_cache/seconds_saved'] >= 0


@pytest.mark.parametrize(
    ('notes', 'expected'),
    [
        ([], {}),
        (['', '3', '[]', '{"level_cache": 3}', '{"level_cache": {"hits": 1}}'], {}),
        (['{"level_cache": {"hits": 1, "misses": 2, "seconds_saved": NaN}}'], {}),
        (['{"level_cache": {"hits": -1, "misses": 2, "seconds_saved": 3}}'], {}),
        (['[' * 100_000], {}),
        (
            [
                notes_of_job({'hits': 1, 'misses': 2, 'seconds_saved': 0.5}),
                'else',
                notes_of_job({'hits': 10, 'misses': 20, 'seconds_saved': 5.0}),
            ],
            {'hits': 11, 'misses': 22, 'seconds_saved': 5.5},
        ),
    ],
)
def test_sums_of_level_caches(notes, expected):
    assert remote_actors.level_cache_of_jobs(notes) == expected


def test_an_actor_of_another_version_is_refused(tmp_path, show):
    address = show(protocol=PROTOCOL + 1)
    with actor(tmp_path, 0, address) as run:
        assert_one_sentence(
            run, 2, rf'^The learner at {address} runs another version .* install the same one\.$'
        )


def test_actors_without_the_secret_are_refused(tmp_path, show):
    address = show.with_secret(b'a secret of at least 16 bytes')
    with actor(tmp_path / 'none', 0, address) as run:
        assert_one_sentence(
            run, 2, f'^The learner at {address} has a secret, and this job has none: give all jobs '
        )
    other = write_secret(tmp_path / 'other', 'another secret of many bytes')
    with actor(tmp_path / 'wrong', 0, address, other) as run:
        assert_one_sentence(run, 2, f'^The learner at {address} has another secret: give all jobs')


@pytest.mark.parametrize('flags', [(), ('--job_name=actor',)])
def test_a_secret_that_cannot_be_read_leaves_nothing(tmp_path, flags):
    missing = f'--cluster_secret_file={tmp_path / "nowhere"}'
    logdir = tmp_path / 'run'
    with WarmRun(
        tmp_path / 'job', *CARTPOLE, '--task=0', *flags, missing, f'--logdir={logdir}'
    ) as run:
        assert_one_sentence(run, 2, f'^{missing}: No such file or directory')
    assert not logdir.exists()


def test_an_actor_with_flags_of_another_run_is_refused(tmp_path, show):
    address = show()
    with actor(tmp_path / 'misled', 2, address, '--unroll_length=7') as misled:
        assert_one_sentence(misled, 2, r'--unroll_length=7 does not fit .* has 20')
    with actor(tmp_path / 'sticky', 2, address, '--sticky_actions=0.5') as sticky:
        assert_one_sentence(sticky, 2, '--sticky_actions=0.5 does not fit .* has 0.0: leave it out')
    with actor(tmp_path / 'lost', 3, address, '--level_name=Acrobot-v1') as lost:
        assert_one_sentence(lost, 2, '--level_name=Acrobot-v1 is not one of the levels')


def test_a_learner_whose_port_is_in_use_prints_one_sentence(tmp_path, address):
    with (
        socket.create_server(('', int(address.partition(':')[2]))),
        learner(tmp_path, tmp_path / 'run', address, '--notrusted_network') as second,
    ):
        assert_one_sentence(second, 2, f'cannot listen on {address}: another process does')
        # Nobody can reach a port that is not open.
        assert 'WARNING' not in second.stderr


def test_stopping_a_learner_before_its_first_update(tmp_path, address):
    with learner(tmp_path, tmp_path / 'run', address) as run:
        run.wait_until(lambda: 'all goes to' in run.stderr)
        run.send(signal.SIGTERM)
        assert run.wait() == 130
    # The latter if the machine was too busy for an orderly end within four seconds.
    assert re.search('(Stopped before the first update: |Interrupted before ).*\n$', run.stderr)
    assert run.stdout == ''


def test_an_actor_with_another_network_is_refused(tmp_path, show):
    spec = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 3, 1)
    network = network_settings(AgentConfig(torso='mlp', core='none'), spec)
    address = show(network=network)
    # First a flag is wrong, then this job's environment.
    with actor(tmp_path / 'a', 0, address, '--torso=deep') as run:
        assert_one_sentence(
            run, 2, rf'^--torso=deep does not fit the learner at {address}, which has mlp: leave'
        )
    with actor(tmp_path / 'b', 0, address) as run:
        assert_one_sentence(
            run, 2, rf'^This job does not fit the learner at {address}: .*actions.* is 2 .* and 3 '
        )


@pytest.mark.parametrize(
    ('kind', 'what'),
    [
        ('nobody', 'is not there: Connection refused'),
        ('no name', 'is not there: .*[Nn]ame'),
        ('another program', 'does not answer'),
    ],
)
def test_a_wrong_address_is_reported(tmp_path, address, kind, what):
    with contextlib.ExitStack() as stack:
        if kind == 'no name':
            address = 'no-such-host.invalid:8000'
        elif kind == 'another program':
            # It accepts and never answers.
            host, _, port = address.partition(':')
            stack.enter_context(socket.create_server((host, int(port))))
        run = stack.enter_context(actor(tmp_path, 0, address, '--reconnect_timeout=1'))
        assert run.wait() == 3
    lines = run.stderr.strip().splitlines()
    first, second = [line for line in lines if not line.startswith('Starting: ')]
    assert re.match(rf'The learner at {address} {what}', first)
    assert first.endswith('Waiting for it, 1 seconds at most')
    assert second == (
        f'The learner at {address} was not there for 1 seconds (--reconnect_timeout).'
    )
    assert run.stdout == ''


def test_interrupting_an_actor_that_waits_for_its_learner(tmp_path, address):
    with actor(tmp_path, 0, address) as run:
        run.wait_until(lambda: 'Waiting for it' in run.stderr)
        run.send(signal.SIGINT)
        assert run.wait() == 130
    assert 'Traceback' not in run.stderr
    assert run.stderr.endswith('Interrupted before anything was done.\n')


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['--job_name=actor'], '--job_name=actor needs a number of its own'),
        (['--task=1'], '--task=1: there can be one learner only'),
        (
            ['--job_name=actor', '--task=0', '--learner_address=nowhere'],
            "'nowhere' is not an address",
        ),
        (['--job_name=actor', '--task=0', '--envs_per_actor=0'], '--envs_per_actor=0'),
    ],
)
def test_bad_flags(tmp_path, flags, sentence):
    with WarmRun(tmp_path, *flags) as run:
        assert_one_sentence(run, 2, sentence)
