"""Tests of the life cycle of actor processes; `troubled_levels.py` has the levels."""

import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import tensorflow as tf
import troubled_levels
from processes import TIMEOUT, is_running, janitor, wait_until

from dynamic_batching.unroll_batcher import ActorState, UnrollBatcher
from impala.acting import actor_pool, actor_processes
from impala.acting.actor import NICENESS
from impala.acting.actor_pool import ActorPool, UnrollsLostError
from impala.acting.actor_processes import ActorError, ActorHost
from impala.acting.episode_series import Schedule, with_action_noise
from impala.config import ActorsConfig
from impala.environments import EnvironmentConfig
from impala.errors import LevelError
from impala.runs import start_progress
from impala.trajectory import ArraySpec

PATIENT = ActorsConfig()
PROMPTLY = 10  # Seconds on a busy machine; 5 are promised on an idle one.
UNROLL_LENGTH = 10


def make_batcher(num_actors, spec=troubled_levels.Level.spec):
    return UnrollBatcher(
        inputs=[
            ArraySpec((), 'float32'),
            ArraySpec((), 'float32'),
            ArraySpec((), 'int32'),
            ArraySpec((), 'int32'),
            ArraySpec((), 'uint8'),
            *spec.observation.values(),
        ],
        outputs=[ArraySpec((), 'int32')],
        states=[],
        level_ids=[0] * num_actors,
        unroll_length=UNROLL_LENGTH,
        queue_capacity=num_actors,
        timeout_ms=1,
    )


def answer(batcher):
    with contextlib.suppress(tf.errors.CancelledError):
        while True:
            requests = batcher.get_inputs()
            actions = tf.zeros_like(requests.last_action)
            batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [actions], [])


def dequeue(batcher):
    with contextlib.suppress(tf.errors.CancelledError):
        while True:
            batcher.dequeue(1)


@contextlib.contextmanager
def running(
    levels,
    max_restarts,
    limits=PATIENT,
    serve=(answer, dequeue),
    on_start=None,
    spec=None,
    **options,
):
    """Runs a pool, answers its actors and takes its unrolls; also yields a list of its reports."""
    reports = []

    def report(text):
        # How often a start reports progress depends on the machine.
        (on_start or str if text.startswith('Starting: ') else reports.append)(text)

    names = [f'troubled_levels:{level}' for level in levels]
    with ActorHost(EnvironmentConfig(), limits) as actor_host:
        batcher = make_batcher(len(levels), spec or troubled_levels.Level.spec)
        threads = [threading.Thread(target=run, args=(batcher,)) for run in serve]
        for thread in threads:
            thread.start()
        try:
            with ActorPool(actor_host, batcher, names, 1, max_restarts, report, **options) as pool:
                yield actor_host, batcher, pool, reports
        finally:
            batcher.close()
            for thread in threads:
                thread.join(TIMEOUT)


def all_three(pool):
    """Returns the three process ids, or None while one is being replaced."""
    processes = pool.process_ids
    return processes if len(processes) == 3 else None


def wait_for_failure(pool):
    with pytest.raises((ActorError, LevelError)) as caught:
        wait_until(lambda: pool.check())
    return caught.value


def test_actors_have_a_lower_priority_than_the_learner():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with running(['good'], max_restarts=0) as (_, batcher, pool, _):
        wait_until(lambda: batcher.statistics()[1][0] > 0)
        (process,) = pool.process_ids
        assert os.getpriority(os.PRIO_PROCESS, process) == min(own + NICENESS, 19)


def test_actors_that_die_are_replaced_and_reported():
    with running(['good', 'fails_late', 'good'], max_restarts=1) as (
        actor_host,
        batcher,
        pool,
        reports,
    ):
        # More often than max_restarts, because full unrolls in between reset the count.
        wait_until(lambda: pool.restarts >= 2)
        wait_until(lambda: all(batcher.statistics()[1][actor] > 0 for actor in (0, 2)))
        wait_until(lambda: len(reports) >= 2)
        for text in reports[:2]:
            assert 'Actor 1 (troubled_levels:fails_late) ended with exit code 1' in text
            assert 'RuntimeError: the joystick broke' in text
        # A repeated error takes only one line.
        assert 'Traceback' in reports[0] and 'as before, 2 times so far' in reports[1]
        assert '\n' not in reports[1]
        # Most of the unrolls were completed.
        pool.check_losses()

        killed, _, other = wait_until(lambda: all_three(pool))
        before = batcher.statistics()[1][2]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: any('Actor 0' in text for text in reports))
        (text,) = [text for text in reports if 'Actor 0' in text]
        assert 'signal 9' in text
        replacement, _, same = wait_until(lambda: all_three(pool))
        assert replacement != killed and same == other
        wait_until(lambda: batcher.statistics()[1][0] > 0)
        wait_until(lambda: batcher.statistics()[1][2] > before)
        pool.check()

        processes = [psutil.Process(pid) for pid in (replacement, other)]
        for process in processes:
            with open(f'/proc/{process.pid}/maps', encoding='utf-8') as file:
                assert 'tensorflow' not in file.read()
        folder = actor_host.config.temp_folder
        assert glob.glob(f'{folder}/level-*')
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert f'restarted {pool.restarts} times. The last: Actor' in reports[-1]
    assert not any(process.is_running() for process in processes)
    assert not os.path.exists(folder)


