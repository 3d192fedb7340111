"""Builds the network for a run's settings and its environment."""

from collections.abc import Sequence

import tensorflow as tf

from impala.config import Config, ConfigError, NetworkConfig
from impala.networks.agent import DTYPES, Agent, AgentConfig
from impala.networks.decoder import Decoder
from impala.networks.normalizer import vectors_of
from impala.networks.torsos import CONVOLUTIONAL
from impala.trajectory import EnvironmentSpec


def choose_network(
    config: Config, level_names: Sequence[str], spec: EnvironmentSpec
) -> AgentConfig:
    """Returns the shape of the network; chooses what the settings leave open.

    Atari gets the paper's shallow network without LSTM, vectors get an MLP, and everything else
    (such as DeepMind Lab) gets the deep network with LSTM of the paper's released code.

    Args:
      config: of the run.
      level_names: of the run, in the order of their ids.
      spec: of their environments.

    Raises:
      ConfigError: `core_size` is given, and the network for these environments has no core; or
        vectors are to be normalized, and there are none; or a contrast gain is given, and there are
        no stacked frames, or the torso does not begin with a convolution.
    """
    is_vector = len(spec.observation['frame'].shape) == 1
    is_atari = spec.suite == 'atari'
    chosen = config.network
    torso = chosen.torso
    if torso == 'auto':
        torso = 'mlp' if is_vector else 'shallow' if is_atari else 'deep'
    core = chosen.core
    if core == 'auto':
        core = 'none' if is_vector or is_atari else 'lstm'
        if core == 'none' and chosen.core_size != NetworkConfig.core_size:
            raise ConfigError(
                f'--core_size={chosen.core_size} has no effect, since --core=auto means none on '
                'these levels: give --core=lstm or --core=gru, too.'
            )
    if chosen.normalize_observations and not vectors_of(spec):
        raise ConfigError(
            '--normalize_observations is for observations that are vectors of numbers, and there '
            f'are none in {", ".join(spec.observation)} of {level_names[0]!r}: leave it out.'
        )
    if chosen.contrast_gain:
        if spec.stack is None:
            raise ConfigError(
                f'--contrast_gain={chosen.contrast_gain:g} needs stacked frames, and those of '
                f'{level_names[0]!r} are single images or vectors: set it to 0, or play Atari '
                'with --frame_stack=2 or more.'
            )
        if torso not in CONVOLUTIONAL:
            raise ConfigError(
                f'--contrast_gain={chosen.contrast_gain:g} belongs to the torsos '
                f'{", ".join(CONVOLUTIONAL)}; this run has --torso={torso}: set it to 0.'
            )
    compute_dtype = chosen.compute_dtype
    if compute_dtype == 'auto':
        # This does not start TensorFlow, which several learners must prepare first.
        fast = has_fast_bfloat16() and not tf.config.get_visible_devices('GPU')
        compute_dtype = 'bfloat16' if fast else 'float32'
    return AgentConfig(
        torso=torso,
        core=core,
        core_size=chosen.core_size,
        compute_dtype=compute_dtype,
        popart_levels=tuple(level_names) if chosen.popart else (),
        latent_size=chosen.latent_size,
        normalize_observations=chosen.normalize_observations,
        contrast_gain=float(chosen.contrast_gain),
    )


def create_agent(
    network: AgentConfig, spec: EnvironmentSpec, agent_class: type[Agent] = Agent
) -> Agent:
    """Makes the agent.

    Args:
      network: its shape.
      spec: of the environment.
      agent_class: to make.

    Raises:
      ConfigError: the network cannot serve the environment's frames.
    """
    try:
        return agent_class(network, spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def create_decoder(network: AgentConfig, spec: EnvironmentSpec) -> Decoder | None:
    """Makes the decoder of an agent whose torso is an auto-encoder; None for other torsos."""
    if network.torso != 'autoencoder':
        return None
    return Decoder(network.latent_size, spec.observation['frame'], DTYPES[network.compute_dtype])


def has_fast_bfloat16(cpu_info: str = '/proc/cpuinfo') -> bool:
    """Returns whether the processor has instructions for bfloat16.

    Without them TensorFlow's convolutions in bfloat16 take several times as long as in float32.

    Args:
      cpu_info: file in which the kernel describes the processor.
    """
    with open(cpu_info, encoding='utf-8') as file:
        return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(file.read().split())
