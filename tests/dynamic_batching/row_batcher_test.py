"""Tests of the batcher of actors whose policy is elsewhere; the clients are threads here."""

import time

import actor_nursery
import numpy as np
import pytest
from counting_actors import TIMEOUT, Nursery
from threads import start

from dynamic_batching.activity import ActorState
from dynamic_batching.actor_client import ActorClient, ClosedError
from dynamic_batching.row_batcher import RowBatcher
from dynamic_batching.wire_row import HEADER, headers
from impala.trajectory import ArraySpec, EpisodeEnd

FOREVER_MS = 1e6
ACTION = ArraySpec((), 'int32')
BYTE = ArraySpec((1,), 'uint8')
NUMBERS = ArraySpec((2,), 'float32')


@pytest.fixture
def make():
    """Makes batchers, and closes them at the end so that waiting threads end."""
    batchers = []

    def make(num_actors, observation=(BYTE,), action=ACTION):
        batchers.append(RowBatcher(num_actors, observation, action))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close()


def first(batcher, actor, *observation, spec=(BYTE,), action=None):
    """Sends the first row of an actor in a thread; returns its client and the future action."""
    client = actor_nursery.WaitingClient(batcher.fd, actor, spec, action)
    arrays = observation or (np.array([actor], np.uint8),)
    return client, start(client.start, EpisodeEnd.TERMINATED, arrays)


def collect(batcher, minimum=1, timeout_ms=FOREVER_MS):
    return start(batcher.collect, minimum, timeout_ms).result(TIMEOUT)


def wait_for_states(batcher, *states):
    deadline = time.monotonic() + TIMEOUT
    while batcher.activity().states != list(states):
        assert time.monotonic() < deadline, batcher.activity()
        time.sleep(0.001)


def test_rows_and_actions_travel_unchanged(make):
    words, action = ArraySpec((3,), 'int64'), ArraySpec((2,), 'float32')
    spec = (words, NUMBERS, BYTE)
    batcher = make(2, spec, action)
    assert batcher.row_bytes == 32 + 3 * 8 + 2 * 4 + 1
    arrays = [
        (np.arange(3) + 10 * i, np.array([i, 0.5], np.float32), np.array([i], np.uint8))
        for i in range(2)
    ]
    clients = [first(batcher, i, *arrays[i], spec=spec, action=action) for i in range(2)]
    rows = collect(batcher, minimum=2)
    for row, sent in zip(rows, headers(rows), strict=True):
        i = sent['actor']
        assert sent['is_first'] and sent['end'] == EpisodeEnd.TERMINATED
        assert row[HEADER.itemsize :].tobytes() == b''.join(each.tobytes() for each in arrays[i])
    answers = np.array([[i + 0.25, -float(i)] for i in headers(rows)['actor']], np.float32)
    batcher.answer(rows, answers)
    for i, (_, answer) in enumerate(clients):
        assert answer.result(TIMEOUT).tolist() == [i + 0.25, -i]
    # The next row of one actor, which the action led to.
    client, _ = clients[1]
    answer = start(client.step, 1.5, EpisodeEnd.LIFE_LOST, arrays[0], 4)
    rows = collect(batcher)
    (sent,) = headers(rows)
    names = ('actor', 'reward', 'episode_return', 'episode_step', 'episode_frames', 'end')
    assert [sent[name] for name in names] == [1, 1.5, 1.5, 1, 4, EpisodeEnd.LIFE_LOST]
    assert not sent['is_first'] and not sent['non_finite']
    batcher.answer(rows, np.zeros((1, 2), np.float32))
    answer.result(TIMEOUT)
    assert batcher.answered_rows() == [1, 2]


def test_values_that_are_not_finite_are_replaced_and_reported(make):
    batcher = make(1, (BYTE, NUMBERS))
    observation = (np.zeros(1, np.uint8), np.array([1, np.inf], np.float32))
    first(batcher, 0, *observation, spec=(BYTE, NUMBERS))
    rows = collect(batcher)
    (sent,) = headers(rows)
    assert (sent['non_finite'], sent['non_finite_value']) == (0b100, np.inf)
    assert rows[0, -8:].view(np.float32).tolist() == [1, 0]


def test_rows_wait_for_the_minimum_of_those_that_play(make):
    batcher = make(4)
    # Alone, while the others have not started.
    _, answer = first(batcher, 0)
    rows = collect(batcher, minimum=4)
    assert headers(rows)['actor'].tolist() == [0]
    clients = [first(batcher, actor) for actor in (1, 2)]
    wait_for_states(batcher, *[ActorState.SLEEPING] * 3, ActorState.IDLE)
    # Two of three play, and the third's row was already collected.
    waiting = start(batcher.collect, 4, FOREVER_MS)
    time.sleep(0.05)
    assert not waiting.done()
    batcher.answer(rows, np.array([7], np.int32))
    assert answer.result(TIMEOUT) == 7
    clients[0][0].finish()
    rows = waiting.result(TIMEOUT)
    assert headers(rows)['actor'].tolist() == [1, 2]


