"""Tests of replay_job.py and remote_replay.py in impala/cluster, with jobs that are killed."""

import asyncio
import collections
import contextlib
import functools
import os
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from command_line import CARTPOLE, PACED, PROGRAM, TESTS, Run, WarmRun, assert_one_sentence, metrics
from network_proxy import Proxy
from ports import free_ports

from impala.cluster import remote_replay as remote_replay_module
from impala.cluster.calls import Client, Server
from impala.cluster.channel import Disconnected, Rejected
from impala.cluster.remote_replay import RemoteReplay
from impala.cluster.replay_job import KIND, layout
from impala.config import ConfigError
from impala.tools.export import export
from impala.trajectory import UnrollArray

PATIENCE_SECONDS = 120
BATCH = 50
ROWS, HEIGHT, WIDTH, STACKED = 6, 3, 5, 4
ENDLESS = '--total_environment_frames=1000000000'
# The replayed part of a batch of CARTPOLE, and the mean number of fresh unrolls in it.
FRACTION, NUM_FRESH = 0.3, 8 * 0.7
COMPONENTS = [
    UnrollArray((), 'int32', 'level_id', False, 0, 2),
    UnrollArray((), 'int64', 'policy_version', False, 0),
    UnrollArray((2, 3), 'float32', 'state_0', False),
    UnrollArray((ROWS,), 'uint8', 'end', True, 0, 3),
    UnrollArray((ROWS, HEIGHT, WIDTH, STACKED), 'uint8', 'frame'),
    UnrollArray((ROWS, 2), 'bool', 'flag'),
    UnrollArray((ROWS,), 'float64', 'reward'),
]


@pytest.fixture
def addresses():
    """Addresses of two replay jobs on the loopback interface."""
    return [f'localhost:{port}' for port in free_ports(2)]


def job(folder, task, addresses, *flags, **options):
    kind = Run if 'prefix' in options else WarmRun
    return kind(folder, '--job_name=replay', f'--task={task}', '--trusted_network',
                f'--replay_addresses={",".join(addresses)}', *flags, **options)  # fmt: skip


def changed_job(folder, task, addresses, change):
    """A replay job that first runs the Python code in `change`."""
    program = folder / 'program.py'
    program.parent.mkdir(parents=True)
    program.write_text(
        f'import runpy\n{change}\nrunpy.run_path({str(PROGRAM)!r}, run_name="__main__")\n'
    )
    return job(folder, task, addresses, program=program, pythonpath=[TESTS.parent])


def learner(folder, logdir, addresses, *flags):
    return WarmRun(folder, *CARTPOLE, f'--logdir={logdir}', f'--replay_fraction={FRACTION}',
                   f'--replay_addresses={",".join(addresses)}', *flags)  # fmt: skip


def kill(run):
    os.kill(run.id, signal.SIGKILL)
    run.process.wait()


@functools.lru_cache(1000)
def unroll(number):
    """Returns an unroll that is determined by a number; its frame stacks restart at random rows."""
    random = np.random.default_rng(number)
    stack = random.integers(256, size=(HEIGHT, WIDTH, STACKED), dtype=np.uint8)
    stacks = [stack]
    for _ in range(ROWS - 1):
        frame = random.integers(256, size=(HEIGHT, WIDTH, 1), dtype=np.uint8)
        is_first = random.random() < 0.3
        stack = np.repeat(frame, 4, 2) if is_first else np.concatenate([stack[..., 1:], frame], 2)
        stacks.append(stack)
    return [
        np.int32(number % 3),
        np.int64(number),
        random.normal(size=(2, 3)).astype(np.float32),
        random.integers(4, size=ROWS, dtype=np.uint8),
        np.stack(stacks),
        random.random((ROWS, 2)) < 0.5,
        random.normal(size=ROWS),
    ]


def batch_of(numbers):
    unrolls = zip(*map(unroll, numbers), strict=True)
    return [
        np.stack(arrays, int(component.time_major))
        for component, arrays in zip(COMPONENTS, unrolls, strict=True)
    ]


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, 'timed out'
        time.sleep(0.01)


def draw(replay):
    """Draws a batch, checks that its unrolls are intact, and returns their numbers."""
    wait_until(lambda: replay.reserve(BATCH))
    unrolls = [
        np.random.default_rng(1).integers(0, 2, array.shape).astype(array.dtype)
        for array in batch_of(range(BATCH))
    ]
    replay.sample(unrolls)
    for array, expected in zip(unrolls, batch_of(unrolls[1].tolist()), strict=True):
        np.testing.assert_array_equal(array, expected)
    return unrolls[1]


