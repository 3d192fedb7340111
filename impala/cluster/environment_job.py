"""The actor job of `--inference=learner`: environments alone, for which the learner acts.

It sends the rows of its environments and gets their actions back, in one call per step of a group
of them; see `impala.cluster.remote_inference` for the other end. It needs neither the network nor
TensorFlow. The environments form two groups that take turns: while the rows of one travel and are
answered, the other plays.
"""

import contextlib
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynamic_batching.activity import Activity
from dynamic_batching.client_library import ClosedError
from dynamic_batching.row_batcher import RowBatcher
from impala import memory
from impala.acting.actor_pool import ActorPool
from impala.acting.actor_processes import ActorHost, require_files
from impala.cluster.calls import Client
from impala.cluster.channel import (
    Closed,
    Disconnected,
    Rejected,
    RemoteError,
    Values,
    WrongPeer,
    WrongSecret,
)
from impala.cluster.job_start import (
    POLL_SECONDS,
    RESERVED_SECONDS,
    ActorJobError,
    Finished,
    Start,
    notes_of_job,
)
from impala.config import Config, ConfigError
from impala.environments.level_cache import level_cache_statistics
from impala.trajectory import EnvironmentSpec

_JOINING_AGAIN_SECONDS = 0.5
# A group waits at least this long for the row of its slowest environment, since a round trip may
# take as long.
_GROUP_TIMEOUT_MS = 100.0
_COMPLETE = 'Training is complete.'


def run(start: Start) -> str:
    """Plays for the learner until training is complete or a signal arrives. Main thread only.

    Args:
      start: of the job.

    Returns:
      A sentence that says why the job ended.

    Raises:
      KeyboardInterrupt: a signal arrived before acting began.
      ConfigError, LevelError: one sentence for the user.
      LearnerLost: the learner did not answer for `reconnect_timeout` seconds.
      ActorJobError: the learner rejects what this job sends.
      ActorError: an environment died too often, or returns what it has not declared.
      UnrollsLostError: the job has ended, but environments kept dying.
    """
    config, level_names, report = start.config, start.level_names, start.report
    address, num_actors = config.cluster.own_address, config.actors.num_actors
    require_files(config.actors.num_processes, 'envs_per_actor', num_actors)
    text = memory.shortage(
        [memory.of_processes(num_actors, config.actors.envs_per_process, 'envs_per_actor')]
    )
    if text:
        raise ConfigError(text)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ActorHost(config.environment, config.actors, report))
        spec = host.common_spec(level_names, config.run.seed)
        groups = group_of_each(num_actors, config.actors.envs_per_process)
        batchers = GroupedRows(groups, spec, config.learner.unroll_length)
        policy = stack.enter_context(RemotePolicy(start, spec, batchers.split(level_names)))
        try:
            policy.join()
        except Finished as error:
            if policy.finished:
                return _COMPLETE
            raise KeyboardInterrupt from error
        job = _Job(config, batchers, policy)
        start.stop.then(job.close)
        pool = ActorPool(
            host,
            batchers,
            level_names,
            config.run.seed,
            config.actors.max_actor_restarts,
            report,
            config.actors.envs_per_process,
        )
        stack.enter_context(job)
        stack.enter_context(pool)
        report(
            f'Actor job {config.cluster.task}: {num_actors} environments of '
            f'{", ".join(sorted({*level_names}))} for the policy of the learner at {address}'
        )
        job.wait(lambda: level_cache_statistics(str(host.config.temp_folder)))
        if not start.stop.received and not policy.finished:
            job.check()
            pool.check()
        pool.check_losses()
    return _COMPLETE if policy.finished else 'Stopped.'


def group_of_each(num_environments: int, envs_per_process: int) -> list[int]:
    """Returns the group, 0 or 1, of each environment.

    Each process has environments of both groups if it has several, those of group 0 first: so it
    always plays one of the groups. Otherwise every other process belongs to group 1.
    """
    groups = []
    for process, first in enumerate(range(0, num_environments, envs_per_process)):
        size = min(envs_per_process, num_environments - first)
        # Of an odd number, every other process has the larger part in group 1.
        in_first = (size + (process + 1) % 2) // 2
        groups += [0] * in_first + [1] * (size - in_first)
    return groups


