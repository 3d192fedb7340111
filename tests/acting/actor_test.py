"""Tests of the actor's loop against a batcher, in one process; `actor_pool_test` has the rest."""

import concurrent.futures
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from dynamic_batching.actor_client import ActorClient, ClosedError
from dynamic_batching.unroll_batcher import UnrollBatcher
from impala.acting import actor
from impala.environments import DeclarationError, Environment
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd

TIMEOUT = 30  # Seconds; reached only by a deadlock.
ENDS = [EpisodeEnd.NOT_ENDED, EpisodeEnd.LIFE_LOST, EpisodeEnd.TRUNCATED, EpisodeEnd.TERMINATED]


class Recorded(Environment):
    """Writes its step number to a buffer that it reuses; records its actions."""

    spec = EnvironmentSpec(
        {'frame': ArraySpec((2,), 'uint8'), 'instruction': ArraySpec((3,), 'int32')}, 100, 4
    )

    def __init__(self):
        self.actions = []
        self._observation = {
            'instruction': np.zeros(3, np.int32),
            'frame': np.zeros(2, np.uint8),
        }

    def _observe(self):
        self._observation['frame'][:] = len(self.actions)
        self._observation['instruction'][:] = 500 + len(self.actions)
        return self._observation

    def reset(self):
        return self._observe()

    def step(self, action):
        self.actions.append(action)
        words, frame = np.full(3, 900, np.int32), np.full(2, 200 + len(self.actions), np.uint8)
        self.last_observation = {'instruction': words, 'frame': frame}
        self.last_action_frames = [None, 1, 2, 3][len(self.actions) % 4]
        return 0.5 * len(self.actions), ENDS[len(self.actions) % 4], self._observe()


def make_batcher(num_actors):
    return UnrollBatcher(
        inputs=[
            ArraySpec((), 'float32'),
            ArraySpec((), 'float32'),
            ArraySpec((), 'int32'),
            ArraySpec((), 'int32'),
            ArraySpec((), 'uint8'),
            *Recorded.spec.observation.values(),
        ],
        outputs=[ArraySpec((), 'int32')],
        states=[],
        level_ids=[0] * num_actors,
        unroll_length=8,
        queue_capacity=2,
    )


def play_both(*others):
    """Two environments take turns; each has its own actions and unroll.

    Returns both, and for each, the fields of the inputs and the outputs of its first unroll.
    """
    both = [Recorded(), Recorded()]
    observation = list(Recorded.spec.observation.values())
    batcher = make_batcher(2)
    clients = [ActorClient(batcher.fd, index, observation) for index in range(2)]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        playing = executor.submit(actor.act, both, clients, ['one', 'two'], *others)
        playing.add_done_callback(lambda _: batcher.close())
        try:
            answered = np.zeros(2, np.int32)
            while min(answered) < 9:
                requests = batcher.get_inputs()
                actors = requests.tickets[0].numpy()
                action = tf.constant(50 + 20 * actors + answered[actors])
                answered[actors] += 1
                batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [action], [])
            unrolls = batcher.dequeue(2)
        finally:
            batcher.close()
        with pytest.raises(ClosedError):
            playing.result(TIMEOUT)
    assert sorted(unrolls.actors.numpy()) == [0, 1]
    for column, index in enumerate(unrolls.actors.numpy()):
        actions = [50 + 20 * index + step for step in range(8)]
        assert unrolls.outputs[0].numpy()[:, column].tolist() == [0, *actions]
        yield both[index], actions, [field.numpy()[:, column] for field in unrolls.inputs]


def test_rows_actions_and_episodes():
    for environment, actions, inputs in play_both():
        reward, episode_return, episode_step, episode_frames, end, frame, words = inputs
        assert environment.actions[:8] == actions
        assert reward.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
        # The first row starts an episode; a lost life (rows 1 and 5) does not end the game.
        assert end.tolist() == [1, 3, 2, 1, 0, 3, 2, 1, 0]
        assert episode_return.tolist() == [0, 0.5, 1.5, 1.5, 2, 4.5, 7.5, 3.5, 4]
        assert episode_step.tolist() == [0, 1, 2, 1, 1, 2, 3, 1, 1]
        # An action lasts 4 frames, except that the episode of row 3 ended after 3.
        assert episode_frames.tolist() == [0, 4, 6, 3, 4, 8, 10, 3, 4]
        assert frame.tolist() == [[step, step] for step in range(9)]
        assert words.tolist() == [[500 + step] * 3 for step in range(9)]


