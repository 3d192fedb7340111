"""All settings of the program, each defined once.

A setting is a field of one of the classes below, made by `setting`: its name, type, default,
bounds, unit and a one-sentence description. Everything else follows from it: the flag of the same
name, the check of its value, its line in a run's `flags.txt`, whether it may change when a run
resumes, whether the jobs of a run must agree on it, and its line in `docs/flags.md`.

    Config.of(level_name='CartPole-v1', num_actors=8, learning_rate=0.003)

Each class checks the bounds of its settings when it is instantiated. Checks between settings are in
the `check` method of their class; a `Config` calls all of them. This module imports no library but
the standard one, because actor processes use it.
"""

import dataclasses
import functools
import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from impala.user_code import is_own

# Whether a setting may change when a run resumes:
# - fixed: no, because it shapes the network, the optimizer's state or the counters.
# - reported: yes, and the run reports the change.
# - schedule: yes, reported; the learning rate or the entropy cost then follows another line.
# - free: yes, without a report, because the meaning of the run's results does not change.
# - not_stored: it describes the present command, not the run, and is not in `flags.txt`.
OnResume = Literal['fixed', 'reported', 'schedule', 'free', 'not_stored']
# Which jobs must have the same value: none, all learners, or all learners and actor jobs.
Agreement = Literal['none', 'learners', 'jobs']

# The torsos of `impala/networks/torsos.py`.
TORSOS = ('shallow', 'deep', 'nature', 'mlp', 'autoencoder')
# The cores of `impala/networks/core.py`.
CORES = ('lstm', 'gru', 'none')

# Added to the port in a learner's address when there are several learners, for the exchange of
# gradients and of messages.
GRADIENTS_PORT_OFFSET = 1000
GROUP_PORT_OFFSET = 2000

MIN_SECRET_BYTES = 16


class ConfigError(ValueError):
    """A setting is invalid, or settings do not fit together; the text is one sentence."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The description of a setting, without its name, type and default.

    Attributes:
      help: one sentence.
      unit: of a number, for instance `'s'`.
      low: least value of a number, inclusive.
      high: greatest value of a number, inclusive.
      choices: all valid values of a text; empty if any text is valid.
      allows_own: whether a text may also name the user's own code, as `my_module:Name`.
      on_resume: see `OnResume`.
      agreement: see `Agreement`.
      only_with: `(name, value)` of another setting; this one has an effect only with that value.
      only_in: the only mode or kind of job in which it has an effect; `''` for more than one.
        `'train'`: learners; `'test'`: test mode; `'tests'`: test mode and tests during training;
        `'local'`: where the policy acts for this process's own environments or, with
        `--inference=learner`, for those of actor jobs; `'actor'`: actor jobs.
      is_path: whether it names a file or folder of this machine.
    """

    help: str
    unit: str = ''
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    allows_own: bool = False
    on_resume: OnResume = 'reported'
    agreement: Agreement = 'none'
    only_with: tuple[str, str] | None = None
    only_in: Literal['', 'train', 'test', 'tests', 'local', 'actor'] = ''
    is_path: bool = False

    def check(self, name: str, value: Any, kind: Any) -> None:
        """Checks one value.

        Args:
          name: of the setting.
          value: of the setting; not None.
          kind: the setting's type.

        Raises:
          ConfigError: it is of another type, out of bounds or not one of the choices.
        """
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f'--{name} must be of type {kind.__name__}, not {value!r}.')
        if self.choices and value not in self.choices and not (self.allows_own and is_own(value)):
            own = ', nor my_module:Name' if self.allows_own else ''
            raise ConfigError(f'--{name}={value} is not one of {", ".join(self.choices)}{own}.')
        for text in value if kind is tuple else [value]:
            self._check_text(name, text)
        if kind is float and not math.isfinite(value):
            raise ConfigError(f'--{name}={value} is not a finite number.')
        if (self.low is not None and value < self.low) or (
            self.high is not None and value > self.high
        ):
            raise ConfigError(
                f'--{name}={value} must be from {self.low:,.15g} to {self.high:,.15g}.'
            )

    def _check_text(self, name: str, value: Any) -> None:
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(f'--{name}={value!r} has characters that cannot be printed in it.')
        if self.is_path and re.match(r'[a-z][a-z0-9+.-]*://', value, re.IGNORECASE):
            raise ConfigError(
                f'--{name}={value} is not a path of this machine: give one, for instance of a '
                'folder where that storage is mounted.'
            )


def setting(default: Any, help: str, **rest: Any) -> Any:
    """Declares a field as a setting; see `Setting` for the arguments."""
    return dataclasses.field(default=default, metadata={'setting': Setting(help, **rest)})


Section = TypeVar('Section', bound='_Checked')


