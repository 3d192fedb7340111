"""Tests of the batcher of actor processes.

Tests of ordering use clients in threads of this process, one call at a time. Tests of crashes use
processes (`actor_nursery.py`) that number their rows and check their answers, which reveals lost,
repeated, torn and misdelivered ones. Deadlocks and lost wake-ups show as time-outs.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import os
import random
import signal
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
    count_rows,
    make_counting_batcher,
    serve_counting,
)
from tensorflow.python.eager import cancellation
from threads import start

from dynamic_batching.actor_client import ActorClient, ClosedError
from dynamic_batching.unroll_batcher import ActorState, UnrollBatcher
from impala.trajectory import ArraySpec, EpisodeEnd

PROMPTLY = 5  # Seconds; milliseconds unless the machine is busy.
FOREVER_MS = 1e6
SCALAR = ArraySpec((), 'float32')
ACTION = ArraySpec((), 'int32')
BYTE = ArraySpec((1,), 'uint8')
NUMBERS = ArraySpec((2,), 'float32')


def make_batcher(num_actors, **options):
    """A batcher whose observation is one byte and whose only output is the action."""
    arguments = {
        'inputs': [*FIXED_INPUTS, BYTE],
        'outputs': [ACTION],
        'states': [],
        'level_ids': range(num_actors),
        'unroll_length': 2,
        'queue_capacity': 4,
        'timeout_ms': FOREVER_MS,
    }
    return UnrollBatcher(**(arguments | options))


def get(batcher):
    """Returns the next batch of requests; fails if none comes."""
    return start(batcher.get_inputs).result(TIMEOUT)


def echo(batcher, requests, states=()):
    """Answers every row with the byte that it sent."""
    actions = tf.cast(requests.inputs[5][:, 0], tf.int32)
    batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [actions], list(states))


def connect(batcher, actor):
    """A client of a batcher whose observation is one byte."""
    return actor_nursery.WaitingClient(batcher.fd, actor, [BYTE])


def send(client, byte, is_first=False):
    """Sends a row in a thread; returns the future of its action."""
    observation = (np.array([byte], np.uint8),)
    if is_first:
        return start(client.start, EpisodeEnd.TERMINATED, observation)
    return start(client.step, 1.0, EpisodeEnd.NOT_ENDED, observation)


def first_rows(batcher, actors):
    """Connects clients that send their numbers as first rows; returns the futures."""
    return [send(connect(batcher, actor), actor, is_first=True) for actor in actors]


def wait_until_asleep(pid):
    """Waits until a connected process sleeps, which it only does to wait for its action."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with open(f'/proc/{pid}/stat', encoding='ascii') as file:
            if file.read().rpartition(')')[2].split()[0] == 'S':
                return
        time.sleep(0.001)
    raise AssertionError('the actor never slept')


@dataclasses.dataclass
class Row:
    """A row of an actor and its answer."""

    reward: float
    episode_return: float
    episode_step: int
    episode_frames: int
    end: int
    frame: np.ndarray
    words: np.ndarray
    frames: int
    outputs: list | None = None  # The answer to this row.
    state_before: list | None = None
    version: int | None = None


def random_array(rng, spec):
    """Random numbers of a spec: no NaN, which is unequal to itself, and no negative action."""
    if spec is ACTION:
        return rng.integers(0, 2**31 - 1, spec.shape, spec.dtype)
    if spec.dtype == 'float32':
        return rng.normal(size=spec.shape).astype(np.float32)
    info = np.iinfo(spec.dtype)
    return rng.integers(info.min, info.max, spec.shape, spec.dtype, endpoint=True)