def draw_many(replay, number):
    # The first batches may have been drawn before the last unrolls arrived.
    for _ in range(6):
        draw(replay)
    return np.concatenate([draw(replay) for _ in range(number // BATCH)])


def remote_replay(addresses, report=lambda text: None, **changes):
    arguments = {
        'level_names': ['a', 'b', 'c'],
        'run_id': 'a run',
        'components': COMPONENTS,
    } | changes
    return RemoteReplay(
        stack='frame',
        addresses=addresses,
        batch_size=BATCH,
        num_replayed=BATCH,
        seed=0,
        report=report,
        **arguments,
    )


def assert_uniform(draws, numbers):
    counts = np.bincount(draws, minlength=max(numbers) + 1)
    assert counts.sum() == counts[numbers].sum()
    expected = len(draws) / len(numbers)
    chi_square = np.sum(np.square(counts[numbers] - expected) / expected)
    # With this many numbers chi-square is nearly normal; allow 4 standard deviations.
    freedom = len(numbers) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom), chi_square


def test_draws_are_intact_and_uniform_over_all_shards(tmp_path, addresses, monkeypatch):
    # A shard that is late, as on a busy machine, would not be drawn from until it has caught up.
    for limit in ('_PROMPT_SECONDS', '_PATIENCE_SECONDS'):
        monkeypatch.setattr(remote_replay_module, limit, PATIENCE_SECONDS)
    reports = []
    capacity = '--replay_capacity=60'
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(job(tmp_path / str(task), task, addresses, capacity))
            for task in range(2)
        ]
        for each in jobs:
            each.wait_until(lambda run=each: 'waiting for a learner on port' in run.stderr)
        replay = remote_replay(addresses, reports.append)
        assert not reports
        replay.start(True, reports.append)
        stack.enter_context(replay)
        wait_until(lambda: replay.metrics()['replay_jobs'] == 2)
        assert not replay.reserve(1)
        assert not replay.reserve(0)
        for first in (0, 50):
            replay.add(batch_of(range(first, first + 50)))
            wait_until(lambda: len(replay) >= 50)
        replay.add(batch_of([100, 101]))
        assert len(replay) <= 60
        wait_until(lambda: {100, 101} <= set(draw(replay)))
        # Shards receive unrolls in turns, and each keeps its last 30.
        assert_uniform(draw_many(replay, 3_000), range(42, 102))
        assert len(replay) == 60
        assert replay.metrics() == {'replay_unrolls': 60, 'replay_jobs': 2}

        # A restarted shard holds fewer than the other.
        kill(jobs[1])
        wait_until(lambda: len(replay) == 30)
        assert set(draw(replay)) <= set(range(42, 102, 2))
        wait_until(lambda: len(reports) == 3)
        assert re.search(
            rf'replay job at {addresses[1]} \S* .*Continuing with 1 of the replay', reports[2]
        )
        with job(tmp_path / 'again', 1, addresses, capacity):
            wait_until(lambda: replay.metrics()['replay_jobs'] == 2)
            replay.add(batch_of(range(102, 112)))
            wait_until(lambda: len(replay) == 35)
            wait_until(lambda: {103, 111} <= set(draw(replay)))
            expected = [*range(52, 112, 2), *range(103, 112, 2)]
            assert_uniform(draw_many(replay, 3_000), expected)
            assert len(reports) == 4
            assert f'Replay job 1 at {addresses[1]} is there, with 0 of at most 30' in reports[3]


def test_a_shard_that_hangs_is_not_waited_for(tmp_path, addresses):
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(job(tmp_path / str(task), task, addresses)) for task in range(2)
        ]
        for each in jobs:
            each.wait_until(lambda run=each: 'waiting for a learner on port' in run.stderr)
        replay = stack.enter_context(remote_replay(addresses))
        wait_until(lambda: replay.metrics()['replay_jobs'] == 2)
        replay.add(batch_of(range(BATCH)))
        wait_until(lambda: len(replay) == BATCH)
        wait_until(lambda: len(set(draw(replay) % 2)) == 2)
        os.kill(jobs[1].id, signal.SIGSTOP)
        slowest = 0.0
        for i in range(40):
            started = time.monotonic()
            if replay.reserve(BATCH):
                replay.sample(batch_of(range(BATCH)))
            replay.add(batch_of(range(100 + i * BATCH, 100 + (i + 1) * BATCH)))
            slowest = max(slowest, time.monotonic() - started)
        # A call to the hanging shard fails after 10 seconds.
        assert slowest < 5
        # The other shard is not held up either.
        newest = 100 + 40 * BATCH

        def arrives():
            replay.add(batch_of([newest]))
            return newest in draw(replay)

        wait_until(arrives)
        os.kill(jobs[1].id, signal.SIGCONT)
        wait_until(lambda: replay.metrics()['replay_jobs'] == 2)
        draw_many(replay, 500)


