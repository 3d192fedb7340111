"""Tests of the client of actors on another machine: what unrolls hold, and who waits for whom."""

import collections
import contextlib
import random
import time

import actor_nursery
import numpy as np
import pytest
import tensorflow as tf
from counting_actors import (
    FIXED_INPUTS,
    TIMEOUT,
    Nursery,
    check_counting_unroll,
    closing,
    make_counting_batcher,
    serve_counting,
)
from threads import start

from dynamic_batching.activity import ActorState
from dynamic_batching.actor_client import ClosedError
from dynamic_batching.group_client import CancelledError, GroupClient
from dynamic_batching.row_batcher import RowBatcher
from dynamic_batching.unroll_batcher import UnrollBatcher
from dynamic_batching.wire_row import HEADER
from impala.trajectory import ArraySpec, EpisodeEnd

ACTION = ArraySpec((), 'int32')
NUMBERS = ArraySpec((2,), 'float32')
BYTE = ArraySpec((1,), 'uint8')


def make_batcher(num_actors, **options):
    """A batcher whose observation is two numbers and a byte; its only output is the action."""
    arguments = {
        'inputs': [*FIXED_INPUTS, NUMBERS, BYTE],
        'outputs': [ACTION],
        'states': [ArraySpec((), 'int32')],
        'level_ids': [0] * num_actors,
        'unroll_length': 2,
        'queue_capacity': 4,
        'timeout_ms': 1e6,
    }
    return UnrollBatcher(**(arguments | options))


def make_group(batcher, actors):
    return GroupClient(batcher.fd, actors, [NUMBERS, BYTE], ACTION)


def make_rows(*actors, numbers=(1, 2), **fields):
    """Rows of the actors, each with its number as the byte."""
    sent = np.zeros(len(actors), HEADER)
    sent['actor'] = actors
    for name, value in fields.items():
        sent[name] = value
    body = np.tile(np.array(numbers, np.float32).view(np.uint8), (len(actors), 1))
    parts = [sent[:, None].view(np.uint8), body, np.array(actors).astype(np.uint8)[:, None]]
    return np.concatenate(parts, axis=1)


def step(group, rows):
    """Sends rows in a thread; returns the future of the actions."""
    group.check(rows)
    return start(group.step, rows)


def answer(batcher, add=0):
    """Answers the next batch with the actors' numbers, and counts in the state; returns it."""
    requests = start(batcher.get_inputs).result(TIMEOUT)
    actions = requests.tickets[0] + add
    batcher.set_outputs(
        requests.tickets, tf.constant(3, tf.int64), [actions], [requests.states[0] + 1]
    )
    return requests


def test_positions_in_the_group_are_actors_of_the_batcher():
    with closing(make_batcher(6, minimum_batch_size=3)) as batcher:
        groups = [make_group(batcher, [5, 1]), make_group(batcher, [0, 3, 2])]
        futures = [step(groups[0], make_rows(1, 0)), step(groups[1], make_rows(2))]
        requests = answer(batcher)
        assert sorted(requests.tickets[0].numpy()) == [1, 2, 5]
        assert [future.result(TIMEOUT).tolist() for future in futures] == [[1, 5], [2]]
        states = batcher.activity().states
        assert [states[actor] for actor in (1, 2, 5)] == [ActorState.ACTING] * 3
        assert [states[actor] for actor in (0, 3, 4)] == [ActorState.IDLE] * 3


def test_a_first_row_begins_an_episode():
    """Row 0 of an unroll after a reset has the initial state, so it must say `done`."""
    with closing(make_batcher(1)) as batcher:
        group = make_group(batcher, [0])
        for _ in range(2):
            ends = (EpisodeEnd.NOT_ENDED, EpisodeEnd.NOT_ENDED, EpisodeEnd.LIFE_LOST)
            for row, end in enumerate(ends):
                future = step(group, make_rows(0, end=end, reward=row))
                requests = answer(batcher, add=row)
                assert requests.states[0].numpy() == [row]
                assert future.result(TIMEOUT) == [row]
            batcher.reset_actor(0)
            group.forget(0)
        # Ends other than that stay.
        future = step(group, make_rows(0, end=EpisodeEnd.TRUNCATED))
        assert answer(batcher).inputs[4].numpy() == [EpisodeEnd.TRUNCATED]
        future.result(TIMEOUT)
        unrolls = batcher.dequeue(2)
        ends = np.repeat([[EpisodeEnd.TERMINATED], [0], [EpisodeEnd.LIFE_LOST]], 2, axis=1)
        np.testing.assert_array_equal(unrolls.inputs[4].numpy(), ends)
        np.testing.assert_array_equal(unrolls.inputs[0].numpy(), np.repeat([[0], [1], [2]], 2, 1))
        np.testing.assert_array_equal(unrolls.outputs[0].numpy(), np.repeat([[0], [0], [1]], 2, 1))


