"""CartPole in numbered pieces: shows which unrolls reached a learner, were lost, or arrived twice.

`--level_name=benchmarks.numbered_level:cart_pole`, with the environment variable `FOLDER_VARIABLE`
naming an empty folder that all environments share.

The game is cut into episodes of at most `EPISODE_STEPS` steps, so that an unroll that long or
longer cannot be lost without an episode that ends in it. The last reward of an episode holds its
number; with rewards clipped to 1, learning sees CartPole's own. A pole that falls ends an episode
as `terminated`, a cut as `truncated`.

Actor processes import this module, which does not import TensorFlow.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from impala.environments import Environment, EnvironmentConfig, create_environment
from impala.trajectory import EpisodeEnd

FOLDER_VARIABLE = 'NUMBERED_LEVEL_FOLDER'
EPISODE_STEPS = 20
# Numbers are assigned in blocks; an environment takes another when it has used up its own.
_BLOCK = 1024
# A return is a float32, exact up to here.
_HIGHEST = 2**24


class _Numbers:
    """Numbers that no other environment in the folder has."""

    def __init__(self, folder: str):
        self._folder = folder
        self._block = -1
        self._used = _BLOCK

    def take(self) -> int:
        """Returns the next number.

        Raises:
          RuntimeError: there are no more.
        """
        if self._used == _BLOCK:
            self._block = self._claim(before=self._block)
            self._used = 0
        self._used += 1
        return self._block * _BLOCK + self._used - 1

    def _claim(self, before: int) -> int:
        for block in range(max(0, before), (_HIGHEST - EPISODE_STEPS) // _BLOCK):
            try:
                with open(os.path.join(self._folder, str(block)), 'x', encoding='utf-8') as file:
                    file.write(str(before))
                return block
            except FileExistsError:
                continue
        raise RuntimeError('There are no more numbers for episodes.')


class _NumberedCartPole(Environment):
    def __init__(self, seed: int, config: EnvironmentConfig, folder: str):
        self._game = create_environment('CartPole-v1', seed, config)
        self.spec = self._game.spec
        self._numbers = _Numbers(folder)
        self._steps = 0

    def reset(self) -> dict[str, Any]:
        self._steps = 0
        return self._game.reset()

    def step(self, action: Any) -> tuple[float, EpisodeEnd, dict[str, Any]]:
        reward, end, observation = self._game.step(action)
        self._steps += 1
        if self._steps == EPISODE_STEPS and not end:
            end = EpisodeEnd.TRUNCATED
        if end:
            self._steps = 0
            reward += self._numbers.take()
        return reward, end, observation

    def close(self) -> None:
        self._game.close()


def cart_pole(seed: int, config: EnvironmentConfig) -> Environment:
    """Makes the level; see the module's description."""
    return _NumberedCartPole(seed, config, os.environ[FOLDER_VARIABLE])


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of the episodes.

    Attributes:
      episodes: that reached the learner.
      duplicates: how many of them had arrived before.
      gaps: environment -> number of its gaps: episodes in a row that are missing before others of
        the same environment. Environments that miss nothing are left out.
      missing: episodes in all gaps together.
      frames_per_fall: frames between two falls of the pole, over the last quarter of the episodes.
    """

    episodes: int
    duplicates: int
    gaps: dict[int, int]
    missing: int
    frames_per_fall: float


def account(rows: Iterable[Mapping[str, str]], folder: str) -> Account:
    """Finds lost and duplicated episodes.

    Args:
      rows: of a run's `episodes.csv`.
      folder: where the environments took their numbers.
    """
    rows = list(rows)
    # Of each block: the environment, named by its first block, and the number of blocks before.
    places: dict[int, tuple[int, int]] = {-1: (-1, -1)}
    for block in sorted(map(int, os.listdir(folder))):
        with open(os.path.join(folder, str(block)), encoding='utf-8') as file:
            before = int(file.read())
        environment, number = places[before]
        places[block] = (block if before < 0 else environment, number + 1)
    seen: dict[int, set[int]] = {}
    duplicates = 0
    for row in rows:
        number = round(float(row['episode_return'])) - int(row['episode_frames'])
        environment, blocks_before = places[number // _BLOCK]
        index = blocks_before * _BLOCK + number % _BLOCK
        indices = seen.setdefault(environment, set())
        duplicates += index in indices
        indices.add(index)
    gaps: dict[int, int] = {}
    missing = 0
    for environment, indices in seen.items():
        before = -1
        for index in sorted(indices):
            if index != before + 1:
                gaps[environment] = gaps.get(environment, 0) + 1
                missing += index - before - 1
            before = index
    last = rows[-max(1, len(rows) // 4) :]
    frames = sum(int(row['episode_frames']) for row in last)
    falls = sum(row['ended_by'] == 'terminated' for row in last)
    return Account(len(rows), duplicates, gaps, missing, frames / max(1, falls))