class SlowLine:
    """Forwards requests to an address at once, and answers after a delay.

    A context manager.

    Attributes:
      address: where it listens, as `host:port`.
      delay: seconds, for answers from now on.
    """

    def __init__(self, address):
        self.delay = 0.0
        self._port = int(address.partition(':')[2])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self):
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, 'localhost', 0))
        self.address = f'localhost:{server.sockets[0].getsockname()[1]}'
        self._thread.start()
        return self

    def __exit__(self, *unused):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self, reader, writer):
        there_reader, there_writer = await asyncio.open_connection('localhost', self._port)
        await asyncio.gather(
            self._pass(reader, there_writer, lambda: 0.0),
            self._pass(there_reader, writer, lambda: self.delay),
        )

    async def _pass(self, reader, writer, delay):
        waiting = collections.deque()
        data = True
        while data:
            try:
                data = await reader.read(1 << 16)
            except OSError:
                data = b''
            waiting.append(data)
            self._loop.call_later(delay(), lambda: self._write(writer, waiting.popleft()))

    def _write(self, writer, data):
        if data:
            writer.write(data)
        else:
            writer.close()


def test_a_slow_shard_does_not_hold_up_the_learner(tmp_path, addresses):
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(job(tmp_path / str(task), task, addresses)) for task in range(2)
        ]
        for each in jobs:
            each.wait_until(lambda run=each: 'waiting for a learner on port' in run.stderr)
        line = stack.enter_context(SlowLine(addresses[1]))
        replay = stack.enter_context(remote_replay([addresses[0], line.address]))
        wait_until(lambda: replay.metrics()['replay_jobs'] == 2)
        replay.add(batch_of(range(BATCH)))
        wait_until(lambda: len(replay) == BATCH)
        wait_until(lambda: len(set(draw(replay) % 2)) == 2)

        def train(is_done):
            """Draws until enough is drawn; returns the mean wait of an update in seconds."""
            waited, num_updates, num_slow = 0.0, 0, 0
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not is_done(num_updates, num_slow):
                assert time.monotonic() < deadline
                started = time.monotonic()
                has_all = replay.reserve(BATCH)
                waited += time.monotonic() - started
                num_updates += 1
                # On a busy machine any shard may take longer than the learner waits.
                if has_all:
                    unrolls = batch_of(range(BATCH))
                    replay.sample(unrolls)
                    num_slow += int((unrolls[1] % 2).sum())
                # The time of an update.
                time.sleep(0.05)
            return waited / num_updates

        usual = train(lambda num_updates, _: num_updates >= 20)
        # It delivers its part of a batch shortly before the learner would give up, after 1 s.
        line.delay = 0.7
        # What it delivers is used.
        mean = train(lambda updates, num_slow: updates >= 60 and num_slow > 2 * BATCH)
        # Waiting for each delivery would take 0.7 s.
        assert mean < usual + 0.35
        assert replay.metrics()['replay_jobs'] == 2
        line.delay = 0.0
        draw_many(replay, 500)


def test_invalid_unrolls_are_left_out(tmp_path, addresses):
    with job(tmp_path, 0, addresses[:1]) as only:
        only.wait_until(lambda: 'waiting for a learner on port' in only.stderr)
        with remote_replay(addresses[:1]) as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            unrolls = batch_of(range(10))
            unrolls[4][3, 4, 0, 0, 1] ^= 1  # Not a stack of frames.
            unrolls[6][2, 5] = np.nan
            unrolls[0][6] = 3  # There is no such level.
            replay.add(unrolls)
            wait_until(lambda: replay.metrics().get('replay_unrolls_left_out') == 3)
            wait_until(lambda: len(replay) == 7)
            wait_until(lambda: {0, 9} <= set(draw(replay)))
            assert set(draw_many(replay, 500)) == {0, 1, 2, 3, 7, 8, 9}


