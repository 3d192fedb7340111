"""Action masks of Gymnasium environments: which actions are allowed in a state."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from impala.environments.environment import DeclarationError
from impala.trajectory import ActionSpec

# Those of a Dict or Tuple that have categories, by their keys or indices; None for other spaces.
_Components: TypeAlias = 'dict[Any, _Components] | None'


class ActionMask:
    """The mask of the present state, converted from what an environment returned.

    Attributes:
      array: bool `[N]` for N logits of the policy; each `take` overwrites it.
    """

    def __init__(self, spec: ActionSpec, space: Any, level_name: str, subject: str) -> None:
        """Prepares the array.

        Args:
          spec: of the actions.
          space: the `gymnasium.Space` of the actions.
          level_name: for error messages.
          subject: in words, where the environment returns the mask.
        """
        self._components = _components(space)
        self._level_name = level_name
        self._subject = subject
        self._size = spec.num_logits
        # Index of the first category of each component.
        self._begins = np.cumsum([0, *spec.categories[:-1]])
        self.array = np.ones(self._size, bool)

    def take(self, value: Any) -> None:
        """Checks a mask and converts it to `array`.

        Args:
          value: true (or 1) for each allowed category. One array for all components, one after
            the other, or a tuple of arrays in the order of the action space, or a dict of them
            with its keys.

        Raises:
          DeclarationError: it is not such a mask, or leaves a component without a category.
        """
        try:
            flat = np.concatenate(
                [np.ravel(each) for each in self._leaves(value, self._components)]
            )
        except ValueError:
            flat = np.zeros(0)
        if flat.shape != (self._size,) or flat.dtype.kind not in 'biu' or not _is_binary(flat):
            raise DeclarationError(
                f'{self._level_name!r} returned {self._subject} that is not {self._size} values '
                'of 0 or 1, one for each category of its actions.'
            )
        np.not_equal(flat, 0, out=self.array)
        if not np.logical_or.reduceat(self.array, self._begins).all():
            raise DeclarationError(
                f'{self._level_name!r} returned {self._subject} that allows no action.'
            )

    def _leaves(self, value: Any, components: _Components) -> list[Any]:
        """Returns the arrays of a mask in the order of the action space.

        Gymnasium sorts the keys of a Dict space, so a mask may have them in another order.
        """
        if isinstance(value, Mapping):
            keys = value.keys() if components is None else components.keys()
            if not keys <= value.keys():
                raise DeclarationError(
                    f'{self._level_name!r} returned {self._subject} with the keys '
                    f'{list(value)}, where its actions have {list(keys)}.'
                )
            value = tuple(value[key] for key in keys)
        if not isinstance(value, tuple):
            return [value]
        inner: list[_Components] = [None] * len(value)
        if components is not None and len(components) == len(value):
            inner = list(components.values())
        pairs = zip(value, inner, strict=True)
        return [leaf for each, part in pairs for leaf in self._leaves(each, part)]


def _components(space: Any) -> _Components:
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return {}
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return None
    items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
    components = {key: _components(each) for key, each in items}
    return {key: each for key, each in components.items() if each != {}}


def _is_binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())
