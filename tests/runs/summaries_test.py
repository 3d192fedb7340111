"""Tests of impala/runs/summaries.py, through what a log writes."""

import os

import pytest
import tensorflow as tf
from run_logs import (
    Clock,
    create,
    file_size_limit,
    metrics,
    write,
)


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log')


@pytest.fixture
def clock():
    return Clock()


def test_tensorboard_has_the_same_numbers(logdir, clock):
    with create(logdir, clock) as log:
        for i in (1, 2):
            log.record_update({'loss/total': 0.25 * i})
            clock.now += 10
            write(log, 10 * i, i)
    folder = os.path.join(logdir, 'summaries')
    (name,) = os.listdir(folder)
    seen = {}
    for record_ in tf.data.TFRecordDataset(os.path.join(folder, name)):
        event = tf.compat.v1.Event.FromString(record_.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == 'scalars'
            seen[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    expected = {}
    for line in metrics(logdir):
        expected.update({(line['agent_steps'], key): value for key, value in line.items()})
    assert seen == pytest.approx(expected)


def test_failed_summaries_are_retried_in_a_new_file(logdir, clock):
    with create(logdir, clock, log_secs=1) as log:
        for i in range(1, 10):
            clock.now += 100
            with file_size_limit(1 << 40 if i > 2 else 0):
                write(log, 10 * i, i)
    folder = os.path.join(logdir, 'summaries')
    steps = set()
    for name in os.listdir(folder):
        for record_ in tf.data.TFRecordDataset(os.path.join(folder, name)):
            event = tf.compat.v1.Event.FromString(record_.numpy())
            steps.update([event.step] * len(event.summary.value))
    assert steps == {40, 50, 60, 70, 80, 90}
    assert len(os.listdir(folder)) <= 2