def test_a_run_continues_while_shards_come_and_go(tmp_path, addresses):
    logdir = tmp_path / 'run'
    capacity = '--replay_capacity=160'

    def latest(name):
        lines = metrics(logdir)
        return lines[-1].get(name) if lines else None

    def assert_exact(first, last):
        """Asserts that the fraction was exact between two lines, within one unroll."""
        updates = last['updates'] - first['updates']
        fresh = (last['frames'] - first['frames']) / 20
        assert updates > 20
        assert abs(fresh - NUM_FRESH * updates) < 1

    def wait_for_lines(run, number):
        length = len(metrics(logdir))

        def new():
            return metrics(logdir)[length:]

        # On a busy machine a line covers few updates.
        run.wait_until(
            lambda: len(new()) >= number and new()[-1]['updates'] - new()[0]['updates'] > 20
        )
        return new()

    with (
        job(tmp_path / 'job0', 0, addresses, capacity) as first,
        learner(tmp_path / 'learner', logdir, addresses, ENDLESS, PACED) as run,
    ):
        # One shard is late.
        first.wait_until(lambda: latest('replay_unrolls') == 80)
        assert run.stderr.count('Continuing with') == 1
        with job(tmp_path / 'job1', 1, addresses, capacity) as second:
            run.wait_until(lambda: latest('replay_unrolls') == 160)
            lines = wait_for_lines(run, 4)
            assert_exact(lines[0], lines[-1])
            assert lines[-1]['replay_jobs'] == 2
            assert lines[-1]['replayed_policy_lag_mean'] > lines[-1]['policy_lag_mean']
            kill(second)
        run.wait_until(lambda: latest('replay_unrolls') == 80)
        assert latest('replay_jobs') == 1
        lines = wait_for_lines(run, 4)
        assert_exact(lines[0], lines[-1])
        run.wait_until(lambda: run.stderr.count('Continuing with') == 2)
        with job(tmp_path / 'job1_again', 1, addresses, capacity) as second:
            run.wait_until(lambda: latest('replay_unrolls') == 160)
            # Both end: training continues with fresh unrolls only.
            kill(first)
            second.send(signal.SIGTERM)
            assert second.wait() == 0
            assert second.stdout == 'Stopped; the 80 trajectories held here are gone.\n'
        run.wait_until(lambda: latest('replay_jobs') == latest('replay_unrolls') == 0)
        lines = wait_for_lines(run, 3)
        assert lines[-1]['replayed_fraction'] == 0
        run.wait_until(lambda: run.stderr.count('Continuing with') == 4)
        assert run.stderr.count('Continuing with no replayed trajectories until it is back') == 2
        run.send(signal.SIGTERM)
        assert run.wait() == 0
    assert 'Traceback' not in run.stderr + first.stderr + second.stderr


def test_shards_outlive_their_learner(tmp_path, addresses):
    logdir = tmp_path / 'run'
    one = addresses[:1]
    importing = ('/usr/bin/env', 'PYTHONPROFILEIMPORTTIME=1')
    with job(tmp_path / 'job', 0, one, prefix=importing) as shard:
        shard.wait_until(lambda: 'waiting for a learner on port' in shard.stderr)
        for i, total in enumerate((4000, 8000)):
            frames = f'--total_environment_frames={total}'
            with learner(tmp_path / f'learner{i}', logdir, one, frames) as run:
                assert run.wait() == 0, run.stderr
            assert 'Another run' not in shard.stderr
            assert metrics(logdir)[-1]['frames'] >= total
        assert re.search(
            r'is there, with [1-9]\d+ of at most 10,000 trajectories: 1 of 1', run.stderr
        )
        resumed = next(line for line in metrics(logdir) if line['frames'] > 4200)
        assert resumed['replayed_fraction'] > 0

        frames = '--total_environment_frames=4000'
        with learner(tmp_path / 'new', tmp_path / 'new_run', one, frames) as run:
            assert run.wait() == 0, run.stderr
        assert re.search(r'Another run begins; the [1-9]\d+ earlier trajectories', shard.stderr)
        assert 'is there, with 0 of' in run.stderr

        # A run with other shapes.
        flags = (frames, '--unroll_length=10')
        with learner(tmp_path / 'odd', tmp_path / 'other', one, *flags) as run:
            assert run.wait() == 0, run.stderr
        assert len(re.findall('Another run begins; the ', shard.stderr)) == 2
        assert 'is there, with 0 of' in run.stderr

        # The run that has the shard is not disturbed.
        with remote_replay(one) as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            replay.add(batch_of(range(10)))
            wait_until(lambda: len(replay) == 10)
            with learner(tmp_path / 'refused', tmp_path / 'refused_run', one) as run:
                assert_one_sentence(
                    run,
                    2,
                    rf'job at {one[0]} refuses: another run, of a, b, c, uses it and was last seen '
                    r'\d+ seconds ago: set other --replay_addresses, or end that run',
                )
            assert not (tmp_path / 'refused_run' / 'flags.txt').exists()
            assert len(replay) == 10
            assert replay.metrics()['replay_jobs'] == 1
        shard.send(signal.SIGINT)
        assert shard.wait() == 0
    imported = set(re.findall(r'\| +([\w.]+)$', shard.stderr, re.MULTILINE))
    assert 'impala.cluster.replay_job' in imported
    unneeded = {'environments', 'impala.environments', 'gymnasium', 'ale_py'}
    assert not (unneeded | {'tensorflow', 'sonnet', 'impala.networks.agent'}) & imported


