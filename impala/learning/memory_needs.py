"""The memory that a run needs, computed from the environment's spec and the network.

All figures are lower bounds: a run that is rejected could not have worked.
"""

from typing import Any

import tensorflow as tf

from impala import memory
from impala.config import Config, ConfigError
from impala.experience.batch import unroll_components
from impala.experience.replay import unroll_nbytes
from impala.memory import Need
from impala.networks import core as cores
from impala.networks import torsos
from impala.networks.agent import AgentConfig, other_observations, other_torso
from impala.trajectory import EnvironmentSpec

# Of each weight: the learner's, its gradient, the optimizer's slot, the published one, and the
# behaviour policy's.
_COPIES_OF_WEIGHTS = 5
_WEIGHT_BYTES = 4


def check(needs: list[Need]) -> None:
    """Checks that there is memory for all needs.

    Raises:
      ConfigError: there is not; names the flags.
    """
    text = memory.shortage(needs)
    if text:
        raise ConfigError(text)


def of_actors(
    config: Config,
    spec: EnvironmentSpec,
    network: AgentConfig,
    flag: str = 'num_actors',
) -> list[Need]:
    """Returns what actors on this machine need: shared memory and processes. See `of_unrolls`."""
    actors = config.actors
    return [
        of_unrolls(config, spec, network, flag),
        memory.of_processes(actors.num_actors, actors.envs_per_process, flag),
    ]


def of_unrolls(
    config: Config,
    spec: EnvironmentSpec,
    network: AgentConfig,
    flag: str = 'num_actors',
) -> Need:
    """Returns what the unrolls of actors need, where the policy acts.

    Args:
      config: of the run, or with the number of actors of a test or an actor job.
      spec: of the environments.
      network: whose state is stored with every unroll.
      flag: name of the flag that has set `config.actors.num_actors`.
    """
    unroll = unroll_nbytes(_components(config, spec, network))
    unrolls = {flag: config.actors.num_actors, 'queue_capacity': config.actors.queue_capacity}
    flags = dict(sorted(unrolls.items(), key=lambda flag: -flag[1]))
    flags['unroll_length'] = config.learner.unroll_length
    return Need('unrolls in shared memory', sum(unrolls.values()) * unroll, flags, unroll)


def of_learner(config: Config, spec: EnvironmentSpec, network: AgentConfig) -> list[Need]:
    """Returns what a learner needs on this machine: batches, weights and replay.

    Args:
      config: of the run.
      spec: of the environments.
      network: that learns.

    Raises:
      ConfigError: the network cannot serve the environment's frames.
    """
    learner = config.learner
    components = _components(config, spec, network)
    unroll = unroll_nbytes(components)
    # Batches on a GPU, whether ready or kept for reuse, are not in this memory.
    on_gpu = bool(tf.config.get_visible_devices('GPU'))
    held = 0 if on_gpu else learner.replay.reuse_buffer
    # By default there is at least one loader.
    batches = max(1, learner.loaders) + held
    flags = {'batch_size': learner.batch_size, 'unroll_length': learner.unroll_length}
    if held > 1:
        flags['reuse_buffer'] = learner.replay.reuse_buffer
    if learner.loaders > 1:
        flags['loaders'] = learner.loaders
    needs = [Need('batches', batches * learner.batch_size * unroll, flags, batches * unroll)]

    frame = spec.observation['frame']
    try:
        sizes = [torsos.linear_sizes(network.torso, frame, network.latent_size)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for array in other_observations(spec).values():
        sizes.append(torsos.linear_sizes(other_torso(network.torso, array), array))
    copies = 1 if on_gpu else _COPIES_OF_WEIGHTS
    weights = copies * _WEIGHT_BYTES * sum(inputs * outputs for inputs, outputs in sizes)
    needs.append(_of_weights(config, network, weights))
    in_core = cores.num_weights(network.core, sum(size for _, size in sizes), network.core_size)
    if in_core:
        nbytes = copies * _WEIGHT_BYTES * in_core
        flags = {'core_size': network.core_size}
        needs.append(Need('weights of the core', nbytes, flags, nbytes / network.core_size))
    if learner.replay.replay_fraction and not config.cluster.replay_addresses:
        packed = unroll_nbytes(components, spec.stack)
        capacity = learner.replay.replay_capacity
        needs.append(Need('the replay', capacity * packed, {'replay_capacity': capacity}, packed))
    return needs


def _of_weights(config: Config, network: AgentConfig, nbytes: int) -> Need:
    if network.torso == 'autoencoder' and network.latent_size > config.environment.width:
        flags = {'latent_size': network.latent_size}
    else:
        flags = {'width': config.environment.width, 'height': config.environment.height}
    return Need('weights of the network', nbytes, flags, nbytes / next(iter(flags.values())))


def _components(config: Config, spec: EnvironmentSpec, network: AgentConfig) -> list[Any]:
    state = cores.state_spec(network.core, network.core_size)
    # The number of levels does not change the size.
    return unroll_components(spec, state, config.learner.unroll_length, 1)
