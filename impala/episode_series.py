"""Episodes that are fixed beforehand: what an actor process plays in test mode.

It knows no TensorFlow: actor processes import it.
"""

import collections
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

import environments
from impala.trajectory import EpisodeEnd

_MIN_SIDE = 168


class EpisodeSeries(environments.Environment):
    """Plays episodes of given seeds one after the other, and then stands still.

    Attributes:
      is_done: whether it has stood still for as long as was asked for.
    """

    def __init__(
        self,
        level_name: str,
        config: environments.EnvironmentConfig,
        seeds: Sequence[int],
        numbers: Sequence[int],
        final_steps: int,
        video_folder: str | None = None,
        num_videos: int = 0,
    ):
        """Makes the environment of the first episode.

        Args:
          level_name: of all episodes.
          config: of the environments.
          seeds: of the episodes, each as if an environment had been made for it; none are needed.
          numbers: of the episodes within the level.
          final_steps: steps to stand still before it is done, so that an unroll that began with
            the last episode is full.
          video_folder: existing folder for videos.
          num_videos: episodes with lower numbers than this are filmed.

        Raises:
          LevelError: as `environments.create_environment`.
        """
        self._level_name = level_name
        self._config = config
        self._upcoming = collections.deque(zip(seeds, numbers, strict=True))
        self._final_steps = final_steps
        self._video_folder = video_folder
        self._num_videos = num_videos
        self._film: _Film | None = None
        self._is_over = not self._upcoming
        self._seed, self._number = self._upcoming.popleft() if self._upcoming else (0, -1)
        self._environment = environments.create_environment(level_name, self._seed, config)
        self.spec = self._environment.spec
        self._observation: environments.Observation = {}
        self._has_next = False
        self.is_done = False

    def reset(self) -> environments.Observation:
        self._observation = self._environment.reset()
        self._begin()
        return self._observation

    def step(self, action: int) -> tuple[float, EpisodeEnd, environments.Observation]:
        if self._is_over:
            self._final_steps -= 1
            self.is_done = self._final_steps <= 0
            return 0.0, EpisodeEnd.NOT_ENDED, self._observation
        reward, end, self._observation = self._environment.step(action)
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            self._end()
        elif self._film is not None:
            self._film.take(self._observation, self._environment)
        return reward, end, self._observation

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._environment.close()

    def _begin(self) -> None:
        """After a reset: what comes next has to be known before this episode ends."""
        # Behind the last one, the map that has just been played costs less than yet another.
        next_seed = self._upcoming[0][0] if self._upcoming else self._seed
        self._has_next = self._environment.seed_next(next_seed)
        if self._video_folder is not None and 0 <= self._number < self._num_videos:
            self._film = _Film(
                os.path.join(
                    self._video_folder,
                    f'{re.sub(r"[^A-Za-z0-9]+", "_", self._level_name)}_{self._number}',
                ),
                self.spec.num_action_repeats,
                self.spec.suite,
            )
            self._film.take(self._observation, self._environment)

    def _end(self) -> None:
        if self._film is not None:
            self._film.close()
            self._film = None
        if not self._upcoming:
            self._is_over = True
            self._observation = {name: array.copy() for name, array in self._observation.items()}
            return
        self._seed, self._number = self._upcoming.popleft()
        if not self._has_next:
            self._environment.close()
            self._environment = environments.create_environment(
                self._level_name, self._seed, self._config
            )
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
