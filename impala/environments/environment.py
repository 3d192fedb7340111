"""The interface of an environment."""

import abc
from typing import Any

import numpy as np

from impala.errors import LevelError
from impala.trajectory import EnvironmentSpec, EpisodeEnd

# The same for Atari and DeepMind Lab.
SUITE_FRAMES_PER_SECOND = 60.0

Observation = dict[str, np.ndarray]


class DeclarationError(LevelError):
    """An environment returned something else than it declared; the text is one sentence with both.

    At the first reset this means that the level cannot be played. Later only that one environment
    failed, since thousands of its steps were as declared.
    """


class Environment(abc.ABC):
    """One level, played over and over.

    Observations are dicts of C-contiguous arrays with exactly the shapes and dtypes of
    `spec.observation`. They may be buffers that the next call overwrites: the caller copies.
    """

    spec: EnvironmentSpec
    # Frames that the last action lasted; None means `spec.num_action_repeats`. Read only after
    # TERMINATED or TRUNCATED, since the end of an episode may cut an action short.
    last_action_frames: int | None = None
    # The last observation of the episode that ended with TRUNCATED, in arrays that the reset has
    # not overwritten; None if the environment does not return it. Read only then, and only with
    # `EnvironmentConfig.bootstrap_truncated`.
    last_observation: Observation | None = None

    @property
    def frames_per_second(self) -> float | None:
        """Frames per second of play at natural speed; None if the level has no such speed."""
        return None

    @abc.abstractmethod
    def reset(self) -> Observation:
        """Starts an episode and returns its first observation."""

    @abc.abstractmethod
    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        """Acts for `spec.num_action_repeats` frames, or until the episode ends.

        Args:
          action: an integer in `[0, spec.num_actions)` if actions are discrete; otherwise an
            array as `ActionSpec.to_environment` returns it.

        Returns:
          The unclipped reward, summed over those frames; how the episode ended, if it did; and the
          observation. An episode that ends is reset in the same step: after TERMINATED or
          TRUNCATED, the observation is the first one of the next episode. After LIFE_LOST the game
          continues.
        """

    def seed_next(self, seed: int) -> bool:
        """Seeds the next episode, which the next `reset` or the end of this episode starts.

        Args:
          seed: the next episode equals the first one of an environment created with this seed.

        Returns:
          Whether this environment can do that. If not, create a new one.
        """
        return False

    def render(self) -> np.ndarray | None:
        """Returns what a person would see now, uint8 RGB `[H, W, 3]`; None if it cannot draw.

        Needs `EnvironmentConfig.render`.
        """
        return None

    def check(self) -> None:  # noqa: B027
        """Looks for reasons not to play the level that creating it does not reveal.

        Raises:
          LevelError: the level cannot be played.
        """

    def close(self) -> None:  # noqa: B027
        """Frees all resources. May be called twice; no other call may follow."""
