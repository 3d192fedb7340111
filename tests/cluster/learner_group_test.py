"""Tests of impala/cluster/learner_group.py within one process, without strategies."""

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import struct
import threading

import numpy as np
import pytest
from other_settings import differing
from ports import free_ports

from configs import STACK, VECTOR
from impala.cluster.channel import connect
from impala.cluster.learner_group import KIND, PROTOCOL, FollowerLog, LearnerGroup, Member
from impala.config import GROUP_PORT_OFFSET, Config, ConfigError, all_settings
from impala.networks.build import choose_network
from impala.training.run import shared_settings
from impala.trajectory import EpisodeEnd

PATIENCE_SECONDS = 60
SETTINGS = {'batch_size': 2, 'vtrace_lambda': 1.0, 'gradient_clip_norm': None}


@pytest.fixture
def addresses():
    """Addresses of three learners on the loopback interface."""
    return tuple(f'localhost:{port}' for port in free_ports(3))


@pytest.fixture
def threads():
    """Runs functions that wait for each other."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool


class Log:
    """Records what it is given."""

    def __init__(self):
        self.episodes, self.actors, self.unrolls = [], {}, []

    def record_episodes(self, *columns):
        assert [column.dtype for column in columns] == ['int32', 'float32', 'int32', 'uint8']
        self.episodes += zip(*columns, strict=True)

    def record_agent_steps(self, level_ids, steps):
        self.unrolls.append((level_ids.tolist(), steps))

    def record_actors(self, rows, learner):
        self.actors[learner] = rows


def group(addresses, task, settings=SETTINGS, reports=None):
    return LearnerGroup(
        Member(addresses, task), settings, (reports if reports is not None else []).append
    )


def test_the_first_learner_collects_from_the_others_until_all_are_done(addresses, threads):
    log = Log()

    def first():
        with group(addresses, 0) as it:
            it.finish()
            # Everything that the others sent before they were done has arrived.
            it.collect(log)
            it.check()

    def follower(task):
        with group(addresses, task) as it:
            follower_log = FollowerLog(it, task, log_secs=0)
            ends = np.zeros((3, 2), np.uint8)
            ends[1] = EpisodeEnd.LIFE_LOST, EpisodeEnd.TRUNCATED
            ends[2] = EpisodeEnd.TERMINATED, EpisodeEnd.NOT_ENDED
            returns = np.float32(task) + np.arange(6, dtype=np.float32).reshape(3, 2) / 10
            follower_log.record_episodes(
                np.array([7, 8], np.int32), returns, np.full((3, 2), 5, np.int32), ends
            )
            follower_log.record_agent_steps(np.array([7, 8], np.int32), 10 * task)
            assert follower_log.line_is_due
            follower_log.record_actors([{'task': task}])
            it.finish()
            it.check()

    waiting = [
        threads.submit(first),
        threads.submit(follower, 2),
        threads.submit(follower, 1),
    ]
    for each in waiting:
        each.result(PATIENCE_SECONDS)
    assert sorted(log.episodes) == sorted(
        (level, np.float32(task) + np.float32(more), 5, end)
        for task in (1, 2)
        for level, more, end in (
            (8, 0.3, EpisodeEnd.TRUNCATED),
            (7, 0.4, EpisodeEnd.TERMINATED),
        )
    )
    assert sorted(log.unrolls) == [([7, 8], 10), ([7, 8], 20)]
    assert log.actors == {1: [{'task': 1}], 2: [{'task': 2}]}


def test_intruders_are_refused_and_the_group_continues(addresses, threads, monkeypatch):
    reports, tracebacks = [], []
    monkeypatch.setattr(threading, 'excepthook', tracebacks.append)

    def member(task, **kwargs):
        with group(addresses, task, **kwargs) as it:
            it.finish()

    first = threads.submit(member, 0, reports=reports)
    with pytest.raises(ConfigError, match='--batch_size is 4 here and 2 at the first learner'):
        member(1, settings=SETTINGS | {'batch_size': 4})
    host, port = addresses[0].split(':')
    group_address = host, int(port) + GROUP_PORT_OFFSET
    for junk in (b'', b'GET / HTTP/1.1\r\n\r\n', b'\xff' * 100):
        with socket.create_connection(group_address) as intruder:
            intruder.sendall(junk)
            # Closing it resets the connection.
            intruder.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    complete = {'protocol': PROTOCOL, 'settings': SETTINGS}
    for hello, answer in (
        ({'task': 'x'}, None),
        ({'task': True, **complete}, None),
        ({'task': 1, 'protocol': PROTOCOL, 'settings': 5}, None),
        ({'task': 9, **complete}, 'no learner with --task=9 among 3'),
        ({'task': 0, **complete}, 'no learner with --task=0 among 3'),
        ({'task': 1, 'protocol': 0}, 'runs another version of this program'),
    ):
        channel = connect(f'{host}:{group_address[1]}', KIND, None, 10)
        channel.send(hello)
        if answer:
            assert answer in channel.receive(lambda _: 0)[0]['refused']
        channel.close()
    with pytest.raises(ConfigError, match='another learner with --task=0 at localhost'):
        member(0)
    second = threads.submit(member, 1)
    while not any(line == f'Waiting for the learners --task=2 on port {group_address[1]}'
                  for line in reports):  # fmt: skip
        assert not first.done()
    with pytest.raises(ConfigError, match='another learner with --task=1 at 127.0.0.1'):
        member(1)
    third = threads.submit(member, 2)
    for each in (first, second, third):
        each.result(PATIENCE_SECONDS)
    assert not tracebacks


def test_a_learner_without_the_secret_is_refused(addresses, threads):
    secret = b'a secret of at least 16 bytes'

    def member(task, own_secret):
        with LearnerGroup(Member(addresses[:2], task, own_secret), SETTINGS, print) as it:
            it.finish()

    first = threads.submit(member, 0, secret)
    for other, words in ((None, 'has a secret, and this job has none'), (b'x' * 16, 'another')):
        while True:
            # Until the first one listens, this one would wait for it.
            with contextlib.suppress(ConnectionRefusedError):
                host, port = addresses[0].split(':')
                socket.create_connection((host, int(port) + GROUP_PORT_OFFSET)).close()
                break
        with pytest.raises(ConfigError, match=words):
            member(1, other)
    second = threads.submit(member, 1, secret)
    for each in (first, second):
        each.result(PATIENCE_SECONDS)


def test_all_learners_have_the_run_id_of_the_first(addresses, threads):
    def member(task, run_id):
        with LearnerGroup(Member(addresses, task), SETTINGS, lambda text: None, run_id) as it:
            it.finish()
            return it.run_id

    waiting = [threads.submit(member, task, run_id) for task, run_id in enumerate(['x', '', ''])]
    assert [each.result(PATIENCE_SECONDS) for each in waiting] == ['x', 'x', 'x']


@pytest.mark.parametrize('name', all_settings())
def test_learners_agree_on_exactly_the_marked_settings(name):
    def settings(values):
        config = Config.of(**values)
        level_name = config.run.level_name
        spec = STACK if level_name.startswith('ALE/') else VECTOR
        repeats = config.environment.num_action_repeats or spec.num_action_repeats
        spec = dataclasses.replace(spec, num_action_repeats=repeats)
        network = choose_network(config, (level_name,), spec)
        return json.loads(json.dumps(shared_settings(config, spec, network)))

    first, second = map(settings, differing(name))
    learner = group(('localhost:1', 'localhost:2'), 0, first)
    refusal = learner._refusal(1, PROTOCOL, second)
    if all_settings()[name].setting.agreement == 'none':
        assert refusal is None
    else:
        assert refusal.startswith(f'--{name} is ')
        assert learner._refusal(1, PROTOCOL, first) is None