def test_a_shard_belongs_to_one_run_at_a_time(tmp_path, addresses, monkeypatch):
    one, lease = addresses[:1], 3.0
    change = f'from impala.cluster import replay_job\nreplay_job.LEASE_SECONDS = {lease}'

    def is_refused(run_id):
        try:
            remote_replay(one, run_id=run_id)
        except ConfigError as error:
            assert re.search('another run, of a, b, c, uses it and was last seen', str(error))
            return True
        return False

    with changed_job(tmp_path / 'job', 0, one, change) as shard:
        shard.wait_until(lambda: 'waiting for a learner on port' in shard.stderr)
        with remote_replay(one) as first:
            wait_until(lambda: first.metrics()['replay_jobs'] == 1)
            # Its learner is alive but sends nothing.
            begun = time.monotonic()
            while time.monotonic() - begun < 2.5 * lease:
                assert is_refused('another')
            first.add(batch_of(range(10)))
            wait_until(lambda: len(first) == 10)
            with remote_replay(one) as second:
                wait_until(lambda: len(second) == 10)
                assert set(draw(second)) <= set(range(10))
            # One of two learners has left.
            assert is_refused('another')
            monkeypatch.setattr(first, '_leave', lambda shard: None)
        # The learner is gone without notice, as if killed.
        assert is_refused('another')
        with remote_replay(one) as again:
            wait_until(lambda: len(again) == 10)
            monkeypatch.setattr(again, '_leave', lambda shard: None)
        left_at = time.monotonic()
        wait_until(lambda: not is_refused('another'))
        assert time.monotonic() - left_at > lease / 2
        # Asking has changed nothing.
        with remote_replay(one) as again:
            wait_until(lambda: len(again) == 10)
        with remote_replay(one, run_id='another') as other:
            wait_until(lambda: other.metrics()['replay_jobs'] == 1)
            other.add(batch_of(range(10, 15)))
            wait_until(lambda: other.metrics() == {'replay_jobs': 1, 'replay_unrolls': 5})
            assert set(draw(other)) <= set(range(10, 15))
            assert is_refused('a run')
        assert 'Another run begins; the 10 earlier trajectories are gone' in shard.stderr
        begins = remote_replay(one, run_id='another')
        begins.start(True, lambda text: None)
        with begins:
            wait_until(lambda: begins.metrics() == {'replay_jobs': 1, 'replay_unrolls': 0})
        assert 'The run begins anew; the 5 earlier trajectories are gone' in shard.stderr


@pytest.mark.parametrize('method', ['add', 'sample'])
def test_a_job_that_cannot_store_or_draw_ends(tmp_path, addresses, method):
    change = (
        'from impala.experience import replay\n'
        f'actual = replay.Replay.{method}\n'
        'def fail_later(self, *arguments):\n'
        '    if len(self) >= 5: raise OSError("the shelf is broken")\n'
        '    return actual(self, *arguments)\n'
        f'replay.Replay.{method} = fail_later'
    )
    with changed_job(tmp_path / 'job', 0, addresses[:1], change) as shard:
        shard.wait_until(lambda: 'waiting for a learner on port' in shard.stderr)
        with remote_replay(addresses[:1]) as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            replay.add(batch_of(range(20)))
            assert shard.wait() == 1
            wait_until(lambda: replay.metrics()['replay_jobs'] == 0)
    sentence = 'Replay job 0 cannot continue: OSError: the shelf is broken; the'
    assert shard.stderr.splitlines()[-1].startswith(sentence)


