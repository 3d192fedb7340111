"""Tests of the learner's side of `--inference=learner`, by calls as actor jobs make them."""

import contextlib
import time

import numpy as np
import pytest
import tensorflow as tf
from threads import start

from dynamic_batching.unroll_batcher import UnrollBatcher
from dynamic_batching.wire_row import HEADER
from impala.cluster import remote_inference
from impala.cluster.calls import Client
from impala.cluster.channel import Disconnected, Rejected
from impala.cluster.remote_inference import EnvironmentJobs
from impala.networks.agent import AgentConfig
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd

TIMEOUT = 30  # Seconds; reached only by a deadlock.
SPEC = EnvironmentSpec(
    {'frame': ArraySpec((2,), 'float32'), 'instruction': ArraySpec((3,), 'int32')},
    ActionSpec.discrete(1000),
    1,
)
NUM_SLOTS = 6
UNROLL_LENGTH = 3


class Learner:
    """A learner whose policy's action is the first number of the frame.

    A context manager.

    Attributes:
      jobs: what is tested.
      address: where it listens.
      lines: reported lines.
    """

    def __init__(self, minimum_batch_size=1, port=0):
        scalar = ArraySpec((), 'float32')
        counts = [ArraySpec((), 'int32')] * 2
        self.batcher = UnrollBatcher(
            inputs=[
                *(scalar, scalar),
                *counts,
                ArraySpec((), 'uint8'),
                *SPEC.observation.values(),
            ],
            outputs=[SPEC.action.array],
            states=[ArraySpec((), 'int32')],
            level_ids=[0] * NUM_SLOTS,
            unroll_length=UNROLL_LENGTH,
            queue_capacity=20,
            minimum_batch_size=minimum_batch_size,
            timeout_ms=1e6,
        )
        self.lines = []
        self.level_names = ['one'] * NUM_SLOTS
        self.jobs = EnvironmentJobs(
            f'localhost:{port}',
            self.batcher,
            ['one', 'two'],
            self.level_names,
            SPEC,
            AgentConfig(torso='mlp', core='none'),
            {'protocol': 1},
            None,
            lambda: 7,
            self.lines.append,
        )
        self.address = f'localhost:{self.jobs.port}'
        self._policy = None

    def __enter__(self):
        self.jobs.__enter__()
        return self

    def __exit__(self, *error):
        self.jobs.__exit__(*error)
        if self._policy is not None:
            self._policy.result(TIMEOUT)

    def play(self):
        """Starts the policy."""
        self._policy = start(self._act)

    def _act(self):
        with contextlib.suppress(tf.errors.CancelledError):
            while True:
                requests = self.batcher.get_inputs()
                self.batcher.set_outputs(
                    requests.tickets,
                    tf.constant(5, tf.int64),
                    [tf.cast(requests.inputs[5][:, 0], tf.int32)],
                    [requests.states[0] + 1],
                )

    def wait_until(self, happened):
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            assert time.monotonic() < deadline, (self.jobs.rows, self.lines)
            time.sleep(0.01)


class Job:
    """Calls of an actor job; a context manager."""

    def __init__(self, learner, owner, task=0):
        self.client = Client(learner.address, 'learner')
        self.owner = owner
        self.task = task

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.client.close()

    def join(self, *groups, spec=SPEC):
        values = {
            'task': self.task,
            'owner': self.owner,
            'host': 'somewhere',
            'groups': groups,
            'spec': spec.to_json(),
        }
        return self.client.call('join', values)[0]

    def act(self, rows, group=0):
        values, body = self.client.call('act', {'owner': self.owner, 'group': group}, [rows], 4000)
        return values or body.view(np.int32).tolist()

    def status(self, **values):
        return self.client.call('status', {'owner': self.owner, **values})[0]


def make_rows(numbers, words=(0, 1, 999), **fields):
    """A row of each environment of a group; the policy answers with the numbers."""
    sent = np.zeros(len(numbers), HEADER)
    sent['actor'] = np.arange(len(numbers))
    for name, value in fields.items():
        sent[name] = value
    frame = np.array([[number, 0.5] for number in numbers], np.float32)
    instruction = np.tile(np.array(words, np.int32), (len(numbers), 1))
    return np.concatenate(
        [sent[:, None].view(np.uint8), frame.view(np.uint8), instruction.view(np.uint8)], axis=1
    )


@pytest.fixture
def learner():
    with Learner() as made:
        yield made