@pytest.mark.parametrize('is_reported', [False, True])
def test_unrolls_with_values_that_are_not_finite_are_discarded(is_reported):
    """Whether the other machine has replaced and reported them, or has sent them."""
    with closing(make_batcher(1)) as batcher:
        group = make_group(batcher, [0])
        for row in range(5):
            rows = make_rows(0)
            if row == 1 and is_reported:
                # Also with bits of observations that do not exist.
                rows = make_rows(0, non_finite=0xFFFFFF02, non_finite_value=np.inf)
            elif row == 1:
                rows = make_rows(0, numbers=(1, np.inf))
            future = step(group, rows)
            requests = answer(batcher)
            assert np.isfinite(requests.inputs[5].numpy()).all()
            future.result(TIMEOUT)
        statistics = batcher.statistics()
        assert statistics.non_finite == (0, 1, np.inf)
        assert (statistics.discarded_unrolls, statistics.queued_unrolls) == (1, 1)
        future = step(group, make_rows(0, reward=np.nan))
        assert answer(batcher).inputs[0].numpy() == [0]
        future.result(TIMEOUT)
        assert batcher.statistics().non_finite[:2] == (0, 0)


def test_malformed_rows_are_rejected():
    with closing(make_batcher(2)) as batcher:
        group = make_group(batcher, [0, 1])
        for rows in (
            make_rows(2),
            make_rows(0, 0),
            make_rows(0, end=4),
            make_rows(0, is_first=2),
            make_rows(2**32 - 1 - 255),
        ):
            with pytest.raises(ValueError, match='not those of different actors'):
                group.check(rows)
        for rows in (make_rows(0)[:, :-1], make_rows(0).astype(np.int8), make_rows(0)[0]):
            with pytest.raises(ValueError, match='rows have 41 bytes, not'):
                group.check(rows)
        assert group.check(make_rows(1, 0, is_first=(0, 1))) == [0]
        future = step(group, make_rows(0))
        deadline = time.monotonic() + TIMEOUT
        while batcher.activity().states[0] is ActorState.IDLE and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ValueError, match='has not been answered'):
            group.check(make_rows(0))
        answer(batcher)
        future.result(TIMEOUT)
        assert group.check(make_rows(0)) == []


def test_wrong_segments_and_actions_are_refused():
    with closing(make_batcher(2)) as batcher:
        with pytest.raises(ValueError, match=r'lacks one of the actors \[0, 2\]'):
            make_group(batcher, [0, 2])
        with pytest.raises(ValueError, match='actions of 4 bytes'):
            GroupClient(batcher.fd, [0], [NUMBERS, BYTE], ArraySpec((2,), 'float32'))
    with open('/dev/zero', 'rb') as file, pytest.raises(ValueError, match='not a segment'):
        GroupClient(file.fileno(), [0], [NUMBERS, BYTE], ACTION)


def test_cancelling_and_closing_end_a_wait():
    with closing(make_batcher(2, minimum_batch_size=2)) as batcher:
        groups = [make_group(batcher, [actor]) for actor in range(2)]
        futures = [step(group, make_rows(0)) for group in groups]
        answer(batcher)
        for future in futures:
            future.result(TIMEOUT)
        future = step(groups[0], make_rows(0))
        time.sleep(0.05)
        groups[0].cancel()
        with pytest.raises(CancelledError):
            future.result(TIMEOUT)
        # Nobody is left in the batch: another group may have the actor.
        batcher.assign_actor(0, 1)
        future = step(make_group(batcher, [0]), make_rows(0))
        other = step(groups[1], make_rows(0))
        requests = answer(batcher)
        actors, states = requests.tickets[0].numpy(), requests.states[0].numpy()
        assert dict(zip(actors, states, strict=True)) == {0: 0, 1: 1}
        future.result(TIMEOUT), other.result(TIMEOUT)
        future = step(groups[1], make_rows(0))
        time.sleep(0.05)
    with pytest.raises(ClosedError):
        future.result(TIMEOUT)


