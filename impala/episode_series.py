"""Episodes that are fixed beforehand: what actor processes play in test mode.

It knows no TensorFlow: actor processes import it.
"""

import collections
import os
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import environments
from impala.seeds import derived_seed
from impala.trajectory import EpisodeEnd

_MIN_SIDE = 168
# Part of every seed, so that a test does not repeat the episodes trained on.
_TEST = 0x7E57


class Episode(NamedTuple):
    """An episode to be played.

    Attributes:
      level_name: what is played.
      seed: as if an environment had been made with it for this episode.
      number: within the level, from 0.
    """

    level_name: str
    seed: int
    number: int


class Schedule:
    """Which episodes are played, who has them at first, and what has come of them."""

    def __init__(
        self,
        level_names: Sequence[str],
        num_actors: int,
        num_episodes: int,
        seed: int,
        ended: Callable[[int], None] = lambda steps: None,
        video_folder: str | None = None,
        num_videos: int = 0,
    ):
        """Decides on the episodes.

        Args:
          level_names: that actors have in turns; no two are alike.
          num_actors: at least one for each level.
          num_episodes: of each level.
          seed: of the test.
          ended: told the agent steps of each episode that has ended, once it is recorded.
          video_folder: existing folder for videos.
          num_videos: episodes with lower numbers than this are filmed.
        """
        self.video_folder = video_folder
        self.num_videos = num_videos
        self._ended = ended
        self._returns: dict[str, dict[int, float]] = {name: {} for name in level_names}
        self._num_left = num_episodes * len(level_names)
        self._episodes = []
        for actor in range(num_actors):
            row, level = divmod(actor, len(level_names))
            name = level_names[level]
            numbers = range(row, num_episodes, -(-(num_actors - level) // len(level_names)))
            self._episodes.append([Episode(name, episode_seed(seed, name, n), n) for n in numbers])

    def episodes_of(self, actor: int) -> list[Episode]:
        """Returns those of an actor that have no result yet."""
        return [
            episode
            for episode in self._episodes[actor]
            if episode.number not in self._returns[episode.level_name]
        ]

    def record(self, level_name: str, number: int, episode_return: float, steps: int) -> None:
        """Takes the result of an episode."""
        self._returns[level_name][number] = episode_return
        self._num_left -= 1
        self._ended(steps)

    @property
    def is_complete(self) -> bool:
        """Whether all episodes have a result."""
        return self._num_left == 0

    def returns(self) -> dict[str, list[float]]:
        """Returns level name -> returns in the order of the episodes' numbers.

        Raises:
          RuntimeError: episodes have no result.
        """
        if not self.is_complete:
            raise RuntimeError(f'{self._num_left} episodes have not been played.')
        return {
            name: [value for _, value in sorted(values.items())]
            for name, values in self._returns.items()
        }


def episode_seed(seed: int, level_name: str, number: int) -> int:
    """Returns the seed of a level's episode with a number, in `[0, 2**31)`."""
    return derived_seed(seed, _TEST, zlib.crc32(level_name.encode()), number)


class EpisodeQueues:
    """The episodes that the environments of one process have not begun.

    An environment that has no more takes over from the one that has the most, and stays with its
    level, as another costs a new environment. Else the longest games would be played alone at the
    end.
    """

    def __init__(self, episodes: Sequence[Sequence[Episode]]):
        """Args: episodes: of each environment, in their order."""
        self._queues = [collections.deque(each) for each in episodes]
        self._sources = list(range(len(self._queues)))

    def first(self, index: int) -> Episode | None:
        """Returns what an environment would take, if that is where it took the last one from."""
        source = self._sources[index]
        queue = self._queues[source]
        # Others begin at the end, so that what an environment has prepared for is taken last.
        return queue[0 if source == index else -1] if queue else None

    def take(self, index: int) -> Episode | None:
        """Returns what an environment is to play now; None if all episodes have begun."""
        if not self._queues[self._sources[index]]:
            self._sources[index] = max(range(len(self._queues)), key=lambda i: len(self._queues[i]))
        source = self._sources[index]
        queue = self._queues[source]
        if not queue:
            return None
        return queue.popleft() if source == index else queue.pop()


class EpisodeSeries(environments.Environment):
    """Plays episodes one after the other, each as in an environment of its own.

    Attributes:
      is_done: whether there are no more; it must not be stepped then.
    """

    def __init__(
        self,
        level_name: str,
        config: environments.EnvironmentConfig,
        queues: EpisodeQueues,
        index: int,
        record: Callable[[str, int, float, int], None],
        video_folder: str | None = None,
        num_videos: int = 0,
    ):
        """Makes the environment of the first episode.

        Args:
          level_name: what to make if there is no episode.
          config: of the environments.
          queues: where it takes its episodes from.
          index: whose they are there in the first place.
          record: told of each episode that has ended; see `Schedule.record`.
          video_folder: existing folder for videos.
          num_videos: episodes with lower numbers than this are filmed.

        Raises:
          LevelError: as `environments.create_environment`.
        """
        self._config = config
        self._queues = queues
        self._index = index
        self._record = record
        self._video_folder = video_folder
        self._num_videos = num_videos
        self._film: _Film | None = None
        first = queues.take(index)
        self.is_done = first is None
        self._episode = first or Episode(level_name, 0, -1)
        self._environment = self._make()
        self.spec = self._environment.spec
        self._observation: environments.Observation = {}
        self._prepared: Episode | None = None
        self._return = 0.0
        self._steps = 0

    def reset(self) -> environments.Observation:
        self._observation = self._environment.reset()
        self._begin()
        return self._observation

    def step(self, action: int) -> tuple[float, EpisodeEnd, environments.Observation]:
        reward, end, self._observation = self._environment.step(action)
        self._return += float(reward)
        self._steps += 1
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            self._end()
        elif self._film is not None:
            self._film.take(self._observation, self._environment)
        return reward, end, self._observation

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._environment.close()

    def _make(self) -> environments.Environment:
        return environments.create_environment(
            self._episode.level_name, self._episode.seed, self._config
        )

    def _begin(self) -> None:
        """After a reset: what comes next has to be known before this episode ends."""
        upcoming = self._queues.first(self._index)
        # Behind the last one, the map that has just been played costs less than yet another.
        seed = (upcoming or self._episode).seed
        self._prepared = upcoming if self._environment.seed_next(seed) else None
        self._return, self._steps = 0.0, 0
        if self._video_folder is not None and 0 <= self._episode.number < self._num_videos:
            name = re.sub(r'[^A-Za-z0-9]+', '_', self._episode.level_name)
            self._film = _Film(
                os.path.join(self._video_folder, f'{name}_{self._episode.number}'),
                self.spec.num_action_repeats,
                self._environment.spec.suite,
            )
            self._film.take(self._observation, self._environment)

    def _end(self) -> None:
        if self._film is not None:
            self._film.close()
            self._film = None
        # float(str(x)) is the shortest decimal of a float32; float(x) shows its binary tail.
        episode_return = float(str(np.float32(self._return)))
        self._record(self._episode.level_name, self._episode.number, episode_return, self._steps)
        episode = self._queues.take(self._index)
        if episode is None:
            self.is_done = True
            return
        is_same_level = episode.level_name == self._episode.level_name
        self._episode = episode
        if episode != self._prepared:
            if not (is_same_level and self._environment.seed_next(episode.seed)):
                self._environment.close()
                self._environment = self._make()
            self._observation = self._environment.reset()
        self._begin()


class _Film:
    """Videos of an episode: the frames of the agent, and what a person would see."""

    def __init__(self, path: str, num_action_repeats: int, suite: str):
        self._path = path
        # Those two have 60 frames a second; others have no time of their own.
        self._rate = max(1.0, 60 / num_action_repeats) if suite else 10.0
        self._is_atari = suite == 'atari'
        self._writers: dict[str, Any] = {}

    def take(
        self, observation: environments.Observation, environment: environments.Environment
    ) -> None:
        frame = observation['frame']
        if frame.dtype == np.uint8 and frame.ndim == 3:
            if frame.shape[2] in (3, 4) and not self._is_atari:
                # A fourth channel says how opaque a picture is.
                rgb = frame[..., :3]
            else:
                # The newest one of a stack of grey frames is the last.
                rgb = np.repeat(frame[..., -1:], 3, axis=2)
            self._write('agent', rgb)
        picture = environment.render()
        if picture is not None:
            self._write('person', picture)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.release()

    def _write(self, kind: str, rgb: np.ndarray) -> None:
        import cv2

        height, width = rgb.shape[:2]
        # Encoders want even sides, and players larger ones than the agent sees.
        scale = max(1, -(-_MIN_SIDE // min(height, width)))
        size = (width * scale // 2 * 2, height * scale // 2 * 2)
        if kind not in self._writers:
            self._writers[kind] = cv2.VideoWriter(
                f'{self._path}_{kind}.mp4', cv2.VideoWriter.fourcc(*'mp4v'), self._rate, size
            )
            if not self._writers[kind].isOpened():
                raise environments.LevelError(
                    f'--save_video: cannot write {self._path}_{kind}.mp4: the folder must be '
                    'writable, and OpenCV able to encode mp4v.'
                )
        bgr = cv2.cvtColor(np.ascontiguousarray(rgb, np.uint8), cv2.COLOR_RGB2BGR)
        self._writers[kind].write(cv2.resize(bgr, size, interpolation=cv2.INTER_NEAREST))