def test_a_job_gets_actions_and_the_learner_whole_unrolls(learner):
    learner.play()
    with Job(learner, 'a') as job:
        assert job.client.call('settings')[0] == {'protocol': 1}
        assert job.status()['has_seat'] is False
        assert job.join(['one', 'two'], ['two']) == {'seat': True}
        assert job.status()['has_seat'] is True
        for row in range(UNROLL_LENGTH + 1):
            ends = EpisodeEnd.LIFE_LOST if row == 2 else EpisodeEnd.NOT_ENDED
            assert job.act(make_rows([row, 10 + row], reward=row, end=ends)) == [row, 10 + row]
        assert job.act(make_rows([30]), group=1) == [30]
        unrolls = learner.batcher.dequeue(2)
        order = np.argsort(unrolls.actors.numpy())
        assert unrolls.level_ids.numpy()[order].tolist() == [0, 1]
        frames = unrolls.inputs[5].numpy()[:, order, 0]
        np.testing.assert_array_equal(frames, [[0, 10], [1, 11], [2, 12], [3, 13]])
        np.testing.assert_array_equal(unrolls.inputs[0].numpy()[:, 0], [0, 1, 2, 3])
        np.testing.assert_array_equal(
            unrolls.inputs[4].numpy()[:, 0],
            [EpisodeEnd.TERMINATED, 0, EpisodeEnd.LIFE_LOST, EpisodeEnd.NOT_ENDED],
        )
        np.testing.assert_array_equal(unrolls.outputs[0].numpy()[1:, order], frames[:-1])
        np.testing.assert_array_equal(unrolls.policy_versions.numpy(), [5, 5])
        # The row of the log, with the lag of the last unroll: 7 - 5.
        learner.wait_until(lambda: learner.jobs.rows)
        (row,) = learner.jobs.rows
        assert (row['task'], row['host'], row['level']) == (0, 'somewhere', 'one')
        assert row['environments'] == 3
        learner.jobs._look(list(learner.jobs._seats.values()), time.monotonic() + 1)
        assert learner.jobs.rows[0]['policy_lag'] == 2
        job.client.call('leave', {'owner': 'a'})
        assert job.status()['has_seat'] is False
        assert job.act(make_rows([1, 2])) == {'ended': True}
    learner.wait_until(lambda: not learner.jobs.rows)
    assert [line for line in learner.lines if 'Actor 0' in line] == [
        'Actor 0 (somewhere) is there: 1 in all',
        'Actor 0 (somewhere) is gone: 0 in all',
    ]


def test_slots_are_counted(learner):
    with Job(learner, 'a') as first, Job(learner, 'b', task=1) as second:
        assert first.join(['one'] * 2, ['one'] * 2) == {'seat': True}
        assert second.join(['one'] * 3) == {'free': 2, 'provided': NUM_SLOTS}
        assert second.join(['two'] * 2) == {'seat': True}
        assert learner.level_names == ['one'] * 4 + ['two'] * 2
        # A job that joins again has its slots anew.
        assert first.join(['one'] * 4) == {'seat': True}
        second.client.call('leave', {'owner': 'b'})
        assert first.join(['one'] * 6) == {'seat': True}


def test_a_number_belongs_to_one_job_until_that_is_silent(learner, monkeypatch):
    learner.play()
    with Job(learner, 'a') as first, Job(learner, 'b') as second:
        first.join(['one'])
        answer = second.join(['one'])
        assert answer['holder']['host'] == 'somewhere'
        assert 0 <= answer['holder']['seconds_since_seen'] < TIMEOUT
        monkeypatch.setattr(remote_inference, 'RESERVED_SECONDS', 0.3)
        learner.wait_until(lambda: not learner.jobs.has_jobs)
        assert second.join(['one']) == {'seat': True}
        assert first.act(make_rows([1])) == {'ended': True}
        monkeypatch.setattr(remote_inference, 'RESERVED_SECONDS', TIMEOUT)
        assert second.act(make_rows([1])) == [1]


def test_joining_again_ends_a_call_that_waits(learner):
    """As after a broken connection. No policy plays at first, so that the call waits."""
    with Job(learner, 'a') as broken, Job(learner, 'a') as job:
        job.join(['one', 'one'])
        waiting = start(broken.act, make_rows([1, 2]))
        learner.wait_until(
            lambda: sum(state in (1, 2) for state in learner.batcher.activity().states) == 2
        )
        assert job.join(['one', 'one']) == {'seat': True}
        assert waiting.result(TIMEOUT) == {'ended': True}
        learner.play()
        for row in range(UNROLL_LENGTH + 1):
            assert job.act(make_rows([20 + row, 40 + row])) == [20 + row, 40 + row]
        frames = learner.batcher.dequeue(2).inputs[5].numpy()[:, :, 0]
        np.testing.assert_array_equal(np.sort(frames[0]), [20, 40])


