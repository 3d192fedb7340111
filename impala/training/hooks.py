"""Hooks that observe a run during training: log, checkpoints, guard, and the user's own.

The training thread calls the hooks, so the learner waits for them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from impala.config import Config, ConfigError
from impala.errors import TrainingError
from impala.experience.batch import UnrollBatch
from impala.experience.mixture import ReplayMixer
from impala.learning.learner import Learner
from impala.networks import decoder
from impala.runs.log import Log
from impala.training.batches import Actors, BatchSource
from impala.training.learners import Learners
from impala.training.run import Run
from impala.trajectory import EnvironmentSpec
from impala.user_code import UserCodeError, describe_failure, load

# A run stops after this many consecutive updates whose loss or gradient is not finite.
MAX_SKIPPED_UPDATES = 10
NUM_RECONSTRUCTIONS = 8


class Update(NamedTuple):
    """An update of the weights, as hooks see it.

    Attributes:
      batch: its batch, with a part for each of `learner.devices`. A hook that keeps it after the
        call keeps its memory in use.
      is_fresh: whether the batch is used for the first time.
      metrics: name -> value, from `Learner.step`.
      updates: of the whole run so far, without skipped ones.
      agent_steps: of the whole run so far, with those of skipped updates; each new unroll counts
        once, however often it is used.
      frames: `agent_steps` times the frames per agent step.
      learner: has the weights.
      log: of the run; `record_update` adds metrics, `record_picture` a picture.
      stop: ends training after this update, as if all frames were done; the run is saved and can
        be resumed.
    """

    batch: tuple[UnrollBatch, ...]
    is_fresh: bool
    metrics: dict[str, float]
    updates: int
    agent_steps: int
    frames: int
    learner: Learner
    log: Log
    stop: Callable[[], None] = lambda: None


class Hook:
    """Base class of hooks; does nothing.

    An error that a hook raises ends the run, which is saved first. The user sees a `TrainingError`
    as one sentence.
    """

    @property
    def module(self) -> tf.Module | None:
        """Saved in the run's checkpoints, and restored after `at_start`; None for nothing.

        Of several learners, only the first one saves and restores its hooks' modules.
        """
        return None

    def at_start(self, spec: EnvironmentSpec, config: Config) -> None:
        """Called once before training, when the environments can be played.

        Args:
          spec: of every level.
          config: of the run.
        """

    def intrinsic_reward(self, batch: UnrollBatch) -> tf.Tensor:
        """Called before every update by runs whose hook overrides it, for each part of the batch.

        The losses add the result to the clipped rewards of this update; the batch, the returns of
        episodes and the replay stay as they are. A batch that is used or replayed several times
        gets new intrinsic rewards each time. So this should only compute; `after_update` is the
        place to learn from a batch, once: see `Update.is_fresh` and `UnrollBatch.is_replayed`.

        Args:
          batch: for one of the learner's devices.

        Returns:
          f32 `[T, B]`; row t is for the action that led to row t + 1 of the batch.
        """
        raise NotImplementedError

    def after_update(self, update: Update) -> None:
        """Called after every update, when its weights are published."""

    def at_line(self, log: Log) -> None:
        """Called just before a line of the log is written, to record values for it."""

    def after_line(self, line: Mapping[str, float]) -> None:
        """Called with the numbers of a line when it is written; also of the last, at the end."""


def modules_of(hooks: Sequence[Hook]) -> dict[str, tf.Module]:
    """Returns name -> module of the hooks that have one; the names are those of their classes."""
    modules: dict[str, tf.Module] = {}
    for hook in hooks:
        if hook.module is not None:
            name = type(hook).__name__
            same = sum(key.partition(' ')[0] == name for key in modules)
            modules[f'{name} {same + 1}' if same else name] = hook.module
    return modules


class IntrinsicRewards:
    """Adds up the intrinsic rewards of hooks."""

    def __init__(self, hooks: Sequence[Hook]):
        """Takes all hooks, of which some may override `Hook.intrinsic_reward`."""
        self._hooks = [
            hook for hook in hooks if type(hook).intrinsic_reward is not Hook.intrinsic_reward
        ]

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def check(self, config: Config) -> None:
        """Checks that a run may have such rewards.

        Raises:
          ConfigError: it has them, and several learners, each of which would have its own.
        """
        if self and config.cluster.has_several_learners:
            raise ConfigError(
                f'The intrinsic reward of {type(self._hooks[0]).__name__} cannot be combined with '
                'several --learner_addresses: the hook of each learner would know only its own '
                'batches.'
            )

    def __call__(self, batch: Sequence[UnrollBatch]) -> list[tf.Tensor]:
        """Returns the sums for each part of a batch, f32 `[T, B]`.

        Raises:
          TrainingError: a hook returns something else.
        """
        return [tf.add_n([_intrinsic_reward(hook, part) for hook in self._hooks]) for part in batch]


def _intrinsic_reward(hook: Hook, part: UnrollBatch) -> tf.Tensor:
    reward = hook.intrinsic_reward(part)
    expected = part.actor_output.env_outputs.reward[1:]
    if not tf.is_tensor(reward) or reward.dtype != expected.dtype or reward.shape != expected.shape:
        what = f'{reward.dtype.name} {reward.shape}' if tf.is_tensor(reward) else repr(reward)
        raise TrainingError(
            f'{type(hook).__name__}.intrinsic_reward returns {what}, and it must return a float32 '
            f'tensor {expected.shape}, a row for each action.'
        )
    return reward


class Metrics(Hook):
    """Records the metrics of updates; policy lags of reused batches get separate names."""

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        metrics = update.metrics
        if not update.is_fresh:
            metrics = {
                f'reused_{name}' if 'policy_lag_' in name else name: value
                for name, value in metrics.items()
            }
        update.log.record_update(metrics)


class Episodes(Hook):
    """Records the agent steps of new unrolls, and the episodes that ended in them."""

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        if update.is_fresh:
            for part in update.batch:
                _record_episodes(update.log, part)


def _record_episodes(log: Log, batch: UnrollBatch) -> None:
    info = batch.actor_output.env_outputs.info
    is_new = ~batch.is_replayed.numpy()
    level_ids = batch.actor_output.level_id.numpy()[is_new]
    log.record_agent_steps(level_ids, info.episode_step.shape[0] - 1)
    # Row 0 is also the last row of the unroll before, or an actor's very first row.
    log.record_episodes(
        level_ids,
        info.episode_return.numpy()[1:, is_new],
        info.episode_frames.numpy()[1:, is_new],
        batch.ends.numpy()[1:, is_new],
    )


class PopArtStatistics(Hook):
    """Records PopArt's mean and standard deviation of each level's values, if PopArt is used."""

    def __init__(self, learner: Learner, level_names: Sequence[str]):
        """Takes the learner, and the level names in the order of their ids."""
        self._popart = learner.agent.popart
        self._level_names = level_names

    def at_line(self, log: Log) -> None:
        """See `Hook`."""
        if self._popart is not None:
            log.record_update(self._popart.statistics(self._level_names))


class Reconstructions(Hook):
    """Records a picture at intervals: some frames of a batch above their reconstructions."""

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        learner = update.learner
        if learner.decoder is None or not learner.config.loss.autoencoder_cost:
            return
        if not update.log.picture_is_due:
            return
        frames = update.batch[0].actor_output.env_outputs.observation['frame']
        # Frames of different rows and, if there are enough, of different unrolls.
        rows, size = frames.shape[:2]
        shown = [(i * rows // NUM_RECONSTRUCTIONS, i % size) for i in range(NUM_RECONSTRUCTIONS)]
        frames = tf.stack([frames[row, column] for row, column in shown])
        picture = decoder.picture(frames.numpy(), learner.reconstruct(frames).numpy())
        update.log.record_picture('reconstructions', picture)


class News(Hook):
    """Records what the other learners have reported about their actors."""

    def __init__(self, learners: Learners):
        """Takes all learners of the run."""
        self._learners = learners

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        self._learners.collect(update.log)


class ReplayState(Hook):
    """Records the metrics of the replay and the seconds of its stages."""

    def __init__(self, mixer: ReplayMixer):
        """Takes the mixer, which holds the replay."""
        self._mixer = mixer

    def at_line(self, log: Log) -> None:
        """See `Hook`."""
        log.record_update(self._mixer.replay.metrics())
        log.record_stage_seconds(self._mixer.stage_seconds())


class StageTimer:
    """Adds up the seconds of named stages, to show the bottleneck of a run.

    Attributes:
      seconds: stage -> seconds so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times its block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed


