"""Predetermined episodes, which actor processes play in test mode.

It does not import TensorFlow, because actor processes import it.
"""

import bisect
import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from impala import environments
from impala.acting import video_file
from impala.seeds import derived_seed
from impala.trajectory import ACTION_NOISE, ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd

_MIN_SIDE = 168
# For videos of environments that declare no frame rate.
_FRAMES_PER_SECOND = 10.0
# Part of every seed, so that a test does not repeat episodes of training.
_TEST = 0x7E57
# Part of the seed of action noise, so that it differs from the environment's random numbers.
_ACTIONS = 0xAC7
# Agent steps whose action noise is drawn at once; does not change the numbers.
_NOISE_STEPS = 64


class Episode(NamedTuple):
    """An episode to be played.

    Attributes:
      level_name: its level.
      seed: the episode is the first of an environment made with this seed.
      number: within the level, from 0.
    """

    level_name: str
    seed: int
    number: int


class Episodes(Sequence[Episode]):
    """Episodes of one level, made lazily because there may be millions."""

    def __init__(
        self, level_name: str, seed: int, numbers: range, without: Sequence[int] = ()
    ) -> None:
        """Stores the numbers.

        Args:
          level_name: the level.
          seed: of the test.
          numbers: numbers of the episodes within the level.
          without: numbers of `numbers` that are left out.
        """
        self._level_name = level_name
        self._seed = seed
        self._numbers = numbers
        self._without = sorted(without)
        # How many episodes come before each gap.
        self._gaps = [numbers.index(gap) - i for i, gap in enumerate(self._without)]

    def __len__(self) -> int:
        return len(self._numbers) - len(self._without)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f'There is no episode {index} of {len(self)}.')
        number = self._numbers[index + bisect.bisect_right(self._gaps, index)]
        return Episode(self._level_name, episode_seed(self._seed, self._level_name, number), number)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-serializable form; `from_json` is its inverse."""
        numbers = self._numbers
        return {
            'level_name': self._level_name,
            'seed': self._seed,
            'numbers': (numbers.start, numbers.stop, numbers.step),
            'without': self._without,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> 'Episodes':
        """Rebuilds what `to_json` returned."""
        return cls(value['level_name'], value['seed'], range(*value['numbers']), value['without'])


class Schedule:
    """The episodes of a test: their assignment to actors, and their results.

    Attributes:
      num_played: episodes that have a result.
      series_settings: JSON-serializable keyword arguments of every `EpisodeSeries`.
    """

    def __init__(
        self,
        level_names: Sequence[str],
        num_actors: int,
        num_episodes: int,
        seed: int,
        ended: Callable[[int], None] = lambda steps: None,
        video_folder: str | None = None,
        num_videos: int = 0,
        max_frames: int | None = None,
    ):
        """Assigns the episodes to the actors.

        Args:
          level_names: levels without duplicates, assigned to the actors round-robin.
          num_actors: at least one for each level.
          num_episodes: of each level.
          seed: of the test.
          ended: called with the agent steps of each episode after its result is recorded.
          video_folder: existing folder for videos.
          num_videos: episodes with numbers below this are filmed.
          max_frames: frames after which an episode is cut off; None for no limit.
        """
        self.series_settings: dict[str, Any] = {
            'video_folder': video_folder,
            'num_videos': num_videos,
            'max_frames': max_frames,
        }
        self.num_played = 0
        self._seed = seed
        self._ended = ended
        self._returns: dict[str, dict[int, float]] = {name: {} for name in level_names}
        self._cut_off = dict.fromkeys(level_names, 0)
        self._num_episodes = num_episodes * len(level_names)
        self._shares = []
        for actor in range(num_actors):
            row, level = divmod(actor, len(level_names))
            stride = -(-(num_actors - level) // len(level_names))
            self._shares.append((level_names[level], range(row, num_episodes, stride)))

    def episodes_of(self, actor: int) -> Episodes:
        """Returns the episodes of an actor that have no result yet."""
        name, numbers = self._shares[actor]
        played = self._returns[name]
        # An actor starts with its first episode; actors that help it start with the last one.
        low, high = 0, len(numbers)
        while low < high and numbers[low] in played:
            low += 1
        while low < high and numbers[high - 1] in played:
            high -= 1
        left = numbers[low:high]
        return Episodes(name, self._seed, left, [number for number in played if number in left])

    def record(
        self,
        level_name: str,
        number: int,
        episode_return: float,
        steps: int,
        is_cut_off: bool = False,
    ) -> None:
        """Records the result of an episode."""
        self._returns[level_name][number] = episode_return
        self._cut_off[level_name] += is_cut_off
        self.num_played += 1
        self._ended(steps)

    @property
    def is_complete(self) -> bool:
        """Whether all episodes have a result."""
        return self.num_played == self._num_episodes

    def returns(self) -> dict[str, list[float]]:
        """Returns level name -> returns so far, ordered by episode number."""
        return {
            name: [value for _, value in sorted(values.items())]
            for name, values in self._returns.items()
        }

    def levels_text(self) -> str:
        """Returns text that says how many of several levels are complete; '' for one level.

        It continues a line that states a number of episodes. Thread-safe.
        """
        if len(self._returns) == 1:
            return ''
        per_level = self._num_episodes // len(self._returns)
        complete = sum(len(values) == per_level for values in self._returns.values())
        return f'; {complete} of {len(self._returns)} levels are complete'

    def cut_off(self) -> dict[str, int]:
        """Returns level name -> number of its episodes that were cut off."""
        return dict(self._cut_off)


def episode_seed(seed: int, level_name: str, number: int) -> int:
    """Returns the seed of a level's episode with this number, in `[0, 2**31)`."""
    return derived_seed(seed, _TEST, zlib.crc32(level_name.encode()), number)