def test_an_unexpected_error_is_reported_and_the_shard_used_again(tmp_path, addresses, monkeypatch):
    reports, faults = [], []
    call = Client.call

    def fails_once(client, name, *arguments, **options):
        if name in faulty:
            faulty.remove(name)
            faults.append(name)
            raise ZeroDivisionError(f'by {name}')
        return call(client, name, *arguments, **options)

    faulty = set()
    monkeypatch.setattr(Client, 'call', fails_once)
    with job(tmp_path / 'job', 0, addresses[:1]) as shard:
        shard.wait_until(lambda: 'waiting for a learner on port' in shard.stderr)
        with remote_replay(addresses[:1]) as replay:
            replay.start(False, reports.append)
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)

            def is_reported_when_used(text):
                replay.add(batch_of(range(5)))
                if replay.reserve(BATCH):
                    replay.sample(batch_of(range(BATCH)))
                return text in ' '.join(reports)

            # One after the other: nothing more is reported of a job that is missing.
            for name in ('draw', 'add'):
                faulty.add(name)
                text = f'{addresses[0]} cannot be used: ZeroDivisionError: by {name}. Continuing'
                wait_until(lambda text=text: is_reported_when_used(text))
                wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            draw_many(replay, 500)
    assert faults == ['draw', 'add']


def test_a_repeated_call_changes_nothing(tmp_path, addresses):
    component = UnrollArray((4,), 'uint8', 'bytes', False)
    learner = {'run': 'a run', 'learner': 'a'}
    begin = learner | {'layout': layout(['a'], [component]), 'anew': False, 'only_asks': False}
    unrolls = np.arange(24, dtype=np.uint8)

    def held(client, name, values, *buffers):
        return client.call(name, values, buffers)[0]['held']

    with job(tmp_path, 0, addresses[:1], '--replay_capacity=100') as only:
        only.wait_until(lambda: 'waiting for a learner on port' in only.stderr)
        with Client(addresses[0], KIND) as client, Client(addresses[0], KIND) as again:
            key = client.call('begin', begin)[0]['key']
            learner |= {'key': key}
            assert held(client, 'add', learner | {'number': 1}, unrolls) == 6
            # Perhaps the first connection is gone.
            assert held(again, 'add', learner | {'number': 1}, unrolls) == 6
            assert held(again, 'add', learner | {'number': 2}, unrolls[:4], unrolls[4:8]) == 8
            assert held(again, 'add', learner | {'learner': 'b', 'number': 2}, unrolls[:4]) == 9
            assert again.call('begin', begin)[0] == {'held': 9, 'capacity': 100, 'key': key}
            for _ in range(5):
                answer, body = client.call('draw', learner | {'number': 5}, max_bytes=20)
                assert answer == {'held': 9}
                assert len(body) == 20 and body.max() < 24
            with pytest.raises(Rejected, match='5 bytes are no unrolls of 4'):
                client.call('add', learner | {'number': 3}, [unrolls[:5]])
            # Longer than any call: the memory for it is not even allocated.
            with pytest.raises(Disconnected):
                client.call('add', learner | {'number': 3}, [bytes(1 << 20)])
            new = again.call('begin', begin | {'anew': True})[0]
            assert new['held'] == 0
            for name in ('add', 'draw'):
                with pytest.raises(Rejected, match='has dropped the trajectories that it held'):
                    client.call(name, learner | {'number': 4})
            # It does not look for the number of an earlier call among other unrolls.
            assert held(client, 'add', learner | {'key': new['key'], 'number': 2}, unrolls) == 6


def test_no_unroll_is_lost_or_stored_twice_when_the_network_fails(tmp_path, addresses):
    with job(tmp_path, 0, addresses[:1], '--replay_capacity=3000') as only:
        only.wait_until(lambda: 'waiting for a learner on port' in only.stderr)
        network, reports = Proxy(int(addresses[0].partition(':')[2])), []
        try:
            with remote_replay([network.address], reports.append) as replay:

                def wait_until_there(times):
                    wait_until(lambda: sum('is there' in text for text in reports) == times)

                for i in range(10):
                    wait_until_there(i + 1)
                    # The call does not arrive, or arrives and its answer does not.
                    network.hold('up' if i % 2 else 'down')
                    replay.add(batch_of(range(10 * i, 10 * i + 10)))
                    time.sleep(0.1)
                    network.cut()
                    network.hold()
                wait_until_there(11)
                wait_until(lambda: len(replay) == 100)
                assert_uniform(draw_many(replay, 1_000), range(100))
                assert replay.metrics() == {'replay_unrolls': 100, 'replay_jobs': 1}
        finally:
            network.close()