def test_a_pool_gives_up_with_the_actors_own_error():
    with running(['fails_early', 'good'], max_restarts=2) as (_, batcher, pool, reports):
        error = wait_for_failure(pool)
        assert isinstance(error, ActorError)
        assert 'Actor 0 (troubled_levels:fails_early)' in str(error)
        assert '2 times in a row' in str(error)
        assert 'RuntimeError: the joystick broke with seed' in str(error)
        assert len(str(error)) < 5000
        assert len(reports) == pool.restarts == 2
        # Every start has its own seed, but counts as the same error.
        seeds = {re.search(r'seed (\d+)', text)[1] for text in [*reports, str(error)]}
        assert len(seeds) == 3
        assert 'as before, 2 times so far' in reports[1]
        with pytest.raises(tf.errors.CancelledError):
            batcher.dequeue(1)


@pytest.mark.parametrize(
    ('level', 'text'),
    [
        ('exits', 'exit code 0,'),
        ('exits_82', 'exit code 82,'),
        ('exits_83', 'exit code 83,'),
        ('exits_politely', 'I am done.'),
    ],
)
def test_an_actor_that_exits_by_itself_has_died(level, text):
    with running([level], max_restarts=0) as (_, _, pool, reports):
        error = wait_for_failure(pool)
        assert isinstance(error, ActorError) and text in str(error)


def test_actors_that_lose_most_of_their_unrolls_are_reported():
    with running(['fails_early'], max_restarts=1000) as (_, _, pool, _):
        pool.check_losses()
        wait_until(lambda: pool.restarts >= 2)
        pattern = r'Actors kept dying: 0 unrolls were completed, and \d were lost .* \(\d times\)'
        with pytest.raises(UnrollsLostError, match=pattern):
            pool.check_losses()


def test_the_last_output_of_a_crashed_library_is_passed_on():
    with running(['prints_and_exits'], max_restarts=0) as (_, _, pool, reports):
        error = wait_for_failure(pool)
        assert 'signal 6' in str(error) and 'engine: out of polygons' in str(error)
        assert not reports


def test_warnings_of_environments_are_passed_on_once():
    with running(['warns', 'warns', 'warns'], max_restarts=0) as (_, batcher, pool, reports):
        wait_until(lambda: all(completed > 0 for completed in batcher.statistics()[1]))
        (text,) = wait_until(lambda: reports)
        assert text.startswith('WARNING: The level cache in /dev/null/cache fails')
        pool.check()


def test_output_of_actors_does_not_fill_the_disk(monkeypatch):
    limit = 100_000
    monkeypatch.setattr(actor_pool, 'MAX_PRINTED_BYTES', limit)
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.01)
    with running(['chatters'], max_restarts=0) as (_, _, pool, _):
        sizes = []

        def has_failed():
            with contextlib.suppress(OSError, IndexError):
                sizes.append(os.stat(f'/proc/{pool.process_ids[0]}/fd/1').st_size)
            return pool._failure

        wait_until(has_failed)
        error = wait_for_failure(pool)
        # The file may have been cut just before the error was printed.
        assert str(error).endswith('RuntimeError: the joystick broke')
    # The actor printed 9 MB.
    assert limit / 10 < max(sizes) < 4_000_000


def test_an_environment_that_hangs_is_named_and_its_process_replaced(monkeypatch):
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.05)
    levels = ['hangs', 'hangs_at_start', 'good']
    with running(
        levels, max_restarts=100, limits=ActorsConfig(silence_secs=0.5, actor_timeout=3.0)
    ) as (_, _, pool, reports):
        # The third one hangs because it is stopped from outside.
        stopped = wait_until(lambda: all_three(pool))[2]
        wait_until(lambda: pool._batcher.statistics().completed_unrolls[2])
        os.kill(stopped, signal.SIGSTOP)
        for actor, level in enumerate(levels):
            who = rf'No sign of life.* actors? .*\b{actor} \(troubled_levels:{level}\)'
            wait_until(lambda who=who: any(re.search(who, text) for text in reports))
            ended = f'Actor {actor} (troubled_levels:{level}) was silent for '
            wait_until(lambda ended=ended: any(text.startswith(ended) for text in reports))
        shown = '\n'.join(reports)
        # The reports say where they hang.
        assert 'in hangs_at_start' in shown and 'in step' in shown
        assert 'its process is killed and restarted after 3 s (--actor_timeout)' in shown
        assert stopped not in pool.process_ids
        pool.check()


