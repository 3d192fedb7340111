"""Tests of the newest weights during training, in a process of their own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import tensorflow as tf

from impala.acting.actor_processes import how_ended
from impala.config import Config, all_settings
from impala.evaluation import SCORES_FILE, test_process
from impala.learning.learner import Learner
from impala.runs.checkpoint import Checkpointer
from impala.runs.files import NETWORK_FILE, LogdirError
from impala.runs.log import Log, TestResult
from impala.training.hooks import Hook, Update
from impala.training.run import Run

# Cores per process that plays the episodes of a test.
_CORES_PER_PROCESS = 8
# Seconds that a test gets to end its actors when training ends.
_GRACE_SECONDS = 5.0


class PeriodicTests(Hook):
    """Tests the weights at intervals of training time, and records the scores in the log.

    A context manager, which ends the test under way. A test that fails is reported; the next one
    follows at its time. If a test takes longer than the interval, the next one follows it.
    """

    def __init__(self, run: Run, learner: Learner, wall_seconds: float):
        """Makes the folder of the tests.

        Args:
          run: first of its learners.
          learner: of the run.
          wall_seconds: of the run so far.
        """
        self._config = run.config
        self._num_levels = len(run.suite.for_testing().levels)
        self._network_file = os.path.join(run.config.run.logdir, NETWORK_FILE)
        # Within the folder that is removed even if this process is killed.
        self._folder = tempfile.mkdtemp(prefix='test-', dir=run.actor_host.config.temp_folder)
        self._checkpointer = Checkpointer(self._folder, _Tested(learner), max_to_keep=2)
        self._due = wall_seconds + run.config.test.test_every_secs
        self._process: subprocess.Popen | None = None
        self._tested = TestResult(0, 0, 0.0, {}, {})
        self._reported = ''

    def __enter__(self) -> 'PeriodicTests':
        return self

    def __exit__(self, *error: Any) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        self._forget()

    def after_update(self, update: Update) -> None:
        """See `Hook`."""
        if self._process is not None and self._process.poll() is not None:
            self._take_result(update.log, self._forget())
        if self._process is None and update.log.wall_seconds >= self._due:
            self._due = update.log.wall_seconds + self._config.test.test_every_secs
            try:
                self._start(update)
            except (LogdirError, OSError) as error:
                self._report(update.log, str(error))

    def _start(self, update: Update) -> None:
        wall_seconds = update.log.wall_seconds
        self._checkpointer.save(wall_seconds)
        shutil.copy(self._network_file, self._folder)
        for name in (SCORES_FILE, test_process.FAILURE_FILE):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self._path(name))
        self._tested = TestResult(update.frames, update.agent_steps, wall_seconds, {}, {})
        with open(self._path('output.txt'), 'wb') as output:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'impala.evaluation.test_process'],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                # The signals of a terminal or job scheduler reach the learner, which ends the test.
                start_new_session=True,
                env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
            )
        assert self._process.stdin is not None
        settings = test_settings(self._config, self._num_levels, self._folder)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f'{json.dumps(settings)}\n'.encode())
            # It stays open: the process ends when it is closed.
            self._process.stdin.flush()

    def _forget(self) -> int:
        """Waits for the end of the process; returns its exit code."""
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _take_result(self, log: Log, code: int) -> None:
        try:
            with open(self._path(SCORES_FILE), encoding='utf-8') as file:
                content = json.load(file)
            if code == 0:
                log.record_test(
                    self._tested._replace(
                        mean_returns={
                            name: level['mean']
                            for name, level in content['levels'].items()
                            if level['mean'] is not None
                        },
                        scores=_suite_scores(content),
                    )
                )
                return
        except (OSError, ValueError):
            pass
        self._report(log, self._failure(code))

    def _failure(self, code: int) -> str:
        for name in (test_process.FAILURE_FILE, 'output.txt'):
            with contextlib.suppress(OSError):
                with open(self._path(name), encoding='utf-8', errors='replace') as file:
                    text = file.read().strip()
                if text:
                    return text
        return f'it {how_ended(code)}.'

    def _report(self, log: Log, text: str) -> None:
        if text != self._reported:
            self._reported = text
            log.message(f'WARNING: a test during training failed, and training continues: {text}')

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


class _Tested(tf.Module):
    """What a test restores: takes the learner's place in a checkpoint."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.agent = learner.agent
        self.agent_steps = learner.agent_steps


def test_settings(config: Config, num_levels: int, folder: str) -> dict[str, Any]:
    """Returns the settings of a test in a process of its own, name -> value.

    Args:
      config: of the run.
      num_levels: number of levels that are tested.
      folder: has the checkpoint; the scores are written there.
    """
    processes = max(1, (os.cpu_count() or 1) // _CORES_PER_PROCESS)
    num_actors = max(num_levels, processes)
    changes = {
        'mode': 'test',
        'logdir': folder,
        'num_actors': num_actors,
        'envs_per_process': -(-num_actors // processes),
        'inference_batch_size': 0,
        'inference_device': '',
        'test_every_secs': 0.0,
        # It would wait for further checkpoints and never end.
        'watch': False,
        # Those of the run may be on another machine, or taken.
        'job_name': 'learner',
        'task': -1,
        'learner_addresses': (),
        'replay_addresses': (),
        'learner_devices': (),
    }
    return {name: config.value(name) for name in all_settings()} | changes


def _suite_scores(content: dict[str, Any]) -> dict[str, float]:
    """Returns the scores of a suite under the names of those of training, from a report."""
    suite = content.get('suite')
    if suite is None or not suite['name']:
        return {}
    return {
        f'{suite["name"]}/test_{name.removeprefix("mean_")}': suite[name]
        for name in ('mean_no_cap', 'mean_cap_100', 'median_no_cap', 'median_cap_100')
    }