@pytest.mark.parametrize(
    ('in_graph', 'action_spec'),
    [
        (False, ACTION),
        (True, ACTION),
        (False, ArraySpec((3,), 'int32')),
        (True, ArraySpec((40,), 'float32')),
    ],
)
def test_unrolls_hold_what_was_sent_and_answered(in_graph, action_spec):
    num_actors, unroll_length, batch_size = 3, 4, 2
    rng = np.random.default_rng(1)
    frame_spec, words_spec = ArraySpec((2, 3, 1), 'uint8'), ArraySpec((5,), 'int32')
    output_specs = [action_spec, ArraySpec((3,), 'float32'), SCALAR]
    state_specs = [ArraySpec((2,), 'float32'), ArraySpec((), 'int64')]
    level_ids = [7, 0, 7]
    batcher = UnrollBatcher(
        [*FIXED_INPUTS, frame_spec, words_spec],
        output_specs,
        state_specs,
        level_ids,
        unroll_length,
        queue_capacity=8,
        minimum_batch_size=1,
        maximum_batch_size=num_actors,
        timeout_ms=FOREVER_MS,
    )
    get_inputs, set_outputs = batcher.get_inputs, batcher.set_outputs
    dequeue = functools.partial(batcher.dequeue, batch_size)
    if in_graph:
        get_inputs, dequeue = tf.function(get_inputs), tf.function(dequeue)

        @tf.function
        def set_outputs(*arguments):
            batcher.set_outputs(*arguments)

    def play(client, row, is_first):
        observation = (row.frame, row.words)
        if is_first:
            return client.start(row.end, observation)
        return client.step(row.reward, row.end, observation, row.frames)

    zero_outputs = [np.zeros(spec.shape, spec.dtype) for spec in output_specs]
    zero_states = [np.zeros(spec.shape, spec.dtype) for spec in state_specs]
    observation_specs = [frame_spec, words_spec]
    clients = [
        actor_nursery.WaitingClient(batcher.fd, actor, observation_specs, action_spec)
        for actor in range(num_actors)
    ]
    histories = [[] for _ in range(num_actors)]  # Since each actor's last reset.
    totals = [(0.0, 0, 0)] * num_actors
    futures = {}
    expected = collections.deque()
    was_replaced = False
    with closing(batcher):
        for iteration in range(150):
            if iteration >= 70 and not was_replaced and 1 not in futures:
                # As if its process had been replaced while it computed its next row.
                was_replaced = True
                batcher.reset_actor(1)
                clients[1] = actor_nursery.WaitingClient(
                    batcher.fd, 1, observation_specs, action_spec
                )
                histories[1], totals[1] = [], (0.0, 0, 0)
            for actor in range(num_actors):
                if actor in futures or rng.random() < 0.4:
                    continue
                is_first = not histories[actor]
                total, steps, total_frames = totals[actor]
                frames = int(rng.integers(1, 5))
                reward = 0.0 if is_first else float(np.float32(rng.normal() * 10))
                end = 1 if is_first else int(rng.choice(4, p=[0.6, 0.1, 0.1, 0.2]))
                if not is_first:
                    total, steps = total + reward, steps + 1
                    total_frames += frames
                row = Row(
                    reward,
                    total,
                    steps,
                    total_frames,
                    end,
                    random_array(rng, frame_spec),
                    random_array(rng, words_spec),
                    frames,
                )
                ends_game = end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED)
                totals[actor] = (0.0, 0, 0) if ends_game else (total, steps, total_frames)
                histories[actor].append(row)
                futures[actor] = start(play, clients[actor], row, is_first)
            if not futures:
                continue
            requests = get_inputs()
            actors = requests.tickets[0].numpy().tolist()
            assert actors and set(actors) <= set(futures) and len(set(actors)) == len(actors)
            for i, actor in enumerate(actors):
                history = histories[actor]
                before = history[-2] if len(history) > 1 else None
                got = [tensor.numpy()[i] for tensor in requests.inputs]
                row = history[-1]
                want = [
                    row.reward, row.episode_return, row.episode_step, row.episode_frames, row.end,
                ]  # fmt: skip
                np.testing.assert_array_equal(np.array(got[:5], np.float32), np.float32(want))
                np.testing.assert_array_equal(got[5], row.frame)
                np.testing.assert_array_equal(got[6], row.words)
                np.testing.assert_array_equal(
                    requests.last_action.numpy()[i],
                    before.outputs[0] if before else zero_outputs[0],
                )
                row.state_before = [tensor.numpy()[i] for tensor in requests.states]
                for state, wanted in zip(
                    row.state_before, before.state_after if before else zero_states, strict=True
                ):
                    np.testing.assert_array_equal(state, wanted)
                if len(history) > 1 and (len(history) - 1) % unroll_length == 0:
                    rows = history[-unroll_length - 1 :]
                    led_to_first = history[-unroll_length - 2] if rows[0] != history[0] else None
                    expected.append((actor, led_to_first, rows))
            outputs = [np.stack([random_array(rng, spec) for _ in actors]) for spec in output_specs]
            states = [np.stack([random_array(rng, spec) for _ in actors]) for spec in state_specs]
            set_outputs(
                requests.tickets,
                tf.constant(iteration, tf.int64),
                [tf.constant(output) for output in outputs],
                [tf.constant(state) for state in states],
            )
            for i, actor in enumerate(actors):
                row = histories[actor][-1]
                row.outputs = [output[i] for output in outputs]
                row.state_after = [state[i] for state in states]
                row.version = iteration
                answer = futures.pop(actor).result(TIMEOUT)
                np.testing.assert_array_equal(answer, row.outputs[0])

            while len(expected) >= batch_size:
                num_inputs = rng.choice([None, 5, 6])
                unrolls = dequeue(num_inputs)
                observations = (frame_spec, words_spec)[
                    : 2 if num_inputs is None else num_inputs - 5
                ]
                for tensor, spec in zip(unrolls.inputs[5:], observations, strict=True):
                    assert tensor.shape == (unroll_length + 1, batch_size, *spec.shape)
                    assert tensor.dtype == spec.dtype
                for column in range(batch_size):
                    actor, led_to_first, rows = expected.popleft()
                    assert unrolls.actors.numpy()[column] == actor
                    assert unrolls.level_ids.numpy()[column] == level_ids[actor]
                    assert unrolls.policy_versions.numpy()[column] == rows[0].version
                    for got, want in zip(unrolls.states, rows[0].state_before, strict=True):
                        np.testing.assert_array_equal(got.numpy()[column], want)
                    names = (
                        'reward', 'episode_return', 'episode_step', 'episode_frames', 'end',
                        'frame', 'words',
                    )  # fmt: skip
                    for name, field in zip(names[:num_inputs], unrolls.inputs, strict=True):
                        want = np.stack([np.asarray(getattr(row, name)) for row in rows])
                        got = field.numpy()[:, column]
                        np.testing.assert_array_equal(got, want.astype(got.dtype))
                    answers = [led_to_first.outputs if led_to_first else zero_outputs]
                    answers += [row.outputs for row in rows[:-1]]
                    for i, field in enumerate(unrolls.outputs):
                        want = np.stack([answer[i] for answer in answers])
                        np.testing.assert_array_equal(field.numpy()[:, column], want)
    assert was_replaced


def test_a_batch_waits_for_its_minimum():
    batcher = make_batcher(3, minimum_batch_size=3)
    with closing(batcher):
        requests = start(batcher.get_inputs)
        actors = first_rows(batcher, [0, 1])
        with pytest.raises(concurrent.futures.TimeoutError):
            requests.result(0.3)
        actors += first_rows(batcher, [2])
        requests = requests.result(TIMEOUT)
        assert sorted(requests.tickets[0].numpy()) == [0, 1, 2]
        echo(batcher, requests)
        assert [actor.result(TIMEOUT) for actor in actors] == [0, 1, 2]