class _Checked:
    """Checks the value of each setting when an instance is made."""

    def __post_init__(self) -> None:
        for name, (kind, is_optional, described) in _own_settings(type(self)).items():
            value = getattr(self, name)
            if value is not None or not is_optional:
                described.check(name, value, kind)

    @classmethod
    def of(cls: type[Section], **values: Any) -> Section:
        """Makes an instance from settings of this class and of the classes nested in it.

        Args:
          **values: name -> value; other settings have their defaults.

        Raises:
          ConfigError: a name or a value is wrong, or values do not fit together.
        """
        return cls().replace(**values)

    def replace(self: Section, **values: Any) -> Section:
        """Returns a copy in which settings have other values; see `of`."""
        sections = [section for _, section in _sections(self)]
        known = {field.name for part in sections for field in dataclasses.fields(part)}
        for name in values:
            if name not in known:
                raise ConfigError(f'{name} is not a setting; docs/flags.md lists them.')
        return _replaced(self, values)

    def agreed(self, *agreements: Agreement) -> dict[str, Any]:
        """Returns name -> value of the settings that jobs must agree on, JSON-serializable.

        Args:
          *agreements: `'jobs'`, `'learners'` or both; see `Agreement`.
        """
        return self._values(lambda described: described.agreement in agreements)

    def fixed(self) -> dict[str, Any]:
        """Returns name -> value of the settings that a run keeps when it resumes.

        The values are JSON-serializable.
        """
        return self._values(lambda described: described.on_resume == 'fixed')

    def _values(self, is_chosen: Callable[[Setting], bool]) -> dict[str, Any]:
        found = {}
        for _, section in _sections(self):
            for name, (_, _, described) in _own_settings(type(section)).items():
                if is_chosen(described):
                    value = getattr(section, name)
                    found[name] = list(value) if isinstance(value, tuple) else value
        return found

    def check(self) -> None:
        """Checks that the settings fit together.

        Raises:
          ConfigError: they do not; names them.
        """


def _own_settings(section: Any) -> dict[str, tuple[Any, bool, Setting]]:
    return _settings_of_class(section)


@functools.cache
def _settings_of_class(section: Any) -> dict[str, tuple[Any, bool, Setting]]:
    """Returns name -> type, whether it may be None, and description of the settings of a class."""
    hints = typing.get_type_hints(section)
    found = {}
    for field in dataclasses.fields(section):
        if 'setting' in field.metadata:
            options = [part for part in typing.get_args(hints[field.name]) if part is not Ellipsis]
            is_optional = type(None) in options
            kind = next((part for part in options if part is not type(None)), hints[field.name])
            if typing.get_origin(hints[field.name]) is tuple:
                kind, is_optional = tuple, False
            found[field.name] = kind, is_optional, field.metadata['setting']
    return found