def train_on_two_learners(folder, logdir, *flags):
    """Trains with two learners, two actor jobs and a replay job; returns what that prints.

    All share a secret.
    """
    (folder / 'secret').write_text('a secret of at least 16 bytes')
    secret = f'--cluster_secret_file={folder / "secret"}'
    ports = [f'localhost:{port}' for port in free_ports(3)]
    shared = f'--learner_addresses={",".join(ports[:2])}'
    with contextlib.ExitStack() as stack:
        shard = stack.enter_context(job(folder / 'job', 0, ports[2:], secret))
        shard.wait_until(lambda: 'waiting for a learner on port' in shard.stderr)
        runs = [
            stack.enter_context(
                learner(folder / f'learner{task}', logdir, ports[2:], shared, f'--task={task}',
                        '--trusted_network', secret, *flags)
            )
            for task in range(2)
        ] + [
            stack.enter_context(
                WarmRun(folder / f'actor{task}', '--job_name=actor', f'--task={task}', shared,
                        secret, '--envs_per_actor=4', '--envs_per_process=4')
            )
            for task in range(2)
        ]  # fmt: skip
        for run in runs:
            assert run.wait() == 0, run.stderr
            assert 'Traceback' not in run.stderr
        shard.send(signal.SIGTERM)
        assert shard.wait() == 0
    return shard.stdout


def test_learners_and_actor_jobs_share_the_shards(tmp_path):
    """A time limit ends the episodes of 10 rewards of 1, and the returns continue."""
    logdir = tmp_path / 'run'
    printed = train_on_two_learners(
        tmp_path, logdir, '--total_environment_frames=12000', '--level_name=levels:timeless',
        '--bootstrap_truncated', '--discounting=0.9', '--sample_reuse=4', '--optimizer=adam',
        '--epsilon=0.1', '--learning_rate=0.01', '--final_learning_rate=0.01', '--entropy_cost=0',
    )  # fmt: skip
    held = int(re.search(r'the (\d+) trajectories held here', printed).group(1))
    # What both have sent, except what was on its way at the end.
    assert abs(held - metrics(logdir)[-1]['frames'] / 20) < 40
    assert metrics(logdir)[-1]['replayed_fraction'] > 0
    export(str(logdir), str(tmp_path / 'model'))
    step = tf.saved_model.load(tmp_path / 'model').signatures['step']
    outputs = step(
        prev_action=tf.constant([0]), reward=tf.constant([1.0]), done=tf.constant([False]),
        frame=tf.ones([1, 2]),
    )  # fmt: skip
    # 1 + 0.9 + 0.81 + ...
    np.testing.assert_allclose(outputs['baseline'], [10.0], atol=0.5)


def test_observations_and_actions_of_all_kinds_pass_between_jobs(tmp_path):
    """An image, numbers and a word; a choice, whose categories are masked in turn, and a number."""
    logdir = tmp_path / 'run'
    train_on_two_learners(
        tmp_path, logdir, '--total_environment_frames=3000', '--level_name=space_levels:crowded',
        '--env_kwargs={"strict": true}', '--info_action_mask', '--width=35', '--height=33',
        '--torso=shallow', '--core=gru', '--core_size=32', '--popart', '--normalize_observations',
        '--bootstrap_truncated',
    )  # fmt: skip
    last = metrics(logdir)[-1]
    assert last['replayed_fraction'] > 0
    assert last['updates_skipped'] == 0
    assert [row['rejected'] for row in last['actors']] == [0, 0]
    # All episodes have 10 rewards of 1, of which none is lost.
    assert last['episode_return/space_levels:crowded'] == 10
    flags = '--mode=test', f'--logdir={logdir}', '--test_num_episodes=2'
    with WarmRun(tmp_path / 'test', *flags) as test:
        assert test.wait() == 0, test.stderr
    assert 'Traceback' not in test.stderr