def test_batches_do_not_wait_for_actors_blocked_on_a_full_queue():
    batcher = make_batcher(4, unroll_length=1, queue_capacity=1, minimum_batch_size=4)
    with closing(batcher):
        clients = [connect(batcher, actor) for actor in range(4)]
        actions = [send(client, 0, is_first=True) for client in clients]
        echo(batcher, get(batcher))
        assert [action.result(TIMEOUT) for action in actions] == [0] * 4
        # All four unrolls are full and the queue has room for one, so its actor is a batch alone.
        actions = [send(client, 7) for client in clients]
        requests = get(batcher)
        assert requests.last_action.shape == [1]


def test_batches_do_not_wait_for_finished_actors():
    batcher = make_batcher(4, minimum_batch_size=4)
    with closing(batcher):
        clients = [connect(batcher, actor) for actor in range(4)]
        actions = [send(client, 0, is_first=True) for client in clients]
        echo(batcher, get(batcher))
        assert [action.result(TIMEOUT) for action in actions] == [0] * 4
        requests = start(batcher.get_inputs)
        actions = [send(clients[0], 5), send(clients[1], 6)]
        clients[2].finish()
        with pytest.raises(concurrent.futures.TimeoutError):
            requests.result(0.3)
        clients[3].finish()
        assert sorted(requests.result(PROMPTLY).tickets[0].numpy()) == [0, 1]
        # The replacement of a finished actor counts again.
        batcher.reset_actor(3)
        echo(batcher, requests.result())
        assert [action.result(TIMEOUT) for action in actions] == [5, 6]
        requests = start(batcher.get_inputs)
        send(clients[0], 7)
        send(clients[1], 8)
        with pytest.raises(concurrent.futures.TimeoutError):
            requests.result(0.3)
        send(connect(batcher, 3), 9, is_first=True)
        assert sorted(requests.result(PROMPTLY).tickets[0].numpy()) == [0, 1, 3]


def test_a_full_unroll_does_not_wait_for_a_batch():
    batcher = make_batcher(2, unroll_length=1, minimum_batch_size=2)
    with closing(batcher):
        clients = [connect(batcher, actor) for actor in range(2)]
        actions = [send(client, 0, is_first=True) for client in clients]
        echo(batcher, get(batcher))
        assert [action.result(TIMEOUT) for action in actions] == [0, 0]
        requests = start(batcher.get_inputs)
        unrolls = start(batcher.dequeue, 1)
        actions = [send(clients[1], 7)]
        # The other actor still plays, but the learner gets the complete unroll.
        assert unrolls.result(TIMEOUT).inputs[5].numpy().tolist() == [[[0]], [[7]]]
        assert not requests.done()
        actions.append(send(clients[0], 8))
        echo(batcher, requests.result(TIMEOUT))
        assert [action.result(TIMEOUT) for action in actions] == [7, 8]


def test_a_smaller_batch_starts_after_the_time_out():
    batcher = make_batcher(3, minimum_batch_size=3, timeout_ms=200)
    with closing(batcher):
        started = time.monotonic()
        requests = start(batcher.get_inputs)
        actors = first_rows(batcher, [2])
        requests = requests.result(TIMEOUT)
        assert time.monotonic() - started >= 0.2
        assert requests.tickets[0].numpy().tolist() == [2]
        echo(batcher, requests)
        assert actors[0].result(TIMEOUT) == 2
        # Without requests there is no batch, even after the time-out.
        requests = start(batcher.get_inputs)
        with pytest.raises(concurrent.futures.TimeoutError):
            requests.result(0.5)
        first_rows(batcher, [0])
        assert requests.result(TIMEOUT).tickets[0].numpy().tolist() == [0]


def test_actors_beyond_the_maximum_batch_size_are_served_in_turn():
    num_actors = 5
    batcher = make_batcher(
        num_actors,
        minimum_batch_size=2,
        maximum_batch_size=2,
        timeout_ms=50,
        unroll_length=1000,
    )

    def play(actor):
        client = connect(batcher, actor)
        observation = (np.array([actor], np.uint8),)
        with contextlib.suppress(ClosedError):
            action = client.start(EpisodeEnd.TERMINATED, observation)
            while action == actor:
                action = client.step(0.0, EpisodeEnd.NOT_ENDED, observation)
            raise AssertionError('an answer for somebody else')

    with closing(batcher):
        players = [start(play, actor) for actor in range(num_actors)]
        served = collections.Counter()
        for _ in range(300):
            requests = get(batcher)
            actors = requests.tickets[0].numpy().tolist()
            assert 1 <= len(actors) <= 2
            served.update(actors)
            echo(batcher, requests)
    for player in players:
        player.result(TIMEOUT)
    # Slack, since threads of one interpreter are not always ready.
    assert min(served.values()) > 0.5 * max(served.values()), served


def test_batches_of_one_serve_every_actor():
    num_actors = 4
    batcher = make_batcher(num_actors, maximum_batch_size=1, minimum_batch_size=1)
    with closing(batcher):
        actors = first_rows(batcher, range(num_actors))
        served = []
        for _ in range(num_actors):
            requests = get(batcher)
            served += requests.tickets[0].numpy().tolist()
        assert sorted(served) == [0, 1, 2, 3]
        assert not any(actor.done() for actor in actors)


def test_several_batches_may_be_in_progress():
    batcher = make_batcher(4, maximum_batch_size=2, minimum_batch_size=2)
    with closing(batcher):
        actors = first_rows(batcher, range(4))
        first, second = get(batcher), get(batcher)
        echo(batcher, second)
        for actor in second.tickets[0].numpy():
            assert actors[actor].result(TIMEOUT) == actor
        assert not any(actors[actor].done() for actor in first.tickets[0].numpy())
        echo(batcher, first)
        for actor in range(4):
            assert actors[actor].result(TIMEOUT) == actor


