"""Training on one machine: actors, behaviour policy, queue and learner, put together (Figure 1)."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from environments import EnvironmentConfig
from impala.acting import BehaviourPolicy, UnrollBatch, UnrollSource
from impala.actor_pool import ActorPool, Workplace
from impala.agent import Agent, AgentConfig
from impala.checkpoint import Checkpointer, LogdirError, check_same_network
from impala.learner import Learner, LearnerConfig
from impala.run_log import RunLog
from impala.trajectory import EnvironmentSpec


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

    @property
    def level_ids(self) -> list[int]:
        """Index of the level of each actor."""
        return [actor % len(self.level_names) for actor in range(self.num_actors)]


class ConfigError(Exception):
    """Settings that do not fit together; its text is one sentence for the user."""


class TrainingError(Exception):
    """The run cannot go on; its text is one sentence for the user."""


# Updates in a row with a loss or gradient that is not finite, after which a run stops.
MAX_SKIPPED_UPDATES = 10

# A second signal this soon is the first one once more: `timeout` and job schedulers send theirs to
# a process and to its group.
SAME_SIGNAL_SECONDS = 1.0


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
        fast = has_fast_bfloat16() and not tf.config.list_logical_devices('GPU')
        compute_dtype = 'bfloat16' if fast else 'float32'
    return AgentConfig(torso=torso, use_lstm=use_lstm, compute_dtype=compute_dtype)


def create_agent(network: AgentConfig, spec: EnvironmentSpec) -> Agent:
    """Makes the agent.

    Raises:
      ConfigError: the network cannot serve the environment's frames.
    """
    try:
        return Agent(network, spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def has_fast_bfloat16(cpu_info: str = '/proc/cpuinfo') -> bool:
    """Returns whether the processor has instructions for bfloat16.

    Without them TensorFlow's convolutions in bfloat16 take several times as long as in float32.

    Args:
      cpu_info: file in which the kernel describes the processor.
    """
    with open(cpu_info, encoding='utf-8') as file:
        return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(file.read().split())


def train(config: TrainingConfig, on_accepted: Callable[[], Any] | None = None) -> str | None:
    """Trains until all frames are done, or until SIGINT or SIGTERM. Main thread only.

    A run that finds checkpoints in its logdir goes on where they end.

    Args:
      config: of the run.
      on_accepted: called once it is certain that the level can be played and that the network is
        the one of the checkpoints, before anything is trained.

    Returns:
      The path of the last checkpoint, None if there is none yet. At once if all frames were done
      before.

    Raises:
      KeyboardInterrupt: SIGINT or SIGTERM came before training had begun.
      ConfigError, LevelError, LogdirError, TrainingError: one sentence for the user.
      ActorError: with the actor's own error text.
    """
    if config.inference_batch_size > config.num_actors:
        raise ConfigError(
            f'--inference_batch_size={config.inference_batch_size} is more than there are actors '
            f'(--num_actors={config.num_actors}).'
        )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        workplace = stack.enter_context(Workplace(config.environment))
        spec = workplace.environment_spec(config.level_names[0], config.seed)
        network = choose_network(config, spec)
        check_same_network(config.logdir, network_settings(network, spec))
        tf.random.set_seed(config.seed)
        frames_per_step = spec.num_action_repeats
        learner = Learner(
            create_agent(network, spec),
            dataclasses.replace(
                config.learner,
                total_agent_steps=max(1, config.total_environment_frames // frames_per_step),
            ),
        )
        checkpointer = Checkpointer(config.logdir, learner, config.save_checkpoint_secs)
        checkpointer.restore()
        if on_accepted is not None:
            on_accepted()
        if int(learner.agent_steps) * frames_per_step >= config.total_environment_frames:
            return checkpointer.latest
        restored_updates = int(learner.updates)
        log = stack.enter_context(
            RunLog(
                config.logdir,
                config.level_names,
                frames_per_step,
                config.total_environment_frames,
                config.log_secs,
                frames=int(learner.agent_steps) * frames_per_step,
                agent_steps=int(learner.agent_steps),
                updates=int(learner.updates),
                wall_seconds=checkpointer.wall_seconds,
            )
        )
        # Acting is bound by the work per row, not by matrix products: bfloat16 gains nothing there.
        acting_agent = Agent(dataclasses.replace(network, compute_dtype='float32'), spec)
        source = UnrollSource(
            spec,
            acting_agent,
            config.level_ids,
            config.learner.unroll_length,
            config.queue_capacity,
            config.inference_batch_size or max(1, config.num_actors // 2),
            config.inference_timeout_ms,
        )
        behaviour = BehaviourPolicy(acting_agent, source)
        behaviour.publish(learner.agent.trainable_variables, learner.updates)
        stop.then(source.batcher.close)
        stack.enter_context(behaviour.serving())
        pool = stack.enter_context(
            ActorPool(
                workplace,
                source.batcher,
                [config.level_names[level] for level in config.level_ids],
                config.seed,
                config.max_actor_restarts,
                log.message,
                config.envs_per_process,
            )
        )
        num_weights = sum(int(tf.size(weight)) for weight in learner.agent.trainable_variables)
        log.message(
            f'{", ".join(config.level_names)}: {config.num_actors} actors, {network.torso} network '
            f'{"with" if network.use_lstm else "without"} LSTM ({num_weights:,} weights), learner '
            f'on {"GPU" if tf.config.list_logical_devices("GPU") else "CPU"} in '
            f'{network.compute_dtype}; all goes to {config.logdir}'
        )
        if checkpointer.latest is not None:
            log.message(
                f'Going on from {checkpointer.latest}, at agent step {int(learner.agent_steps):,}'
            )

        def save() -> None:
            # A run that fails each time it is started must not push its good checkpoints out.
            if int(learner.updates) > restored_updates:
                checkpointer.save(log.wall_seconds)

        try:
            _learn(
                config, frames_per_step, learner, behaviour, source, pool, log, checkpointer, stop
            )
            if not stop.received:
                behaviour.check()
                pool.check()
        except BaseException:
            # Whatever went wrong, the weights are good: updates that were not finite are skipped.
            try:
                save()
            except LogdirError as error:
                log.message(f'WARNING: {error}')
            raise
        try:
            save()
        except LogdirError as error:
            raise TrainingError(str(error)) from error
    return checkpointer.latest


def _learn(
    config: TrainingConfig,
    frames_per_step: int,
    learner: Learner,
    behaviour: BehaviourPolicy,
    source: UnrollSource,
    pool: ActorPool,
    log: RunLog,
    checkpointer: Checkpointer,
    stop: 'StopSignal',
) -> None:
    """The learner of Figure 1: until the frames are done or the batcher is closed."""
    timer = StageTimer()
    restarts = skipped_in_a_row = 0
    agent_steps = int(learner.agent_steps)
    batches = source.batches(config.learner.batch_size)
    while agent_steps * frames_per_step < config.total_environment_frames:
        with timer('learner/wait'):
            batch = next(batches, None)
        # Behind the signal there may still be a batch that was assembled ahead.
        if batch is None or stop.received:
            return
        with timer('learner/train_step'):
            metrics = _to_floats(learner.step(batch.actor_output))
        with timer('learner/publish'):
            behaviour.publish(learner.agent.trainable_variables, learner.updates)
        with timer('learner/log'):
            agent_steps = int(learner.agent_steps)
            statistics = source.batcher.statistics()
            metrics['inference_batch_size'] = statistics.rows / statistics.batches
            log.record_update(metrics)
            record_episodes(log, batch)
            restarts_before, restarts = restarts, pool.restarts
            log.record_actor_restart(restarts - restarts_before)
            log.record_stage_seconds(statistics.stage_seconds | timer.seconds)
            log.maybe_write(agent_steps * frames_per_step, agent_steps, int(learner.updates))
            checkpointer.maybe_save(log.wall_seconds)
        skipped_in_a_row = skipped_in_a_row + 1 if metrics['skipped'] else 0
        if skipped_in_a_row >= MAX_SKIPPED_UPDATES:
            raise TrainingError(
                f'Loss or gradient was not finite in {skipped_in_a_row} updates in a row (none of '
                'them was applied): try a lower --learning_rate or --gradient_clip_norm.'
            )


def record_episodes(log: RunLog, batch: UnrollBatch) -> None:
    """Hands the episodes that ended in a batch to the log."""
    info = batch.actor_output.env_outputs.info
    # Row 0 stands in the unroll before, too, or is the first of an actor.
    log.record_episodes(
        batch.actor_output.level_id.numpy(),
        info.episode_return.numpy()[1:],
        info.episode_step.numpy()[1:],
        batch.ends.numpy()[1:],
    )


class StageTimer:
    """Adds up the seconds of named stages; cleanba's answer to "what is my bottleneck?"."""

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