def with_action_noise(spec: EnvironmentSpec) -> EnvironmentSpec:
    """Returns the spec of an `EpisodeSeries` whose environments have the given spec.

    Observations have an additional entry `ACTION_NOISE`, f32 `[N]`: independent draws from the
    standard Gumbel distribution for each logit of the policy, and from the standard normal
    distribution for each continuous component of an action. With logits, the action
    `argmax(logits + noise)` is then a sample from the policy (Maddison et al. 2014,
    https://arxiv.org/abs/1411.0030). It depends only on the episode and the agent step, not on the
    other episodes that are being played.
    """
    noise = ArraySpec((spec.action.num_logits + len(spec.action.bounds),), 'float32')
    return dataclasses.replace(spec, observation=spec.observation | {ACTION_NOISE: noise})


class _NoiseStream:
    """The action noise of an episode, step by step."""

    def __init__(self, seed: int, action: ActionSpec):
        self._random = np.random.default_rng((_ACTIONS, seed))
        self._action = action
        self._rows: Iterator[np.ndarray] = iter(())

    def next(self) -> np.ndarray:
        """Returns the noise of the next agent step, f32 `[N]`."""
        row = next(self._rows, None)
        if row is None:
            rows = self._random.gumbel(size=(_NOISE_STEPS, self._action.num_logits))
            if self._action.bounds:
                normal = self._random.normal(size=(_NOISE_STEPS, len(self._action.bounds)))
                rows = np.concatenate([rows, normal], 1)
            self._rows = iter(rows.astype(np.float32))
            row = next(self._rows)
        return row


class EpisodeQueues:
    """The episodes that the environments of one process have not started.

    An environment that has finished its episodes takes over some of the environment that has the
    most left. Otherwise the longest games would be played one at a time at the end. It stays with
    that source, because another level requires a new environment.
    """

    def __init__(self, episodes: Sequence[Sequence[Episode]]):
        """Takes the episodes of each environment, in the order in which they are played."""
        self._episodes = list(episodes)
        # Half-open range of the episodes that have not started.
        self._bounds = [[0, len(each)] for each in episodes]
        self._sources = list(range(len(self._episodes)))

    def first(self, index: int) -> Episode | None:
        """Returns the next episode of an environment's present source, None if it has no more."""
        source = self._sources[index]
        low, high = self._bounds[source]
        if low == high:
            return None
        # Others take from the end, so that an environment's prepared episode is taken last.
        return self._episodes[source][low if source == index else high - 1]

    def take(self, index: int) -> Episode | None:
        """Takes the episode that an environment must play next; None if all have started."""
        if not self._num_left(self._sources[index]):
            self._sources[index] = max(range(len(self._bounds)), key=self._num_left)
        episode = self.first(index)
        if episode is not None:
            source = self._sources[index]
            if source == index:
                self._bounds[source][0] += 1
            else:
                self._bounds[source][1] -= 1
        return episode

    def _num_left(self, source: int) -> int:
        low, high = self._bounds[source]
        return high - low


