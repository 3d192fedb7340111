"""The learner's side of `--inference=learner`: one policy acts for environments on other machines.

As in SEED RL (Espeholt et al., 2020) and in PolyBeast (Küttler et al., 2019), an actor job sends
observations and gets actions back. Recurrent states and unrolls stay here. The rows of a job arrive
in one call per step of a group of its environments. They are written into the learner's batcher
without Python work per row, and the behaviour policy answers them as it answers local actors.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynamic_batching.client_library import ClosedError
from dynamic_batching.group_client import CancelledError, GroupClient
from dynamic_batching.unroll_batcher import UnrollBatcher
from dynamic_batching.wire_row import HEADER
from impala.acting.local_actors import LocalActors
from impala.cluster.calls import Function, Refused, Server, argument, port_of, warn_of_strangers
from impala.cluster.channel import Buffer, Disconnected, Values, printable
from impala.cluster.job_start import POLL_SECONDS, RESERVED_SECONDS
from impala.cluster.learner_service import KIND
from impala.cluster.remote_actors import WATCH_SECONDS, level_cache_of_jobs
from impala.config import Config
from impala.networks.agent import Agent, AgentConfig
from impala.runs.log import Log
from impala.runs.run_settings import flags_of, network_settings
from impala.trajectory import INSTRUCTION_BUCKETS, EnvironmentSpec

# No batch waits for an environment that has sent nothing for this many seconds.
_SILENT_SECONDS = 0.5


class RemoteInference(LocalActors):
    """Actors whose environments are on other machines, and whose policy is here.

    Attributes:
      port: port on which the learner listens.
    """

    _pool: 'EnvironmentJobs'

    def __init__(
        self,
        config: Config,
        level_names: Sequence[str],
        spec: EnvironmentSpec,
        network: AgentConfig,
        agent: Agent,
        host: Any,
        settings: dict[str, Any],
        report: Callable[[str], None],
        device: str | None = None,
    ):
        """Starts to listen.

        Args:
          config: of the run; `num_actors` is the number of environments of all jobs together.
          level_names: levels of the run, in the order of their ids.
          spec: of every environment.
          network: of the agent, with which the jobs' environments must agree.
          agent: acts for all; see `LocalActors`.
          host: see `LocalActors`.
          settings: for the actor jobs, JSON-serializable.
          report: takes lines that say which jobs come and go.
          device: see `BehaviourPolicy`.

        Raises:
          ServerError: the address is invalid or in use.
          ConfigError: there is no memory for the unrolls, or the file of the secret cannot be used.
        """
        cluster, secret = config.cluster, config.cluster.secret()
        self._names_of_run = list(level_names)
        self._jobs_arguments = (spec, network, settings, secret)
        super().__init__(config, level_names, spec, agent, host, report, device=device)
        self.port = self._pool.port
        if not cluster.trusted_network:
            warn_of_strangers(cluster.own_address, self.port, secret, report)

    def _default_batch_size(self, config: Config) -> int:
        # What waits, at once: a call brings the rows of a whole group, and a job whose rows wait
        # for those of another plays less.
        return 1

    def _make_pool(
        self, config: Config, actor_host: Any, report: Callable[[str], None], schedule: Any
    ) -> 'EnvironmentJobs':
        spec, network, settings, secret = self._jobs_arguments
        return EnvironmentJobs(
            config.cluster.own_address,
            self._source.batcher,
            self._names_of_run,
            # Shared with the jobs, which update it: it names the level of a bad unroll.
            self._level_names,
            spec,
            network,
            settings,
            secret,
            self._behaviour.published_version,
            report,
        )

    def record(self, log: Log) -> dict[str, float]:
        """Records the state of the jobs in the log, too; see `LocalActors.record`."""
        log.record_actors(self._pool.rows)
        return super().record(log)

    def level_cache(self) -> dict[str, float]:
        """Returns the sums of the jobs' statistics of their level caches."""
        return level_cache_of_jobs(self._pool.notes())

    def finish(self) -> None:
        """Announces to the jobs that training is complete, and waits until they have heard of it.

        Takes `2 * POLL_SECONDS` at most.
        """
        self._pool.finish()
        self.close()
        ends_at = time.monotonic() + 2 * POLL_SECONDS
        while self._pool.has_jobs and time.monotonic() < ends_at:
            time.sleep(0.05)


