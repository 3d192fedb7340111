"""Test mode: plays episodes with the weights of a checkpoint, with the actors of training.

All levels are played at once. The episodes are chosen beforehand: each has a seed that follows from
the run's seed, its level and its number, whatever environment plays it. Taking the first episodes
that end would favour short ones.
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

import tensorflow as tf

from impala import suites
from impala.acting.actor_processes import ActorHost, require_files
from impala.acting.episode_series import Schedule, with_action_noise
from impala.acting.local_actors import LocalActors
from impala.config import Config
from impala.environments.atari import ATARI_MAX_EPISODE_FRAMES
from impala.evaluation import report as test_report
from impala.evaluation.report import CheckpointScores
from impala.evaluation.test_agents import GreedyAgent, SamplingAgent
from impala.learning import devices, memory_needs
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
from impala.suites import Suite
from impala.trajectory import EnvironmentSpec

VIDEO_FOLDER = 'videos'

# The unrolls of a test are discarded: longer ones would be fewer, but take more memory.
_UNROLL_LENGTH = 100
_INFERENCE_TIMEOUT_MS = 2.0
_WATCH_SECONDS = 2.0
_WATCH_TRIES = 4
_WRITING_SECONDS = 3.0
# Few environments have longer episodes; DeepMind Lab's end long before.
_MAX_FRAMES = 1_000_000


class EvaluationInterrupted(Exception):
    """A signal ended a test; the scores so far are written. The text is for the user."""


class _Restorable(tf.Module):
    """Takes the learner's place in a checkpoint."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent
        self.agent_steps = tf.Variable(0, dtype=tf.int64, trainable=False)


class _Players:
    """The actors that are playing; closing them also closes later ones."""

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
        """Waits for that many seconds, or until closed; returns whether it is closed."""
        return self._closed.wait(seconds)


def evaluate(
    config: Config, report: Callable[[str], None] = print
) -> dict[str, list[float]] | None:
    """Plays whole episodes with a checkpoint and writes the scores; see `impala.evaluation.report`.

    An Atari game ends with its last life, whatever the run's settings. Main thread only.

    Args:
      config: of the run that is tested; its levels are played as `config.test` says.
      report: takes lines about the checkpoint and its scores.

    Returns:
      Level name -> undiscounted, unclipped returns in the order of the episodes' numbers within
      each environment, of the checkpoint tested last; None if SIGINT or SIGTERM came first.

    Raises:
      EvaluationInterrupted: SIGINT or SIGTERM came after some of the episodes had been played.
      KeyboardInterrupt: SIGINT or SIGTERM came before anything was played.
      ConfigError, LevelError, LogdirError: one sentence for the user.
      ActorError: with the actor's own error text.
    """
    suite = suites.load(config.run.level_name).for_testing()
    config = settings_of_test(config, len(suite.levels))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        require_files(config.actors.num_processes, 'num_actors', config.actors.num_actors)
        actor_host = stack.enter_context(ActorHost(config.environment, config.actors))
        tester = _Tester(config, suite, actor_host, stop, report)
        tester.restore()
        _check_writable(config.run.logdir)
        stop.then(tester.close, nothing_to_lose=True)
        returns = None
        while True:
            if tester.checkpoint is not None:
                played = tester.test()
                returns = played or returns
                # Figures and TensorFlow's functions are full of reference cycles. Among that many
                # older objects, Python would collect them late.
                gc.collect()
                if played is None or not config.test.watch:
                    return returns
                if tester.frames >= config.run.total_environment_frames:
                    report('Training is complete.')
                    return returns
            if not tester.await_checkpoint():
                return returns


def default_max_frames(spec: EnvironmentSpec) -> int:
    """Returns the default of `--test_max_frames`, the frames after which episodes are cut off."""
    return ATARI_MAX_EPISODE_FRAMES if spec.suite == 'atari' else _MAX_FRAMES


