"""Test mode: plays episodes with the weights of a checkpoint, on the machinery of training.

All levels are played at once. Which episodes are played is decided beforehand: each has a seed that
follows from the run's seed, its level and its number, whatever environment plays it. Taking the
first episodes that end would favour short ones.
"""

import collections
import contextlib
import dataclasses
import gc
import glob
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from impala.acting.actor_processes import Workplace, require_files
from impala.acting.episode_series import ACTION_NOISE, Schedule, with_action_noise
from impala.acting.local_actors import LocalActors
from impala.config import ConfigError, TrainingConfig
from impala.environments.atari import ATARI_MAX_EPISODE_FRAMES
from impala.evaluation import report as test_report
from impala.evaluation.report import CheckpointScores
from impala.learning import memory_needs
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import choose_network, create_agent
from impala.runs.checkpoint import Checkpointer, LogdirError, NoIntactCheckpointError
from impala.runs.files import complete_checkpoints, newest_checkpoint
from impala.runs.progress import Progress, report_to_stderr
from impala.runs.run_settings import (
    check_same_network,
    checkpoint_settings,
    popart_levels,
    stored_settings,
)
from impala.runs.stop_signal import StopSignal
from impala.suites import Suite, known_level
from impala.trajectory import AgentOutput, ArraySpec, EnvironmentSpec, StepOutput

VIDEO_FOLDER = 'videos'

# Nobody looks at unrolls: longer ones would be fewer, but take more memory.
_UNROLL_LENGTH = 100
_INFERENCE_TIMEOUT_MS = 2.0
_WATCH_SECONDS = 2.0
_WATCH_TRIES = 4
_WRITING_SECONDS = 3.0
# Few environments have longer episodes, and DeepMind Lab's end by themselves long before.
_MAX_FRAMES = 1_000_000

# Rows that a test computes at a time. With more, a single environment would wait longer, and with
# fewer, many would: so many cost at most some two or three times what one row costs, and each of
# them at most about twice what it costs among many.
_ROWS = 8
_ROWS_OF_TORSO = {'mlp': 32, 'shallow': 16}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a run is tested.

    Attributes:
      num_episodes: per level.
      policy: `'sample'` as in the paper, or `'greedy'`: the most probable action.
      checkpoint: path without file extension; None for the newest.
      watch: test the newest checkpoint of a run that goes on, and then each one that follows, in
        their order; those that training removes while another one is tested are left out.
      num_videos: episodes per level that are filmed.
      max_frames: after which an episode is cut off; None for `default_max_frames`.
    """

    num_episodes: int = 10
    policy: str = 'sample'
    checkpoint: str | None = None
    watch: bool = False
    num_videos: int = 0
    max_frames: int | None = None


class EvaluationInterrupted(Exception):
    """A signal ended a test; what had been played is written. The text is for the user."""


class _TestAgent(Agent):
    """Acts by what a row itself holds, so that an episode does not depend on any other.

    It samples with the action noise of `EpisodeSeries`; an episode begins with the last action and
    the last reward 0, as the first one of an environment does; and the network is always computed
    with the same number of rows. Else sums of the same numbers would be made in another order, as
    kernels differ by shape, and a return that hangs on the last bit of a logit would depend on how
    many environments asked for an action at the same moment.
    """

    def __init__(self, config: AgentConfig, spec: EnvironmentSpec, name: str = 'agent'):
        super().__init__(config, spec, name)
        self._num_rows = _ROWS_OF_TORSO.get(config.torso, _ROWS)

    def step(
        self, prev_action: tf.Tensor, env_output: StepOutput, state: Any
    ) -> tuple[AgentOutput, Any]:
        is_first = env_output.done
        prev_action = tf.where(is_first, 0, prev_action)
        reward = tf.where(is_first, 0.0, env_output.reward)
        env_output = env_output._replace(reward=reward)
        scalar = ArraySpec((), 'float32')
        logits = ArraySpec((self._num_actions,), 'float32')
        output = AgentOutput(ArraySpec((), 'int32'), logits, scalar)
        return in_parts(
            super().step,
            self._num_rows,
            (prev_action, env_output, state),
            (output, self.state_spec),
        )

    def choose_actions(self, logits: tf.Tensor, env_output: StepOutput) -> tf.Tensor:
        noise = env_output.observation[ACTION_NOISE]
        return tf.argmax(logits + noise, -1, tf.int32)


class _GreedyAgent(_TestAgent):
    """Does what it deems best."""

    def choose_actions(self, logits: tf.Tensor, env_output: StepOutput) -> tf.Tensor:
        return tf.argmax(logits, -1, tf.int32)


def in_parts(
    function: Callable[..., Any], num_rows: int, arguments: tuple[Any, ...], result_spec: Any
) -> Any:
    """Calls a function with so many rows at a time.

    Args:
      function: takes nests of `[num_rows, ...]` and returns one; each row of that follows from the
        same row of the arguments.
      num_rows: of each call; the last one is filled up with zeros.
      arguments: of the function, nests of `[B, ...]`.
      result_spec: nest of `ArraySpec` of a row that it returns.

    Returns:
      What the function returns, a nest of `[B, ...]`.
    """
    size = tf.shape(tf.nest.flatten(arguments)[0])[0]

    def split(rows: tf.Tensor) -> tf.Tensor:
        padding = [[0, -size % num_rows]] + [[0, 0]] * (rows.shape.rank - 1)
        return tf.reshape(tf.pad(rows, padding), [-1, num_rows, *rows.shape[1:]])

    results = tf.map_fn(
        lambda part: function(*part),
        tf.nest.map_structure(split, arguments),
        parallel_iterations=1,
        fn_output_signature=tf.nest.map_structure(
            lambda spec: tf.TensorSpec([num_rows, *spec.shape], spec.dtype), result_spec
        ),
    )
    return tf.nest.map_structure(lambda t: tf.reshape(t, [-1, *t.shape[2:]])[:size], results)


class _Restorable(tf.Module):
    """Stands where the learner does in a checkpoint."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent
        self.agent_steps = tf.Variable(0, dtype=tf.int64, trainable=False)


