"""The agent: observation, last reward and action in, policy and baseline out (paper, Figure 3).

Letters: T unroll length, B batch size, P number of parameters of a policy (the number of actions if
they are discrete), L instruction length, N rows (merged time and batch), V number of levels that
have values of their own.
"""

import dataclasses
from typing import Any

import sonnet as snt
import tensorflow as tf

from impala.config import NetworkConfig
from impala.networks import core as cores
from impala.networks import torsos
from impala.networks.action_distribution import (
    ActionDistribution,
    bounded_log_stddev,
)
from impala.networks.frame_mean import FrameMean
from impala.networks.lstm import LSTM
from impala.networks.normalizer import Normalizer
from impala.networks.popart import PopArt
from impala.trajectory import (
    ACTION_MASK,
    INSTRUCTION_BUCKETS,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
)

_EMBEDDING_SIZE = 20
_INSTRUCTION_LSTM_SIZE = 64
# Units of the layer that joins several encoders if there is no core.
_JOINT_SIZE = 256
DTYPES = {'float32': tf.float32, 'bfloat16': tf.bfloat16}


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The shape of the network.

    Attributes:
      torso: `'deep'`, `'shallow'`, `'nature'`, `'autoencoder'` (all for images) or `'mlp'` (for
        vectors); or `my_module:MyTorso`.
      core: what follows the torso: `'lstm'`, `'gru'`, `'none'` or `my_module:MyCore`.
      core_size: outputs of an LSTM or GRU.
      compute_dtype: `'float32'` or `'bfloat16'`, what the torso computes in. Weights, and all that
        follows the torso, are float32 either way.
      max_reward_input: the last reward, as an input, is clipped to plus or minus this.
      popart_levels: names of the levels, in the order of their ids, whose values PopArt normalizes
        separately; empty without PopArt.
      latent_size: number of features of the auto-encoder's encoder; other torsos have fixed ones.
      normalize_observations: whether vectors are normalized by their running mean and variance.
      contrast_gain: of `impala.networks.torsos.Contrast`, for stacks of frames; 0: the torso sees
        the frames.
    """

    torso: str = 'deep'
    core: str = 'lstm'
    core_size: int = NetworkConfig.core_size
    compute_dtype: str = 'float32'
    max_reward_input: float = 1.0
    popart_levels: tuple[str, ...] = ()
    latent_size: int = torsos.LATENT_SIZE
    normalize_observations: bool = False
    contrast_gain: float = 0.0


class Agent(snt.Module):
    """The policy, the baseline and, with a core, their memory.

    All variables exist once it is constructed.

    Attributes:
      actions: the distribution of actions, given a policy.
      normalizer: normalizes vector observations; None if they are not normalized.
      frame_mean: the mean of all frames; None without a contrast gain.
      popart: the last layer of a baseline that is normalized per level; None without PopArt.

    Args:
      config: shapes the network.
      spec: of the environment.

    Raises:
      ValueError: the configuration is unknown or does not suit the environment's frames.
    """

    def __init__(self, config: AgentConfig, spec: EnvironmentSpec, name: str = 'agent'):
        super().__init__(name)
        if config.compute_dtype not in DTYPES:
            raise ValueError(
                f'Unknown compute_dtype {config.compute_dtype!r}; choose one of '
                f'{", ".join(DTYPES)}.'
            )
        self.actions = ActionDistribution(spec.action)
        self._max_reward_input = config.max_reward_input
        self.normalizer = Normalizer(spec) if config.normalize_observations else None
        frame = spec.observation['frame']
        self.frame_mean = FrameMean(frame) if config.contrast_gain else None
        self._torso = torsos.create_torso(
            config.torso,
            frame,
            DTYPES[config.compute_dtype],
            config.latent_size,
            self.frame_mean and torsos.Contrast(config.contrast_gain, self.frame_mean),
        )
        size = self._torso.output_size + 1 + self.actions.num_features
        # Other observations have encoders of their own.
        self._encoders: dict[str, snt.Module] = {}
        for key, array in other_observations(spec).items():
            torso = other_torso(config.torso, array)
            encoder = torsos.create_torso(torso, array, DTYPES[config.compute_dtype])
            # Checkpoints identify the layers by the names of these attributes.
            setattr(self, f'_encoder_{len(self._encoders)}', encoder)
            self._encoders[key] = encoder
            size += encoder.output_size
        self._instruction = None
        if 'instruction' in spec.observation:
            self._instruction = InstructionEncoder()
            size += self._instruction.output_size
        self._core = cores.create_core(config.core, size, config.core_size)
        self._joint: torsos.Linear | None = None
        if self._core is not None:
            size = self._core.output_size
        elif num_encoders(config.torso, spec) > 1:
            # Else policy and baseline would be sums of functions of one observation each.
            self._joint = torsos.Linear(size, _JOINT_SIZE, name='joint')
            size = _JOINT_SIZE
        # Logits and means; standard deviations do not depend on the observation.
        self._policy = torsos.Linear(size, self.actions.num_features, name='policy')
        if spec.action.bounds:
            self._log_stddev = tf.Variable(tf.zeros([len(spec.action.bounds)]), name='log_stddev')
        self.popart: PopArt | None = None
        if config.popart_levels:
            self.popart = PopArt(size, len(config.popart_levels))
        else:
            self._baseline = torsos.Linear(size, 1, name='baseline')

    def initialize_orthogonally(self) -> None:
        """Gives the layers before the core and the heads orthogonal weights, as PPO's agents have.

        Saxe et al. 2014 (https://arxiv.org/abs/1312.6120): signals keep their size from layer to
        layer. The gain of torsos is sqrt(2), which makes up for what ReLUs cut off. The policy's is
        0.01, so that all actions are about equally probable at first. The baseline's is 1. PopArt's
        layer, biases, cores and embeddings are left unchanged.
        """
        encoders = [self._torso, *self._encoders.values()]
        gains = [(layer.w, 2**0.5) for torso in encoders for layer in torsos.layers(torso)]
        if self._joint is not None:
            gains.append((self._joint.w, 2**0.5))
        gains.append((self._policy.w, 0.01))
        if self.popart is None:
            gains.append((self._baseline.w, 1.0))
        for weights, gain in gains:
            weights.assign(snt.initializers.Orthogonal(gain)(weights.shape, tf.float32))

    @property
    def acting_variables(self) -> list[tf.Variable]:
        """All that acting needs, in a fixed order.

        These are the weights, the statistics of observations, and what the user's own torso or core
        has without training it, such as random features. Acting needs no statistics of values.
        """
        of_values = () if self.popart is None else self.popart.non_trainable_variables
        unused = {id(variable) for variable in of_values}
        others = [each for each in self.non_trainable_variables if id(each) not in unused]
        return [*self.trainable_variables, *others]

    @property
    def state_spec(self) -> Any:
        """Nest of `ArraySpec` of the recurrent state of one row; `()` without a core."""
        return () if self._core is None else self._core.state_spec

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """Returns the recurrent state at the start of an episode, a nest of f32 `[B, ...]`."""
        if self._core is None:
            return ()
        return self._core.initial_state(batch_size)

    def step(
        self, prev_action: tf.Tensor, env_output: StepOutput, state: Any
    ) -> tuple[AgentOutput, Any]:
        """Acts once.

        Args:
          prev_action: `[B, ...]`, the action that led to `env_output`.
          env_output: `StepOutput` of `[B, ...]`.
          state: nest of f32 `[B, ...]`, recurrent state before this row; the initial state
            replaces it where `env_output.done`.

        Returns:
          `AgentOutput` of `[B, ...]`, its action sampled from the policy, and the state after it.
          With PopArt the baseline is 0: acting needs only the policy, and the level is not known
          here.
        """
        x = self._inputs(prev_action, env_output)
        if self._core is not None:
            state = cores.begun(env_output.done, self._core.initial_state(1), state)
            x, state = self._core.step(self._core.project(x), state)
        policy, baseline = self._heads(x, env_output.observation)
        if self.popart is not None:
            baseline = tf.zeros_like(env_output.reward)
        return AgentOutput(self.choose_actions(policy, env_output), policy, baseline), state

    def choose_actions(self, policy: tf.Tensor, env_output: StepOutput) -> tf.Tensor:
        """Samples actions from the policy.

        Args:
          policy: f32 `[B, P]`.
          env_output: `StepOutput` of `[B, ...]` that it belongs to.

        Returns:
          `[B, ...]`, of the type that `ActionSpec.array` says.
        """
        return self.actions.sample(policy)

    def encode(self, frames: tf.Tensor) -> tf.Tensor:
        """Returns the torso's features, f32 `[N, F]`, of frames `[N, ...]`."""
        return self._torso(frames)

    def unroll(
        self,
        prev_actions: tf.Tensor,
        env_outputs: StepOutput,
        state: Any,
        features: tf.Tensor | None = None,
    ) -> tuple[AgentOutput, Any]:
        """Runs over T+1 rows at once; only the core's recurrence goes step by step.

        Args:
          prev_actions: `[T+1, B, ...]`, the actions that led to `env_outputs`.
          env_outputs: `StepOutput` of `[T+1, B, ...]`.
          state: nest of f32 `[B, ...]`, recurrent state before row 0; before every row that is
            `done` it is replaced by the initial state.
          features: f32 `[(T+1) * B, F]`, result of `encode` for the frames of all rows; None if it
            is not computed yet.

        Returns:
          `AgentOutput` of `[T+1, B, ...]` and the state after the last row. No action is sampled:
          `action` is the policy's most probable one, since a learner knows the action that was
          taken. With PopArt `baseline` is `[T+1, B, V]`: normalized, for each level.
        """
        actions, rows = tf.nest.map_structure(_merge, (prev_actions, env_outputs))
        x = self._inputs(actions, rows, features)
        if self._core is not None:
            projected = self._core.project(x)
            projected = tf.reshape(projected, [*_dims(env_outputs.reward), projected.shape[-1]])
            x, state = self._core.unroll(projected, env_outputs.done, state)
            x = tf.reshape(x, [-1, self._core.output_size])
        policy, baseline = self._heads(x, rows.observation)
        outputs = AgentOutput(action=self.actions.mode(policy), policy=policy, baseline=baseline)
        dims = _dims(env_outputs.reward)
        return tf.nest.map_structure(lambda t: tf.reshape(t, [*dims, *t.shape[1:]]), outputs), state

    def _inputs(
        self, prev_action: tf.Tensor, env_output: StepOutput, features: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns the inputs of core or heads, f32 `[N, ...]`, for N rows."""
        limit = self._max_reward_input
        observation = env_output.observation
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        if features is None:
            features = self.encode(observation['frame'])
        parts = [
            features,
            tf.clip_by_value(env_output.reward, -limit, limit)[:, tf.newaxis],
            self.actions.features(prev_action),
            *(encode(observation[key]) for key, encode in self._encoders.items()),
        ]
        if self._instruction is not None:
            parts.append(self._instruction(observation['instruction']))
        x = tf.concat(parts, -1)
        return x if self._joint is None else tf.nn.relu(self._joint(x))

    def _heads(
        self, x: tf.Tensor, observation: dict[str, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns policy f32 `[N, P]` and baseline f32 `[N]`, or `[N, V]` with PopArt."""
        policy = self._policy(x)
        if self.actions.spec.bounds:
            log_stddev = bounded_log_stddev(tf.convert_to_tensor(self._log_stddev))
            log_stddev = tf.broadcast_to(log_stddev, [tf.shape(policy)[0], *log_stddev.shape])
            policy = tf.concat([policy, log_stddev], -1)
        if ACTION_MASK in observation:
            policy = self.actions.masked(policy, observation[ACTION_MASK])
        if self.popart is not None:
            return policy, self.popart(x)
        return policy, tf.squeeze(self._baseline(x), -1)


def other_observations(spec: EnvironmentSpec) -> dict[str, ArraySpec]:
    """Returns the observations besides frame, instruction and action mask, sorted by name.

    The order, which is that of the network's inputs, does not depend on that of the spec.
    """
    known = ('frame', 'instruction', ACTION_MASK)
    return {name: spec.observation[name] for name in sorted(spec.observation) if name not in known}


def other_torso(torso: str, array: ArraySpec) -> str:
    """Returns the torso of an observation other than the frame.

    Images have the frame's torso if they are large enough for it; everything else has an MLP.

    Args:
      torso: of the frame.
      array: of the observation.
    """
    if len(array.shape) != 3 or array.dtype not in torsos.PIXEL_DTYPES:
        return 'mlp'
    # There is a decoder for the frame only.
    name = 'shallow' if torso in ('autoencoder', 'mlp') else torso
    return name if min(array.shape[:2]) >= torsos.smallest_side(name) else 'mlp'


def num_encoders(torso: str, spec: EnvironmentSpec) -> int:
    """Returns the number of encoders of all observations together.

    Args:
      torso: of the frame.
      spec: of the environment.
    """
    arrays = [(torso, spec.observation['frame'])]
    arrays += [(other_torso(torso, array), array) for array in other_observations(spec).values()]
    numbers = [torsos.num_encoders(array) if name == 'mlp' else 1 for name, array in arrays]
    return sum(numbers) + ('instruction' in spec.observation)


class InstructionEncoder(snt.Module):
    """The paper's instruction channel: an embedding of 20 and an LSTM of 64 over the words."""

    def __init__(self, name: str | None = None):
        super().__init__(name)
        self._embedding = snt.Embed(INSTRUCTION_BUCKETS, _EMBEDDING_SIZE)
        self._lstm = LSTM(_EMBEDDING_SIZE, _INSTRUCTION_LSTM_SIZE)
        self.output_size = _INSTRUCTION_LSTM_SIZE

    def __call__(self, instruction: tf.Tensor) -> tf.Tensor:
        """Encodes instructions.

        Args:
          instruction: i32 `[N, L]`, words as buckets 1 to 999, then zeros.

        Returns:
          f32 `[N, 64]`, the LSTM's output at the last word; zeros where there is no word.
        """
        # An instruction seldom changes within an episode, so a batch of unrolls holds few different
        # ones. The op that finds them exists for CPUs only.
        with tf.device('CPU:0'):
            instruction, index = tf.raw_ops.UniqueV2(x=instruction, axis=[0])
        length = tf.math.count_nonzero(instruction, -1, dtype=tf.int32)
        # At least one step, because the outputs of no step would have no shape.
        words = tf.transpose(instruction)[: tf.maximum(tf.reduce_max(length), 1)]
        # The reshape makes the gradient a dense tensor; a gather's alone is not.
        table = tf.reshape(self._embedding.embeddings, [INSTRUCTION_BUCKETS, _EMBEDDING_SIZE])
        embedded = tf.gather(table, words)
        projected = self._lstm.project(tf.reshape(embedded, [-1, _EMBEDDING_SIZE]))
        projected = tf.reshape(projected, [*_dims(words), projected.shape[-1]])
        state = self._lstm.initial_state(tf.shape(length)[0])
        outputs, _ = self._lstm.unroll(projected, tf.zeros_like(words, tf.bool), state)
        outputs = tf.concat([state.hidden[tf.newaxis], outputs], 0)
        return tf.gather_nd(outputs, tf.stack([tf.gather(length, index), index], 1))


def _merge(t: tf.Tensor) -> tf.Tensor:
    """Returns `[T, B, ...]` as `[T * B, ...]`."""
    return tf.reshape(t, [-1, *t.shape[2:]])


def _dims(t: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns T and B of `[T, B]`, as integers where they are known."""
    dynamic = tf.shape(t)
    return [dynamic[i] if d is None else d for i, d in enumerate(t.shape)]
