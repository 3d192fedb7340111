"""The recurrent core between torso and heads: an LSTM, a GRU, or the user's own.

Letters: T steps, B batch size, F features of a step, H outputs of a step.
"""

from typing import Any, Protocol

import sonnet as snt
import tensorflow as tf

from impala.config import CORES
from impala.networks.gru import GRU
from impala.networks.lstm import LSTM
from impala.networks.own_module import OwnModule
from impala.trajectory import ArraySpec
from impala.user_code import is_own, place_of

# Rows of the batch that a new core of the user's is tried with.
_ROWS = 2


class Core(Protocol):
    """What `--core=my_module:MyCore` must make, besides being a Sonnet module: `snt.RNNCore`."""

    def initial_state(self, batch_size: int) -> Any:
        """Returns the state at the start of an episode.

        Args:
          batch_size: B, an integer or an i32 scalar tensor.

        Returns:
          A nest of f32 `[B, ...]`: a tensor, or tuples, lists and dicts of tensors. All rows are
          equal. It replaces the state before every step that begins an episode.
        """

    def __call__(self, inputs: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        """Takes one step. In a graph, B is unknown.

        Args:
          inputs: f32 `[B, F]`, features of the torso and of all other inputs.
          state: before the step, as from `initial_state`.

        Returns:
          The outputs, f32 `[B, H]`, which policy and baseline see, and the state after the step,
          with the same structure and shapes. Actors store it, and it is sent to the learner with
          every unroll, so it should be small, and finite.
        """


class UnrolledCore(Protocol):
    """What the agent needs of a core; its variables exist from construction on.

    Attributes:
      output_size: H.
      state_spec: nest of `ArraySpec` of the state of one row.
    """

    output_size: int
    state_spec: Any

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """Returns the state at the start of an episode, a nest of f32 `[B, ...]`."""

    def project(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns what does not depend on the state, f32 `[N, P]`, of inputs f32 `[N, F]`."""

    def step(self, projected: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        """Takes a step with f32 `[B, P]` from `project`; returns outputs f32 `[B, H]` and state."""

    def unroll(self, projected: tf.Tensor, reset: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        """Runs over a sequence.

        Args:
          projected: f32 `[T, B, P]`, from `project`.
          reset: bool `[T, B]`, before which steps the state is replaced by the initial one, even
            if it is not finite.
          state: before the first step.

        Returns:
          The outputs, f32 `[T, B, H]`, and the state after the last step.
        """


class OwnCore(snt.Module):
    """The user's own core: `my_module:MyCore`, see `Core`; an `UnrolledCore`.

    The first call may make its variables, as it does in Sonnet's cores.

    Attributes:
      output_size: H.
      state_spec: nest of `ArraySpec` of the state of one row.

    Args:
      name: `my_module:MyCore`.
      input_size: F.

    Raises:
      ValueError: it cannot be imported or called with such features, or does not do what `Core`
        says.
    """

    def __init__(self, name: str, input_size: int):
        super().__init__('own_core')
        own = OwnModule(f'--core={name}')
        self._flag = own.flag
        self._core: Core = own.make()
        if not isinstance(self._core, tf.Module):
            raise ValueError(
                f'{own.flag} makes {type(self._core).__name__}, and it must be a Sonnet module.'
            )
        initial = own.call(lambda: self._core.initial_state(_ROWS), f'a batch of {_ROWS}')
        self._check_state(initial)
        inputs, what = tf.zeros([_ROWS, input_size]), f'features of float32 [{_ROWS}, {input_size}]'
        result = own.call(lambda: self._core(inputs, initial), what)
        self.output_size = self._check_step(initial, result, what)
        own.check_variables(snt.allow_empty_variables(self).variables)
        self.state_spec = tf.nest.map_structure(
            lambda each: ArraySpec(tuple(each.shape[1:]), 'float32'), initial
        )
        own.trace(
            self.unroll,
            tf.TensorSpec([None, None, input_size]),
            tf.TensorSpec([None, None], tf.bool),
            tf.nest.map_structure(lambda spec: tf.TensorSpec([None, *spec.shape]), self.state_spec),
        )

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """Returns the state at the start of an episode, a nest of f32 `[B, ...]`."""
        return self._core.initial_state(batch_size)

    def project(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns the inputs, f32 `[N, F]`, as they are."""
        return inputs

    def step(self, projected: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        """Returns the outputs, f32 `[B, H]`, of one step, and the state after it."""
        return self._core(projected, state)

    def unroll(self, projected: tf.Tensor, reset: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
        """Runs over a sequence, step by step; see `UnrolledCore`."""
        steps = tf.shape(projected)[0]
        initial = self.initial_state(1)

        def step(t, state, outputs):
            output, state = self.step(projected[t], begun(reset[t], initial, state))
            return t + 1, state, outputs.write(t, output)

        row = tf.TensorShape([None, self.output_size])
        _, state, outputs = tf.while_loop(
            lambda t, *_: t < steps,
            step,
            (0, state, tf.TensorArray(tf.float32, steps, element_shape=row)),
            shape_invariants=(
                tf.TensorShape([]),
                tf.nest.map_structure(
                    lambda spec: tf.TensorShape([None, *spec.shape]), self.state_spec
                ),
                tf.TensorShape(None),
            ),
            parallel_iterations=1,
        )
        return outputs.stack(), state

    def _check_state(self, initial: Any) -> None:
        if not all(_is_batch(each) for each in tf.nest.flatten(initial)):
            raise ValueError(
                f'{self._flag} has an initial state of {_described(initial)} for a batch of '
                f'{_ROWS}, and each of its tensors must be float32 [{_ROWS}, ...]'
                f'{place_of(type(self._core))}.'
            )

    def _check_step(self, initial: Any, result: Any, features: str) -> int:
        """Returns the number of outputs, H, if the result of a step is as it should be."""
        place = place_of(type(self._core))
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                f'{self._flag} returns {type(result).__name__}, and it must return a pair of '
                f'outputs and state{place}.'
            )
        outputs, state = result
        if not _is_batch(outputs) or len(outputs.shape) != 2:
            raise ValueError(
                f'{self._flag} returns outputs of {_described(outputs)} for {features}, and they '
                f'must be float32 [{_ROWS}, H]{place}.'
            )
        try:
            tf.nest.assert_same_structure(initial, state)
            is_same = all(
                _described(each) == _described(other)
                for each, other in zip(
                    tf.nest.flatten(initial), tf.nest.flatten(state), strict=True
                )
            )
        except (TypeError, ValueError):
            is_same = False
        if not is_same:
            raise ValueError(
                f'{self._flag} turns a state of {_described(initial)} into one of '
                f'{_described(state)}, and structure, shapes and types must stay the '
                f'same{place}.'
            )
        return int(outputs.shape[1])


def create_core(name: str, input_size: int, core_size: int) -> UnrolledCore | None:
    """Returns the core called `name`, one of `CORES`; None for `'none'`.

    Args:
      name: of the core, or `my_module:MyCore`, see `OwnCore`.
      input_size: F.
      core_size: H of an LSTM or GRU.

    Raises:
      ValueError: there is no such core, or it cannot be used.
    """
    if name == 'none':
        return None
    if name == 'lstm':
        return LSTM(input_size, core_size, name='core')
    if name == 'gru':
        return GRU(input_size, core_size, name='core')
    if is_own(name):
        return OwnCore(name, input_size)
    raise ValueError(f'Unknown core {name!r}; choose one of {", ".join(CORES)}.')


def state_spec(name: str, core_size: int) -> Any:
    """Returns a nest of `ArraySpec` of a core's state; `()` for none and the user's own.

    Args:
      name: see `create_core`.
      core_size: see `create_core`.
    """
    array = ArraySpec((core_size,), 'float32')
    return {'lstm': (array, array), 'gru': (array,)}.get(name, ())


def num_weights(name: str, input_size: int, core_size: int) -> int:
    """Returns the number of a core's weights without biases; 0 for none and the user's own.

    Args:
      name: see `create_core`.
      input_size: see `create_core`.
      core_size: see `create_core`.
    """
    return {'lstm': 4, 'gru': 3}.get(name, 0) * core_size * (input_size + core_size)


def begun(reset: tf.Tensor, initial: Any, state: Any) -> Any:
    """Returns the state before a step.

    Args:
      reset: bool `[B]`, which rows begin an episode.
      initial: nest of f32 `[1, ...]`, the state at the start of an episode.
      state: nest of f32 `[B, ...]`, the state after the step before.
    """

    def chosen(initial: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
        # Selected, because a product would keep a state that is NaN.
        rows = tf.reshape(reset, [-1, *[1] * (len(initial.shape) - 1)])
        return tf.where(rows, initial, state)

    return tf.nest.map_structure(chosen, initial, state)


def _is_batch(value: Any) -> bool:
    """Returns whether a value is an f32 tensor with a row for each of the batch."""
    return (
        tf.is_tensor(value)
        and value.dtype == tf.float32
        and len(value.shape) > 0
        and value.shape[0] == _ROWS
    )


def _described(nest: Any) -> str:
    """Returns types and shapes of a nest of tensors, for a sentence."""

    def shown(value: Any) -> str:
        is_tensor = tf.is_tensor(value)
        return f'{value.dtype.name} {list(value.shape)}' if is_tensor else type(value).__name__

    return str(tf.nest.map_structure(shown, nest)).replace("'", '')