class GroupedRows:
    """The batchers of all groups, which the pool of actor processes sees as one."""

    def __init__(self, groups: Sequence[int], spec: EnvironmentSpec, unroll_length: int):
        """Makes the batchers.

        Args:
          groups: the group of each environment.
          spec: of every environment.
          unroll_length: T, agent steps.

        Raises:
          ConfigError: there is no memory.
        """
        self._groups = list(groups)
        self._unroll_length = unroll_length
        self._positions = [
            self._groups[:actor].count(group) for actor, group in enumerate(self._groups)
        ]
        observation = list(spec.observation.values())
        try:
            self.batchers = [
                RowBatcher(self._groups.count(group), observation, spec.action.array)
                for group in sorted({*groups})
            ]
        except MemoryError as error:
            raise ConfigError(
                f'There is {error}: give a smaller --envs_per_actor={len(groups)}.'
            ) from error

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """Returns the values of each group's environments, from one value per environment."""
        return [
            [value for value, of in zip(values, self._groups, strict=True) if of == group]
            for group in range(len(self.batchers))
        ]

    def _joined(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        """Inverts `split`."""
        return [
            values[group][position]
            for group, position in zip(self._groups, self._positions, strict=True)
        ]

    # The interface of `actor_pool.Batcher`.

    def segment_of(self, actor: int) -> tuple[int, int]:
        return self.batchers[self._groups[actor]].fd, self._positions[actor]

    def activity(self) -> Activity:
        activities = [batcher.activity() for batcher in self.batchers]
        return Activity(
            self._joined([each.states for each in activities]),
            self._joined([each.progress for each in activities]),
            any(each.closed for each in activities),
        )

    def completed_unrolls(self) -> list[int]:
        answered = self._joined([batcher.answered_rows() for batcher in self.batchers])
        return [rows // self._unroll_length for rows in answered]

    def reset_actor(self, actor: int) -> None:
        self.batchers[self._groups[actor]].reset_actor(self._positions[actor])

    def close(self) -> None:
        for batcher in self.batchers:
            batcher.close()


class RemotePolicy:
    """The learner's policy, as a function of rows. A context manager.

    Each group has a connection and a thread that calls `act`. When the learner is gone, one of them
    joins again, and the other waits for it. The learner then begins new unrolls, with the initial
    recurrent state, at whatever rows the environments have reached.

    Attributes:
      finished: whether training is complete.
    """

    def __init__(self, start: Start, spec: EnvironmentSpec, groups: Sequence[Sequence[str]]):
        """Does not connect yet.

        Args:
          start: of the job.
          spec: of every environment.
          groups: levels of the environments of each group.
        """
        self._task = start.config.cluster.task
        self._address = start.config.cluster.own_address
        self._retry = start.retry
        self._report = start.report
        self._spec = spec
        self._levels = [list(group) for group in groups]
        self._num_environments = sum(map(len, groups))
        self._action_shape = spec.action.array.shape
        self._action_dtype = np.dtype(spec.action.array.dtype)
        self._owner = secrets.token_hex(8)
        self._control, *self._connections = (
            Client(self._address, 'learner', start.secret) for _ in range(1 + len(groups))
        )
        # Held while joining. The count tells whether another thread has joined meanwhile.
        self._joining = threading.Lock()
        self._num_joined = 0
        self._is_leaving = False
        self.finished = False

    def __enter__(self) -> 'RemotePolicy':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls. Thread-safe."""
        for client in (self._control, *self._connections):
            client.close()

    def act(self, group: int, rows: np.ndarray) -> np.ndarray:
        """Returns the actions `[N, ...]` for rows u8 `[N, row_bytes]` of a group.

        Raises:
          Closed: `close` was called.
          Finished: training is complete, or a signal has stopped the job.
          LearnerLost, ConfigError, ActorJobError: see `run`.
        """
        num_bytes = len(rows) * math.prod(self._action_shape) * self._action_dtype.itemsize
        while True:
            num_joined = self._num_joined
            try:
                values, body = self._connections[group].call(
                    'act', {'owner': self._owner, 'group': group}, [rows], num_bytes
                )
                if not values.get('ended') and len(body) == num_bytes:
                    return body.view(self._action_dtype).reshape(len(rows), *self._action_shape)
            except Rejected as error:
                raise ActorJobError(f'{self._address}: {error}') from error
            except (Disconnected, WrongPeer, WrongSecret):
                # `join` finds out what has become of the learner.
                pass
            self.join(num_joined)

    def join(self, num_joined: int = 0) -> None:
        """Gets slots for the environments, and waits for those of a job that has ended to be free.

        Args:
          num_joined: how often this job had joined when its slots were seen to be lost; if it has
            joined since, nothing happens.

        Raises:
          ConfigError: another job has the number and is alive, there are not enough slots, or the
            environments do not fit the learner.
          Others: see `act`.
        """
        with self._joining:
            if self._is_leaving:
                raise Closed('The job is ending.')
            if num_joined < self._num_joined:
                return
            seen_at = None
            while True:
                answer = self._retry.call(self._join_once)
                if answer.get('finished'):
                    self.finished = True
                    raise Finished
                if answer.get('seat'):
                    self._num_joined += 1
                    return
                holder = answer.get('holder')
                now = time.monotonic()
                age = holder['seconds_since_seen'] if holder else 0.0
                if seen_at is None:
                    seen_at = now - age
                    self._report(
                        f'{self._obstacle(answer)[:-1]}; waiting up to {RESERVED_SECONDS:g} '
                        'seconds to see whether a job that has ended is in the way'
                    )
                # A margin of one second, since this clock and the learner's may drift apart.
                elif now - age > seen_at + (1 if holder else RESERVED_SECONDS + 1):
                    raise ConfigError(self._obstacle(answer))
                self._retry.sleep(_JOINING_AGAIN_SECONDS)

    def _join_once(self) -> Values:
        try:
            return self._control.call(
                'join',
                {
                    'task': self._task,
                    'owner': self._owner,
                    'host': socket.gethostname(),
                    'groups': self._levels,
                    'spec': self._spec.to_json(),
                },
            )[0]
        except Rejected as error:
            raise ConfigError(
                f'This job does not fit the learner at {self._address}: {error}'
            ) from error

    def _obstacle(self, answer: Values) -> str:
        """Returns a sentence that says why the learner has no place for this job."""
        holder = answer.get('holder')
        if holder:
            return (
                f'--task={self._task} is taken by a job on {holder["host"]}, last seen '
                f'{holder["seconds_since_seen"]:.1f} seconds ago: give each actor job a number of '
                'its own.'
            )
        return (
            f'The learner at {self._address} has room for {answer.get("free")} more environments '
            f'of {answer.get("provided")} (its --num_actors), and this job has '
            f'{self._num_environments} (--envs_per_actor): give the learner a larger --num_actors.'
        )

    def poll(self, notes: str) -> None:
        """Tells the learner that this job is alive, and finds out whether training is complete.

        Args:
          notes: see `notes_of_job`.
        """
        with contextlib.suppress(RemoteError):
            values, _ = self._control.call('status', {'owner': self._owner, 'notes': notes})
            self.finished = self.finished or bool(values.get('finished'))

    def leave(self) -> None:
        """Frees the slots, if the learner is there, and ends all calls of `act`."""
        self._is_leaving = True
        with contextlib.suppress(RemoteError):
            self._control.call('leave', {'owner': self._owner})


class _Job:
    """The threads that pass rows and actions on. A context manager."""

    def __init__(self, config: Config, rows: GroupedRows, policy: RemotePolicy):
        self._minimum = config.actors.inference_batch_size
        self._timeout_ms = max(config.actors.inference_timeout_ms, _GROUP_TIMEOUT_MS)
        self._rows = rows
        self._policy = policy
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._relay, args=(group,), name=f'group {group}', daemon=True)
            for group in range(len(rows.batchers))
        ]

    def __enter__(self) -> '_Job':
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._policy.leave()
        self._policy.close()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Ends the job. Thread-safe."""
        self._ended.set()
        self._rows.close()

    def wait(self, level_cache: Callable[[], dict[str, float]]) -> None:
        """Waits until the job ends, and stays in touch with the learner."""
        while not self._ended.wait(POLL_SECONDS) and not self._policy.finished:
            self._policy.poll(notes_of_job(level_cache()))

    def check(self) -> None:
        """Raises the error that ended the job, if any."""
        if self._failure is not None:
            raise self._failure

    def _relay(self, group: int) -> None:
        batcher = self._rows.batchers[group]
        minimum = min(self._minimum or batcher.num_actors, batcher.num_actors)
        try:
            while True:
                rows = batcher.collect(minimum, self._timeout_ms)
                batcher.answer(rows, self._policy.act(group, rows))
        except (ClosedError, Closed, Finished):
            pass
        except Exception as error:  # `check` raises it in the main thread.
            self._failure = error
        finally:
            self.close()