def test_a_truncated_episode_has_one_more_row_with_its_last_observation():
    for environment, actions, inputs in play_both(True):
        reward, episode_return, episode_step, episode_frames, end, frame, words = inputs
        # The environment never sees the actions for the last observations, rows 2 and 7.
        assert environment.actions[:6] == actions[:2] + actions[3:7]
        assert reward.tolist() == [0, 0.5, 1, 0, 1.5, 2, 2.5, 3, 0]
        # A lost life (rows 1 and 6) and the rules (row 4) end an episode as ever.
        assert end.tolist() == [1, 3, 0, 2, 1, 0, 3, 0, 2]
        # The first row of an episode has the same statistics as the last one of the one before.
        assert episode_return.tolist() == [0, 0.5, 1.5, 1.5, 1.5, 2, 4.5, 7.5, 7.5]
        assert episode_step.tolist() == [0, 1, 2, 2, 1, 1, 2, 3, 3]
        assert episode_frames.tolist() == [0, 4, 6, 6, 3, 4, 8, 10, 10]
        assert frame[:, 0].tolist() == [0, 1, 202, 2, 3, 4, 5, 206, 6]
        assert words[:, 2].tolist() == [500, 501, 900, 502, 503, 504, 505, 900, 506]


def test_an_episode_begins_after_a_row_was_answered():
    batcher = make_batcher(1)
    client = ActorClient(batcher.fd, 0, list(Recorded.spec.observation.values()))
    observation = list(Recorded().reset().values())[::-1]
    with pytest.raises(RuntimeError, match='the actor has not started'):
        client.begin(EpisodeEnd.TRUNCATED, observation)
    client.start(EpisodeEnd.TERMINATED, observation)
    with pytest.raises(RuntimeError, match='wait between two'):
        client.begin(EpisodeEnd.TRUNCATED, observation)
    batcher.close()


def test_a_wrong_observation_raises_different_errors_at_the_start_and_later():
    observation = list(Recorded.spec.observation.values())
    batcher = make_batcher(1)
    environment = Recorded()
    environment._observation['frame'] = np.zeros(3, np.uint8)
    client = ActorClient(batcher.fd, 0, observation)
    with pytest.raises(DeclarationError, match=r"'mine' .* 'frame' as uint8 \[3\], but its spec"):
        actor.act([environment], [client], ['mine'])
    environment._observation['frame'] = np.zeros(2, np.uint8)
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        playing = executor.submit(actor.act, [environment], [client], ['mine'])
        playing.add_done_callback(lambda _: batcher.close())
        try:
            requests = batcher.get_inputs()
            del environment._observation['frame']
            environment._observe = lambda: environment._observation
            actions = tf.constant([0])
            batcher.set_outputs(requests.tickets, tf.constant(0, tf.int64), [actions], [])
            with pytest.raises(actor.ContractError, match="'mine' .* without 'frame', which its"):
                playing.result(TIMEOUT)
        finally:
            batcher.close()


def run(lifeline, **settings):
    read_end, write_end = lifeline
    settings = {'seeds': [1], 'lifeline': read_end, 'environment': {'temp_folder': None}} | settings
    return subprocess.run(
        [sys.executable, '-m', 'impala.acting.actor'],
        input=json.dumps(settings),
        pass_fds=[read_end],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture
def lifeline():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_level_that_cannot_be_played_prints_one_sentence(lifeline):
    result = run(lifeline, level_names=['ALE/NoSuchGame-v5'], segments=[lifeline[0]], actors=[0])
    assert result.returncode == actor.BAD_INPUT_EXIT_CODE
    assert 'NoSuchGame' in result.stderr and 'Traceback' not in result.stderr


def test_non_finite_values_are_warned_of_once(caplog):
    values = actor.NonFiniteWarnings(['frame', 'speed'])
    for _ in range(2):
        values.warn('mine:first', {0: -np.inf, 2: np.nan}, True)
        values.warn('mine:other', {1: np.inf}, False)
        values.warn('mine:first', {2: np.inf}, True)
    assert [record.message.split(': ')[0] for record in caplog.records] == [
        'the reward of mine:first is -inf as float32',
        "the observation 'speed' of mine:first is nan as float32",
        "the observation 'frame' of mine:other is inf as float32",
    ]
    # In test mode the warning does not mention learning.
    assert ['learn' in record.message for record in caplog.records] == [True, True, False]


def test_a_wrong_segment_fails_with_a_traceback(lifeline):
    result = run(lifeline, level_names=['CartPole-v1'], segments=[lifeline[0]], actors=[0])
    assert result.returncode == 1
    assert 'Traceback' in result.stderr and 'not a segment' in result.stderr


def test_the_last_sentence_is_found_in_mixed_output(capfd):
    os.write(2, b'engine: half a li')
    actor.say('An old one.')
    actor.say('Two\nlines of an \N{LATIN SMALL LETTER E WITH ACUTE}lan.')
    os.write(2, b'engine: bye\n')
    printed = capfd.readouterr().err
    assert actor.sentence_of(printed) == 'Two\nlines of an \N{LATIN SMALL LETTER E WITH ACUTE}lan.'
    assert actor.sentence_of('engine: bye\n') is None
    # A sentence that is cut off does not count.
    assert actor.sentence_of(printed[: printed.rindex('lan.')]) == 'An old one.'