def test_unrolls_that_do_not_fit_are_refused_or_replace_the_others(tmp_path, addresses):
    one, other = [addresses[0]], [addresses[1]]
    with (
        job(tmp_path / 'job', 0, one, '--replay_capacity=1000000000') as vast,
        job(tmp_path / 'other', 0, other) as shard,
    ):
        for each in (vast, shard):
            each.wait_until(lambda run=each: 'waiting for a learner on port' in run.stderr)
        with pytest.raises(ConfigError, match=f'at {one[0]} refuses: .* than there is room for'):
            remote_replay(one)
        with remote_replay(other) as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            replay.add(batch_of(range(10)))
            wait_until(lambda: len(replay) == 10)
        # The run resumes with other components, so earlier unrolls are dropped.
        with remote_replay(other, components=COMPONENTS[:-1]) as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            replay.add(batch_of(range(5))[:-1])
            wait_until(lambda: len(replay) == 5)
        assert 'The run begins anew; the 10 earlier trajectories are gone' in shard.stderr
        for each in (vast, shard):
            each.send(signal.SIGTERM)
            assert each.wait() == 0


def test_a_job_of_another_kind_is_refused():
    with (
        Server('localhost:0', {}, 'learner', None, print) as server,
        pytest.raises(ConfigError, match='is not a replay job of this version of the program'),
    ):
        remote_replay([f'localhost:{server.port}'])


def test_a_learner_with_another_secret_is_refused(tmp_path, addresses):
    file = tmp_path / 'secret'
    file.write_text('a secret of at least 16 bytes\n')
    with job(tmp_path / 'job', 0, addresses[:1], f'--cluster_secret_file={file}') as only:
        only.wait_until(lambda: 'waiting for a learner on port' in only.stderr)
        with remote_replay(addresses[:1], secret=b'a secret of at least 16 bytes') as replay:
            wait_until(lambda: replay.metrics()['replay_jobs'] == 1)
            replay.add(batch_of(range(10)))
            wait_until(lambda: set(draw(replay)) == set(range(10)))
        for secret, what in ((b'another of at least 16 bytes', 'another'), (None, 'a')):
            with pytest.raises(ConfigError, match=f'^The replay job at .* has {what} secret'):
                remote_replay(addresses[:1], secret=secret)


def test_a_replay_job_whose_port_is_in_use_prints_one_sentence(tmp_path, addresses):
    with (
        socket.create_server(('', int(addresses[1].partition(':')[2]))),
        job(tmp_path, 1, addresses, '--notrusted_network') as second,
    ):
        assert_one_sentence(
            second, 2, f'The replay job cannot listen on {addresses[1]}: another process does'
        )
        assert 'WARNING' not in second.stderr


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['--job_name=replay', '--task=0'], '^--job_name=replay needs --replay_addresses='),
        (
            ['--job_name=replay', '--task=2', '--replay_addresses=a:1,b:2'],
            '^--job_name=replay needs a number of its own, --task=0 to 1',
        ),
        (['--job_name=replay', '--replay_addresses=a:1'], 'needs a number of its own, --task=0'),
        (
            ['--job_name=replay', '--task=0', '--replay_addresses=nowhere'],
            "^'nowhere' is not an address of a job, which has the form host:port",
        ),
        (
            ['--job_name=replay', '--task=0', '--replay_addresses=a:1,b:2', '--replay_capacity=1'],
            '^--replay_capacity=1 leaves nothing for some of 2 replay jobs',
        ),
        (
            ['--job_name=actor', '--task=0', '--replay_addresses=a:1'],
            '^--replay_addresses is for the learner and for replay jobs',
        ),
        (
            ['--job_name=replay', '--task=0', '--replay_addresses=a:1', '--cluster_secret_file=no'],
            '--cluster_secret_file=.*no: No such file or directory',
        ),
        (
            [*CARTPOLE, '--replay_addresses=a:1'],
            '^--replay_addresses=a:1 would hold .* no one uses',
        ),
        (
            [
                *CARTPOLE,
                '--replay_addresses=a:1',
                '--replay_fraction=0.5',
                '--replay_capacity=200',
            ],
            '^--replay_capacity=200 is a setting of the replay jobs here: leave it out of the lea',
        ),
    ],
)
def test_bad_flags(tmp_path, flags, sentence):
    with WarmRun(tmp_path, f'--logdir={tmp_path}/run', *flags) as run:
        assert_one_sentence(run, 2, sentence)
