"""What a run is: its settings, the network that follows from them, and what must not change."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from impala.acting.silence import SilenceLimits
from impala.environments import EnvironmentConfig
from impala.learning.learner import LearnerConfig
from impala.networks.agent import DTYPES, Agent, AgentConfig
from impala.networks.decoder import Decoder
from impala.networks.torsos import LATENT_SIZE
from impala.suites import Suite
from impala.trajectory import EnvironmentSpec

# In the settings of a network: names of the levels, in their order; not there without PopArt.
POPART_LEVELS = 'popart or --level_name (levels whose values are normalised)'
_FRAME_DTYPE = 'level_name (dtype of the frames)'
# Runs from before these were stored go on without them.
LATER_SETTINGS = (_FRAME_DTYPE,)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A run on one machine.

    Attributes:
      logdir: folder for all that the run leaves behind.
      level_names: levels, given to the actors round robin.
      seed: of everything random.
      num_actors: environments.
      envs_per_process: environments that take turns in one process.
      total_environment_frames: frames after which the run ends.
      torso: as `AgentConfig.torso`, or `'auto'`.
      use_lstm: None decides by the kind of level.
      compute_dtype: of the learner's torso, actors use float32; `'float32'`, `'bfloat16'`, or
        `'auto'`: bfloat16 on a processor made for it.
      learner: of batch, loss and optimizer; its `total_agent_steps` follows from the frames.
      environment: of every actor's environment.
      inference_batch_size: requests that make a batch; 0 is half of the actors.
      inference_timeout_ms: milliseconds after which fewer make one.
      queue_capacity: full unrolls that wait for the learner before actors wait for it.
      max_actor_restarts: in a row, of one actor, before the run stops.
      save_checkpoint_secs: seconds of training between checkpoints.
      log_secs: seconds between lines of `metrics.jsonl`.
      suite: what `level_names` are the levels of, for their scores; None where there are none.
      popart: whether values are normalised per level.
      stop_at_frames: frames at which the run ends for now, though the learning rate falls over
        `total_environment_frames`; 0 for none.
      allow_level_change: whether a run may go on with other levels than it has been trained on.
      loaders: threads that assemble batches and move them to a device of the learner, and as many
        batches that are made ahead; 0 as of `loading.default_loaders`.
      latent_size: as `AgentConfig.latent_size`.
      initializer: of the weights with which a run begins; `'truncated_normal'`, or `'orthogonal'`,
        see `Agent.initialize_orthogonally`.
      replay_addresses: `host:port` of the replay jobs that hold the replay; none for the learner's
        memory.
      silence: how long an environment may take for a step, or to be made.
    """

    logdir: str
    level_names: tuple[str, ...]
    seed: int
    num_actors: int
    envs_per_process: int
    total_environment_frames: int
    torso: str
    use_lstm: bool | None
    compute_dtype: str
    learner: LearnerConfig
    environment: EnvironmentConfig
    inference_batch_size: int
    inference_timeout_ms: float
    queue_capacity: int
    max_actor_restarts: int
    save_checkpoint_secs: float
    log_secs: float
    suite: Suite | None = None
    popart: bool = False
    stop_at_frames: int = 0
    allow_level_change: bool = False
    loaders: int = 0
    latent_size: int = LATENT_SIZE
    initializer: str = 'truncated_normal'
    replay_addresses: tuple[str, ...] = ()
    silence: SilenceLimits = SilenceLimits()

    @property
    def last_frames(self) -> int:
        """Frames after which the process that trains ends."""
        total = self.total_environment_frames
        return min(self.stop_at_frames or total, total)

    @property
    def num_processes(self) -> int:
        """Processes in which the actors of this machine run."""
        return -(-self.num_actors // self.envs_per_process)

    @property
    def levels_text(self) -> str:
        """What is played, in a few words."""
        if len(self.level_names) <= 3:
            return ', '.join(self.level_names)
        name = self.suite.name if self.suite else ''
        return f'{len(self.level_names)} levels{" of " if name else ""}{name}'

    @property
    def level_ids(self) -> list[int]:
        """Index of the level of each actor."""
        return [actor % len(self.level_names) for actor in range(self.num_actors)]


class ConfigError(Exception):
    """Settings that do not fit together; its text is one sentence for the user."""


def with_common_actions(config: EnvironmentConfig, level_names: Sequence[str]) -> EnvironmentConfig:
    """Gives several Atari games all 18 actions: an agent of them all has one set for all."""
    games = {name for name in level_names if name.startswith('ALE/')}
    return dataclasses.replace(config, full_action_set=config.full_action_set or len(games) > 1)


# Settings of an environment that shape what is learned from, and not where it is played.
_SHAPING_SETTINGS = (
    'width',
    'height',
    'num_action_repeats',
    'full_action_set',
    'sticky_actions',
    'end_episode_on_life_loss',
    'max_noops',
    'frames_per_noop',
    'frame_stack',
)


def environment_settings(config: EnvironmentConfig) -> dict[str, Any]:
    """Returns the flags of an environment that must be the same in all jobs of a run."""
    return {name: getattr(config, name) for name in _SHAPING_SETTINGS}


def choose_network(config: TrainingConfig, spec: EnvironmentSpec) -> AgentConfig:
    """Fills in what the flags leave to us.

    Atari has the paper's shallow network without LSTM, vectors an MLP, everything else (DeepMind
    Lab first) the deep network with LSTM of the paper's released code.
    """
    is_vector = len(spec.observation['frame'].shape) == 1
    is_atari = spec.suite == 'atari'
    torso = config.torso
    if torso == 'auto':
        torso = 'mlp' if is_vector else 'shallow' if is_atari else 'deep'
    use_lstm = config.use_lstm
    if use_lstm is None:
        use_lstm = not (is_vector or is_atari)
    compute_dtype = config.compute_dtype
    if compute_dtype == 'auto':
        # Asked for in a way that does not start TensorFlow: several learners have to prepare that.
        fast = has_fast_bfloat16() and not tf.config.get_visible_devices('GPU')
        compute_dtype = 'bfloat16' if fast else 'float32'
    return AgentConfig(
        torso=torso,
        use_lstm=use_lstm,
        compute_dtype=compute_dtype,
        popart_levels=config.level_names if config.popart else (),
        latent_size=config.latent_size,
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
    """Makes what trains the agent's encoder beside the agent; None for a torso that is none."""
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


def check_learner(config: LearnerConfig, popart: bool = False) -> None:
    """Refuses settings of loss, optimizer and re-use that have no effect or do not go together.

    Args:
      config: of loss, optimizer and re-use.
      popart: whether values are normalised per level.

    Raises:
      ConfigError: names the flags.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(LearnerConfig)}
    belongs_to = {
        '--loss=appo': (
            'clip_epsilon',
            'clip_target_rho_threshold',
            'kl_cost',
            'normalize_advantages',
            'gae_advantages',
            'target_update_steps',
        ),
        '--loss=vtrace': ('clip_pg_rho_threshold',),
        '--optimizer=adam': ('adam_beta1', 'adam_beta2', 'adam_epsilon'),
        '--optimizer=rmsprop': ('momentum', 'decay', 'epsilon'),
    }
    chosen = (f'--loss={config.loss}', f'--optimizer={config.optimizer}')
    for setting, names in belongs_to.items():
        for name in names:
            value = getattr(config, name)
            if setting not in chosen and value != defaults[name]:
                flag = f'--{name}' if value is True else f'--{name}={value}'
                raise ConfigError(
                    f'{flag} belongs to {setting}; this run has {" and ".join(chosen)}: leave it '
                    f'out, or give its default, {defaults[name]}.'
                )
    if popart and config.target_update_steps:
        raise ConfigError(
            f'--target_update_steps={config.target_update_steps} does not go with --popart: the '
            'units of the values would be others by then.'
        )
    if config.target_update_steps == 0:
        value = config.clip_target_rho_threshold
        if value != defaults['clip_target_rho_threshold']:
            raise ConfigError(
                f'--clip_target_rho_threshold={value} is for the ratio to a target network: give '
                '--target_update_steps=1 or more, too.'
            )
    if config.reuse_buffer > 1 and config.sample_reuse == 1:
        raise ConfigError(
            f'--reuse_buffer={config.reuse_buffer} holds batches that no one uses again: give '
            '--sample_reuse=2 or more, too.'
        )
    capacity = config.replay_capacity
    if not config.replay_fraction and capacity != defaults['replay_capacity']:
        raise ConfigError(
            f'--replay_capacity={capacity} holds trajectories that no one uses again: give '
            '--replay_fraction=0.5, for instance, too.'
        )
    if config.replay_fraction * config.batch_size > config.batch_size - 1:
        most = (config.batch_size - 1) / config.batch_size
        raise ConfigError(
            f'--replay_fraction={config.replay_fraction} would leave nothing new in some batches '
            f'of --batch_size={config.batch_size}: give a larger batch, or '
            f'--replay_fraction={math.floor(most * 1000) / 1000} at most.'
        )


def check_torso(config: TrainingConfig) -> None:
    """Refuses settings of an auto-encoder where there is none.

    Raises:
      ConfigError: names the flags.
    """
    if config.torso == 'autoencoder':
        return
    for name, value, default in (
        ('latent_size', config.latent_size, TrainingConfig.latent_size),
        ('autoencoder_cost', config.learner.autoencoder_cost, LearnerConfig.autoencoder_cost),
    ):
        if value != default:
            raise ConfigError(
                f'--{name}={value} belongs to --torso=autoencoder; this run has '
                f'--torso={config.torso}.'
            )


def learner_settings(config: LearnerConfig) -> dict[str, Any]:
    """Returns the flags that shape what the learner keeps beside the network, if not as ever.

    They are for `checkpoint.check_same_network`; runs that have no such flags stored have neither.
    """
    settings: dict[str, Any] = {}
    if config.optimizer != 'rmsprop':
        settings['optimizer'] = config.optimizer
    if config.target_update_steps:
        settings['target_update_steps (whether there is a target network)'] = True
    return settings


def network_settings(network: AgentConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns the flags that shape the network, for `checkpoint.check_same_network`."""
    frame: Sequence[int] = spec.observation['frame'].shape
    settings: dict[str, Any] = {
        'torso': network.torso,
        'use_lstm': network.use_lstm,
        'level_name or --full_action_set (number of actions)': spec.num_actions,
        'level_name, --width, --height or --frame_stack (shape of the frames)': list(frame),
        _FRAME_DTYPE: spec.observation['frame'].dtype,
        'level_name (whether it has instructions)': 'instruction' in spec.observation,
    }
    # Left out without it, so that runs from before there was such a thing can be resumed.
    if network.popart_levels:
        settings[POPART_LEVELS] = list(network.popart_levels)
    if network.torso == 'autoencoder':
        settings['latent_size'] = network.latent_size
    return settings


def counted_by(config: TrainingConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns what gives a run's counters and logs their meaning, for `checkpoint.check_same_run`.

    Agent steps are counted, and frames, with all schedules, are agent steps times the repeats.
    """
    return {'num_action_repeats': spec.num_action_repeats, 'levels': list(config.level_names)}


def popart_levels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns `AgentConfig.popart_levels` of what `network_settings` returned.

    Raises:
      ConfigError: it comes from a file and is damaged.
    """
    levels = settings.get(POPART_LEVELS, [])
    if not isinstance(levels, (list, tuple)) or not all(isinstance(each, str) for each in levels):
        raise ConfigError(
            f'The settings of the network are damaged: {POPART_LEVELS} is {levels!r}.'
        )
    return tuple(levels)


def frame_dtype(settings: Mapping[str, Any], frame_shape: Sequence[int]) -> str:
    """Returns the dtype of the frames of what `network_settings` returned.

    Of runs from before it was stored: uint8 for images, float32 for all else.
    """
    return settings.get(_FRAME_DTYPE, 'uint8' if len(frame_shape) == 3 else 'float32')


def latent_size(settings: Mapping[str, Any]) -> int:
    """Returns `AgentConfig.latent_size` of what `network_settings` returned."""
    return settings.get('latent_size', LATENT_SIZE)
