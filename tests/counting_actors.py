"""Actor processes that number their rows, and a policy whose answers tell the rows apart.

So lost, repeated, torn and misdelivered rows and answers show in the unrolls.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

import actor_nursery
import numpy as np
import pytest
import tensorflow as tf

from dynamic_batching.unroll_batcher import UnrollBatcher
from impala.trajectory import ArraySpec, EpisodeEnd

TIMEOUT = 30  # Seconds; reached only by a deadlock.
FIXED_INPUTS = [
    ArraySpec((), 'float32'),
    ArraySpec((), 'float32'),
    ArraySpec((), 'int32'),
    ArraySpec((), 'int32'),
    ArraySpec((), 'uint8'),
]


@contextlib.contextmanager
def closing(batcher):
    """Closes the batcher at the end of the block, so that waiting threads always end."""
    try:
        yield batcher
    finally:
        batcher.close()


class Nursery:
    """Actor processes that can be killed."""

    def __init__(self, batcher):
        environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, actor_nursery.__file__, str(batcher.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[batcher.fd],
            env=environment,
        )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self._process.stdin.close()
        if self._process.wait(TIMEOUT) != 0:
            raise RuntimeError('the nursery failed')
        self._process.stdout.close()

    def start(self, actor, incarnation=0):
        """Starts a process, waits until it is connected and returns its id."""
        return self._ask(do='start', actor=actor, incarnation=incarnation)

    def kill(self, pid):
        """Kills a process and waits until it is gone."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid):
        """Waits until a process ends by itself; returns its exit code."""
        return self._ask(do='wait', pid=pid)

    def _ask(self, **command):
        self._process.stdin.write(json.dumps(command).encode() + b'\n')
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def make_counting_batcher(num_actors, **options):
    """A batcher for the processes of a nursery."""
    arguments = {
        'inputs': [*FIXED_INPUTS, *actor_nursery.OBSERVATION],
        'outputs': [ArraySpec((), 'int32'), ArraySpec((3,), 'float32'), ArraySpec((), 'int64')],
        'states': [ArraySpec((), 'int64'), ArraySpec((2,), 'float32')],
        'level_ids': range(num_actors),
        'unroll_length': 2,
        'queue_capacity': 4,
        'timeout_ms': 1e6,
    }
    return UnrollBatcher(**(arguments | options))


def count_rows(batcher, requests, version):
    """Gives each row of a nursery's processes a unique answer."""
    who = requests.inputs[5]
    last_action = tf.cast(requests.last_action, tf.int64)
    action = (who[:, 0] * 1000 + who[:, 1]) * 100000 + who[:, 2]
    batcher.set_outputs(
        requests.tickets,
        version,
        [
            tf.cast(action, tf.int32),
            tf.cast(tf.stack([who[:, 1], who[:, 2], last_action % 100000], 1), tf.float32),
            tf.fill(tf.shape(action), version),
        ],
        [
            requests.states[0] * 31 + who[:, 2] + 1,
            requests.states[1] + tf.cast(tf.stack([who[:, 2], who[:, 1]], 1), tf.float32),
        ],
    )


def serve_counting(batcher):
    """Answers in a `tf.while_loop` until the batcher is closed; versions count batches."""

    @tf.function
    def loop():
        def body(version):
            count_rows(batcher, batcher.get_inputs(), version)
            return (version + 1,)

        tf.while_loop(
            lambda version: tf.constant(True),
            body,
            (tf.constant(0, tf.int64),),
            parallel_iterations=1,
        )

    with pytest.raises(tf.errors.CancelledError):
        loop()


def check_counting_unroll(unrolls, column, unroll_length, level_ids):
    """Checks every number of one unroll; returns its actor, incarnation and first counter."""
    reward, episode_return, episode_step, episode_frames, end, who, frame = [
        field.numpy()[:, column] for field in unrolls.inputs
    ]
    action, logits, version = [output.numpy()[:, column] for output in unrolls.outputs]
    actor, incarnation, first = who[0]
    counters = np.arange(first, first + unroll_length + 1)
    assert actor == unrolls.actors.numpy()[column]
    assert unrolls.level_ids.numpy()[column] == level_ids[actor]
    np.testing.assert_array_equal(who[:, 0], actor)
    np.testing.assert_array_equal(who[:, 1], incarnation)
    np.testing.assert_array_equal(who[:, 2], counters)
    assert first % unroll_length == 0
    byte = (actor + 3 * incarnation + counters) % 256
    np.testing.assert_array_equal(frame, np.repeat(byte[:, None], frame.shape[1], 1))

    # Replay the episodes from the start.
    total, steps, frames = 0.0, 0, 0
    rows = [(0.0, 0.0, 0, 0, EpisodeEnd.TERMINATED)]
    for counter in range(1, counters[-1] + 1):
        total, steps = total + counter % 5, steps + 1
        frames += counter % actor_nursery.MOST_FRAMES
        phase = counter % actor_nursery.EPISODE_STEPS
        row_end = {0: EpisodeEnd.TERMINATED, 3: EpisodeEnd.LIFE_LOST}.get(phase, 0)
        rows.append((counter % 5, total, steps, frames, row_end))
        if phase == 0:
            total, steps, frames = 0.0, 0, 0
    expected = rows[first:]
    for got, want in zip(
        (reward, episode_return, episode_step, episode_frames, end),
        np.transpose(expected),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)

    # Row t holds the answer to row t - 1; the very first row holds zeros.
    answered = counters - 1
    right_action = actor_nursery.right_action(actor, incarnation, answered)
    np.testing.assert_array_equal(action, np.where(counters == 0, 0, right_action))
    np.testing.assert_array_equal(logits[:, 0], np.where(counters == 0, 0, incarnation))
    np.testing.assert_array_equal(logits[:, 1], np.where(counters == 0, 0, answered))
    np.testing.assert_array_equal(
        logits[:, 2], np.where(counters <= 1, 0, np.maximum(answered - 1, 0))
    )
    assert unrolls.policy_versions.numpy()[column] == version[1]
    since = 1 if first == 0 else 0
    assert np.all(np.diff(version[since:]) > 0)

    state_hash = np.int64(0)
    with np.errstate(over='ignore'):
        for counter in range(first):
            state_hash = state_hash * np.int64(31) + np.int64(counter + 1)
    assert unrolls.states[0].numpy()[column] == state_hash
    np.testing.assert_array_equal(
        unrolls.states[1].numpy()[column],
        np.array([sum(range(first)), incarnation * first], np.float32),
    )
    return int(actor), int(incarnation), int(first)
