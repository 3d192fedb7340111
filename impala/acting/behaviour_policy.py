"""The behaviour policy: the agent that answers the actors, and the unrolls that result.

Espeholt et al. 2018, Figure 1 (left), with dynamic batching as in Table 1: one copy of the weights
acts for all environments.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from dynamic_batching.unroll_batcher import UnrollBatcher
from impala.experience.batch import Mix, UnrollBatch, batch_of_components, compiled
from impala.experience.loading import Batch, Loading
from impala.learning.devices import placed_on
from impala.networks.agent import Agent
from impala.trajectory import (
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)


class UnrollSource:
    """The batcher of the actor processes, in the structures of agent and environment."""

    def __init__(
        self,
        spec: EnvironmentSpec,
        agent: Agent,
        level_ids: Sequence[int],
        unroll_length: int,
        queue_capacity: int,
        minimum_batch_size: int,
        timeout_ms: float,
        max_discarded_in_a_row: int = 0,
    ):
        """Makes the batcher; see `UnrollBatcher` for most arguments.

        Args:
          spec: of every actor's environment.
          agent: gives the spec of the recurrent state, which the batcher keeps.
          level_ids: the level of each actor.
          unroll_length: T, agent steps.
          queue_capacity: unrolls.
          minimum_batch_size: rows.
          timeout_ms: milliseconds.
          max_discarded_in_a_row: unrolls; 0 for no limit.
        """
        self._queue_capacity = queue_capacity
        self._loadings: list[Loading] = []
        self._observation_names = list(spec.observation)
        self._state_structure = agent.state_spec
        scalar = ArraySpec((), 'float32')
        self.batcher = UnrollBatcher(
            inputs=[
                scalar,
                scalar,
                ArraySpec((), 'int32'),
                ArraySpec((), 'int32'),
                ArraySpec((), 'uint8'),
                *spec.observation.values(),
            ],
            outputs=[spec.action.array, spec.action.policy, scalar],
            states=tf.nest.flatten(agent.state_spec),
            level_ids=level_ids,
            unroll_length=unroll_length,
            queue_capacity=queue_capacity,
            minimum_batch_size=minimum_batch_size,
            maximum_batch_size=len(level_ids),
            timeout_ms=timeout_ms,
            max_discarded_in_a_row=max_discarded_in_a_row,
        )

    def answer(self, agent: Agent, policy_version: tf.Tensor) -> None:
        """Waits for requests and answers them with the agent's actions.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        requests = self.batcher.get_inputs()
        outputs, state = agent.step(
            requests.last_action,
            self._step_output(requests.inputs),
            tf.nest.pack_sequence_as(self._state_structure, requests.states),
        )
        self.batcher.set_outputs(
            requests.tickets, policy_version, list(outputs), tf.nest.flatten(state)
        )

    def assembler(self, batch_size: int, mix: Mix | None = None) -> Callable[[], UnrollBatch]:
        """Returns a function that waits for unrolls and makes a batch of them; see `compiled`.

        Args:
          batch_size: B, unrolls.
          mix: adds replayed unrolls and decides how many new ones to wait for; see
            `impala.experience.mixture.ReplayMixer.batch`.
        """
        return compiled(lambda: mix(self.dequeue) if mix else self.dequeue(batch_size))

    def dequeue(self, batch_size: int) -> UnrollBatch:
        """Waits for unrolls and makes a batch of them.

        Args:
          batch_size: B, unrolls.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        unrolls = self.batcher.dequeue(batch_size)
        return batch_of_components(
            [
                unrolls.level_ids,
                unrolls.policy_versions,
                *unrolls.states,
                *unrolls.inputs,
                *unrolls.outputs,
            ],
            unrolls.actors,
            self._state_structure,
            self._observation_names,
        )

    def batches(self, batch_size: int, mix: Mix | None = None) -> Iterator[UnrollBatch]:
        """Yields batches of `assembler`, prepared one ahead, until the batcher is closed."""
        return self._ahead(self.assembler(batch_size, mix))

    def discard(self) -> None:
        """Discards unrolls, so that actors do not block, until the batcher is closed."""
        # Half of the queue at a time: the other half takes what comes in the meantime.
        batch_size = max(1, self._queue_capacity // 2)
        # Observations, by far the largest part of an unroll, are not copied.
        take = compiled(lambda: self.batcher.dequeue(batch_size, num_inputs=1).actors)
        for _ in self._ahead(take):
            pass

    def _ahead(self, assemble: Callable[[], Batch]) -> Iterator[Batch]:
        """Yields assembled batches, prepared one ahead, until the batcher is closed."""
        loading = Loading(assemble)
        self._loadings.append(loading)
        try:
            for (batch,) in loading:
                yield batch
        finally:
            loading.close()

    def wait(self) -> None:
        """Waits for the threads of `batches` and `discard`; the batcher is closed.

        A thread that returned from TensorFlow while Python shuts down would crash the process.
        """
        for loading in self._loadings:
            loading.wait()

    def _step_output(self, inputs: Sequence[tf.Tensor]) -> StepOutput:
        reward, *info, end = inputs[:5]
        observation = inputs[5:]
        return StepOutput(
            reward=reward,
            info=StepOutputInfo(*info),
            done=tf.not_equal(end, 0),
            observation=dict(zip(self._observation_names, observation, strict=True)),
        )


class BehaviourPolicy(tf.Module):
    """Acts with a copy of the weights that is replaced as a whole between two batches.

    Actors therefore never see a mixture of old and new weights, and `publish` does not wait for the
    network's computation.
    """

    def __init__(self, agent: Agent, source: UnrollSource, device: str | None = None):
        """Wraps an agent.

        Args:
          agent: has its own variables; no other code may use it.
          source: supplies the requests to answer.
          device: of the agent's variables, where it computes; None leaves that to TensorFlow.
        """
        super().__init__()
        self._agent = agent
        self._source = source
        self._device = device
        # Where the batcher is, so that comparing them moves nothing.
        self._device_of_versions = None if device is None else '/cpu:0'
        with placed_on(device):
            self._published = [
                tf.Variable(weight, trainable=False) for weight in agent.acting_variables
            ]
        with placed_on(self._device_of_versions):
            self._version = tf.Variable(-1, dtype=tf.int64, trainable=False)
            self._published_version = tf.Variable(-1, dtype=tf.int64, trainable=False)
        self._lock = tf.CriticalSection()
        self._failure: BaseException | None = None

    @tf.function(autograph=False)
    def publish(self, weights: Sequence[tf.Variable], version: tf.Tensor) -> None:
        """Gives the actors new weights from the next batch on.

        Args:
          weights: of the learner's agent, in the order of its `acting_variables`. On the CPU
            their values are shared, not copied; from another device they are copied.
          version: i64 scalar, number of learner updates that made these weights.
        """
        values = [tf.convert_to_tensor(weight) for weight in weights]

        def assign() -> tf.Tensor:
            assigned = [
                variable.assign(value, read_value=False)
                for variable, value in zip(self._published, values, strict=True)
            ]
            assigned.append(self._published_version.assign(version, read_value=False))
            return _after(assigned, version)

        self._lock.execute(assign)

    def published_version(self) -> int:
        """Returns the version of the weights that were published last; -1 before the first."""
        return int(self._published_version.numpy())

    def _refresh(self) -> tf.Tensor:
        def assign() -> tf.Tensor:
            assigned = [
                weight.assign(published, read_value=False)
                for weight, published in zip(
                    self._agent.acting_variables, self._published, strict=True
                )
            ]
            version = tf.identity(self._published_version)
            assigned.append(self._version.assign(version, read_value=False))
            return _after(assigned, version)

        return self._lock.execute(assign)

    def answer(self) -> None:
        """Waits for requests and answers them, with the weights that were published last.

        Raises:
          tf.errors.CancelledError: the batcher is closed.
        """
        with placed_on(self._device_of_versions):
            is_current = tf.equal(self._version, self._published_version)
        tf.cond(is_current, lambda: tf.identity(self._version), self._refresh)
        with placed_on(self._device):
            self._source.answer(self._agent, self._version.read_value())

    @tf.function(autograph=False)
    def _serve(self) -> None:
        # One call lasts for the whole run: TensorFlow runs the loop, not Python.
        def body(batches: tf.Tensor) -> tf.Tensor:
            self.answer()
            return batches + 1

        tf.while_loop(
            lambda batches: tf.constant(True),
            lambda batches: (body(batches),),
            (tf.constant(0, tf.int64),),
            parallel_iterations=1,
        )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answers actors on a separate thread until the block is left."""

        def run() -> None:
            try:
                self._serve()
            except tf.errors.CancelledError:
                pass
            except BaseException as error:  # `check` raises it in the training loop.
                self._failure = error
            finally:
                # No one answers from here on: wake all who wait.
                self._source.batcher.close()

        thread = threading.Thread(target=run, name='behaviour policy', daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._source.batcher.close()
            thread.join()

    def check(self) -> None:
        """Raises the error that ended the serving thread, if any."""
        if self._failure is not None:
            raise self._failure


def _after(operations: Sequence[tf.Operation], value: tf.Tensor) -> tf.Tensor:
    """Returns a value that is available only after the operations.

    A critical section ends when its result is available. Operations on which the result does not
    depend could run after its end.
    """
    with tf.control_dependencies(operations):
        return tf.identity(value)