class EpisodeSeries(environments.Environment):
    """Plays a sequence of episodes, each as if in a newly made environment.

    Attributes:
      spec: see `with_action_noise`.
      is_done: whether all episodes are played; it must not be stepped after that.
    """

    def __init__(
        self,
        level_name: str,
        config: environments.EnvironmentConfig,
        queues: EpisodeQueues,
        index: int,
        record: Callable[[str, int, float, int, bool], None],
        video_folder: str | None = None,
        num_videos: int = 0,
        max_frames: int | None = None,
    ):
        """Makes the environment of the first episode.

        Args:
          level_name: level to make if there is no episode.
          config: settings of the environments.
          queues: supplies the episodes.
          index: index of this environment in `queues`.
          record: called with the result of each episode; see `Schedule.record`.
          video_folder: existing folder for videos.
          num_videos: episodes with numbers below this are filmed.
          max_frames: frames after which an episode is cut off; None for no limit.

        Raises:
          LevelError: see `environments.create_environment`.
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
        self.spec = with_action_noise(self._environment.spec)
        self._max_steps = float('inf')
        if max_frames is not None:
            self._max_steps = -(-max_frames // self.spec.num_action_repeats)
        self._observation: environments.Observation = {}
        self._prepared: Episode | None = None
        self._return = 0.0
        self._steps = 0
        self._begin_noise()

    def reset(self) -> environments.Observation:
        self._observation = self._environment.reset()
        self._begin()
        return self._observation | {ACTION_NOISE: self._noise.next()}

    def step(self, action: Any) -> tuple[float, EpisodeEnd, environments.Observation]:
        reward, end, self._observation = self._environment.step(action)
        self._return += float(reward)
        self._steps += 1
        if end in (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED):
            self._end(is_cut_off=False)
        elif self._steps >= self._max_steps:
            end = EpisodeEnd.TRUNCATED
            self._end(is_cut_off=True)
        elif self._film is not None:
            self._film.take(self._observation)
        return reward, end, self._observation | {ACTION_NOISE: self._noise.next()}

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._environment.close()

    def _make(self) -> environments.Environment:
        return environments.create_environment(
            self._episode.level_name, self._episode.seed, self._config
        )

    def _begin(self) -> None:
        """Starts an episode after a reset, and prepares the next one before this one ends."""
        upcoming = self._queues.first(self._index)
        # After the last episode, loading the same map again is cheaper than another one.
        seed = (upcoming or self._episode).seed
        self._prepared = upcoming if self._environment.seed_next(seed) else None
        self._return, self._steps = 0.0, 0
        if self._video_folder is not None and 0 <= self._episode.number < self._num_videos:
            name = re.sub(r'[^A-Za-z0-9]+', '_', self._episode.level_name)
            self._film = _Film(
                os.path.join(self._video_folder, f'{name}_{self._episode.number}'),
                self._environment,
            )
            self._film.take(self._observation)

    def _begin_noise(self) -> None:
        self._noise = _NoiseStream(self._episode.seed, self.spec.action)

    def _end(self, is_cut_off: bool) -> None:
        if self._film is not None:
            self._film.close()
            self._film = None
        self._record(
            self._episode.level_name, self._episode.number, self._return, self._steps, is_cut_off
        )
        episode = self._queues.take(self._index)
        if episode is None:
            self.is_done = True
            return
        is_same_level = episode.level_name == self._episode.level_name
        self._episode = episode
        self._begin_noise()
        is_prepared = episode == self._prepared
        if is_cut_off or not is_prepared:
            if not (is_prepared or (is_same_level and self._environment.seed_next(episode.seed))):
                self._environment.close()
                self._environment = self._make()
            self._observation = self._environment.reset()
        self._begin()


class _Film:
    """Videos of an episode: what the agent sees, and what a person would see."""

    def __init__(self, path: str, environment: environments.Environment):
        self._path = path
        self._environment = environment
        frames_per_second = environment.frames_per_second or _FRAMES_PER_SECOND
        self._rate = frames_per_second / environment.spec.num_action_repeats
        self._is_atari = environment.spec.suite == 'atari'
        self._files: dict[str, video_file.VideoFile] = {}

    def take(self, observation: environments.Observation) -> None:
        frame = observation['frame']
        if frame.dtype == np.float32 and frame.ndim == 3:
            # Pixels of floats are from 0 to 1, whatever the bounds of the environment's own are.
            frame = np.rint(255 * np.clip(np.nan_to_num(frame), 0.0, 1.0)).astype(np.uint8)
        if frame.dtype == np.uint8 and frame.ndim == 3:
            if frame.shape[2] in (3, 4) and not self._is_atari:
                # A fourth channel is the opacity.
                rgb = frame[..., :3]
            else:
                # The last frame of a stack of grey frames is the newest.
                rgb = np.repeat(frame[..., -1:], 3, axis=2)
            self._write('agent', rgb)
        picture = self._environment.render()
        if picture is not None:
            self._write('person', picture)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, kind: str, rgb: np.ndarray) -> None:
        import cv2

        height, width = rgb.shape[:2]
        # Encoders require even sides, and players larger frames than the agent sees.
        scale = max(1, -(-_MIN_SIDE // min(height, width)))
        size = (width * scale // 2 * 2, height * scale // 2 * 2)
        if kind not in self._files:
            self._files[kind] = video_file.create(f'{self._path}_{kind}.mp4', self._rate, size)
        picture = np.ascontiguousarray(rgb, np.uint8)
        self._files[kind].write(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST))