class StageSeconds(Hook):
    """Records the state of the actors, and the seconds of their and the learner's stages."""

    def __init__(self, actors: Actors, timer: StageTimer):
        """Takes the actors, and the timer of the learner's stages."""
        self._actors = actors
        self._timer = timer

    def at_line(self, log: Log) -> None:
        """See `Hook`."""
        log.record_stage_seconds(self._actors.record(log) | self._timer.seconds)


class Logging(Hook):
    """Calls the hooks that record, then writes the log."""

    def __init__(self, recorders: Sequence[Hook]):
        """Takes these hooks, in the order in which they are called."""
        self._recorders = recorders

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        for hook in self._recorders:
            hook.after_update(update)
        if update.log.line_is_due:
            self.at_line(update.log)
        update.log.maybe_write(update.frames, update.agent_steps, update.updates)

    def at_line(self, log: Log) -> None:
        """See `Hook`."""
        for hook in self._recorders:
            hook.at_line(log)


class NonFiniteGuard(Hook):
    """Ends a run if too many consecutive updates have a loss or gradient that is not finite."""

    def __init__(self, sample_reuse: int = 1):
        """Starts the count at 0.

        Args:
          sample_reuse: uses of each batch; all uses of one bad batch count as one.
        """
        self._most = MAX_SKIPPED_UPDATES * sample_reuse
        self._skipped_in_a_row = 0

    def after_update(self, update: Update) -> None:
        """See `Hook`.

        Raises:
          TrainingError: too many updates in a row were skipped.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if update.metrics['skipped'] else 0
        if self._skipped_in_a_row >= self._most:
            raise TrainingError(
                f'Loss or gradient was not finite in {self._skipped_in_a_row} updates in a row '
                '(none of them was applied): try a lower --learning_rate or --gradient_clip_norm.'
            )


class Profiler(Hook):
    """Profiles some updates with TensorFlow's profiler; a context manager that ends with the run.

    TensorBoard shows the result under "Profile", with the package `tensorboard-plugin-profile`.
    """

    def __init__(self, logdir: str, updates: tuple[int, int]):
        """Prepares.

        Args:
          logdir: of the run.
          updates: of the run, after which the profile begins and ends.
        """
        self._logdir = logdir
        self._first, self._last = updates
        self._is_running = False

    def __enter__(self) -> 'Profiler':
        return self

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        if self._is_running and update.updates >= self._last:
            self._stop()
            update.log.message(f'The profile of updates {self._first} to {self._last} is written')
        elif not self._is_running and self._first <= update.updates < self._last:
            tf.profiler.experimental.start(self._logdir)
            self._is_running = True

    def __exit__(self, *error: Any) -> None:
        if self._is_running:
            self._stop()

    def _stop(self) -> None:
        self._is_running = False
        tf.profiler.experimental.stop()


def own_hooks(names: Sequence[str]) -> list[Hook]:
    """Returns the user's hooks, `my_module:MyHook()` each.

    Raises:
      ConfigError: one of them cannot be made.
    """
    hooks: list[Hook] = []
    for name in names:
        try:
            hook = load(name)()
        except UserCodeError as error:
            raise ConfigError(f'--hooks={name}: {error}.') from error
        except Exception as error:
            raise ConfigError(
                f'--hooks={name} cannot be made: {describe_failure(error)}.'
            ) from error
        if not isinstance(hook, Hook):
            raise ConfigError(
                f'--hooks={name} makes {type(hook).__name__}, and it must be a subclass of '
                'impala.training.hooks.Hook.'
            )
        hooks.append(hook)
    return hooks


def recorders(run: Run, learner: Learner, source: BatchSource, timer: StageTimer) -> list[Hook]:
    """Returns the hooks that record the log's standard contents."""
    hooks: list[Hook] = [
        Metrics(),
        Episodes(),
        News(run.learners),
        StageSeconds(source.actors, timer),
        PopArtStatistics(learner, run.suite.level_names),
        Reconstructions(),
    ]
    if source.replay is not None:
        hooks.append(ReplayState(source.replay))
    return hooks