def test_actors_that_wait_for_the_learner_are_not_silent(monkeypatch):
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.02)
    limits = ActorsConfig(silence_secs=0.1, actor_timeout=30)
    with running(
        ['good'] * 4, max_restarts=0, limits=limits, serve=(answer,), envs_per_process=2
    ) as (_, batcher, pool, reports):
        processes = wait_until(lambda: pool.process_ids if len(pool.process_ids) == 2 else None)

        def is_full():
            # Every actor has filled one unroll for the queue and one more; in each process, one
            # actor sleeps for both.
            states = batcher.activity().states
            asleep = [ActorState.SLEEPING in states[first : first + 2] for first in (0, 2)]
            return all(asleep) and sum(batcher.statistics().completed_unrolls) == 4

        wait_until(is_full)
        time.sleep(0.1)  # Gives the pool time to report which actors are back.
        reports.clear()
        time.sleep(1.0)
        assert not reports
        assert pool.process_ids == processes


def test_child_processes_end_with_their_environment():
    with running(['has_an_engine', 'good'], max_restarts=1) as (actor_host, batcher, pool, _):

        def engines():
            paths = glob.glob(f'{actor_host.config.temp_folder}/child-*')
            return [int(path.rpartition('-')[2]) for path in paths]

        wait_until(lambda: batcher.statistics()[1][0] > 0)
        (first,) = engines()
        assert psutil.pid_exists(first)
        os.kill(pool.process_ids[0], signal.SIGKILL)
        wait_until(lambda: not is_running(first))
        wait_until(lambda: pool.restarts == 1 and batcher.statistics()[1][0] > 0)
        (second,) = set(engines()) - {first}
        assert is_running(second)
    wait_until(lambda: not is_running(second))


def test_a_start_is_cut_short_when_the_batcher_is_closed():
    with running(['good'] * 200, max_restarts=0) as (_, batcher, pool, reports):
        wait_until(lambda: len(pool.process_ids) >= 3)
        batcher.close()
        started = time.monotonic()
    assert time.monotonic() - started < PROMPTLY
    assert len(pool.process_ids) == 0
    assert not reports


def test_a_slow_start_reports_progress(monkeypatch):
    monkeypatch.setattr(start_progress, '_FIRST_SECONDS', 0.0)
    monkeypatch.setattr(start_progress, '_PAUSE_SECONDS', 0.0)
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.01)
    lines = []
    with running(['good'] * 3, max_restarts=0, on_start=lines.append) as (_, _, pool, _):
        wait_until(lambda: 'Starting: 3 of 3 actor processes are up' in lines)
        assert lines[0] == 'Starting: 0 of 3 actor processes are up'
        pool.check()
    assert lines.count('Starting: 3 of 3 actor processes are up') == 1


def test_processes_that_have_played_all_their_episodes_count_as_started(monkeypatch):
    monkeypatch.setattr(start_progress, '_FIRST_SECONDS', 0.0)
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.01)
    lines = []
    names = ['troubled_levels:good', 'troubled_levels:starts_late']
    schedule = Schedule(names, 2, 1, 7)
    spec = with_action_noise(troubled_levels.Level.spec)
    levels = ['good', 'starts_late']
    with running(levels, 0, on_start=lines.append, spec=spec, schedule=schedule) as (_, _, pool, _):
        wait_until(lambda: 'Starting: 2 of 2 actor processes are up' in lines)
        wait_until(lambda: schedule.is_complete)
        pool.check()
    assert lines.count('Starting: 2 of 2 actor processes are up') == 1


def test_a_level_that_cannot_be_played_is_not_retried():
    with running(['raises_level_error'], max_restarts=100) as (_, _, pool, reports):
        error = wait_for_failure(pool)
        assert isinstance(error, LevelError) and str(error) == 'This level needs a map.'
        assert pool.restarts == 0 and not reports


def test_an_environment_that_breaks_its_declaration_dies_with_one_sentence():
    with running(['breaks_its_declaration'], max_restarts=1) as (_, _, pool, reports):
        error = wait_for_failure(pool)
    assert isinstance(error, ActorError)
    for text in (*reports, str(error)):
        assert 'ended with exit code 84' in text and 'Traceback' not in text
        assert "'frame' as float32 [3], but its spec declares float32 [2]." in text
    assert reports


PARENT = """
import glob
import sys
import threading
import actor_pool_test
with actor_pool_test.running(['good', 'has_an_engine', 'has_an_engine'], 0) as (
    actor_host, batcher, pool, _
):
    actor_pool_test.wait_until(lambda: all(batcher.statistics()[1]))
    engines = glob.glob(f'{actor_host.config.temp_folder}/child-*')
    engines = [path.rpartition('-')[2] for path in engines]
    print(actor_host.config.temp_folder, *pool.process_ids, *engines, flush=True)
    threading.Event().wait()
"""


def test_nothing_is_left_when_the_parent_is_killed():
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, '-c', PARENT], stdout=subprocess.PIPE, env=environment
    ) as parent:
        try:
            folder, *actors = parent.stdout.readline().decode().split()
            processes = [psutil.Process(int(actor)) for actor in actors]
            assert len(processes) == 5 and os.path.isdir(folder)
            # A suspended process cannot notice that its parent is gone.
            processes[2].suspend()
            # A job scheduler, too, terminates first and kills a while later.
            janitor(psutil.Process(parent.pid), folder).terminate()
        finally:
            parent.kill()
        wait_until(lambda: not any(map(is_running, map(int, actors))))
        wait_until(lambda: not os.path.exists(folder))
