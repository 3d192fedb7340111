"""An environment without cost: it returns the same frame for every action."""

import numpy as np

from impala.environments import Environment, EnvironmentConfig
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd

EPISODE_STEPS = 1000


class FixedFrame(Environment):
    """Always returns the same random 72x96x3 frame, in episodes of 1,000 agent steps."""

    spec = EnvironmentSpec({'frame': ArraySpec((72, 96, 3), 'uint8')}, ActionSpec.discrete(9), 4)

    def __init__(self, seed: int):
        frame = np.random.default_rng(seed).integers(0, 256, (72, 96, 3), np.uint8)
        self._observation = {'frame': frame}
        self._steps = 0

    def reset(self):
        return self._observation

    def step(self, action):
        self._steps += 1
        end = EpisodeEnd.TRUNCATED if self._steps % EPISODE_STEPS == 0 else EpisodeEnd.NOT_ENDED
        return 0.0, end, self._observation


def make(seed: int, config: EnvironmentConfig) -> FixedFrame:
    """Level name `benchmarks.fixed_frame:make`."""
    return FixedFrame(seed)