class _Group:
    """Environments of a job whose rows travel together.

    Attributes:
      client: writes their rows.
      slots: their actors in the batcher, in the job's order.
      lock: held during a step.
    """

    def __init__(self, client: GroupClient, slots: Sequence[int]):
        self.client = client
        self.slots = slots
        self.lock = threading.Lock()


class _Seat:
    """The place of a job that has joined.

    Attributes:
      task: number of the job.
      owner: what this start of the job calls itself; no other start calls itself so.
      host: host of the job.
      levels: level of each environment.
      groups: of its environments.
      seen_at: time of its last call.
      notes: its last notes; see `job_start.notes_of_job`.
      has_ended: whether its slots may belong to others.
    """

    def __init__(self, task: int, owner: str, host: str, levels: list[str], groups: list[_Group]):
        self.task = task
        self.owner = owner
        self.host = host
        self.levels = levels
        self.groups = groups
        self.seen_at = time.monotonic()
        self.notes = ''
        self.has_ended = False
        self.rejected = 0

    @property
    def slots(self) -> list[int]:
        return [slot for group in self.groups for slot in group.slots]


class EnvironmentJobs:
    """Serves the actor jobs whose environments play with the learner's policy. A context manager.

    A job joins with a number of environments and gets as many actors of the batcher, its slots. It
    loses them when it leaves, joins again, or has not called for `RESERVED_SECONDS`; what it had
    begun is then discarded.

    Attributes:
      port: port on which it listens.
      rows: a row of the log for each job.
      restarts: always 0; the jobs restart their processes themselves.
    """

    restarts = 0

    def __init__(
        self,
        address: str,
        batcher: UnrollBatcher,
        names_of_run: Sequence[str],
        level_names: list[str],
        spec: EnvironmentSpec,
        network: AgentConfig,
        settings: dict[str, Any],
        secret: bytes | None,
        version: Callable[[], int],
        report: Callable[[str], None],
    ):
        """Starts to listen.

        Args:
          address: `host:port`.
          batcher: its actors are for the jobs, and no one else.
          names_of_run: levels of the run, in the order of their ids.
          level_names: the level of each actor of the batcher; kept up to date.
          spec: of every environment.
          network: of the agent, with which the jobs' environments must agree.
          settings: for the jobs, JSON-serializable.
          secret: that the jobs must have; None without one.
          version: returns the version of the published weights.
          report: takes lines that say which jobs come and go.

        Raises:
          ServerError: the address is invalid or in use.
        """
        self._batcher = batcher
        self._names_of_run = list(names_of_run)
        self._level_names = level_names
        self._spec = spec
        self._network = network
        self._settings = settings
        self._version = version
        self._report = report
        self._observation = list(spec.observation.values())
        self._row_bytes = HEADER.itemsize + sum(array.nbytes for array in self._observation)
        self._instruction = _bytes_of('instruction', spec)
        # Guards the seats and the free slots.
        self._lock = threading.Lock()
        self._seats: dict[int, _Seat] = {}
        self._by_owner: dict[str, _Seat] = {}
        self._free = list(range(batcher.num_actors))
        self._finished = False
        self.rows: list[dict[str, Any]] = []
        self._completed = [0] * batcher.num_actors
        self._looked_at = time.monotonic()
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name='job watch', daemon=True)
        for actor in self._free:
            batcher.assign_actor(actor, 0)
        functions = {
            'settings': Function(self._tell_settings),
            'status': Function(self._tell_status),
            'join': Function(self._join),
            'leave': Function(self._leave),
            'act': Function(self._act, batcher.num_actors * self._row_bytes),
        }
        self._server = Server(address, functions, KIND, secret, report)
        self._address, self.port = address, self._server.port

    def __enter__(self) -> 'EnvironmentJobs':
        self._report(
            f'Waiting for actors on {port_of(self._address, self.port)}, with up to '
            f'{self._batcher.num_actors} environments (--num_actors)'
        )
        self._watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._closed.set()
        self._watcher.join()
        # Ends the steps that wait, for which the server would wait.
        self._batcher.close()
        self._server.close()

    def check(self) -> None:
        """Does nothing: a job handles its own failures."""

    def check_losses(self) -> None:
        """Does nothing: a job counts its own losses."""

    def finish(self) -> None:
        """Tells the jobs, when they ask, that training is complete."""
        self._finished = True

    @property
    def has_jobs(self) -> bool:
        """Whether there are jobs."""
        return bool(self._seats)

    def notes(self) -> list[str]:
        """Returns the last notes of each job."""
        with self._lock:
            return [seat.notes for seat in self._seats.values()]

    # Functions that jobs call; see `Function`. Values come from other machines.

    def _tell_settings(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        return self._settings, ()

    def _tell_status(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        """Tells how far training is; renews the seat of `owner`, and takes its `notes`."""
        seat = self._by_owner.get(str(values.get('owner')))
        if seat is not None:
            seat.seen_at = time.monotonic()
            if 'notes' in values:
                seat.notes = argument(values, 'notes', str)
        return {
            'version': self._version(),
            'finished': self._finished,
            'has_seat': seat is not None,
        }, ()

    def _join(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        """Gives a job slots for its environments.

        The answer has `seat`, or says why there is none: `finished`, `holder` of the number, or too
        few are `free`.
        """
        task, owner = argument(values, 'task', int), argument(values, 'owner', str)
        host = printable(argument(values, 'host', str))
        try:
            groups = [[str(level) for level in group] for group in values['groups']]
            spec = EnvironmentSpec.from_json(values['spec'])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(f'The job does not say what it has: {error}.') from error
        levels = [level for group in groups for level in group]
        self._check_environments(levels, spec)
        with self._lock:
            seat = self._seats.get(task)
            if self._finished:
                if seat is not None and seat.owner == owner:
                    self._end(seat)
                return {'finished': True}, ()
            if self._batcher.activity().closed:
                # The run can still be resumed: the job waits for the next learner.
                raise Disconnected('the learner is ending')
            if seat is not None and seat.owner != owner:
                since = time.monotonic() - seat.seen_at
                return {'holder': {'host': seat.host, 'seconds_since_seen': since}}, ()
            if seat is not None:
                self._end(seat)
            if len(self._free) < len(levels):
                return {'free': len(self._free), 'provided': self._batcher.num_actors}, ()
            made = []
            for group in groups:
                slots, self._free = self._free[: len(group)], self._free[len(group) :]
                for slot, level in zip(slots, group, strict=True):
                    self._level_names[slot] = level
                    self._completed[slot] = 0
                    self._batcher.assign_actor(slot, self._names_of_run.index(level))
                client = GroupClient(
                    self._batcher.fd, slots, self._observation, self._spec.action.array
                )
                made.append(_Group(client, slots))
            seat = _Seat(task, owner, host, levels, made)
            self._seats[task] = self._by_owner[owner] = seat
        return {'seat': True}, ()

    def _leave(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        """Frees the slots of `owner`."""
        with self._lock:
            seat = self._by_owner.get(str(values.get('owner')))
            if seat is not None:
                self._end(seat)
        return {}, ()

    def _act(self, values: Values, body: np.ndarray) -> tuple[Values, Sequence[Buffer]]:
        """Takes rows of a group, and returns their actions when all are answered.

        Instead, the answer has `ended` if the job must join again.
        """
        seat = self._by_owner.get(str(values.get('owner')))
        number = values.get('group')
        if seat is None:
            return {'ended': True}, ()
        if not isinstance(number, int) or not 0 <= number < len(seat.groups):
            raise Refused(f'There is no group {number} in this job.')
        group = seat.groups[number]
        with group.lock:
            if seat.has_ended:
                return {'ended': True}, ()
            seat.seen_at = time.monotonic()
            try:
                rows = body.reshape(-1, self._row_bytes)
                restarted = group.client.check(rows)
                self._check_instructions(rows)
            except ValueError as error:
                seat.rejected += 1
                raise Refused(f'Rows of environments are refused: {error}.') from error
            for position in restarted:
                self._batcher.reset_actor(group.slots[position])
                group.client.forget(position)
            try:
                actions = group.client.step(rows)
            except CancelledError:
                return {'ended': True}, ()
            except ClosedError as error:
                raise Disconnected('the learner is ending') from error
            seat.seen_at = time.monotonic()
        return {}, (actions,)

    def _check_environments(self, levels: list[str], spec: EnvironmentSpec) -> None:
        """Refuses environments that do not fit the agent."""
        if not levels or not {*levels} <= {*self._names_of_run}:
            raise Refused('The job has levels that are not those of the learner.')
        own, theirs = (network_settings(self._network, each) for each in (self._spec, spec))
        for name in own:
            if own[name] != theirs[name]:
                raise Refused(f'{flags_of(name)} is {theirs[name]} here and {own[name]} there.')
        if spec.to_json() != self._spec.to_json():
            raise Refused('its environments are not those of the learner.')

    def _check_instructions(self, rows: np.ndarray) -> None:
        if self._instruction is not None:
            words = np.ascontiguousarray(rows[:, self._instruction]).view('<i4')
            if words.size and (words.min() < 0 or words.max() >= INSTRUCTION_BUCKETS):
                raise ValueError('an instruction has words that do not exist')

    def _end(self, seat: _Seat) -> None:
        """Takes the slots from a job. The lock is held."""
        del self._seats[seat.task], self._by_owner[seat.owner]
        for group in seat.groups:
            group.client.cancel()
        for group in seat.groups:
            # Steps that wait end within a tenth of a second.
            with group.lock:
                seat.has_ended = True
                for slot in group.slots:
                    self._batcher.assign_actor(slot, 0)
        self._free = sorted([*self._free, *seat.slots])

    def _watch(self) -> None:
        """Ends the seats of jobs that are gone, and updates the rows of the log."""
        while not self._closed.wait(_SILENT_SECONDS):
            now = time.monotonic()
            with self._lock:
                for seat in list(self._seats.values()):
                    if now - seat.seen_at > RESERVED_SECONDS:
                        self._end(seat)
                        continue
                    for group in seat.groups:
                        group.client.skip_silent(_SILENT_SECONDS)
                seats = list(self._seats.values())
            if now - self._looked_at >= WATCH_SECONDS or {row['task'] for row in self.rows} != {
                seat.task for seat in seats
            }:
                self._look(seats, now)

    def _look(self, seats: Sequence[_Seat], now: float) -> None:
        """Counts unrolls, and reports which jobs have come or gone."""
        completed, versions = self._batcher.completed_unrolls(), self._batcher.policy_versions()
        version, elapsed = self._version(), max(now - self._looked_at, 1e-9)
        rows: list[dict[str, Any]] = []
        for seat in sorted(seats, key=lambda seat: seat.task):
            slots = seat.slots
            # A restarted environment's count begins anew.
            new = [
                completed[slot] - (before if before <= completed[slot] else 0)
                for slot, before in ((slot, self._completed[slot]) for slot in slots)
            ]
            last_version = max(versions[slot] for slot in slots)
            rows.append(
                {
                    'task': seat.task,
                    'host': seat.host,
                    'level': seat.levels[0],
                    'environments': len(slots),
                    'trajectories_per_second': round(sum(new) / elapsed, 3),
                    'policy_lag': version - last_version if last_version >= 0 else 0,
                    'seconds_since_seen': round(now - seat.seen_at, 1),
                    'rejected': seat.rejected,
                    'duplicates': 0,
                }
            )
        hosts = {row['task']: row['host'] for row in [*self.rows, *rows]}
        before, present = ({row['task'] for row in each} for each in (self.rows, rows))
        for tasks, what in ((present - before, 'is there'), (before - present, 'is gone')):
            for task in sorted(tasks):
                self._report(f'Actor {task} ({hosts[task]}) {what}: {len(present)} in all')
        self.rows, self._completed, self._looked_at = rows, completed, now


def _bytes_of(name: str, spec: EnvironmentSpec) -> slice | None:
    """Returns where the bytes of an observation are in a row; None if there is no such one."""
    offset = HEADER.itemsize
    for each, array in spec.observation.items():
        if each == name:
            return slice(offset, offset + array.nbytes)
        offset += array.nbytes
    return None
