"""Tests of the actor processes' lives, with real processes (levels in `troubled_levels.py`)."""

import contextlib
import glob
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import tensorflow as tf
import troubled_levels

from dynamic_batching.unroll_batcher import UnrollBatcher
from environments import EnvironmentConfig, LevelError
from impala import actor_pool
from impala.actor import NICENESS
from impala.actor_pool import ActorError, ActorPool, Workplace
from impala.run_config import with_common_actions
from impala.trajectory import ArraySpec

TIMEOUT = 60  # Seconds; reached only when something is broken.
UNROLL_LENGTH = 10


def make_batcher(num_actors):
    return UnrollBatcher(
        inputs=[
            ArraySpec((), 'float32'),
            ArraySpec((), 'float32'),
            ArraySpec((), 'int32'),
            ArraySpec((), 'uint8'),
            *troubled_levels.Level.spec.observation.values(),
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
def running(levels, max_restarts):
    """A pool whose actors are answered and whose unrolls are taken, and what it reports."""
    reports = []
    names = [f'troubled_levels:{level}' for level in levels]
    with Workplace(EnvironmentConfig()) as workplace:
        batcher = make_batcher(len(levels))
        threads = [threading.Thread(target=run, args=(batcher,)) for run in (answer, dequeue)]
        for thread in threads:
            thread.start()
        try:
            with ActorPool(workplace, batcher, names, 1, max_restarts, reports.append) as pool:
                yield workplace, batcher, pool, reports
        finally:
            batcher.close()
            for thread in threads:
                thread.join(TIMEOUT)


def wait_until(condition):
    """Returns the first value of a function that is not false."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def all_three(pool):
    """The actors' process ids, when none of them is being replaced."""
    processes = pool.process_ids
    return processes if len(processes) == 3 else None


def wait_for_failure(pool):
    with pytest.raises((ActorError, LevelError)) as caught:
        wait_until(lambda: pool.check())
    return caught.value


def test_actors_let_the_learner_go_first():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with running(['good'], max_restarts=0) as (_, batcher, pool, _):
        wait_until(lambda: batcher.statistics()[1][0] > 0)
        (process,) = pool.process_ids
        assert os.getpriority(os.PRIO_PROCESS, process) == min(own + NICENESS, 19)


def test_actors_that_die_are_replaced_and_reported():
    with running(['good', 'fails_late', 'good'], max_restarts=1) as (
        workplace,
        batcher,
        pool,
        told,
    ):
        # Twice and more: the full unrolls in between are what lets it go on.
        wait_until(lambda: pool.restarts >= 2)
        wait_until(lambda: all(batcher.statistics()[1][actor] > 0 for actor in (0, 2)))
        for text in told[:2]:
            assert 'Actor 1 (troubled_levels:fails_late) ended with exit code 1' in text
            assert 'RuntimeError: the joystick broke' in text

        killed, _, other = wait_until(lambda: all_three(pool))
        before = batcher.statistics()[1][2]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: any('Actor 0' in text for text in told))
        (text,) = [text for text in told if 'Actor 0' in text]
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
        folder = workplace.config.temp_folder
        assert glob.glob(f'{folder}/level-*')
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert not any(process.is_running() for process in processes)
    assert not os.path.exists(folder)


def test_a_pool_gives_up_with_the_actors_own_error():
    with running(['fails_early', 'good'], max_restarts=2) as (_, batcher, pool, told):
        error = wait_for_failure(pool)
        assert isinstance(error, ActorError)
        assert 'Actor 0 (troubled_levels:fails_early)' in str(error)
        assert '2 times in a row' in str(error)
        assert 'RuntimeError: the joystick broke with seed' in str(error)
        assert len(str(error)) < 5000
        assert len(told) == pool.restarts == 2
        # Every start has a seed of its own.
        seeds = {text.rpartition('seed ')[2] for text in [*told, str(error)]}
        assert len(seeds) == 3
        with pytest.raises(tf.errors.CancelledError):
            batcher.dequeue(1)


def test_an_actor_that_exits_as_if_all_were_well_has_died():
    with running(['exits'], max_restarts=1) as (_, _, pool, told):
        error = wait_for_failure(pool)
        assert 'exit code 0' in str(error) and len(told) == 1


def test_the_last_words_of_a_library_are_passed_on():
    with running(['prints_and_exits'], max_restarts=0) as (_, _, pool, told):
        error = wait_for_failure(pool)
        assert 'signal 6' in str(error) and 'engine: out of polygons' in str(error)
        assert not told


def test_what_environments_warn_of_is_passed_on_once():
    with running(['warns', 'warns', 'warns'], max_restarts=0) as (_, batcher, pool, told):
        wait_until(lambda: all(completed > 0 for completed in batcher.statistics()[1]))
        (text,) = wait_until(lambda: told)
        assert text.startswith('WARNING: The level cache in /dev/null/cache fails')
        pool.check()


def test_what_actors_print_does_not_fill_the_disk(monkeypatch):
    limit = 100_000
    monkeypatch.setattr(actor_pool, 'MAX_PRINTED_BYTES', limit)
    monkeypatch.setattr(actor_pool, 'CUT_SECONDS', 0.01)
    with running(['chatters'], max_restarts=0) as (_, _, pool, _):
        sizes = []

        def has_failed():
            with contextlib.suppress(OSError, IndexError):
                sizes.append(os.stat(f'/proc/{pool.process_ids[0]}/fd/1').st_size)
            return pool._failure

        wait_until(has_failed)
        error = wait_for_failure(pool)
        assert 'line of an engine' in str(error)
        assert str(error).endswith('RuntimeError: the joystick broke')
    # It printed 500 times 18 kB.
    assert limit / 10 < max(sizes) < 4_000_000


def test_a_level_that_cannot_be_played_is_not_tried_again():
    with running(['misses_something'], max_restarts=100) as (_, _, pool, told):
        error = wait_for_failure(pool)
        assert isinstance(error, LevelError) and str(error) == 'This level needs a map.'
        assert pool.restarts == 0 and not told


def test_specs_come_from_a_process_of_their_own():
    with Workplace(EnvironmentConfig()) as workplace:
        spec = workplace.environment_spec('troubled_levels:good', 1)
        assert spec == troubled_levels.Level.spec
        with pytest.raises(LevelError, match=r'^.*no_such_module.*$'):
            workplace.environment_spec('no_such_module:level', 1)
        with pytest.raises(ActorError, match='RuntimeError: there is no joystick'):
            workplace.environment_spec('troubled_levels:fails_to_start', 1)


def test_several_levels_have_one_spec_or_are_refused_by_name():
    with Workplace(EnvironmentConfig()) as workplace:
        spec = workplace.common_spec(['levels:short', 'levels:long', 'levels:short'], 1)
        assert spec == workplace.environment_spec('levels:long', 1)
        for other, what in (
            ('levels:wide', 'observations: levels:short has frame float32 2, but levels:wide'),
            ('levels:three_actions', 'actions: levels:short has 2, but levels:three_actions 3'),
        ):
            with pytest.raises(LevelError, match=what):
                workplace.common_spec(['levels:short', other, 'levels:long'], 1)
        with pytest.raises(LevelError) as error:
            workplace.common_spec(
                ['levels:none', 'levels:short', 'levels:incomplete', 'CartPol-v1'], 1
            )
        text = str(error.value)
        assert text.startswith('3 of the 4 levels cannot be played here.')
        assert 'levels:incomplete: Its map is missing.' in text
        assert "CartPol-v1: Gymnasium has no 'CartPol-v1'. Did you mean 'CartPole-v1'?" in text
        assert 'levels:short' not in text
        with pytest.raises(ActorError, match='(?s)troubled_levels:fails_to_start.*no joystick'):
            workplace.common_spec(['levels:short', 'troubled_levels:fails_to_start'], 1)


def test_several_atari_games_have_one_set_of_actions():
    names = ['ALE/Pong-v5', 'ALE/Breakout-v5']
    with Workplace(EnvironmentConfig()) as workplace, pytest.raises(LevelError, match='actions'):
        workplace.common_spec(names, 1)
    config = with_common_actions(EnvironmentConfig(), names)
    with Workplace(config) as workplace:
        assert workplace.common_spec(names, 1).num_actions == 18
    assert with_common_actions(EnvironmentConfig(), names[:1]) == EnvironmentConfig()


PARENT = """
import sys
import threading
import actor_pool_test
with actor_pool_test.running(['good', 'good'], 0) as (workplace, batcher, pool, _):
    actor_pool_test.wait_until(lambda: all(batcher.statistics()[1]))
    print(workplace.config.temp_folder, *pool.process_ids, flush=True)
    threading.Event().wait()
"""


def janitor(parent, folder):
    # A process that was only just started may not show its command line yet.
    return wait_until(
        lambda: next((child for child in parent.children() if folder in child.cmdline()), None)
    )


def test_the_folder_goes_when_its_janitor_was_killed():
    with Workplace(EnvironmentConfig()) as workplace:
        folder = workplace.config.temp_folder
        assert os.path.isdir(folder)
        janitor(psutil.Process(), folder).kill()
    assert not os.path.exists(folder)


def test_nothing_is_left_when_the_parent_is_killed():
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, '-c', PARENT], stdout=subprocess.PIPE, env=environment
    ) as parent:
        try:
            folder, *actors = parent.stdout.readline().decode().split()
            processes = [psutil.Process(int(actor)) for actor in actors]
            assert len(processes) == 2 and os.path.isdir(folder)
            # As a job scheduler does, which then waits a while before it kills.
            janitor(psutil.Process(parent.pid), folder).terminate()
        finally:
            parent.kill()
        wait_until(lambda: not any(process.is_running() for process in processes))
        wait_until(lambda: not os.path.exists(folder))
