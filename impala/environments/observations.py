"""The observation of a Gymnasium environment, converted to the arrays that the agent sees.

A Dict or Tuple is taken apart, however deeply nested. Its entries become these arrays:

* `frame`: the image whose key is `screen`, `image` or `observation`, or else the first one. Without
  an image, all numbers.
* Other images: an array for each, named by its keys, with `/` between them.
* `vector`: all numbers, one entry after the other, if there is an image. Its spec, or that of
  `frame`, says which entries it consists of.
* `instruction`: all texts, one after the other, as hashes of their words.

A name that is taken gets a number: `a/b` and `a/b_2`. An `action_mask` of the outermost Dict is no
part of the observation. What is an image or a number is said in
`impala.environments.observation_spaces`.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from impala.environments.environment import DeclarationError
from impala.environments.instructions import hash_instruction
from impala.environments.observation_spaces import (
    RULE,
    Entry,
    is_text,
    make_entry,
    space_text,
    value_text,
)
from impala.errors import LevelError
from impala.trajectory import ACTION_MASK, ACTION_NOISE, ArraySpec, Part

# Keys of the image that is the frame, in order of preference.
FRAME_KEYS = ('screen', 'image', 'observation')

# Names of arrays that are not images of their own.
_RESERVED = ('frame', 'vector', 'instruction', ACTION_MASK, ACTION_NOISE)

_Path = tuple[Any, ...]


class Observations:
    """Converts the observations of one environment.

    Attributes:
      spec: name -> spec of each array.
      arrays: name -> array; each `take` overwrites or replaces them.
      take: checks an observation, given as what the environment returned and whether it starts an
        episode, and converts it to `arrays`. Raises DeclarationError if it is not in the space.
    """

    def __init__(
        self,
        space: Any,
        size: tuple[int, int] | None,
        level_name: str,
        keys: Sequence[str] = (),
        made_by: str = '',
    ) -> None:
        """Reads a space.

        Args:
          space: a `gymnasium.Space`.
          size: width and height to resize images to, pixels; None to leave their size.
          level_name: for error messages.
          keys: of the entries of a Dict to use; none for all.
          made_by: part of a sentence that says what makes the observation, or ''.

        Raises:
          LevelError: the space is not supported, or lacks a key.
        """
        self._level_name = level_name
        self._space = space
        self._made_by = made_by
        self._texts: list[_Path] = []
        self._heard: list[str] = []
        self._entries: list[tuple[_Path, Entry]] = []
        self._parts: dict[str, tuple[Part, ...]] = {}
        for path, each in self._chosen(space, keys):
            if is_text(each):
                self._texts.append(path)
                self._heard.append('')
                continue
            entry = make_entry(each, size, level_name, _name(path) or None)
            if entry is None:
                raise self._unsupported(path, each)
            self._entries.append((path, entry))
        if not self._entries:
            chosen = f', of which --observation_keys={",".join(keys)} chooses' if keys else ' with'
            raise LevelError(
                f'{level_name!r} has the observation space {space_text(space)}{made_by}{chosen} '
                f'neither an image nor numbers: {RULE}.'
            )
        # Without a Dict or Tuple, its only entry.
        self.take: Callable[[Any, bool], None] = self._take_parts
        if not self._entries[0][0]:
            self.take = self._entries[0][1].take
        self.arrays = self._arrange()
        self.spec = {
            name: ArraySpec(array.shape, array.dtype.name, parts=self._parts.get(name, ()))
            for name, array in self.arrays.items()
        }

    def _take_parts(self, value: Any, is_first: bool) -> None:
        for path, entry in self._entries:
            entry.take(self._at(value, path), is_first)
        if self._texts:
            self._hear([self._at(value, path) for path in self._texts])

    def _chosen(self, space: Any, keys: Sequence[str]) -> Iterator[tuple[_Path, Any]]:
        from gymnasium import spaces

        if not keys:
            yield from _leaves(space, ())
            return
        known = {str(key): key for key in space} if isinstance(space, spaces.Dict) else {}
        for name in dict.fromkeys(keys):
            if name not in known:
                there = f'the keys {", ".join(known)}' if known else 'no keys'
                raise LevelError(
                    f'--observation_keys={",".join(keys)}: the observation of '
                    f'{self._level_name!r} has {there}.'
                )
            if name != ACTION_MASK:
                yield from _leaves(space[known[name]], (known[name],))

    def _arrange(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name; those of numbers become parts of one array."""
        images = [path for path, entry in self._entries if len(entry.array.shape) == 3]
        frame: _Path | None = None
        if images:
            preferred = [path for key in FRAME_KEYS for path in images if path[-1:] == (key,)]
            frame = (preferred or images)[0]
        arrays: dict[str, np.ndarray] = {}
        numbers: list[Entry] = []
        for path, entry in self._entries:
            if path == frame:
                arrays['frame'] = entry.array
            elif path in images:
                arrays[_free(_name(path), {*_RESERVED, *arrays})] = entry.array
            else:
                numbers.append(entry)
        if numbers:
            vector = np.zeros(sum(entry.array.size for entry in numbers), np.float32)
            name = 'vector' if images else 'frame'
            arrays[name], self._parts[name] = vector, _parts(numbers)
            begin = 0
            for entry in numbers:
                end = begin + entry.array.size
                entry.array = vector[begin:end]
                begin = end
        if self._texts:
            arrays['instruction'] = hash_instruction('')
        return {'frame': arrays.pop('frame'), **arrays}

    def _hear(self, texts: list[Any]) -> None:
        # Letters and length are not compared with the Text space: its default does not even allow
        # blanks, and only hashes of the words are used.
        for path, text in zip(self._texts, texts, strict=True):
            if not isinstance(text, str):
                raise DeclarationError(
                    f'{self._level_name!r} declares a text as {_subject(path)}, but returned '
                    f'{value_text(text)}.'
                )
        if texts != self._heard:
            self._heard = texts
            self.arrays['instruction'] = hash_instruction(' '.join(texts))

    def _at(self, value: Any, path: _Path) -> Any:
        for depth, key in enumerate(path):
            # The keys of a Tuple are its indices.
            has_keys = isinstance(value, Mapping) or (
                isinstance(value, tuple | list) and isinstance(key, int)
            )
            try:
                if not has_keys:
                    raise KeyError(key)
                value = value[key]
            except LookupError as error:
                came = 'one without it' if has_keys else value_text(value)
                raise DeclarationError(
                    f'{self._level_name!r} declares {key!r} in {_subject(path[:depth])}, but '
                    f'returned {came}.'
                ) from error
        return value

    def _unsupported(self, path: _Path, part: Any) -> LevelError:
        of = f', of which {_name(path)!r}, {space_text(part)}, is not supported' if path else ''
        return LevelError(
            f'{self._level_name!r} has the observation space {space_text(self._space)}'
            f'{self._made_by}{of}: {RULE}.'
        )


def _leaves(space: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    """Yields the entries of a space that are not a Dict or Tuple, with their keys and indices."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key, each in space.items():
            if path or key != ACTION_MASK:
                yield from _leaves(each, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, each in enumerate(space):
            yield from _leaves(each, (*path, index))
    else:
        yield path, space


def _parts(entries: Sequence[Entry]) -> tuple[Part, ...]:
    """Returns the parts of the vector that consists of some entries."""
    if len(entries) == 1:
        return entries[0].spec.parts
    parts = [
        entry.spec.parts or (Part('numbers', (math.prod(entry.spec.shape),)),) for entry in entries
    ]
    return tuple(itertools.chain.from_iterable(parts))


def _name(path: _Path) -> str:
    return '/'.join(map(str, path))


def _subject(path: _Path) -> str:
    return f'{_name(path)!r} of its observation' if path else 'its observation'


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f'{name}_{number}' for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)