class _Players:
    """The actors that play at present; closing them closes those to come, too."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._actors: LocalActors | None = None

    @contextlib.contextmanager
    def playing(self, actors: LocalActors) -> Iterator[None]:
        with self._lock:
            self._actors = actors
        try:
            with actors:
                if self._closed.is_set():
                    actors.close()
                yield
        finally:
            with self._lock:
                self._actors = None

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._actors is not None:
                self._actors.close()

    def wait(self, seconds: float) -> bool:
        """Returns, in so many seconds or when closed, whether it is closed."""
        return self._closed.wait(seconds)


def evaluate(
    config: TrainingConfig, evaluation: EvaluationConfig, report: Callable[[str], None]
) -> dict[str, list[float]] | None:
    """Plays whole episodes with a checkpoint and writes what came out; see `test_report`.

    A game that is lost life by life counts as one episode. Main thread only.

    Args:
      config: of the run that is tested; its levels are those to be played.
      evaluation: how.
      report: told in lines which checkpoint is tested and what its scores are.

    Returns:
      Level name -> undiscounted, unclipped returns in the order of the episodes' numbers within
      each environment, of the checkpoint tested last; None if SIGINT or SIGTERM came first.

    Raises:
      EvaluationInterrupted: SIGINT or SIGTERM came when some of the episodes had been played.
      KeyboardInterrupt: SIGINT or SIGTERM came before anything was played.
      ConfigError, LevelError, LogdirError: one sentence for the user.
      ActorError: with the actor's own error text.
    """
    if evaluation.watch and evaluation.checkpoint is not None:
        raise ConfigError(
            '--watch tests the checkpoints to come, so it does not go with --checkpoint.'
        )
    suite = config.suite or Suite('', tuple(map(known_level, config.level_names)))
    final_frames = config.total_environment_frames
    config = settings_of_test(config, evaluation)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        require_files(config.num_processes, 'num_actors', config.num_actors)
        workplace = stack.enter_context(Workplace(config.environment, config.silence))
        spec = workplace.common_spec(config.level_names, config.seed)
        network = dataclasses.replace(choose_network(config, spec), compute_dtype='float32')
        stored = stored_settings(config.logdir)
        if network.popart_levels and stored is not None:
            # The levels that are tested may be others.
            trained_levels = popart_levels(stored) or network.popart_levels
            network = dataclasses.replace(network, popart_levels=trained_levels)
        memory_needs.check(memory_needs.of_actors(config, spec, network))
        agent = create_agent(
            network, spec, _GreedyAgent if evaluation.policy == 'greedy' else _TestAgent
        )
        restorable = _Restorable(agent)
        checkpointer = Checkpointer(config.logdir, restorable)
        if newest_checkpoint(config.logdir) is not None:
            check_same_network(config.logdir, checkpoint_settings(config, network, spec))
        players = _Players()
        if not _restore(checkpointer, evaluation):
            if not evaluation.watch:
                raise LogdirError(
                    f'There is no checkpoint in {config.logdir}: give the --logdir of a training '
                    'run.'
                )
            report(f'Waiting for the first checkpoint in {config.logdir}')
        _check_writable(config.logdir)
        stop.then(players.close, nothing_to_lose=True)
        returns = None
        while True:
            if checkpointer.latest is not None:
                played = _test(
                    config, evaluation, suite, spec, agent, checkpointer.latest, workplace,
                    players, stop, int(restorable.agent_steps), report,
                )  # fmt: skip
                returns = played or returns
                # Figures and functions of TensorFlow are full of reference cycles, which Python
                # would leave for long among so many older objects.
                gc.collect()
                if played is None or not evaluation.watch:
                    return returns
                if int(restorable.agent_steps) * spec.num_action_repeats >= final_frames:
                    report('Training is complete.')
                    return returns
            if not _await_checkpoint(config.logdir, checkpointer, players):
                return returns


def default_max_frames(spec: EnvironmentSpec) -> int:
    """Returns the frames after which an episode of a test is cut off, if nobody says."""
    return ATARI_MAX_EPISODE_FRAMES if spec.suite == 'atari' else _MAX_FRAMES


def settings_of_test(config: TrainingConfig, evaluation: EvaluationConfig) -> TrainingConfig:
    """Returns a run's settings with those of its test."""
    slots_per_level = min(
        max(1, config.num_actors // len(config.level_names)), evaluation.num_episodes
    )
    # As many processes as the run had, unless that is more than there is to play in.
    processes = max(1, config.num_actors // config.envs_per_process)
    num_slots = slots_per_level * len(config.level_names)
    return dataclasses.replace(
        config,
        num_actors=num_slots,
        envs_per_process=max(config.envs_per_process, -(-num_slots // processes)),
        queue_capacity=num_slots,
        inference_batch_size=max(1, num_slots // 2),
        inference_timeout_ms=min(config.inference_timeout_ms, _INFERENCE_TIMEOUT_MS),
        learner=dataclasses.replace(config.learner, unroll_length=_UNROLL_LENGTH),
        environment=dataclasses.replace(
            config.environment,
            end_episode_on_life_loss=False,
            is_test=True,
            render=evaluation.num_videos > 0,
        ),
    )


def _check_writable(logdir: str) -> None:
    """Raises, before anything is played, if there is no writing in a folder."""
    try:
        # A run that is yet to begin makes its folder.
        if os.path.isdir(logdir):
            tempfile.TemporaryFile(dir=logdir).close()
    except OSError as error:
        raise LogdirError(
            f'Cannot write the scores in {logdir}: {error.strerror}. Give a --logdir of your own '
            'with a copy of the run.'
        ) from error


def _restore(checkpointer: Checkpointer, evaluation: EvaluationConfig) -> bool:
    """Restores a checkpoint; returns whether there was one."""
    deadline = time.monotonic() + _WRITING_SECONDS
    while True:
        try:
            return checkpointer.restore(evaluation.checkpoint)
        except NoIntactCheckpointError:
            # The first one of a run may be being written at this moment.
            if evaluation.watch:
                return False
            if evaluation.checkpoint is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _await_checkpoint(logdir: str, checkpointer: Checkpointer, players: _Players) -> bool:
    """Waits for the checkpoint after the last one and restores it; False if that is ended.

    One after the other, so that a test which outlasts several saves leaves none of them out but
    those that training has removed by then.
    """
    last = checkpointer.latest
    tries: collections.Counter[str] = collections.Counter()
    while True:
        for path in complete_checkpoints(logdir, after=last):
            if tries[path] == _WATCH_TRIES:
                continue
            tries[path] += 1
            try:
                checkpointer.restore(path)
                return True
            except NoIntactCheckpointError as error:
                # It may be cut short as yet, or just have been removed. If it stays so, it is
                # damaged, and it is the turn of the next.
                if tries[path] < _WATCH_TRIES:
                    break
                report_to_stderr(f'WARNING: {error} It is not tested.')
        if players.wait(_WATCH_SECONDS):
            return False


def _test(
    config: TrainingConfig,
    evaluation: EvaluationConfig,
    suite: Suite,
    spec: EnvironmentSpec,
    agent: Agent,
    checkpoint: str,
    workplace: Workplace,
    players: _Players,
    stop: StopSignal,
    agent_steps: int,
    report: Callable[[str], None],
) -> dict[str, list[float]] | None:
    """Tests one checkpoint, whose weights the agent has; None if it ends without a result."""
    report(f'Testing {checkpoint}')
    video_folder = None
    if evaluation.num_videos:
        video_folder = _make_video_folder(config.logdir, checkpoint)
    total = evaluation.num_episodes * len(config.level_names)
    max_frames = evaluation.max_frames or default_max_frames(spec)
    failure: Exception | None = None

    def ended(steps: int) -> None:
        stop.begun()
        progress.update()
        if schedule.is_complete:
            actors.close()

    schedule = Schedule(
        config.level_names, config.num_actors, evaluation.num_episodes, config.seed, ended,
        video_folder, evaluation.num_videos, max_frames,
    )  # fmt: skip
    progress = Progress(total, 'episode', schedule.levels_text)
    actors = LocalActors(
        config, with_action_noise(spec), agent, workplace, report_to_stderr, schedule
    )
    try:
        with progress, players.playing(actors):
            actors.discard_unrolls()
            if not (schedule.is_complete or stop.received):
                actors.check()
    except Exception as error:  # Raised again when what has been played is written.
        failure = error
    if not schedule.num_played:
        if failure is not None:
            raise failure
        return None
    returns = schedule.returns()
    scores = CheckpointScores(
        checkpoint=checkpoint,
        agent_steps=agent_steps,
        frames=agent_steps * spec.num_action_repeats,
        policy=evaluation.policy,
        seed=config.seed,
        suite=suite,
        returns=returns,
        num_episodes=evaluation.num_episodes,
        cut_off=schedule.cut_off(),
        max_frames=max_frames,
    )
    not_written = ''
    try:
        test_report.write(
            config.logdir, scores, add_to_history=evaluation.watch and schedule.is_complete
        )
    except OSError as error:
        not_written = f'Cannot write the scores in {config.logdir}: {error.strerror}.'
    # What has been played is shown, whatever becomes of the files.
    report(test_report.table(scores))
    if failure is None and not_written and not evaluation.watch:
        raise LogdirError(not_written)
    if not_written:
        report_to_stderr(f'WARNING: {not_written}')
    if video_folder is not None:
        num_videos = len(os.listdir(video_folder))
        report(
            f'{num_videos} videos are in {video_folder}'
            if num_videos
            else 'There are no videos: these levels have no picture.'
        )
    if failure is not None:
        raise failure
    if not schedule.is_complete:
        raise EvaluationInterrupted(
            f'Interrupted: {schedule.num_played:,} of {total:,} episodes were played; their scores '
            f'are in {config.logdir}, marked as partial.'
        )
    return returns


def _make_video_folder(logdir: str, checkpoint: str) -> str:
    folder = os.path.join(os.path.abspath(logdir), VIDEO_FOLDER, os.path.basename(checkpoint))
    try:
        os.makedirs(folder, exist_ok=True)
        # Of an earlier test, perhaps of other levels.
        for file in glob.glob(os.path.join(glob.escape(folder), '*.mp4')):
            os.remove(file)
    except OSError as error:
        raise LogdirError(f'Cannot make the folder {folder}: {error.strerror}.') from error
    return folder