class StopSignal:
    """Ends a run cleanly on SIGINT, SIGTERM or SIGHUP. A context manager, main thread only.

    As long as nothing runs that must be brought to an end, the signal raises KeyboardInterrupt.
    Afterwards it calls the function given to `then`, once and on a thread of its own: the main
    thread may well be inside TensorFlow, waiting for data, where Python's own handlers do not run,
    and the function must be what lets it return. A second signal, more than `SAME_SIGNAL_SECONDS`
    after the first, then ends the process at once.

    Attributes:
      received: whether a signal has come.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._stop: Callable[[], Any] | None = None
        self.received = False

    def then(self, stop: Callable[[], Any]) -> None:
        """From now on the signal calls a function.

        Args:
          stop: function without arguments, called on another thread.
        """
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._thread = threading.Thread(target=self._watch, name='stop signal', daemon=True)
        self._thread.start()
        self._stop = stop
        if self.received:  # It came in the lines above.
            stop()

    def __enter__(self) -> 'StopSignal':
        # `nohup` ignores SIGHUP so that a run outlives its terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._handlers = {
            number: signal.signal(number, self._handle)
            for number in self._SIGNALS
            if number not in ignored
        }
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._stop is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        # Later on it exists only so that the signal does nothing here: `_watch` acts on it.
        if self._stop is None and not self.received:
            self.received = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        received_at = 0.0
        while numbers := os.read(self._read, 1):
            if numbers[0] not in self._handlers:
                continue
            if not self.received:
                received_at = time.monotonic()
                self.received = True
                if self._stop is not None:
                    self._stop()
            elif time.monotonic() - received_at >= SAME_SIGNAL_SECONDS:
                os._exit(128 + numbers[0])


def _to_floats(metrics: dict[str, tf.Tensor]) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in metrics.items()}


def network_settings(network: AgentConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns the flags that shape the network, as `check_same_network` compares them."""
    frame: Sequence[int] = spec.observation['frame'].shape
    return {
        'torso': network.torso,
        'use_lstm': network.use_lstm,
        'level_name or --full_action_set (number of actions)': spec.num_actions,
        'level_name, --width, --height or --frame_stack (shape of the frames)': list(frame),
        'level_name (whether it has instructions)': 'instruction' in spec.observation,
    }