def test_unrolls_keep_the_level_that_they_were_played_on():
    with closing(make_batcher(1, unroll_length=1, level_ids=[4])) as batcher:
        for level in (None, 7):
            if level is not None:
                batcher.assign_actor(0, level)
                assert batcher.policy_versions() == [-1]
            group = make_group(batcher, [0])
            for _ in range(3):
                future = step(group, make_rows(0))
                answer(batcher)
                future.result(TIMEOUT)
            assert batcher.policy_versions() == [3]
            assert batcher.statistics().completed_unrolls == [2]
        # The second two were played after the first had been queued.
        assert batcher.dequeue(4).level_ids.numpy().tolist() == [4, 4, 7, 7]


def test_no_batch_waits_for_absent_or_silent_actors():
    with closing(make_batcher(4, minimum_batch_size=4)) as batcher:
        for actor in range(4):
            batcher.assign_actor(actor, 0)
        group = make_group(batcher, [0, 1])
        other = make_group(batcher, [2])
        futures = [step(group, make_rows(0)), None]
        answer(batcher)
        futures[0].result(TIMEOUT)
        # From its first row on, batches wait for an actor.
        futures[1] = step(other, make_rows(0))
        time.sleep(0.05)
        assert not futures[1].done()
        futures[0] = step(group, make_rows(0))
        assert len(answer(batcher).tickets[0]) == 2
        for future in futures:
            future.result(TIMEOUT)
        # Unless it has been silent for a while.
        group.skip_silent(1000.0)
        futures[1] = step(other, make_rows(0))
        time.sleep(0.05)
        assert not futures[1].done()
        group.skip_silent(0.0)
        assert answer(batcher).tickets[0].numpy().tolist() == [2]
        futures[1].result(TIMEOUT)
        futures = [step(group, make_rows(0)), step(other, make_rows(0))]
        requests = answer(batcher)
        if len(requests.tickets[0]) == 1:  # One of them was alone for a moment.
            answer(batcher)
        for future in futures:
            future.result(TIMEOUT)


def test_killing_actors_behind_a_relay_damages_nothing():
    """The rows of actor processes are relayed, as between two machines."""
    num_actors, unroll_length, batch_size, seconds = 12, 5, 6, 4.0
    level_ids = [0] * num_actors
    batcher = make_counting_batcher(
        num_actors,
        level_ids=level_ids,
        unroll_length=unroll_length,
        queue_capacity=3,
        minimum_batch_size=1,
        timeout_ms=2,
    )
    rows_of_actors = RowBatcher(num_actors, actor_nursery.OBSERVATION, ACTION)
    rng = random.Random(0)
    dequeued = []  # (actor, incarnation, first counter) in the queue's order.
    steps = []

    def relay():
        group = GroupClient(batcher.fd, range(num_actors), actor_nursery.OBSERVATION, ACTION)
        with contextlib.suppress(ClosedError):
            while True:
                rows = rows_of_actors.collect(num_actors, 2)
                for position in group.check(rows):
                    batcher.reset_actor(position)
                    group.forget(position)
                rows_of_actors.answer(rows, group.step(rows))
                steps.append(len(rows))

    def learn():
        with contextlib.suppress(tf.errors.CancelledError):
            while True:
                unrolls = batcher.dequeue(batch_size)
                for column in range(batch_size):
                    dequeued.append(
                        check_counting_unroll(unrolls, column, unroll_length, level_ids)
                    )

    with Nursery(rows_of_actors) as nursery, closing(batcher), closing(rows_of_actors):
        processes = [nursery.start(actor) for actor in range(num_actors)]
        incarnations = [0] * num_actors
        threads = [start(serve_counting, batcher), start(learn), start(relay)]
        kills = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # Two actors are never killed and must deliver every unroll.
            actor = rng.randrange(num_actors - 2)
            time.sleep(rng.random() * 0.01)
            nursery.kill(processes[actor])
            rows_of_actors.reset_actor(actor)
            incarnations[actor] += 1
            processes[actor] = nursery.start(actor, incarnations[actor])
            kills += 1
        assert not any(thread.done() for thread in threads)
        deadline = time.monotonic() + TIMEOUT
        while not all(batcher.statistics()[1]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(batcher.statistics()[1])
        rows_of_actors.close()
        batcher.close()
        for thread in threads:
            thread.result(TIMEOUT)
        for process in processes:
            assert nursery.wait(process) == actor_nursery.CLOSED
    assert kills > 50
    following = collections.defaultdict(int)
    for actor, incarnation, first in dequeued:
        assert following[actor, incarnation] == first, 'an unroll is lost, repeated or out of order'
        following[actor, incarnation] += unroll_length
    for actor in (num_actors - 1, num_actors - 2):
        assert {i for a, i in following if a == actor} == {0}
