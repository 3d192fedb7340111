"""The user's own torso or core: how it is made and tried, with a sentence for each failure."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from impala.user_code import UserCodeError, describe_failure, load


class OwnModule:
    """Makes the user's own part of the network and tries it.

    Args:
      flag: that names it, as `--core=my_module:MyCore`.
    """

    def __init__(self, flag: str):
        self.flag = flag
        self._made: list[tf.Variable] = []

    def make(self) -> Any:
        """Returns an instance of the class that the flag names.

        Raises:
          ValueError: it cannot be imported or made; one sentence.
        """
        try:
            kind = load(self.flag.partition('=')[2])
        except UserCodeError as error:
            raise ValueError(f'{self.flag}: {error}.') from error
        return self._run(kind, 'cannot be made')

    def call(self, function: Callable[[], Any], inputs: str) -> Any:
        """Returns what a call of the part returns.

        Args:
          function: makes the call.
          inputs: what it is called with, for a sentence.

        Raises:
          ValueError: the call fails; one sentence.
        """
        return self._run(function, f'fails with {inputs}')

    def trace(self, function: Callable[..., Any], *signature: Any) -> None:
        """Builds a graph, so that what fails there fails here. In debug mode there are no graphs.

        Args:
          function: to trace.
          *signature: nests of `tf.TensorSpec`, its arguments, of an unknown batch size.

        Raises:
          ValueError: that fails; one sentence.
        """
        # In debug mode a breakpoint would see tensors without values.
        if not tf.config.functions_run_eagerly():
            traced = tf.function(function, autograph=False).get_concrete_function
            self.call(lambda: traced(*signature), 'batches of unknown size in a graph')

    def check_variables(self, found: Sequence[tf.Variable]) -> None:
        """Checks that all variables can be found, since others would not be trained.

        Args:
          found: the variables of the Sonnet module that has the part as an attribute.

        Raises:
          ValueError: others were made; one sentence.
        """
        known = {id(variable) for variable in found}
        for variable in self._made:
            if id(variable) not in known:
                raise ValueError(
                    f'{self.flag} has the variable {variable.name!r} outside of Sonnet modules, '
                    'so it would be neither trained nor saved: make it an attribute of one.'
                )

    def _run(self, function: Callable[[], Any], what: str) -> Any:
        def created(next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
            self._made.append(next_creator(**kwargs))
            return self._made[-1]

        try:
            with tf.variable_creator_scope(created):
                return function()
        except Exception as error:
            raise ValueError(f'{self.flag} {what}: {describe_failure(error)}.') from error
