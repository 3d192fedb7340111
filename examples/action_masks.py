"""Action masks: a third of the actions are impossible at each step.

The mask is an entry of the observation, or of the info.

How to run it: docs/examples/action_masks.md.
"""

import gymnasium
import numpy as np

WORKERS, JOBS = 9, 3
BUSY_STEPS = 3  # So three of nine workers are busy, except at the start of an episode.
EPISODE_STEPS = 30
# Reward for each worker and job: each worker is good at one job, and not all are equally good.
SKILLS = np.array(
    [
        [1.0 - 0.1 * (w // JOBS) if w % JOBS == j else 0.2 for j in range(JOBS)]
        for w in range(WORKERS)
    ]
)


class Workers(gymnasium.Env):
    """Jobs come one by one, and each is given to a worker who is not busy.

    A job for a busy worker is an error, as it would be in a program that plans real work.
    """

    action_space = gymnasium.spaces.Discrete(WORKERS)

    def __init__(self, mask_in='observation'):
        """Takes where the mask is: `'observation'` or `'info'`."""
        self._mask_in = mask_in
        entries = {
            'job': gymnasium.spaces.Discrete(JOBS),
            'next_job': gymnasium.spaces.Discrete(JOBS),
            'busy': gymnasium.spaces.Box(0.0, 1.0, (WORKERS,)),
        }
        if mask_in == 'observation':
            entries['action_mask'] = gymnasium.spaces.MultiBinary(WORKERS)
        self.observation_space = gymnasium.spaces.Dict(entries)

    def reset(self, *, seed=None, options=None):
        """Starts an episode; see `gymnasium.Env`."""
        super().reset(seed=seed)
        self._steps = 0
        self._busy_until = np.zeros(WORKERS, int)
        self._jobs = self.np_random.integers(JOBS, size=EPISODE_STEPS + 2)
        return self._observe()

    def step(self, action):
        """Gives the job to a worker; see `gymnasium.Env`."""
        if self._busy_until[action] > self._steps:
            raise ValueError(f'worker {action} is busy')
        reward = SKILLS[action, self._jobs[self._steps]]
        self._steps += 1
        self._busy_until[action] = self._steps + BUSY_STEPS
        observation, info = self._observe()
        return observation, reward, False, self._steps == EPISODE_STEPS, info

    def _observe(self):
        busy = self._busy_until > self._steps
        observation = {
            'job': self._jobs[self._steps],
            'next_job': self._jobs[self._steps + 1],
            # A mask is not an input of the network, so this is.
            'busy': busy.astype(np.float32),
        }
        mask = (~busy).astype(np.int8)
        if self._mask_in == 'info':
            return observation, {'action_mask': mask}
        return observation | {'action_mask': mask}, {}


def make(seed, config, **kwargs):
    """Called in every actor; `--env_kwargs` has `mask_in`."""
    return Workers(**kwargs)
