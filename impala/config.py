"""The settings of a run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from impala.acting.silence import SilenceLimits
from impala.environments import EnvironmentConfig
from impala.learning.learner import LearnerConfig
from impala.networks.torsos import LATENT_SIZE
from impala.suites import Suite


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
