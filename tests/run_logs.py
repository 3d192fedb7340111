"""For tests of a run's log: logs with a settable clock, and readers of their files."""

import contextlib
import csv
import io
import json
import os
import resource

import numpy as np

from impala.runs import run_log
from impala.suites import Level, Suite
from impala.trajectory import EpisodeEnd

LEVELS = ['ALE/Pong-v5', 'a "level", with commas']
SUITE = Suite('', tuple(Level(name, name) for name in LEVELS))
HEADER = 'wall_seconds,frames,agent_steps,level,episode_return,episode_frames,ended_by'


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self):
        self.now = 1e6

    def __call__(self):
        return self.now


def create(logdir, clock, stream=None, suite=SUITE, **kwargs):
    return run_log.RunLog(
        logdir, suite, 4, 4000, clock=clock, stream=stream or io.StringIO(), **kwargs
    )


def write(log, agent_steps, updates=0):
    return log.maybe_write(4 * agent_steps, agent_steps, updates)


def record(log, returns, level_id=0, end=EpisodeEnd.TERMINATED, frames=40):
    n = len(returns)
    log.record_episodes(
        np.full([n], level_id, np.int32),
        np.array(returns, np.float32),
        np.full([n], frames, np.int32),
        np.full([n], end, np.int32),
    )


def refuse_constant(name):
    raise ValueError(f'{name} is not JSON')


def metrics(logdir, name='metrics.jsonl'):
    with open(os.path.join(logdir, name)) as file:
        content = file.read()
    assert content == '' or content.endswith('\n')
    return [json.loads(line, parse_constant=refuse_constant) for line in content.splitlines()]


def episodes(logdir, name='episodes.csv'):
    with open(os.path.join(logdir, name), newline='') as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """Makes the operating system refuse to write any file beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
