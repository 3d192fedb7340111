"""The training loop: Figure 1 of the paper."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from impala import suites
from impala.acting.actor_pool import UnrollsLostError
from impala.config import Config, with_common_actions
from impala.experience.batch import UnrollBatch
from impala.learning import devices
from impala.learning.learner import Learner
from impala.runs import files
from impala.runs.flags import store_flags
from impala.runs.interval import WAIT_STAGE
from impala.runs.log import Log
from impala.runs.progress import report_to_stderr
from impala.runs.start_progress import starting
from impala.suites import Suite
from impala.training.batches import BatchSource, create_actors, create_replay
from impala.training.checkpoints import Checkpoints
from impala.training.hooks import (
    Hook,
    IntrinsicRewards,
    Logging,
    NonFiniteGuard,
    Profiler,
    StageTimer,
    Update,
    own_hooks,
    recorders,
)
from impala.training.periodic_tests import PeriodicTests
from impala.training.run import (
    Run,
    announce,
    build_learner,
    opened_log,
    started,
)
from impala.training.weights_and_biases import WeightsAndBiases


def train(config: Config, hooks: Sequence[Hook] = ()) -> str | None:
    """Trains until all frames are done, or until SIGINT or SIGTERM. Main thread only.

    If `config.run.logdir` has checkpoints, the run resumes from the newest. If it has all its
    frames already, the function returns at once.

    Args:
      config: of the run. If `config.cluster.task` is 0 or more, the learner serves actor jobs;
        otherwise it runs its own actors.
      hooks: called in this order after every update.

    Returns:
      The path of the last checkpoint; None if there is none yet or another learner has it.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came before training had started.
      UnrollsLostError: training has ended and is saved, but actors kept dying.
      ConfigError, LevelError, LogdirError, ServerError, TrainingError: one sentence for the user.
      LearnerGroupError: another learner has ended.
      ActorError: actors died too often; the text includes the last one's error.
    """
    cluster, learner_devices = config.cluster, config.learner.learner_devices
    if learner_devices or cluster.has_several_learners:
        devices.prepare(learner_devices, cluster.has_several_learners)
    # Before anything is started, lest it be refused.
    devices.inference_device(config.actors.inference_device)
    suite = suites.load(config.run.level_name)
    environment = with_common_actions(config.environment, suite.level_names)
    config = dataclasses.replace(config, environment=environment)
    with contextlib.ExitStack() as stack:
        if cluster.is_first:
            stack.enter_context(files.locked(config.run.logdir))
            files.try_checkpoint_folder(config.run.logdir)
        if config.run.debug:
            stack.enter_context(_without_graphs())
        return _train(config, suite, hooks)


@contextlib.contextmanager
def _without_graphs() -> Iterator[None]:
    """Makes TensorFlow call the functions that it would compile, line by line."""
    was_eager = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(was_eager)


def _train(config: Config, suite: Suite, hooks: Sequence[Hook]) -> str | None:
    with contextlib.ExitStack() as stack:
        own = [*own_hooks(config.run.hooks), *hooks]
        trackers = []
        if config.run.wandb_project and config.cluster.is_first:
            trackers.append(WeightsAndBiases(config))
            own += trackers
        intrinsic = IntrinsicRewards(own)
        intrinsic.check(config)
        run = stack.enter_context(started(config, suite))
        agent, learner = build_learner(run)
        for hook in own:
            hook.at_start(run.spec, config)
        replay = create_replay(run, agent, learner)
        checkpoints = Checkpoints(run, learner, own)
        if config.cluster.is_first:
            store_flags(config, report_to_stderr)
        learner.synchronize()
        if run.frames(learner) >= config.run.last_frames:
            run.learners.finish()
            return checkpoints.latest
        for tracker in trackers:
            stack.enter_context(tracker)
        log = stack.enter_context(
            opened_log(
                run, learner, checkpoints.wall_seconds, functools.partial(_show_line, [*own])
            )
        )
        actors = create_actors(run, agent, learner, log)
        actors.publish(learner.weights, learner.version)
        run.when_stopped(actors.close)
        source = stack.enter_context(BatchSource(run, learner, actors, replay, log))
        announce(run, learner, replay, checkpoints.latest, log)

        timer = StageTimer()
        guard = NonFiniteGuard(config.learner.replay.sample_reuse)
        if config.run.profiled is not None:
            own.append(stack.enter_context(Profiler(config.run.logdir, config.run.profiled)))
        if config.test.test_every_secs and config.cluster.is_first:
            own.append(stack.enter_context(PeriodicTests(run, learner, log.wall_seconds)))
        logging = Logging([*recorders(run, learner, source, timer), *own])
        with checkpoints.saved_at_the_end(log):
            try:
                _learn(run, learner, source, log, timer, [logging, checkpoints, guard], intrinsic)
            except run.stop.raised:
                run.stop.received = True
            # For the last line, which is written even if none is due.
            logging.at_line(log)
            _end_together(run, source, log)
        # If the run can still be resumed, its actor jobs keep waiting for it.
        if not run.stop.received and run.frames(learner) >= config.run.total_environment_frames:
            actors.finish()
        try:
            actors.check_losses()
        except UnrollsLostError as error:
            error.checkpoint = checkpoints.latest
            raise
    return checkpoints.latest


def _learn(
    run: Run,
    learner: Learner,
    source: BatchSource,
    log: Log,
    timer: StageTimer,
    hooks: Sequence[Hook],
    intrinsic: IntrinsicRewards,
) -> None:
    """The learner of Figure 1: trains until the frames are done or the actors are closed."""
    step = _TrainStep(run, learner, log)
    # Finding them in the agent's modules takes a large part of a millisecond.
    weights = learner.weights
    frames = run.frames(learner)
    stops: list[bool] = []
    while frames < run.config.run.last_frames and not stops:
        with timer(WAIT_STAGE):
            batch, is_fresh = next(source.batches, (None, False))
        # After the signal there may still be a batch that was assembled ahead.
        if batch is None or run.stop.received:
            return
        rewards = None
        if intrinsic:
            with timer('learner/intrinsic_reward'):
                rewards = intrinsic(batch)
        with timer('learner/train_step'):
            metrics = step(batch, is_fresh, rewards)
        if metrics is None:
            return
        with timer('learner/publish'):
            source.actors.publish(weights, learner.version)
        with timer('learner/log'):
            updates, agent_steps = learner.counts()
            frames = agent_steps * run.spec.num_action_repeats
            _show(
                hooks,
                Update(
                    batch,
                    is_fresh,
                    metrics,
                    updates,
                    agent_steps,
                    frames,
                    learner,
                    log,
                    stop=lambda: stops.append(True),
                ),
            )


def _show(hooks: Sequence[Hook], update: Update) -> None:
    # A separate function, so that no variable keeps the batch while the next one is awaited.
    for hook in hooks:
        hook.after_update(update)


def _show_line(hooks: Sequence[Hook], line: Mapping[str, float]) -> None:
    for hook in hooks:
        hook.after_line(line)


class _TrainStep:
    """Train steps. Tracing the first one takes seconds, during which it may be interrupted."""

    def __init__(self, run: Run, learner: Learner, log: Log):
        self._run = run
        self._learner = learner
        self._log = log
        self._has_begun = False

    def __call__(
        self,
        batch: tuple[UnrollBatch, ...],
        is_fresh: bool,
        intrinsic_rewards: Sequence[tf.Tensor] | None,
    ) -> dict[str, float] | None:
        """Updates the weights; returns the metrics, or None if the run must end."""
        stop = self._run.stop
        is_traced = not (self._has_begun or self._run.config.run.debug)
        bootstrap_truncated = self._run.config.environment.bootstrap_truncated
        try:
            with self._tracing() if is_traced else contextlib.nullcontext():
                metrics = _to_floats(
                    self._learner.step_in_parts(
                        [part.for_loss(bootstrap_truncated) for part in batch],
                        is_fresh,
                        [part.is_replayed for part in batch],
                        intrinsic_rewards,
                    )
                )
        except KeyboardInterrupt:
            stop.received = True
            return None
        except RuntimeError:
            # TensorFlow turns an interrupt that arrives while it makes an error into this.
            if self._has_begun or not stop.received:
                raise
            return None
        except tf.errors.OpError as error:
            self._run.learners.explain(error)
            return None
        self._has_begun = True
        return metrics

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        stop = self._run.stop
        with stop.interrupting(), starting(self._log.message, 'the train step is traced'):
            yield
        stop.begun()


def _end_together(run: Run, source: BatchSource, log: Log) -> None:
    """Raises the error that ended training, if any, and ends together with the other learners."""
    if run.stop.received:
        # The signal's thread may not have got to this yet, and later it would be too late.
        run.learners.stop()
        return
    source.actors.check()
    run.learners.check()
    run.learners.finish()
    run.learners.collect(log)


def _to_floats(metrics: dict[str, tf.Tensor]) -> dict[str, float]:
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    if values.get('replayed_fraction') == 0:
        values = {name: v for name, v in values.items() if not name.startswith('replayed_policy')}
    return values