def test_batches_wait_for_present_environments_only():
    """With a minimum of all slots, of which some are free, and one job is killed."""
    with Learner(minimum_batch_size=NUM_SLOTS) as learner:
        learner.play()
        with Job(learner, 'a') as job, Job(learner, 'b', task=1) as killed:
            assert job.join(['one'] * 2) == {'seat': True}
            assert killed.join(['one']) == {'seat': True}
            # Those that have not sent a row yet are not waited for.
            assert job.act(make_rows([1, 2])) == [1, 2]
            waiting = start(killed.act, make_rows([3]))
            assert job.act(make_rows([1, 2])) == [1, 2]
            assert waiting.result(TIMEOUT) == [3]
            killed.client.close()
            for _ in range(3):
                assert job.act(make_rows([1, 2])) == [1, 2]


def test_an_environment_that_has_restarted_begins_a_new_unroll(learner):
    learner.play()
    with Job(learner, 'a') as job:
        job.join(['one', 'one'])
        for row in range(6):
            first = [False, row in (0, 2)]
            assert job.act(make_rows([row, 10 + row], is_first=first)) == [row, 10 + row]
        unrolls = learner.batcher.dequeue(2)
        order = np.argsort(unrolls.actors.numpy())
        np.testing.assert_array_equal(
            unrolls.inputs[5].numpy()[:, order, 0], [[0, 12], [1, 13], [2, 14], [3, 15]]
        )
        ends = unrolls.inputs[4].numpy()[:, order]
        np.testing.assert_array_equal(ends, [[EpisodeEnd.TERMINATED] * 2, [0, 0], [0, 0], [0, 0]])


def test_wrong_calls_are_rejected_and_counted(learner):
    learner.play()
    with Job(learner, 'a') as job:
        job.join(['one', 'one'])
        for rows, message in (
            (make_rows([1, 2])[:, :-1], 'cannot reshape'),
            (make_rows([1, 2, 3]), 'not those of different actors'),
            (make_rows([1, 2], actor=0), 'not those of different actors'),
            (make_rows([1, 2], words=(0, 1, 1000)), 'words that do not exist'),
            (make_rows([1, 2], words=(0, -1, 1)), 'words that do not exist'),
        ):
            with pytest.raises(Rejected, match=message):
                job.act(np.ascontiguousarray(rows))
        for group in (1, -1, None, 'x'):
            with pytest.raises(Rejected, match='There is no group'):
                job.act(make_rows([1, 2]), group=group)
        assert job.act(make_rows([1, 2])) == [1, 2]
        assert job.client.call('act', {'group': 0})[0] == {'ended': True}
        learner.jobs._look(list(learner.jobs._seats.values()), time.monotonic())
        assert learner.jobs.rows[0]['rejected'] == 5


def test_wrong_jobs_are_refused(learner):
    with Job(learner, 'a') as job:
        with pytest.raises(Rejected, match='levels that are not those of the learner'):
            job.join(['three'])
        with pytest.raises(Rejected, match='levels that are not those of the learner'):
            job.join()
        other = EnvironmentSpec(SPEC.observation, ActionSpec.discrete(4), 1)
        with pytest.raises(Rejected, match=r'\(actions\) is 4 here and 1000 there\.'):
            job.join(['one'], spec=other)
        other = EnvironmentSpec(SPEC.observation, SPEC.action, 2)
        with pytest.raises(Rejected, match='its environments are not those'):
            job.join(['one'], spec=other)
        for values in ({}, {'task': 'x'}, {'task': 0, 'owner': 'a', 'host': '', 'groups': 3}):
            with pytest.raises(
                Rejected, match="does not say what it has|the argument 'task' is not an int"
            ):
                job.client.call('join', values)
        assert not learner.jobs.has_jobs


def test_the_end_of_training_reaches_the_jobs(learner):
    with Job(learner, 'a') as job, Job(learner, 'b', task=1) as late:
        job.join(['one'])
        assert not job.status()['finished']
        waiting = start(Job(learner, 'a').act, make_rows([1]))
        learner.wait_until(lambda: any(learner.batcher.activity().states))
        learner.jobs.finish()
        learner.batcher.close()
        with pytest.raises(Disconnected):
            waiting.result(TIMEOUT)
        assert job.status()['finished']
        assert late.join(['one']) == {'finished': True}
        assert learner.jobs.has_jobs
        assert job.join(['one']) == {'finished': True}
        assert not learner.jobs.has_jobs


def test_a_learner_that_stops_takes_no_jobs(learner):
    """Its jobs wait for the next one, which resumes the run."""
    with Job(learner, 'a') as job:
        job.join(['one'])
        learner.batcher.close()
        with pytest.raises(Disconnected):
            job.act(make_rows([1]))
        with pytest.raises(Disconnected):
            job.join(['one'])


def test_notes_reach_the_learner(learner):
    with Job(learner, 'a') as job:
        job.join(['one'])
        assert learner.jobs.notes() == ['']
        job.status(notes='text')
        assert learner.jobs.notes() == ['text']