def test_fewer_rows_suffice_after_the_time_out(make):
    batcher = make(2)
    _, answer = first(batcher, 0)
    rows = collect(batcher)
    first(batcher, 1)
    wait_for_states(batcher, ActorState.SLEEPING, ActorState.SLEEPING)
    batcher.answer(rows, np.zeros(1, np.int32))
    answer.result(TIMEOUT)
    rows = collect(batcher, minimum=2, timeout_ms=50)
    assert headers(rows)['actor'].tolist() == [1]


def test_a_late_actor_is_waited_for_once(make):
    batcher = make(2)
    clients = [first(batcher, actor) for actor in range(2)]
    wait_for_states(batcher, *[ActorState.SLEEPING] * 2)

    def answer(rows):
        batcher.answer(rows, headers(rows)['actor'].astype(np.int32))

    answer(collect(batcher, minimum=2))
    fast, slow = (client for client, _ in clients)
    wait_for_states(batcher, *[ActorState.ACTING] * 2)

    def send(client):
        return start(client.step, 0.0, EpisodeEnd.NOT_ENDED, (np.zeros(1, np.uint8),))

    action = send(fast)
    rows = collect(batcher, minimum=2, timeout_ms=20)
    for _ in range(3):
        assert headers(rows)['actor'].tolist() == [0]
        answer(rows)
        action.result(TIMEOUT)
        action = send(fast)
        rows = collect(batcher, minimum=2)
    # It is waited for again after its next row.
    late = send(slow)
    wait_for_states(batcher, *[ActorState.SLEEPING] * 2)
    answer(rows)
    action.result(TIMEOUT)
    action = send(fast)
    answer(collect(batcher, minimum=2))
    late.result(TIMEOUT)
    action.result(TIMEOUT)
    action = send(fast)
    waiting = start(batcher.collect, 2, FOREVER_MS)
    time.sleep(0.05)
    assert not waiting.done()
    late = send(slow)
    assert sorted(headers(waiting.result(TIMEOUT))['actor']) == [0, 1]


def test_answers_that_do_not_fit_are_rejected(make):
    batcher = make(1)
    first(batcher, 0)
    rows = collect(batcher)
    for actions in (np.zeros(2, np.int32), np.zeros(1, np.int64), np.zeros((1, 1), np.int32)):
        with pytest.raises(ValueError, match='are no actions of 1 rows'):
            batcher.answer(rows, actions)


def test_a_replaced_actor_gets_no_answer_meant_for_its_predecessor(make):
    batcher = make(2)
    # This one does not wait for its action.
    old = ActorClient(batcher.fd, 0, [BYTE])
    old.start(EpisodeEnd.TERMINATED, [np.zeros(1, np.uint8)])
    _, other = first(batcher, 1)
    wait_for_states(batcher, ActorState.REQUESTED, ActorState.SLEEPING)
    rows = collect(batcher, minimum=2)
    batcher.reset_actor(0)
    _, new = first(batcher, 0, np.array([9], np.uint8))
    wait_for_states(batcher, ActorState.SLEEPING, ActorState.SLEEPING)
    batcher.answer(rows, np.array([5, 6], np.int32))
    assert other.result(TIMEOUT) == 6
    rows = collect(batcher)
    (sent,) = headers(rows)
    assert (sent['actor'], sent['is_first'], rows[0, -1]) == (0, 1, 9)
    batcher.answer(rows, np.array([8], np.int32))
    assert new.result(TIMEOUT) == 8
    assert batcher.answered_rows() == [1, 1]


def test_closing_ends_all_waits(make):
    batcher = make(2)
    _, answer = first(batcher, 0)
    wait_for_states(batcher, ActorState.SLEEPING, ActorState.IDLE)
    collect(batcher)
    waiting = start(batcher.collect, 1, FOREVER_MS)
    time.sleep(0.05)
    batcher.close()
    for future in (waiting, answer):
        with pytest.raises(ClosedError):
            future.result(TIMEOUT)
    assert batcher.activity().closed
    with pytest.raises(ClosedError):
        batcher.collect(1, 0)


def test_a_killed_actor_holds_nobody_up():
    batcher = RowBatcher(2, actor_nursery.OBSERVATION, ACTION)
    with Nursery(batcher) as nursery:
        processes = [nursery.start(actor) for actor in range(2)]
        rows = collect(batcher, minimum=2)
        nursery.kill(processes[0])
        batcher.reset_actor(0)
        for _ in range(3):
            sent = headers(rows)
            counters = rows[:, 32:56].copy().view(np.int64)[:, 2]
            batcher.answer(
                rows,
                np.array(
                    [
                        actor_nursery.right_action(int(actor), 0, int(counter))
                        for actor, counter in zip(sent['actor'], counters, strict=True)
                    ],
                    np.int32,
                ),
            )
            rows = collect(batcher, minimum=2)
            assert headers(rows)['actor'].tolist() == [1]
        batcher.close()
        assert nursery.wait(processes[1]) == actor_nursery.CLOSED


def test_no_memory_is_an_error():
    with pytest.raises(MemoryError, match='no memory for the rows of 2 actors'):
        RowBatcher(2, [ArraySpec((1 << 62,), 'uint8')], ACTION)
