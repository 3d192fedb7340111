"""The interface of an environment, and its configuration."""

import abc
import dataclasses

import numpy as np

from impala.errors import LevelError
from impala.trajectory import EnvironmentSpec, EpisodeEnd

# Width and height.
DEFAULT_SIZE = (96, 72)
# The same for Atari and DeepMind Lab.
SUITE_FRAMES_PER_SECOND = 60.0

Observation = dict[str, np.ndarray]


class DeclarationError(LevelError):
    """An environment returned something else than it declared; the text is one sentence with both.

    At the first reset this means that the level cannot be played. Later only that one environment
    failed, since thousands of its steps were as declared.
    """


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """What shapes an environment besides its level and seed; `dataclasses.asdict` is its JSON form.

    Attributes:
      width: of the frames of DeepMind Lab, of Atari and of resized images, pixels. The default of
        both is 84x84 for Atari; pictures of MiniGrid have their own size whatever it says.
      height: see `width`.
      num_action_repeats: frames per agent step; None is 4 for Atari, DeepMind Lab and VizDoom and 1
        for everything else.
      full_action_set: Atari: all 18 actions, not the game's minimal set.
      sticky_actions: Atari: probability that a frame repeats the action of the one before
        (Machado et al., 2018, use .25).
      end_episode_on_life_loss: Atari: report a lost life as `EpisodeEnd.LIFE_LOST`.
      max_noops: Atari: an episode starts with 1 to this many no-ops, uniformly; 0 for none.
      frames_per_noop: Atari: 1 as in DQN's released code and Gymnasium; as many as action repeats
        make a no-op an action of the agent, as in DQN's text (Mnih et al., 2015).
      frame_stack: Atari: number of frames in the stack, the newest last.
      dataset_path: DeepMind Lab: folder with the Brady-Konkle-Oliva images that two levels need.
      level_cache_dir: DeepMind Lab: folder of compiled maps, shared by all processes; None compiles
        every map anew, which takes seconds at each episode.
      level_cache_gb: what these maps may have in all, in units of 1e9 bytes.
      temp_folder: existing folder for what an environment writes; None is the system's. A killed
        process leaves its files there, so a parent does well to remove it.
      is_test: DeepMind Lab: allow the hold-out levels, which are for testing only, and take the
        mixer seed of tests.
      render: `Environment.render` will be called.
    """

    width: int = DEFAULT_SIZE[0]
    height: int = DEFAULT_SIZE[1]
    num_action_repeats: int | None = None
    full_action_set: bool = False
    sticky_actions: float = 0.0
    end_episode_on_life_loss: bool = False
    max_noops: int = 30
    frames_per_noop: int = 1
    frame_stack: int = 4
    dataset_path: str = ''
    level_cache_dir: str | None = None
    level_cache_gb: float = 10.0
    temp_folder: str | None = None
    is_test: bool = False
    render: bool = False

    def __post_init__(self) -> None:
        for name in ('width', 'height', 'frame_stack', 'frames_per_noop'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}.')
        if self.num_action_repeats is not None and self.num_action_repeats < 1:
            raise ValueError(
                f'num_action_repeats must be at least 1, not {self.num_action_repeats}.'
            )
        if not 0 <= self.sticky_actions < 1:
            raise ValueError(f'sticky_actions must be in [0, 1), not {self.sticky_actions}.')
        if self.max_noops < 0:
            raise ValueError(f'max_noops must not be negative, but is {self.max_noops}.')


class Environment(abc.ABC):
    """One level, played over and over.

    Observations are dicts of C-contiguous arrays with exactly the shapes and dtypes of
    `spec.observation`. They may be buffers that the next call overwrites: the caller copies.
    """

    spec: EnvironmentSpec
    # Frames that the last action lasted; None means `spec.num_action_repeats`. Read only after
    # TERMINATED or TRUNCATED, since the end of an episode may cut an action short.
    last_action_frames: int | None = None

    @property
    def frames_per_second(self) -> float | None:
        """Frames per second of play at natural speed; None if the level has no such speed."""
        return None

    @abc.abstractmethod
    def reset(self) -> Observation:
        """Starts an episode and returns its first observation."""

    @abc.abstractmethod
    def step(self, action: int) -> tuple[float, EpisodeEnd, Observation]:
        """Acts for `spec.num_action_repeats` frames, or until the episode ends.

        Args:
          action: in `[0, spec.num_actions)`.

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
