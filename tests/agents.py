"""Small agents, and batches of random numbers for them."""

import numpy as np
import sonnet as snt
import tensorflow as tf

from impala.networks.action_distribution import ActionDistribution
from impala.networks.agent import Agent, AgentConfig
from impala.networks.decoder import Decoder
from impala.trajectory import (
    ActionSpec,
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

_OBSERVATION_SIZE = 4

_NUM_ACTIONS = 3

_SPEC = EnvironmentSpec(
    {'frame': ArraySpec((_OBSERVATION_SIZE,), 'float32')},
    action=_NUM_ACTIONS,
    num_action_repeats=1,
)


def mlp_agent(core='lstm', popart_levels=(), normalizes=False):
    tf.random.set_seed(0)
    config = AgentConfig(
        'mlp', core, core_size=8, popart_levels=popart_levels, normalize_observations=normalizes
    )
    return Agent(config, _SPEC)


class EmbeddingAgent(snt.Module):
    """Looks up logits and baseline by the last action; has one unused variable."""

    normalizer = None
    frame_mean = None
    popart = None
    actions = ActionDistribution(ActionSpec.discrete(_NUM_ACTIONS))

    def __init__(self, rows):
        super().__init__()
        self.table = tf.Variable(rows, dtype=tf.float32)
        self.unused = tf.Variable([1.0, 2.0])

    @property
    def acting_variables(self):
        return self.trainable_variables

    def unroll(self, prev_actions, env_outputs, state):
        rows = tf.gather(self.table, prev_actions)
        return AgentOutput(prev_actions, rows[..., :-1], self.value(rows[..., -1])), state

    def value(self, x):
        return x


def batch_of(config, state=(), seed=0):
    rng = np.random.default_rng(seed)
    rows = (config.unroll_length + 1, config.batch_size)
    frames = rng.normal(size=(*rows, _OBSERVATION_SIZE)).astype(np.float32)
    batch = ActorOutput(
        level_id=np.zeros(config.batch_size, np.int32),
        policy_version=np.zeros(config.batch_size, np.int64),
        agent_state=state,
        env_outputs=StepOutput(
            reward=rng.normal(size=rows).astype(np.float32),
            info=StepOutputInfo(np.zeros(rows, np.float32), *2 * [np.zeros(rows, np.int32)]),
            done=rng.random(rows) < 0.2,
            observation={'frame': frames},
        ),
        agent_outputs=AgentOutput(
            action=rng.integers(_NUM_ACTIONS, size=rows, dtype=np.int32),
            policy=rng.normal(size=(*rows, _NUM_ACTIONS)).astype(np.float32),
            baseline=rng.normal(size=rows).astype(np.float32),
        ),
    )
    return tf.nest.map_structure(tf.convert_to_tensor, batch)


_IMAGE_SPEC = EnvironmentSpec(
    {'frame': ArraySpec((9, 14, 3), 'uint8')}, action=_NUM_ACTIONS, num_action_repeats=1
)


def encoder_agent(core='lstm', contrast_gain=0.0):
    tf.random.set_seed(0)
    config = AgentConfig(
        'autoencoder', core, core_size=8, latent_size=6, contrast_gain=contrast_gain
    )
    return Agent(config, _IMAGE_SPEC)


def image_decoder():
    tf.random.set_seed(1)
    return Decoder(6, _IMAGE_SPEC.observation['frame'], tf.float32)


def batch_of_images(config, state=(), seed=0):
    """Like `batch_of`, with frames of a white square at a random place on grey."""
    rng = np.random.default_rng(seed)
    batch = batch_of(config, state, seed)
    frames = np.full((config.unroll_length + 1, config.batch_size, 9, 14, 3), 70, np.uint8)
    for t, b in np.ndindex(*frames.shape[:2]):
        y, x = rng.integers((6, 11))
        frames[t, b, y : y + 4, x : x + 4] = 255
    env_outputs = batch.env_outputs._replace(observation={'frame': tf.constant(frames)})
    return batch._replace(env_outputs=env_outputs)
