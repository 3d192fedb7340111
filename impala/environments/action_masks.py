"""Action masks of Gymnasium environments: which actions are allowed in a state."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from impala.environments.environment import DeclarationError
from impala.trajectory import ActionSpec


class ActionMask:
    """The mask of the present state, converted from what an environment returned.

    Attributes:
      array: bool `[N]` for N logits of the policy; each `take` overwrites it.
    """

    def __init__(self, spec: ActionSpec, level_name: str, subject: str) -> None:
        """Prepares the array.

        Args:
          spec: of the actions.
          level_name: for error messages.
          subject: in words, where the environment returns the mask.
        """
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
            the other, or a tuple or dict of arrays in the order of the action space.

        Raises:
          DeclarationError: it is not such a mask, or leaves a component without a category.
        """
        try:
            flat = np.concatenate([np.ravel(each) for each in _leaves(value)])
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


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _is_binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())