@dataclasses.dataclass(frozen=True)
class RunConfig(_Checked):
    """The run."""

    mode: str = setting(
        'train',
        'Train, or test the newest checkpoint.',
        choices=('train', 'test'),
        on_resume='not_stored',
    )
    logdir: str = setting(
        '/tmp/agent',
        "The run's folder: checkpoints, metrics, learning curve.",
        on_resume='not_stored',
        is_path=True,
    )
    level_name: str = setting(
        'explore_goal_locations_small',
        'Level: a Gymnasium id (ALE/Pong-v5), a DeepMind Lab level, or module:callable; several '
        'separated by commas; or a suite: dmlab30, atari57, or the path of a CSV file.',
        agreement='jobs',
    )
    allow_level_change: bool = setting(
        False,
        'Resume a run on other levels than before; its logs then cover both.',
        on_resume='not_stored',
    )
    seed: int = setting(1, 'Seed of everything random.', low=0, high=2**31 - 1)
    total_environment_frames: int = setting(
        1_000_000_000,
        'Frames to train for.',
        unit='frames',
        low=1,
        high=10**15,
        on_resume='schedule',
        agreement='learners',
    )
    stop_at_frames: int = setting(
        0,
        'Save and stop when the whole run has reached this many frames; schedules still span '
        '--total_environment_frames. 0: do not stop early.',
        unit='frames',
        low=0,
        high=10**15,
        on_resume='not_stored',
        agreement='learners',
    )
    save_checkpoint_secs: float = setting(
        600.0, 'Training time between checkpoints.', unit='s', low=0, high=1e9, on_resume='free'
    )
    hooks: tuple[str, ...] = setting(
        (),
        'Hooks of the training loop as my_module:MyHook, separated by commas.',
        on_resume='free',
    )
    wandb_project: str = setting(
        '',
        'Project of Weights & Biases that gets the metrics and the flags of the run, too; needs '
        'the package wandb.',
        on_resume='free',
        only_in='train',
    )
    debug: bool = setting(
        False,
        'Play and train in one process and one thread, without graphs, so that breakpoint() works '
        'in environments, torsos, losses and hooks.',
        on_resume='not_stored',
    )
    profile_updates: str = setting(
        '',
        "Updates to profile, as 100:110: TensorFlow's profiler writes into --logdir.",
        on_resume='not_stored',
    )
    log_secs: float = setting(
        10.0, 'Time between lines of metrics.jsonl.', unit='s', low=0, high=1e9, on_resume='free'
    )

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The numbers in `profile_updates`; None if it is empty or has another form."""
        match = re.fullmatch(r'(\d{1,15}):(\d{1,15})', self.profile_updates)
        if match is None or int(match[1]) >= int(match[2]):
            return None
        return int(match[1]), int(match[2])

    @property
    def last_frames(self) -> int:
        """Frames of the whole run at which the training process ends."""
        total = self.total_environment_frames
        return min(self.stop_at_frames or total, total)

    def check(self) -> None:
        for name in self.hooks:
            if not is_own(name):
                raise ConfigError(f'--hooks={name} is not of the form my_module:MyHook.')
        if self.profile_updates and self.profiled is None:
            raise ConfigError(
                f'--profile_updates={self.profile_updates} is not of the form 100:110, the second '
                'greater than the first.'
            )
        if not self.logdir:
            raise ConfigError('--logdir is empty: give the folder of the run.')


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig(_Checked):
    """Environments."""

    width: int = setting(
        96,
        'Width of the frames. Atari: 84 by 84 in place of the default 96 by 72.',
        unit='pixels',
        low=1,
        high=4096,
        on_resume='fixed',
        agreement='jobs',
    )
    height: int = setting(
        72,
        'Height of the frames; see --width.',
        unit='pixels',
        low=1,
        high=4096,
        on_resume='fixed',
        agreement='jobs',
    )
    num_action_repeats: int | None = setting(
        None,
        'Frames per agent step. Default: 4 for Atari, DeepMind Lab and ViZDoom, 1 for others.',
        unit='frames',
        low=1,
        high=10_000,
        on_resume='fixed',
        agreement='jobs',
    )
    full_action_set: bool = setting(
        False,
        "Atari: all 18 actions instead of the game's own; always on with several games.",
        on_resume='fixed',
        agreement='jobs',
    )
    env_kwargs: str = setting(
        '',
        'Keyword arguments of a Gymnasium id or of my_module:make, as JSON: {"difficulty": 2}.',
        agreement='jobs',
    )
    observation_keys: tuple[str, ...] = setting(
        (),
        'Entries of a Dict observation that the agent sees, separated by commas; none for all.',
        on_resume='fixed',
        agreement='jobs',
    )
    clip_actions: bool = setting(
        False,
        'Box actions: clip a normal distribution to the bounds, instead of squashing it by tanh.',
        on_resume='fixed',
        agreement='jobs',
    )
    info_action_mask: bool = setting(
        False,
        "Allow only the actions of info['action_mask']; a mask in the observation is always used.",
        agreement='jobs',
    )
    atari_mode: int | None = setting(
        None,
        'Atari: mode of the game, as ale-py numbers it. Default: that of ale-py.',
        low=0,
        high=1_000_000,
        agreement='jobs',
    )
    atari_difficulty: int | None = setting(
        None,
        'Atari: difficulty of the game, as ale-py numbers it. Default: that of ale-py.',
        low=0,
        high=1_000_000,
        agreement='jobs',
    )
    bootstrap_truncated: bool = setting(
        False,
        'After a time limit (truncated), continue the return by the value of the last observation.',
        agreement='jobs',
    )
    sticky_actions: float = setting(
        0.0,
        'Atari: probability that a frame repeats the previous action (Machado et al., 2018: 0.25).',
        low=0,
        high=0.999,
        agreement='jobs',
    )
    end_episode_on_life_loss: bool = setting(
        False, 'Atari: losing a life ends the episode.', agreement='jobs'
    )
    max_noops: int = setting(
        30,
        'Atari: an episode starts with 1 to this many no-ops; 0: none.',
        low=0,
        high=10_000,
        agreement='jobs',
    )
    frames_per_noop: int = setting(
        1,
        "Atari: frames per no-op; 1 as in DQN's released code, --num_action_repeats as in its "
        'text (Mnih et al., 2015).',
        unit='frames',
        low=1,
        high=10_000,
        agreement='jobs',
    )
    frame_stack: int = setting(
        4,
        'Atari: frames in an observation, the newest last.',
        unit='frames',
        low=1,
        high=256,
        on_resume='fixed',
        agreement='jobs',
    )
    dataset_path: str = setting(
        '',
        'DeepMind Lab: folder of the Brady-Konkle-Oliva images, which two psychlab levels need.',
        on_resume='free',
        is_path=True,
    )
    level_cache_dir: str = setting(
        os.path.join('~', '.cache', 'impala', 'dmlab_levels'),
        'DeepMind Lab: folder of compiled maps, shared by all processes; empty: compile each map '
        'anew, which takes seconds per episode.',
        on_resume='free',
        is_path=True,
    )
    level_cache_gb: float = setting(
        10.0,
        'DeepMind Lab: size of that folder; the least recently used maps are deleted.',
        unit='GB',
        low=0,
        high=1e6,
        on_resume='free',
    )
    # The following are no settings: the program sets them, not the user.
    # Existing folder for files that an environment writes; None for the system's. A killed process
    # leaves its files there, so a parent should remove it.
    temp_folder: str | None = None
    # DeepMind Lab: allow the hold-out levels, which are for testing only, and use the mixer seed of
    # tests.
    is_test: bool = False
    # `Environment.render` will be called.
    render: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments in `env_kwargs`."""
        return json.loads(self.env_kwargs) if self.env_kwargs else {}

    def check(self) -> None:
        try:
            is_object = isinstance(self.kwargs, dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ConfigError(
                f'--env_kwargs={self.env_kwargs} is not a JSON object, for instance '
                '{"difficulty": 2}.'
            )


@dataclasses.dataclass(frozen=True)
class ActorsConfig(_Checked):
    """Actors."""

    num_actors: int = setting(4, 'Environments.', low=1, high=10_000)
    envs_per_process: int = setting(
        1,
        'Environments that take turns in one process; with few cores, several are faster.',
        low=1,
        high=10_000,
    )
    inference_batch_size: int = setting(
        0,
        'Requests that make an inference batch; 0: half the actors, or with --inference=learner '
        'whatever waits.',
        low=0,
        high=10_000,
    )
    inference: str = setting(
        'actor',
        'Where the policy of actor jobs acts: in each job, or on the learner, which then provides '
        'for --num_actors environments of all jobs together.',
        choices=('actor', 'learner'),
        on_resume='free',
        agreement='jobs',
    )
    inference_device: str = setting(
        '',
        "Device that computes the actors' policy, as /gpu:1 or /cpu:0; empty: the first GPU, or "
        'the CPU.',
        on_resume='free',
        only_in='local',
    )
    inference_timeout_ms: float = setting(
        20.0, 'Time after which fewer requests make a batch.', unit='ms', low=0, high=600_000
    )
    queue_capacity: int = setting(
        1, 'Full unrolls that may wait for the learner.', unit='unrolls', low=1, high=1_000_000
    )
    max_actor_restarts: int = setting(
        3, 'Consecutive restarts of one actor before the run stops.', low=0, high=10**6
    )
    silence_secs: float = setting(
        60.0,
        'Report an environment that takes this long for a step or to start; 0: never.',
        unit='s',
        low=0,
        high=1e9,
        on_resume='free',
    )
    actor_timeout: float = setting(
        600.0,
        'Kill and restart the process of an environment that takes this long; 0: never.',
        unit='s',
        low=0,
        high=1e9,
        on_resume='free',
    )

    @property
    def num_processes(self) -> int:
        """Number of actor processes on this machine."""
        return -(-self.num_actors // self.envs_per_process)


@dataclasses.dataclass(frozen=True)
class NetworkConfig(_Checked):
    """Network."""

    torso: str = setting(
        'auto',
        'Network before the core; auto: shallow for Atari, mlp for vectors, deep otherwise; or '
        "my_module:MyTorso, a Sonnet module of one's own.",
        choices=('auto', *TORSOS),
        allows_own=True,
        on_resume='fixed',
        agreement='jobs',
    )
    latent_size: int = setting(
        64,
        'Numbers that the auto-encoder turns a frame into.',
        low=1,
        high=65_536,
        on_resume='fixed',
        agreement='jobs',
        only_with=('torso', 'autoencoder'),
    )
    initializer: str = setting(
        'truncated_normal',
        'Initial weights: as in the released code, or as is usual for PPO.',
        choices=('truncated_normal', 'orthogonal'),
    )
    core: str = setting(
        'auto',
        'Memory after the torso; auto: none for Atari and vectors, lstm otherwise; or '
        "my_module:MyCore, a Sonnet core of one's own.",
        choices=('auto', *CORES),
        allows_own=True,
        on_resume='fixed',
        agreement='jobs',
    )
    core_size: int = setting(
        256,
        'Units of an LSTM or GRU core.',
        low=1,
        high=65_536,
        on_resume='fixed',
        agreement='jobs',
    )
    popart: bool = setting(
        False,
        'Normalize values per level (PopArt), for levels with different rewards; usually with '
        '--reward_clipping=none.',
        on_resume='fixed',
        agreement='jobs',
    )
    normalize_observations: bool = setting(
        False,
        'Normalize vectors of numbers by the mean and variance of all that was learned from.',
        on_resume='fixed',
        agreement='jobs',
    )
    contrast_gain: float = setting(
        0.0,
        'Atari: multiplied by this, the network sees the differences between successive frames and '
        'the newest frame minus the mean frame; 0: the frames themselves.',
        low=0,
        high=1000,
        on_resume='fixed',
        agreement='jobs',
    )
    compute_dtype: str = setting(
        'float32',
        "Data type of the learner's torso; auto: bfloat16 on CPUs with instructions for it.",
        choices=('float32', 'bfloat16', 'auto'),
    )

    def check(self) -> None:
        has_size = self.core in ('auto', 'lstm', 'gru')
        if self.core_size != NetworkConfig.core_size and not has_size:
            raise ConfigError(
                f'--core_size={self.core_size} belongs to --core=lstm and --core=gru; this run has '
                f'--core={self.core}: leave it out.'
            )


@dataclasses.dataclass(frozen=True)
class LossConfig(_Checked):
    """Loss."""

    loss: str = setting(
        'vtrace',
        "The paper's V-trace policy gradient, or the clipped surrogate of asynchronous PPO; or "
        "my_module:my_loss, a function of one's own.",
        choices=('vtrace', 'appo'),
        allows_own=True,
        agreement='learners',
    )
    discounting: float = setting(
        0.99, 'Discount per agent step, gamma.', low=0, high=1, agreement='learners'
    )
    entropy_cost: float = setting(
        0.00025,
        'Weight of the entropy bonus.',
        low=0,
        high=1e6,
        on_resume='schedule',
        agreement='learners',
    )
    final_entropy_cost: float | None = setting(
        None,
        'Value that --entropy_cost reaches, linearly, at the end of the run; default: it is '
        'constant.',
        low=0,
        high=1e6,
        on_resume='schedule',
        agreement='learners',
    )
    baseline_cost: float = setting(
        0.5, 'Weight of the baseline loss.', low=0, high=1e6, agreement='learners'
    )
    reward_clipping: str = setting(
        'abs_one',
        'How rewards are clipped for learning.',
        choices=('abs_one', 'soft_asymmetric', 'none'),
        agreement='learners',
    )
    clip_rho_threshold: float | None = setting(
        1.0, 'rho-bar of V-trace.', low=0, high=1e9, agreement='learners'
    )
    clip_c_threshold: float | None = setting(
        1.0, 'c-bar of V-trace.', low=0, high=1e9, agreement='learners'
    )
    clip_pg_rho_threshold: float | None = setting(
        1.0,
        'rho-bar of the policy gradient.',
        low=0,
        high=1e9,
        agreement='learners',
        only_with=('loss', 'vtrace'),
    )
    vtrace_lambda: float = setting(1.0, 'lambda of V-trace.', low=0, high=1, agreement='learners')
    clip_epsilon: float = setting(
        0.2,
        'Bound of the ratio of policies, epsilon.',
        low=1e-6,
        high=1e6,
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    target_update_steps: int = setting(
        0,
        'Updates between those of the target network of IMPACT; 0: no target network.',
        unit='updates',
        low=0,
        high=10**9,
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    clip_target_rho_threshold: float = setting(
        2.0,
        'rho of IMPACT, which bounds mu / pi_target.',
        low=1,
        high=1e9,
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    kl_cost: float = setting(
        0.0,
        'Weight of the divergence from the policy in the denominator of the ratio.',
        low=0,
        high=1e6,
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    normalize_advantages: bool = setting(
        False,
        'Scale the advantages of each batch to mean 0 and standard deviation 1.',
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    gae_advantages: bool = setting(
        False,
        'Use the advantages of GAE, with lambda --vtrace_lambda, instead of those of V-trace.',
        agreement='learners',
        only_with=('loss', 'appo'),
    )
    autoencoder_cost: float = setting(
        1.0,
        'Weight of the squared error of the reconstructed pixels.',
        low=0,
        high=1e6,
        agreement='learners',
        only_with=('torso', 'autoencoder'),
    )

    def check(self) -> None:
        value = self.clip_target_rho_threshold
        if not self.target_update_steps and value != LossConfig.clip_target_rho_threshold:
            raise ConfigError(
                f'--clip_target_rho_threshold={value} is for the ratio to a target network: give '
                '--target_update_steps=1 or more, too.'
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """Optimizer."""

    optimizer: str = setting(
        'rmsprop',
        'What applies the gradients.',
        choices=('rmsprop', 'adam'),
        on_resume='fixed',
        agreement='learners',
    )
    learning_rate: float = setting(
        0.00048,
        'Learning rate at the start of the run.',
        low=0,
        high=1e6,
        on_resume='schedule',
        agreement='learners',
    )
    final_learning_rate: float = setting(
        0.0,
        'Value that --learning_rate reaches, linearly, at the end of the run; the same value keeps '
        'it constant.',
        low=0,
        high=1e6,
        on_resume='schedule',
        agreement='learners',
    )
    decay: float = setting(
        0.99,
        'Decay of the mean square, per update.',
        low=0,
        high=1,
        agreement='learners',
        only_with=('optimizer', 'rmsprop'),
    )
    momentum: float = setting(
        0.0, 'Momentum.', low=0, high=1, agreement='learners', only_with=('optimizer', 'rmsprop')
    )
    # Epsilons must be positive: for a weight that has had no gradient, the optimizer may divide by
    # nothing else.
    epsilon: float = setting(
        0.1,
        'Epsilon, inside the root.',
        low=1e-15,
        high=1e6,
        agreement='learners',
        only_with=('optimizer', 'rmsprop'),
    )
    adam_beta1: float = setting(
        0.9,
        'Decay of the mean.',
        low=0,
        high=0.999999,
        agreement='learners',
        only_with=('optimizer', 'adam'),
    )
    adam_beta2: float = setting(
        0.999,
        'Decay of the mean square.',
        low=0,
        high=0.999999,
        agreement='learners',
        only_with=('optimizer', 'adam'),
    )
    adam_epsilon: float = setting(
        1e-8,
        'Epsilon, outside the root.',
        low=1e-15,
        high=1e6,
        agreement='learners',
        only_with=('optimizer', 'adam'),
    )
    gradient_clip_norm: float = setting(
        0.0,
        'Global norm that gradients are clipped to; 0: no clipping.',
        low=0,
        high=1e9,
        agreement='learners',
    )


@dataclasses.dataclass(frozen=True)
class ReplayConfig(_Checked):
    """Sample reuse and replay."""

    sample_reuse: int = setting(
        1, 'Updates per batch.', unit='updates', low=1, high=10_000, agreement='learners'
    )
    reuse_buffer: int = setting(
        1,
        'Most recent batches that updates alternate between; 1: each is used up before the next.',
        unit='batches',
        low=1,
        high=10_000,
        agreement='learners',
    )
    replay_fraction: float = setting(
        0.0,
        'Fraction of the unrolls of each batch that are drawn from the replay.',
        low=0,
        high=1,
        agreement='learners',
    )
    replay_capacity: int = setting(
        10_000,
        'Unrolls in the replay, over all replay jobs; the oldest are overwritten.',
        unit='unrolls',
        low=1,
        high=10**9,
        agreement='learners',
    )

    def check(self) -> None:
        if self.reuse_buffer > 1 and self.sample_reuse == 1:
            raise ConfigError(
                f'--reuse_buffer={self.reuse_buffer} holds batches that no one uses again: give '
                '--sample_reuse=2 or more, too.'
            )


@dataclasses.dataclass(frozen=True)
class LearnerConfig(_Checked):
    """Learner."""

    batch_size: int = setting(
        2,
        'Unrolls per update, of each learner.',
        unit='unrolls',
        low=1,
        high=100_000,
        agreement='learners',
    )
    unroll_length: int = setting(
        100, 'Agent steps per unroll.', unit='agent steps', low=1, high=100_000, agreement='jobs'
    )
    loaders: int = setting(
        0,
        'Threads per device that assemble batches and move them there, each one batch ahead; 0: 2 '
        'for GPUs, 1 for CPUs.',
        low=0,
        high=64,
    )
    learner_devices: tuple[str, ...] = setting(
        (),
        'Devices that share each batch of a learner, as /gpu:0,/gpu:1; empty: the first GPU, or '
        'the CPU; with --learner_addresses, all GPUs.',
    )
    intra_op_threads: int = setting(
        0,
        'Threads that share an operation on the CPU; 0: one per core.',
        low=0,
        high=1024,
    )
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    replay: ReplayConfig = ReplayConfig()
    # Not a setting: agent steps over which learning rate and entropy cost change. Follows from
    # --total_environment_frames and the action repeats.
    total_agent_steps: int = 250_000_000

    def check(self) -> None:
        fraction = self.replay.replay_fraction
        if fraction * self.batch_size > self.batch_size - 1:
            most = (self.batch_size - 1) / self.batch_size
            raise ConfigError(
                f'--replay_fraction={fraction} would leave nothing new in some batches of '
                f'--batch_size={self.batch_size}: give a larger batch, or '
                f'--replay_fraction={math.floor(most * 1000) / 1000} at most.'
            )


@dataclasses.dataclass(frozen=True)
class ClusterConfig(_Checked):
    """Several machines."""

    job_name: str = setting(
        'learner',
        'Kind of a distributed job.',
        choices=('learner', 'actor', 'replay'),
        on_resume='free',
    )
    task: int = setting(
        -1,
        'Number of a distributed job among those of its kind, from 0; -1 on a single machine.',
        low=-1,
        high=100_000,
        on_resume='free',
    )
    learner_address: str = setting('localhost:8000', 'host:port of the learner.', on_resume='free')
    learner_addresses: tuple[str, ...] = setting(
        (),
        'host:port of each of several learners that train one model, by --task; replaces '
        '--learner_address. Actor jobs are assigned by --task modulo the number of learners. A '
        'learner also uses the ports 1000 and 2000 above its own.',
        agreement='learners',
    )
    replay_addresses: tuple[str, ...] = setting(
        (),
        'host:port of each replay job, by --task, for them and for the learner; empty: the learner '
        'holds the replay in its own memory.',
        agreement='learners',
    )
    envs_per_actor: int = setting(
        1,
        'Environments of an actor job.',
        low=1,
        high=10_000,
        on_resume='free',
        only_in='actor',
    )
    reconnect_timeout: float = setting(
        600.0,
        'Time that an actor job waits for its learner.',
        unit='s',
        low=0,
        high=1e8,
        on_resume='free',
        only_in='actor',
    )
    actor_device: str = setting(
        'cpu',
        'Device that an actor job computes the agent on.',
        choices=('cpu', 'gpu'),
        on_resume='free',
        only_in='actor',
    )
    wire_compression: str = setting(
        'auto',
        'Compress trajectories on their way to the learner by zstd; auto: if they shrink to a '
        'quarter or less, as those of Atari do.',
        choices=('auto', 'zstd', 'none'),
        on_resume='free',
        only_in='actor',
    )
    bfloat16_weights: bool = setting(
        False,
        'Read the weights from the learner as bfloat16: half of the bytes, rounded to 8 '
        'significant bits.',
        on_resume='free',
        only_in='actor',
    )
    cluster_secret_file: str = setting(
        '',
        'File with a secret of at least 16 bytes, the same for all jobs of the run; they then '
        'serve nobody else.',
        on_resume='free',
        is_path=True,
    )
    trusted_network: bool = setting(
        False,
        'Only the jobs of the run can reach the ports that they listen on: do not warn about them.',
        on_resume='free',
    )

    @property
    def has_several_learners(self) -> bool:
        """Whether this is one of several learners."""
        return self.job_name == 'learner' and len(self.learner_addresses) > 1

    @property
    def is_first(self) -> bool:
        """Whether this learner writes checkpoints and logs."""
        return not self.has_several_learners or self.task == 0

    @property
    def is_job(self) -> bool:
        """Whether the run has jobs on several machines, of which this is one."""
        return self.job_name != 'learner' or self.is_distributed

    @property
    def is_distributed(self) -> bool:
        """Whether the learner serves actor jobs instead of running its own actors."""
        return self.task >= 0

    @property
    def own_address(self) -> str:
        """The address of this learner, or of the learner that this actor job serves."""
        addresses = self.learner_addresses or (self.learner_address,)
        return addresses[self.task % len(addresses)]

    def secret(self) -> bytes | None:
        """Returns the secret of the run, without white space around it; None without one.

        Raises:
          ConfigError: the file cannot be read, or its secret is too short.
        """
        path = self.cluster_secret_file
        if not path:
            return None
        try:
            with open(path, 'rb') as file:
                secret = file.read().strip()
        except OSError as error:
            raise ConfigError(f'--cluster_secret_file={path}: {error.strerror}.') from error
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigError(
                f'--cluster_secret_file={path}: a secret of {len(secret)} bytes is too short; make '
                f'one with: openssl rand -hex 32 > {path}'
            )
        return secret

    def check(self) -> None:
        for address in (self.learner_address, *self.learner_addresses, *self.replay_addresses):
            split_address(address)
        for address in self.replay_addresses:
            if self.replay_addresses.count(address) > 1:
                raise ConfigError(
                    f'--replay_addresses has {address} more than once: give each replay job one of '
                    'its own.'
                )
        if len(self.learner_addresses) > 1:
            self._check_learner_addresses()

    def _check_learner_addresses(self) -> None:
        num_learners = len(self.learner_addresses)
        if self.job_name == 'learner' and self.task >= num_learners:
            raise ConfigError(
                f'--task={self.task}: there are {num_learners} --learner_addresses, so learners '
                f'are --task=0 to --task={num_learners - 1}.'
            )
        most = 65535 - GROUP_PORT_OFFSET
        taken: dict[tuple[str, int], str] = {}
        for address in self.learner_addresses:
            host, port = split_address(address)
            if not 0 < port <= most:
                raise ConfigError(
                    f'--learner_addresses: the port of {address} must be from 1 to {most}; port + '
                    f'{GROUP_PORT_OFFSET} is used, too.'
                )
            for offset in (0, GRADIENTS_PORT_OFFSET, GROUP_PORT_OFFSET):
                other = taken.setdefault((host, port + offset), address)
                is_twice = offset == 0 and self.learner_addresses.count(address) > 1
                if other != address or is_twice:
                    raise ConfigError(
                        f'--learner_addresses: {other} and {address} would both use port '
                        f'{port + offset}; a learner uses its port, and those '
                        f'{GRADIENTS_PORT_OFFSET} and {GROUP_PORT_OFFSET} above.'
                    )


@dataclasses.dataclass(frozen=True)
class TestConfig(_Checked):
    """Tests."""

    __test__ = False  # Not for pytest.

    test_every_secs: float = setting(
        0.0,
        'Test the newest weights during training, in a process of its own, with this much training '
        'time in between; 0: never.',
        unit='s',
        low=0,
        high=1e9,
        on_resume='not_stored',
        only_in='train',
    )
    test_num_episodes: int = setting(
        10,
        'Episodes per level.',
        unit='episodes',
        low=1,
        high=100_000,
        on_resume='not_stored',
        only_in='tests',
    )
    test_max_frames: int | None = setting(
        None,
        'Length at which an episode is cut off. Default: 108,000 for Atari, 1,000,000 for others.',
        unit='frames',
        low=1,
        high=1_000_000_000,
        on_resume='not_stored',
        only_in='tests',
    )
    test_policy: str = setting(
        'sample',
        'Sample actions as the paper does, or take the most probable one.',
        choices=('sample', 'greedy'),
        on_resume='not_stored',
        only_in='tests',
    )
    checkpoint: str = setting(
        '',
        'A checkpoint other than the newest, for instance RUN/checkpoints/ckpt-3.',
        on_resume='not_stored',
        only_in='test',
        is_path=True,
    )
    watch: bool = setting(
        False,
        'Test the newest checkpoint and each one that follows.',
        on_resume='not_stored',
        only_in='test',
    )
    save_video: int = setting(
        0,
        'Episodes per level to write as videos.',
        unit='episodes',
        low=0,
        high=1000,
        on_resume='not_stored',
        only_in='test',
    )

    def check(self) -> None:
        if self.watch and self.checkpoint:
            raise ConfigError(
                '--watch tests the checkpoints to come, so it cannot be combined with --checkpoint.'
            )


@dataclasses.dataclass(frozen=True)
class Config(_Checked):
    """All settings of a run or a test."""

    run: RunConfig = RunConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    actors: ActorsConfig = ActorsConfig()
    network: NetworkConfig = NetworkConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        for _, section in _sections(self):
            section.check()

    def value(self, name: str) -> Any:
        """Returns the value of a setting, wherever it is in the tree."""
        section: Any = self
        for step in all_settings()[name].path:
            section = getattr(section, step)
        return getattr(section, name)

    @property
    def is_learner(self) -> bool:
        """Whether the process trains."""
        return self.run.mode == 'train' and self.cluster.job_name == 'learner'

    @property
    def policy_acts(self) -> bool:
        """Whether the policy acts in this learner or test, and not in actor jobs."""
        return not self.cluster.is_distributed or self.actors.inference == 'learner'

    def check(self) -> None:
        self._check_unused()
        self._check_debug()
        self._check_jobs()
        if self.network.popart and self.learner.loss.target_update_steps:
            raise ConfigError(
                f'--target_update_steps={self.learner.loss.target_update_steps} cannot be combined '
                'with --popart: the target network would have values in other units.'
            )

    def _check_unused(self) -> None:
        for name, known in all_settings().items():
            value = self.value(name)
            if known.setting.only_with is None or value == known.default:
                continue
            other, needed = known.setting.only_with
            # The user's own code may use all settings.
            if self.value(other) != needed and not is_own(str(self.value(other))):
                flag = f'--{name}' if value is True else f'--{name}={value}'
                raise ConfigError(
                    f'{flag} belongs to --{other}={needed}; this run has '
                    f'--{other}={self.value(other)}: leave it out, or give its default, '
                    f'{known.default}.'
                )

    def _check_debug(self) -> None:
        if not self.run.debug:
            return
        if self.run.mode == 'test':
            raise ConfigError('--debug is for training: leave it out of --mode=test.')
        for name in (
            'job_name',
            'task',
            'learner_devices',
            'replay_addresses',
            'loaders',
            'test_every_secs',
        ):
            value = self.value(name)
            if value != all_settings()[name].default:
                text = ','.join(value) if isinstance(value, tuple) else value
                raise ConfigError(
                    '--debug does everything in one process and one thread, so it cannot be '
                    f'combined with --{name}={text}.'
                )

    def _check_jobs(self) -> None:
        cluster = self.cluster
        is_test = self.run.mode == 'test'
        if cluster.job_name == 'replay':
            self._check_replay_job()
        elif cluster.job_name == 'actor':
            if cluster.task < 0 or is_test:
                raise ConfigError(
                    '--job_name=actor needs a number of its own, --task=0 or more, and '
                    '--mode=train.'
                )
            if cluster.replay_addresses:
                raise ConfigError(
                    '--replay_addresses is for the learner and for replay jobs: leave it out of an '
                    'actor job.'
                )
        elif not is_test:
            self._check_replay_of_learner()
            if cluster.task > 0 and not cluster.has_several_learners:
                raise ConfigError(
                    f'--task={cluster.task}: there can be one learner only, --task=0, unless '
                    '--learner_addresses has several.'
                )
            if cluster.has_several_learners and cluster.task < 0:
                raise ConfigError(
                    '--learner_addresses needs the number of this learner, --task=0 or more.'
                )
            if self.policy_acts and self.actors.inference_batch_size > self.actors.num_actors:
                raise ConfigError(
                    f'--inference_batch_size={self.actors.inference_batch_size} is more than there '
                    f'are actors (--num_actors={self.actors.num_actors}).'
                )

    def _check_replay_of_learner(self) -> None:
        replay, addresses = self.learner.replay, self.cluster.replay_addresses
        has_capacity = replay.replay_capacity != ReplayConfig.replay_capacity
        if not replay.replay_fraction and (addresses or has_capacity):
            flag = (
                f'--replay_addresses={",".join(addresses)} would hold'
                if addresses
                else f'--replay_capacity={replay.replay_capacity} holds'
            )
            raise ConfigError(
                f'{flag} trajectories that no one uses again: give --replay_fraction=0.5, for '
                'instance, too.'
            )
        if addresses and has_capacity:
            raise ConfigError(
                f'--replay_capacity={replay.replay_capacity} is a setting of the replay jobs here: '
                'leave it out of the learner, which has --replay_addresses.'
            )

    def _check_replay_job(self) -> None:
        addresses, task = self.cluster.replay_addresses, self.cluster.task
        if not addresses:
            raise ConfigError(
                '--job_name=replay needs --replay_addresses=host:port,... of all replay jobs.'
            )
        if not 0 <= task < len(addresses) or self.run.mode == 'test':
            raise ConfigError(
                f'--job_name=replay needs a number of its own, --task=0 to {len(addresses) - 1}, '
                'the place of its address in --replay_addresses, and --mode=train.'
            )
        capacity = self.learner.replay.replay_capacity
        if capacity < len(addresses):
            raise ConfigError(
                f'--replay_capacity={capacity} leaves nothing for some of {len(addresses)} replay '
                f'jobs: give --replay_capacity={len(addresses)} or more.'
            )


@dataclasses.dataclass(frozen=True)
class Known:
    """A setting and its place in the tree.

    Attributes:
      path: names of the fields that lead from `Config` to the class of the setting.
      group: title of that class's settings.
      kind: its type: bool, int, float, str, or tuple for a list of texts.
      default: its default.
      setting: its description.
    """

    path: tuple[str, ...]
    group: str
    kind: Any
    default: Any
    setting: Setting


@functools.cache
def all_settings() -> Mapping[str, Known]:
    """Returns name -> setting of the whole tree, group by group."""
    found: dict[str, Known] = {}
    for path, section in _sections(Config):
        for name, (kind, _, described) in _own_settings(section).items():
            assert name not in found, f'{name} stands twice in the tree'
            default = getattr(section, name)
            title = str(section.__doc__).removesuffix('.')
            found[name] = Known(path, title, kind, default, described)
    return found


def _sections(section: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields all sections of a tree, or of its class, with the names that lead to them."""
    yield path, section
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default):
            child = getattr(section, field.name)
            # A class attribute is the default, an instance.
            child = type(child) if isinstance(section, type) else child
            yield from _sections(child, (*path, field.name))


def _replaced(section: Any, values: Mapping[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replaced(value, values)
        elif field.name in values:
            new = values[field.name]
            changes[field.name] = tuple(new) if isinstance(new, list) else new
    return dataclasses.replace(section, **changes)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of `host:port`.

    Raises:
      ConfigError: it has another form.
    """
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"'{address}' is not an address of a job, which has the form host:port.")
    return host, int(port)


def with_common_actions(config: EnvironmentConfig, level_names: Sequence[str]) -> EnvironmentConfig:
    """Returns a config in which several Atari games have all 18 actions, as one agent requires."""
    games = {name for name in level_names if name.startswith('ALE/')}
    return dataclasses.replace(config, full_action_set=config.full_action_set or len(games) > 1)