@pytest.mark.parametrize(
    'options, message',
    [
        ({'minimum_batch_size': 0}, 'minimum_batch_size'),
        ({'minimum_batch_size': 3, 'maximum_batch_size': 2}, 'maximum_batch_size'),
        ({'queue_capacity': 0}, 'more unrolls than actors'),
        ({'unroll_length': 0}, 'at least two rows'),
        ({'timeout_ms': -1.0}, 'timeout'),
        ({'timeout_ms': float('nan')}, 'timeout'),
        ({'inputs': FIXED_INPUTS}, 'observations'),
        ({'inputs': [ArraySpec((), 'float32')] * 18}, 'observations'),
        ({'outputs': []}, 'action'),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(tf.errors.OpError, match=message):
        make_batcher(2, **options)


def test_a_client_refuses_wrong_actors_and_observations():
    spec = ArraySpec((2, 3), 'uint8')
    batcher = make_batcher(2, inputs=[*FIXED_INPUTS, spec])
    right = np.arange(6, dtype=np.uint8).reshape([2, 3])
    with closing(batcher):
        for actor in (2, -1):
            with pytest.raises(ValueError, match='no actor'):
                actor_nursery.WaitingClient(batcher.fd, actor, [spec])
        for specs in ([], [BYTE], [spec, spec], [ArraySpec((2, 3), 'int32')]):
            with pytest.raises(ValueError, match='made for observations'):
                actor_nursery.WaitingClient(batcher.fd, 0, specs)
        for action in (ArraySpec((1,), 'int32'), SCALAR, ArraySpec((2,), 'float32')):
            with pytest.raises(ValueError, match='made for actions that are int32 scalars'):
                actor_nursery.WaitingClient(batcher.fd, 0, [spec], action)
        client = actor_nursery.WaitingClient(batcher.fd, 0, [spec])
        for wrong in [
            (np.zeros([2, 4], np.uint8),),
            (np.zeros([3, 2], np.uint8),),
            (np.zeros([2, 3], np.int32),),
            (np.zeros([2, 3], np.int8),),
            (right, right),
            (),
        ]:
            with pytest.raises(ValueError):
                client.start(EpisodeEnd.TERMINATED, wrong)
        # Refused rows leave nothing behind. Non-contiguous arrays arrive intact.
        answer = start(client.start, EpisodeEnd.TERMINATED, (np.asfortranarray(right),))
        requests = get(batcher)
        assert [float(value[0]) for value in requests.inputs[:5]] == [0, 0, 0, 0, 1]
        np.testing.assert_array_equal(requests.inputs[5][0], right)
        batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [tf.constant([5])], [])
        assert answer.result(TIMEOUT) == 5


def test_a_client_refuses_an_occupied_slot():
    batcher = make_batcher(1)
    with closing(batcher):
        client = connect(batcher, 0)
        with pytest.raises(RuntimeError, match='start'):
            send(client, 1).result(PROMPTLY)
        answer = send(client, 1, is_first=True)
        echo(batcher, get(batcher))
        answer.result(TIMEOUT)
        for other in (client, connect(batcher, 0)):
            with pytest.raises(RuntimeError, match='reset'):
                send(other, 2, is_first=True).result(PROMPTLY)
        batcher.reset_actor(0)
        answer = send(connect(batcher, 0), 3, is_first=True)
        echo(batcher, get(batcher))
        assert answer.result(TIMEOUT) == 3


@pytest.mark.parametrize('contents', [b'', b'x', b'\0' * 100000])
def test_a_client_refuses_files_that_are_not_segments(contents, tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(contents)
    with open(path, 'r+b') as file, pytest.raises(ValueError, match='segment'):
        actor_nursery.WaitingClient(file.fileno(), 0, [BYTE])


def test_a_client_refuses_pipes_and_invalid_descriptors():
    read_end, write_end = os.pipe()
    with open(read_end, 'rb'), open(write_end, 'wb'), pytest.raises(ValueError, match='segment'):
        actor_nursery.WaitingClient(read_end, 0, [BYTE])
    with pytest.raises(ValueError, match='segment'):
        actor_nursery.WaitingClient(-1, 0, [BYTE])


def test_malformed_answers_are_refused():
    batcher = make_counting_batcher(1)
    with closing(batcher):
        start(
            actor_nursery.WaitingClient(batcher.fd, 0, actor_nursery.OBSERVATION).start,
            EpisodeEnd.TERMINATED,
            actor_nursery.observation(0, 0, 0),
        )
        requests = get(batcher)
        version = tf.constant(0, tf.int64)
        outputs = [tf.zeros([1], tf.int32), tf.zeros([1, 3]), tf.zeros([1], tf.int64)]
        states = [tf.zeros([1], tf.int64), tf.zeros([1, 2])]
        actors, epochs = requests.tickets
        for wrong in [
            (requests.tickets, version, [outputs[0], tf.zeros([1, 4]), outputs[2]], states),
            (requests.tickets, version, [outputs[0], tf.zeros([2, 3]), outputs[2]], states),
            (requests.tickets, version, [tf.zeros([1]), *outputs[1:]], states),
            (requests.tickets, version, outputs[:2], states),
            (requests.tickets, version, [*outputs, outputs[0]], states),
            (requests.tickets, version, outputs, [states[0], tf.zeros([1, 3])]),
            (requests.tickets, version, outputs, states[:1]),
            (requests.tickets, version, outputs, [*states, states[0]]),
            (requests.tickets, tf.zeros([2], tf.int64), outputs, states),
            ((actors, tf.zeros([0], tf.int64)), version, outputs, states),
            ((actors + 1, epochs), version, outputs, states),
            ((actors - 1, epochs), version, outputs, states),
        ]:
            with pytest.raises(tf.errors.InvalidArgumentError):
                batcher.set_outputs(*wrong)
        with pytest.raises(tf.errors.InvalidArgumentError, match='no actor 1'):
            batcher.reset_actor(1)
        batcher.set_outputs(requests.tickets, version, outputs, states)


def test_answers_to_outdated_tickets_are_ignored():
    batcher = make_batcher(1)
    with closing(batcher):
        client = connect(batcher, 0)
        answer = send(client, 1, is_first=True)
        old = get(batcher)
        echo(batcher, old)
        assert answer.result(TIMEOUT) == 1
        answer = send(client, 1)
        requests = get(batcher)
        batcher.reset_actor(0)
        echo(batcher, requests)
        with pytest.raises(concurrent.futures.TimeoutError):
            answer.result(0.1)


def make_number_batcher(**options):
    """A batcher of one actor, whose observation is two numbers."""
    return make_batcher(1, inputs=[*FIXED_INPUTS, NUMBERS], **options)


def play_row(batcher, client, numbers, reward=1.0, is_first=False):
    """Sends and answers a row; returns its non-finite values and what the policy saw."""
    observation = [np.array(numbers, np.float32)]
    if is_first:
        non_finite = client.start(EpisodeEnd.TERMINATED, observation)
    else:
        non_finite = client.send(reward, EpisodeEnd.NOT_ENDED, observation)
    requests = get(batcher)
    batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [tf.constant([0])], [])
    client.wait()
    return non_finite, requests.inputs[0].numpy()[0], requests.inputs[-1].numpy()[0].tolist()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_unrolls_with_non_finite_values_are_discarded(value):
    batcher = make_number_batcher()
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        assert batcher.statistics().non_finite is None
        # Unrolls of rows 0-2, 2-4, ... Row 1 spoils the first, row 6 the third and the fourth.
        for row in range(11):
            numbers = [row, value if row == 1 else 0]
            reward = value if row == 6 else 1
            seen = play_row(batcher, client, numbers, reward, is_first=row == 0)
            if row == 1:
                np.testing.assert_equal(seen, ({1: value}, 1, [1, 0]))
            elif row == 6:
                np.testing.assert_equal(seen, ({0: value}, 0, [6, 0]))
            else:
                assert seen == ({}, row > 0, [row, 0])
        unrolls = batcher.dequeue(2)
        assert unrolls.inputs[-1].numpy()[:, :, 0].T.tolist() == [[2, 3, 4], [8, 9, 10]]
        statistics = batcher.statistics()
        assert statistics.queued_unrolls == 2
        assert statistics.discarded_unrolls == 3
        assert statistics.discarded_in_a_row == 0
        # Discarded unrolls count as completed, since they show that the actor works.
        assert statistics.completed_unrolls == [5]
        np.testing.assert_equal(statistics.non_finite, (0, 0, value))
        # A non-finite reward makes all later returns of its episode non-finite.
        returns = unrolls.inputs[1].numpy().T
        assert returns[0].tolist() == [2, 3, 4]
        assert not np.isfinite(returns[1]).any()


def test_a_reward_beyond_float32_is_not_finite():
    batcher = make_number_batcher()
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        play_row(batcher, client, [0, 0], is_first=True)
        assert play_row(batcher, client, [0, 0], reward=-1e39)[0] == {0: -np.inf}


def test_first_observations_are_checked():
    batcher = make_number_batcher()
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        seen = play_row(batcher, client, [np.nan, 3], is_first=True)
        np.testing.assert_equal(seen, ({1: np.nan}, 0, [0, 3]))
        for row in range(1, 5):
            play_row(batcher, client, [row, 0])
        assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [2, 3, 4]


def test_discarded_unrolls_need_no_room_in_the_queue():
    batcher = make_number_batcher(queue_capacity=1)
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        play_row(batcher, client, [0, 0], is_first=True)
        # The first unroll fills the queue; the following ones are spoiled, up to row 20.
        for row in range(1, 23):
            play_row(batcher, client, [row, np.inf if 3 <= row <= 20 else 0])
        assert batcher.statistics().discarded_unrolls == 10
        for row in (23, 24):
            requests = start(batcher.get_inputs)
            client.send(1.0, EpisodeEnd.NOT_ENDED, [np.array([row, 0], np.float32)])
            if row == 24:
                # This unroll is good, and the queue has no room for it.
                with pytest.raises(concurrent.futures.TimeoutError):
                    requests.result(0.3)
                assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [0, 1, 2]
            tickets = requests.result(TIMEOUT).tickets
            batcher.set_outputs(tickets, tf.constant(0, tf.int64), [tf.constant([0])], [])
            client.wait()
        assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [22, 23, 24]


def test_a_reset_forgets_non_finite_values():
    batcher = make_number_batcher()
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        play_row(batcher, client, [np.nan, 0], is_first=True)
        client.send(np.nan, EpisodeEnd.NOT_ENDED, [np.zeros(2, np.float32)])
        batcher.reset_actor(0)
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        for row in range(3):
            play_row(batcher, client, [row, 0], is_first=row == 0)
        assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [0, 1, 2]
        assert batcher.statistics().discarded_unrolls == 0


def test_a_batcher_closes_after_too_many_discarded_unrolls_in_a_row():
    batcher = make_number_batcher(max_discarded_in_a_row=2)
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        play_row(batcher, client, [0, 0], is_first=True)
        # The first and the third unroll are spoiled: not two in a row.
        for row in range(1, 7):
            play_row(batcher, client, [row, 0], np.nan if row in (1, 5) else 1)
        play_row(batcher, client, [np.nan, 0])
        requests, unrolls = start(batcher.get_inputs), start(batcher.dequeue, 2)
        client.send(1.0, EpisodeEnd.NOT_ENDED, [np.zeros(2, np.float32)])
        for waiting in (requests, unrolls):
            with pytest.raises(tf.errors.CancelledError):
                waiting.result(PROMPTLY)
        with pytest.raises(ClosedError):
            client.wait()
        assert batcher.statistics().discarded_in_a_row == 2


def test_unrolls_discarded_while_the_queue_is_full_do_not_close_the_batcher():
    batcher = make_batcher(
        2, inputs=[*FIXED_INPUTS, NUMBERS], queue_capacity=1, max_discarded_in_a_row=2
    )
    with closing(batcher):
        good, bad = (ActorClient(batcher.fd, actor, [NUMBERS]) for actor in range(2))
        for row in range(4):
            play_row(batcher, good, [row, 0], is_first=row == 0)
        # The queue holds its first unroll and has no room for the second.
        good.send(1.0, EpisodeEnd.NOT_ENDED, [np.array([4, 0], np.float32)])
        for row in range(11):
            play_row(batcher, bad, [np.nan, 0], is_first=row == 0)
        assert batcher.statistics().discarded_unrolls == 5
        assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [0, 1, 2]
        requests = get(batcher)
        assert requests.inputs[-1].numpy()[0, 0] == 4
        assert batcher.dequeue(1).inputs[-1].numpy()[:, 0, 0].tolist() == [2, 3, 4]
        assert not batcher.activity().closed
        # Now there is room, but all new unrolls are spoiled.
        for _ in range(3):
            play_row(batcher, bad, [np.nan, 0])
        requests = start(batcher.get_inputs)
        bad.send(1.0, EpisodeEnd.NOT_ENDED, [np.array([np.nan, 0], np.float32)])
        with pytest.raises(tf.errors.CancelledError):
            requests.result(PROMPTLY)


def test_returns_are_summed_in_double_precision():
    batcher = make_number_batcher()
    with closing(batcher):
        client = ActorClient(batcher.fd, 0, [NUMBERS])
        play_row(batcher, client, [0, 0], is_first=True)
        # float32 cannot hold the second of these returns, 2**24 + 1.
        for reward in (2**24, 1, 1, 0):
            play_row(batcher, client, [0, 0], reward)
        returns = batcher.dequeue(2).inputs[1].numpy().T
        assert returns.tolist() == [[0, 2**24, 2**24], [2**24, 2**24 + 2, 2**24 + 2]]


def test_closing_fails_waiting_and_later_calls():
    batcher = make_batcher(2, minimum_batch_size=2)
    cancelled = tf.errors.CancelledError
    waiting = [start(batcher.get_inputs) for _ in range(2)]
    waiting += [start(batcher.dequeue, 3) for _ in range(2)]
    actors = first_rows(batcher, [0])
    with pytest.raises(concurrent.futures.TimeoutError):
        waiting[0].result(0.2)
    batcher.close()
    for future in waiting:
        with pytest.raises(cancelled):
            future.result(PROMPTLY)
    with pytest.raises(ClosedError):
        actors[0].result(PROMPTLY)
    batcher.close()
    with pytest.raises(cancelled):
        start(batcher.get_inputs).result(PROMPTLY)
    with pytest.raises(cancelled):
        start(batcher.dequeue, 1).result(PROMPTLY)
    with pytest.raises(ClosedError):
        first_rows(batcher, [1])[0].result(PROMPTLY)
    batcher.reset_actor(0)
    assert batcher.statistics()[1] == [0, 0]


def test_closing_wakes_every_waiting_call():
    # Each round closes at another instant while the callers go to sleep.
    rng = random.Random(1)
    slowest = 0.0
    for _ in range(60):
        batcher = make_batcher(3, minimum_batch_size=3)
        waiting = [start(batcher.get_inputs), start(batcher.dequeue, 2)]
        waiting += first_rows(batcher, [0, 1])
        until = time.perf_counter() + rng.random() * 1e-3
        while time.perf_counter() < until:
            pass
        closed_at = time.perf_counter()
        for closer in [start(batcher.close) for _ in range(3)]:
            closer.result(PROMPTLY)
        for future in waiting:
            with pytest.raises((tf.errors.CancelledError, ClosedError)):
                future.result(PROMPTLY)
        slowest = max(slowest, time.perf_counter() - closed_at)
    assert slowest < PROMPTLY


def test_a_garbage_collected_batcher_closes():
    batcher = make_batcher(1)
    descriptor = batcher.fd
    client = connect(batcher, 0)
    answer = send(client, 1, is_first=True)
    echo(batcher, get(batcher))
    assert answer.result(TIMEOUT) == 1
    answer = send(client, 1)
    loop = [batcher]
    loop.append(loop)
    del batcher, loop
    gc.collect()
    with pytest.raises(ClosedError):
        answer.result(PROMPTLY)
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize('method', ['get_inputs', 'dequeue'])
def test_cancelling_a_waiting_graph(method):
    batcher = make_batcher(1)
    arguments = [] if method == 'get_inputs' else [1]
    with closing(batcher):
        function = tf.function(lambda: getattr(batcher, method)(*arguments)[0])
        concrete = function.get_concrete_function()
        for _ in range(10):
            manager = cancellation.CancellationManager()
            cancelled = start(manager.get_cancelable_function(concrete))
            manager.start_cancel()
            with pytest.raises(tf.errors.CancelledError):
                cancelled.result(PROMPTLY)
        # Cancelled calls leave nothing behind: requests and unrolls go to later calls.
        client = connect(batcher, 0)
        answer = send(client, 1, is_first=True)
        unrolls = start(batcher.dequeue, 1)
        for _ in range(2):
            echo(batcher, get(batcher))
            assert answer.result(TIMEOUT) == 1
            answer = send(client, 1)
        get(batcher)
        assert unrolls.result(TIMEOUT).inputs[5].shape == (3, 1, 1)


@pytest.mark.parametrize('method', ['get_inputs', 'dequeue'])
def test_cancelling_one_of_two_waiting_graphs(method):
    batcher = make_batcher(1)
    arguments = [] if method == 'get_inputs' else [1]
    with closing(batcher):
        function = tf.function(lambda: getattr(batcher, method)(*arguments)[0])
        concrete = function.get_concrete_function()
        first = start(concrete)
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(0.2)
        for _ in range(5):
            manager = cancellation.CancellationManager()
            second = start(manager.get_cancelable_function(concrete))
            manager.start_cancel()
            with pytest.raises(tf.errors.CancelledError):
                second.result(PROMPTLY)
        assert not first.done()


def test_actors_wait_when_the_queue_is_full():
    num_actors, capacity, unroll_length, batch_size = 4, 2, 3, 9
    batcher = make_counting_batcher(
        num_actors, unroll_length=unroll_length, queue_capacity=capacity, timeout_ms=1
    )
    with Nursery(batcher) as nursery, closing(batcher):
        processes = [nursery.start(actor) for actor in range(num_actors)]
        server = start(serve_counting, batcher)
        deadline = time.monotonic() + TIMEOUT
        while sum(batcher.statistics()[1]) < capacity and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes:
            wait_until_asleep(process)
        time.sleep(0.2)
        assert sum(batcher.statistics()[1]) == capacity
        # A batch may be larger than the queue: actors continue while it is assembled.
        dequeued = 0
        for _ in range(20):
            unrolls = start(batcher.dequeue, batch_size).result(TIMEOUT)
            for column in range(batch_size):
                check_counting_unroll(unrolls, column, unroll_length, range(num_actors))
            dequeued += batch_size
            assert sum(batcher.statistics()[1]) <= dequeued + capacity
        assert all(completed > 0 for completed in batcher.statistics()[1])
        batcher.close()
        server.result(TIMEOUT)
        assert [nursery.wait(process) for process in processes] == [actor_nursery.CLOSED] * 4


def test_actors_share_the_room_in_the_queue():
    num_actors, batch_size = 6, 4
    batcher = make_counting_batcher(
        num_actors, unroll_length=3, queue_capacity=1, minimum_batch_size=3, timeout_ms=1
    )
    with Nursery(batcher) as nursery, closing(batcher):
        for actor in range(num_actors):
            nursery.start(actor)
        server = start(serve_counting, batcher)
        # Dequeue more slowly than actors play, so that they always wait for room.
        delivered = collections.Counter()
        for _ in range(30):
            time.sleep(0.02)
            unrolls = start(batcher.dequeue, batch_size).result(TIMEOUT)
            delivered.update(unrolls.actors.numpy().tolist())
        batcher.close()
        server.result(TIMEOUT)
    # An equal share is 20 unrolls; an actor that is always last in line gets hardly any.
    assert min(delivered[actor] for actor in range(num_actors)) >= 10


def test_an_actor_killed_while_it_waits_is_forgotten():
    batcher = make_counting_batcher(2, unroll_length=100)
    version = tf.constant(0, tf.int64)
    with Nursery(batcher) as nursery, closing(batcher):
        killed = nursery.start(0)
        wait_until_asleep(killed)
        nursery.kill(killed)
        batcher.reset_actor(0)
        nursery.start(1)
        requests = get(batcher)
        assert requests.tickets[0].numpy().tolist() == [1]
        count_rows(batcher, requests, version)
        nursery.start(0, incarnation=1)
        seen = []
        while not seen:
            requests = get(batcher)
            who = requests.inputs[5].numpy()
            seen = who[who[:, 0] == 0].tolist()
            count_rows(batcher, requests, version)
        assert seen == [[0, 1, 0]]


def test_a_replaced_actor_gets_no_answer_meant_for_its_predecessor():
    batcher = make_counting_batcher(2, minimum_batch_size=2, unroll_length=100)
    version = tf.constant(0, tf.int64)
    with Nursery(batcher) as nursery, closing(batcher):
        processes = [nursery.start(actor) for actor in range(2)]
        for _ in range(5):
            count_rows(batcher, get(batcher), version)
        old = get(batcher)
        nursery.kill(processes[0])
        batcher.reset_actor(0)
        nursery.start(0, incarnation=1)
        # By now the new process may have sent its first request.
        count_rows(batcher, old, version)
        new = get(batcher)
        order = np.argsort(new.tickets[0].numpy())
        np.testing.assert_array_equal(new.inputs[5].numpy()[order], [[0, 1, 0], [1, 0, 6]])
        np.testing.assert_array_equal(new.inputs[4].numpy()[order[0]], EpisodeEnd.TERMINATED)
        assert new.last_action.numpy()[order].tolist() == [
            0,
            actor_nursery.right_action(1, 0, 5),
        ]
        assert new.states[0].numpy()[order[0]] == 0
        assert new.states[0].numpy()[order[1]] != 0
        np.testing.assert_array_equal(new.states[1].numpy()[order[0]], [0, 0])


def test_an_actor_killed_between_requests_loses_only_its_unfinished_unroll():
    unroll_length = 4
    batcher = make_batcher(1, unroll_length=unroll_length)
    with closing(batcher):
        for incarnation in range(3):
            client = connect(batcher, 0)
            answer = send(client, 100 * incarnation, is_first=True)
            echo(batcher, get(batcher))
            answer.result(TIMEOUT)
            # One whole unroll and a part of the next.
            for row in range(1, unroll_length + 3):
                answer = send(client, 50 * incarnation + row)
                echo(batcher, get(batcher))
                answer.result(TIMEOUT)
            assert batcher.statistics()[1] == [1]
            batcher.reset_actor(0)
            assert batcher.statistics()[1] == [0]
        unrolls = batcher.dequeue(3)
        frames = unrolls.inputs[5].numpy()[:, :, 0]
        for incarnation in range(3):
            rows = [50 * incarnation + row for row in range(1, unroll_length + 1)]
            assert frames[:, incarnation].tolist() == [100 * incarnation, *rows]
            assert unrolls.outputs[0].numpy()[:, incarnation].tolist() == [
                0,
                100 * incarnation,
                *rows[:-1],
            ]
            assert unrolls.inputs[2].numpy()[:, incarnation].tolist() == [0, 1, 2, 3, 4]


def test_stages_are_timed():
    batcher = make_batcher(1)
    with closing(batcher):
        client = connect(batcher, 0)
        answer = send(client, 1, is_first=True)
        requests = get(batcher)
        time.sleep(0.3)
        echo(batcher, requests)
        answer.result(TIMEOUT)
        time.sleep(0.2)
        requests = start(batcher.get_inputs)
        time.sleep(0.1)
        answer = send(client, 1)
        echo(batcher, requests.result(TIMEOUT))
        answer.result(TIMEOUT)
        seconds = batcher.statistics()[0]
    assert 0.3 <= seconds['batcher/inference'] < 0.3 + PROMPTLY
    assert 0.3 <= seconds['actor/environment'] < 0.3 + PROMPTLY
    assert 0.3 <= seconds['actor/wait'] < 0.3 + PROMPTLY
    assert 0.1 <= seconds['batcher/wait'] < 0.1 + PROMPTLY
    assert seconds['batcher/gather'] < PROMPTLY and seconds['batcher/scatter'] < PROMPTLY
    assert seconds['queue/wait'] == 0 and seconds['queue/copy'] == 0


def test_activity_shows_what_each_actor_waits_for():
    """One of two actors plays three rows; only its progress changes."""

    def states_when(expected):
        deadline = time.monotonic() + TIMEOUT
        while (activity := batcher.activity()).states != expected:
            assert time.monotonic() < deadline, activity
            time.sleep(0.001)
        return activity

    with closing(make_batcher(2, minimum_batch_size=1)) as batcher:
        assert batcher.activity() == ([ActorState.IDLE] * 2, [0, 0], False)
        client = connect(batcher, 1)
        progress = [0]
        for row in range(3):
            action = send(client, row, is_first=row == 0)
            requests = get(batcher)
            activity = states_when([ActorState.IDLE, ActorState.SLEEPING])
            # Nothing is timed before the first row.
            assert row == 0 or activity.progress[1] > progress[-1]
            progress.append(activity.progress[1])
            echo(batcher, requests)
            assert action.result(TIMEOUT) == row
            activity = batcher.activity()
            assert activity.states == [ActorState.IDLE, ActorState.ACTING]
            assert activity.progress[0] == 0 and activity.progress[1] > progress[-1]
            progress.append(activity.progress[1])
        client = connect(batcher, 0)
        client._send(0.0, 0, EpisodeEnd.TERMINATED, (np.zeros(1, np.uint8),), True)
        assert batcher.activity().states == [ActorState.REQUESTED, ActorState.ACTING]
        echo(batcher, get(batcher))
        assert batcher.activity().states == [ActorState.ANSWERED, ActorState.ACTING]
        batcher.reset_actor(1)
        assert batcher.activity().states == [ActorState.ANSWERED, ActorState.IDLE]
    assert batcher.activity().closed


@pytest.mark.parametrize('minimum, maximum, capacity', [(8, 16, 3), (3, 3, 1)])
def test_killing_actors_at_random_damages_nothing(minimum, maximum, capacity):
    num_actors, unroll_length, batch_size = 16, 5, 6
    seconds = 4.0
    level_ids = [actor % 3 for actor in range(num_actors)]
    batcher = make_counting_batcher(
        num_actors,
        level_ids=level_ids,
        unroll_length=unroll_length,
        queue_capacity=capacity,
        minimum_batch_size=minimum,
        maximum_batch_size=maximum,
        timeout_ms=2,
    )
    rng = random.Random(capacity)
    dequeued = []  # (actor, incarnation, first counter) in the queue's order.

    def learn():
        with contextlib.suppress(tf.errors.CancelledError):
            while True:
                unrolls = batcher.dequeue(batch_size)
                for column in range(batch_size):
                    dequeued.append(
                        check_counting_unroll(unrolls, column, unroll_length, level_ids)
                    )

    with Nursery(batcher) as nursery, closing(batcher):
        processes = [nursery.start(actor) for actor in range(num_actors)]
        incarnations = [0] * num_actors
        server, learner = start(serve_counting, batcher), start(learn)
        kills = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # Two actors are never killed and must deliver every unroll.
            actor = rng.randrange(num_actors - 2)
            if rng.random() < 0.5:
                time.sleep(rng.random() * 0.01)
            assert nursery.kill(processes[actor]) == -signal.SIGKILL, 'died by itself'
            batcher.reset_actor(actor)
            incarnations[actor] += 1
            processes[actor] = nursery.start(actor, incarnations[actor])
            kills += 1
        assert not server.done() and not learner.done()
        # All of them keep playing.
        count = len(dequeued)
        deadline = time.monotonic() + TIMEOUT
        while not all(batcher.statistics()[1]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(batcher.statistics()[1])
        assert len(dequeued) > count
        batcher.close()
        server.result(TIMEOUT)
        learner.result(TIMEOUT)
        for process in processes:
            assert nursery.wait(process) == actor_nursery.CLOSED
    assert kills > 50
    following = collections.defaultdict(int)
    for actor, incarnation, first in dequeued:
        assert following[actor, incarnation] == first, 'an unroll is lost, repeated or out of order'
        following[actor, incarnation] += unroll_length
    for actor in (num_actors - 1, num_actors - 2):
        assert {i for a, i in following if a == actor} == {0}
    print(f'{kills} kills, {len(dequeued)} unrolls')