def settings_of_test(config: Config, num_levels: int) -> Config:
    """Returns the settings for testing a run on that many levels."""
    actors = config.actors
    slots_per_level = min(max(1, actors.num_actors // num_levels), config.test.test_num_episodes)
    # As many processes as the run had, unless there are fewer environments.
    processes = max(1, actors.num_actors // actors.envs_per_process)
    num_slots = slots_per_level * num_levels
    return dataclasses.replace(
        config,
        actors=dataclasses.replace(
            actors,
            num_actors=num_slots,
            envs_per_process=max(actors.envs_per_process, -(-num_slots // processes)),
            queue_capacity=num_slots,
            inference_batch_size=max(1, num_slots // 2),
            inference_timeout_ms=min(actors.inference_timeout_ms, _INFERENCE_TIMEOUT_MS),
        ),
        learner=dataclasses.replace(config.learner, unroll_length=_UNROLL_LENGTH),
        environment=dataclasses.replace(
            config.environment,
            end_episode_on_life_loss=False,
            bootstrap_truncated=False,
            is_test=True,
            render=config.test.save_video > 0,
        ),
    )


def _check_writable(logdir: str) -> None:
    """Raises `LogdirError`, before anything is played, if a folder is not writable."""
    try:
        # A missing folder is made by the run that is awaited.
        if os.path.isdir(logdir):
            tempfile.TemporaryFile(dir=logdir).close()
    except OSError as error:
        raise LogdirError(
            f'Cannot write the scores in {logdir}: {error.strerror}. Give a --logdir of your own '
            'with a copy of the run.'
        ) from error


class _Tester:
    """Tests one checkpoint of a run after another, with the same processes and agent."""

    def __init__(
        self,
        config: Config,
        suite: Suite,
        actor_host: ActorHost,
        stop: StopSignal,
        report: Callable[[str], None],
    ):
        """Makes the agent.

        Args:
          config: from `settings_of_test`.
          suite: whose levels are played.
          actor_host: starts the processes.
          stop: its `begun` is called once an episode has ended.
          report: takes lines about the checkpoint and its scores.

        Raises:
          ConfigError, LevelError, LogdirError, ActorError: see `evaluate`.
        """
        self._config = config
        self._suite = suite
        self._actor_host = actor_host
        self._stop = stop
        self._report = report
        self._players = _Players()
        self._device = devices.inference_device(config.actors.inference_device)
        self._spec = actor_host.common_spec(suite.level_names, config.run.seed)
        network = self._network()
        memory_needs.check(memory_needs.of_actors(config, self._spec, network))
        is_greedy = config.test.test_policy == 'greedy'
        agent_class = GreedyAgent if is_greedy else SamplingAgent
        with devices.placed_on(self._device):
            self._agent = create_agent(network, self._spec, agent_class)
        self._restored = _Restorable(self._agent)
        self._checkpointer = Checkpointer(config.run.logdir, self._restored)

    def _network(self) -> AgentConfig:
        """Returns the shape of the network, which must be that of the run."""
        logdir = self._config.run.logdir
        network = choose_network(self._config, self._suite.level_names, self._spec)
        network = dataclasses.replace(network, compute_dtype='float32')
        stored = stored_settings(logdir)
        if network.popart_levels and stored is not None:
            # The tested levels may be others than the trained ones.
            trained_levels = popart_levels(stored) or network.popart_levels
            network = dataclasses.replace(network, popart_levels=trained_levels)
        if newest_checkpoint(logdir) is not None:
            check_same_network(logdir, checkpoint_settings(self._config, network, self._spec))
        return network

    @property
    def checkpoint(self) -> str | None:
        """Path of the checkpoint whose weights the agent has; None if there is none yet."""
        return self._checkpointer.latest

    @property
    def frames(self) -> int:
        """Frames that the run had been trained on at that checkpoint."""
        return int(self._restored.agent_steps) * self._spec.num_action_repeats

    def close(self) -> None:
        """Ends playing and waiting. May be called by any thread."""
        self._players.close()

    def restore(self) -> None:
        """Restores the first checkpoint to be tested, if there is one.

        Raises:
          LogdirError: there is none, and `--watch` is off; or it cannot be restored.
        """
        logdir, watch = self._config.run.logdir, self._config.test.watch
        path = self._config.test.checkpoint.removesuffix('.index') or None
        deadline = time.monotonic() + _WRITING_SECONDS
        while True:
            try:
                if self._checkpointer.restore(path):
                    return
                break
            except NoIntactCheckpointError:
                # The run may be writing its first one right now.
                if watch:
                    break
                if path is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        if not watch:
            raise LogdirError(
                f'There is no checkpoint in {logdir}: give the --logdir of a training run.'
            )
        self._report(f'Waiting for the first checkpoint in {logdir}')

    def await_checkpoint(self) -> bool:
        """Waits for the next checkpoint and restores it; returns False if closed meanwhile.

        Checkpoints are tested in order. If a test takes longer than several saves, the next ones
        are still tested, except those that training has removed meanwhile.
        """
        last = self.checkpoint
        tries: collections.Counter[str] = collections.Counter()
        while True:
            for path in complete_checkpoints(self._config.run.logdir, after=last):
                if tries[path] == _WATCH_TRIES:
                    continue
                tries[path] += 1
                try:
                    self._checkpointer.restore(path)
                    return True
                except NoIntactCheckpointError as error:
                    # It may be incomplete so far, or just have been removed. If it stays
                    # unreadable, it is damaged and the next one is tested.
                    if tries[path] < _WATCH_TRIES:
                        break
                    report_to_stderr(f'WARNING: {error} It is not tested.')
            if self._players.wait(_WATCH_SECONDS):
                return False

    def test(self) -> dict[str, list[float]] | None:
        """Tests the checkpoint; returns level -> returns, or None if it ends without a result."""
        assert self.checkpoint is not None
        self._report(f'Testing {self.checkpoint}')
        video_folder = None
        if self._config.test.save_video:
            video_folder = _make_video_folder(self._config.run.logdir, self.checkpoint)
        schedule, failure = self._play(video_folder)
        if not schedule.num_played:
            if failure is not None:
                raise failure
            return None
        self._write(schedule, failure)
        if video_folder is not None:
            num_videos = len(os.listdir(video_folder))
            self._report(
                f'{num_videos} videos are in {video_folder}'
                if num_videos
                else 'There are no videos: these levels have no picture.'
            )
        if failure is not None:
            raise failure
        if not schedule.is_complete:
            raise EvaluationInterrupted(
                f'Interrupted: {schedule.num_played:,} of {self._num_episodes:,} episodes were '
                f'played; their scores are in {self._config.run.logdir}, marked as partial.'
            )
        return schedule.returns()

    @property
    def _num_episodes(self) -> int:
        return self._config.test.test_num_episodes * len(self._suite.levels)

    @property
    def _max_frames(self) -> int:
        return self._config.test.test_max_frames or default_max_frames(self._spec)

    def _play(self, video_folder: str | None) -> tuple[Schedule, Exception | None]:
        """Plays the episodes; returns their schedule, and the error that ended them, if any."""
        config, test = self._config, self._config.test

        def ended(steps: int) -> None:
            self._stop.begun()
            progress.update()
            if schedule.is_complete:
                actors.close()

        schedule = Schedule(
            self._suite.level_names, config.actors.num_actors, test.test_num_episodes,
            config.run.seed, ended, video_folder, test.save_video, self._max_frames,
        )  # fmt: skip
        progress = Progress(self._num_episodes, 'episode', schedule.levels_text)
        actors = LocalActors(
            config,
            self._suite.level_names,
            with_action_noise(self._spec),
            self._agent,
            self._actor_host,
            report_to_stderr,
            schedule,
            self._device,
        )
        try:
            with progress, self._players.playing(actors):
                actors.discard_unrolls()
                if not (schedule.is_complete or self._stop.received):
                    actors.check()
        except Exception as error:  # Raised again when the scores so far are written.
            return schedule, error
        return schedule, None

    def _write(self, schedule: Schedule, failure: Exception | None) -> None:
        """Writes and shows the scores."""
        logdir, test = self._config.run.logdir, self._config.test
        assert self.checkpoint is not None
        scores = CheckpointScores(
            checkpoint=self.checkpoint,
            agent_steps=int(self._restored.agent_steps),
            frames=self.frames,
            policy=test.test_policy,
            seed=self._config.run.seed,
            suite=self._suite,
            returns=schedule.returns(),
            num_episodes=test.test_num_episodes,
            cut_off=schedule.cut_off(),
            max_frames=self._max_frames,
        )
        not_written = ''
        try:
            test_report.write(logdir, scores, add_to_history=test.watch and schedule.is_complete)
        except OSError as error:
            not_written = f'Cannot write the scores in {logdir}: {error.strerror}.'
        # The scores are shown even if they cannot be written.
        self._report(test_report.table(scores))
        if failure is None and not_written and not test.watch:
            raise LogdirError(not_written)
        if not_written:
            report_to_stderr(f'WARNING: {not_written}')


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
