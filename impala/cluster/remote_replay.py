"""The learner's client of replay jobs, which hold the unrolls in shards.

Letters: T unroll length, K arrays of an unroll, N unrolls.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from impala.cluster.replay_job import (
    BOARD,
    PROTOCOL,
    REQUEST_COMPONENTS,
    REQUESTS,
    Answer,
    Layout,
    Request,
    RequestKind,
)
from impala.cluster.transport import (
    AnyConnection,
    Connection,
    Disconnected,
    Rejected,
    RemoteError,
    ReplayConnection,
    WrongPeer,
)
from impala.config import ConfigError
from impala.experience.replay import Packing
from impala.trajectory import UnrollArray

# The learner waits at most this many seconds per batch, for all shards together.
_PATIENCE_SECONDS = 1.0
# A limit per wait is not enough: a shard that is slow each time would still slow the learner down.
# So waits up to `_PROMPT_SECONDS` are free, and what exceeds them is limited, for each shard, to
# `_PATIENCE_SHARE` of the time. A shard that misses its deadline is skipped until it delivers.
_PROMPT_SECONDS = 0.05
_PATIENCE_SHARE = 0.1
# Interval at which an idle shard is polled.
_POLL_SECONDS = 2.0
_FIRST_BACK_OFF_SECONDS, _MAX_BACK_OFF_SECONDS = 0.25, 5.0
# How often a shard's lease is renewed within its duration.
_RENEWALS_PER_LEASE = 4
_LEAVE_SECONDS = 2.0
_DEADLINE_SECONDS = 10.0


class RemoteReplay:
    """Replay over shards, with the interface of `impala.experience.replay.Replay`.

    A context manager. Each shard has two threads here: one sends it unrolls, in turn with the other
    shards, and reconnects when the shard is lost; one prefetches a few sampled unrolls. Shards
    sample uniformly from what they hold, and each unroll comes from shard i with a probability
    proportional to the number that shard i holds. So all unrolls are sampled equally often, even if
    a shard that came back holds fewer than the others.

    The memory is bounded: at most twice the replayed unrolls of a batch, rounded up for each shard,
    plus those in transit; and two batches of unrolls to be sent. Unrolls that a shard does not
    take, because it is too slow or lost, are dropped. The learner never waits longer than a second
    for the shards, nor repeatedly for a slow one; unrolls that arrive late are used later.

    Attributes:
      components: the arrays of an unroll, as given.
    """

    def __init__(
        self,
        components: Sequence[UnrollArray],
        stack: str | None,
        *,
        level_names: Sequence[str],
        run_id: str,
        addresses: Sequence[str],
        batch_size: int,
        num_replayed: int,
        seed: Any,
        report: Callable[[str], None],
    ):
        """Asks the shards that answer whether the run can acquire them.

        Args:
          components: see `Packing`.
          stack: see `Packing`.
          level_names: levels of the run.
          run_id: identifies the run, see `impala.runs.files.run_id`.
          addresses: `host:port` of each shard.
          batch_size: unrolls per batch.
          num_replayed: maximum number of replayed unrolls per batch.
          seed: seed for the choice of shards; see `numpy.random.default_rng`.
          report: takes lines that say which shards connect and disconnect.

        Raises:
          ConfigError: a shard cannot hold these unrolls, or belongs to another run that is still
            active.
          ServerError: an address is invalid.
        """
        self.components = list(components)
        self._packing = Packing(components, stack)
        self._layout = Layout(tuple(level_names), tuple(self._packing.packed))
        self._run_id = run_id
        self._learner = secrets.randbits(62)
        self._batch_size = batch_size
        self._num_taken = -(-max(1, num_replayed) // len(addresses))
        self._random = np.random.default_rng(seed)
        self._report = report
        self._shards = [_Shard(task, address) for task, address in enumerate(addresses)]
        self._packing_lock = threading.Lock()
        # Guards everything below and the shards.
        self._changed = threading.Condition()
        self._closed = False
        self._connections: set[Connection] = set()
        self._drawn: list[list[np.ndarray]] = []
        self._reserved: list[list[np.ndarray]] = []
        self._next_shard = 0
        self._num_left_out = 0
        self._num_lost = 0
        self._seconds = {'replay/fetch': 0.0, 'replay/send': 0.0}
        self._threads = [
            threading.Thread(target=target, args=(shard,), name=f'replay job {shard.task}')
            for shard in self._shards
            for target in (self._keep, self._fetch)
        ]
        self._for_each(lambda shard: self._request(shard, RequestKind.QUERY))

    def start(self, begins: bool, report: Callable[[str], None]) -> None:
        """Prepares the use of the shards; must precede entering the context.

        Args:
          begins: whether the run begins, so that the shards must drop their unrolls.
          report: takes lines that say which shards connect and disconnect, from now on.
        """
        for shard in self._shards:
            shard.begins = begins
        self._report = report

    def __enter__(self) -> 'RemoteReplay':
        """Acquires the shards that answer.

        Raises:
          ConfigError: see `__init__`.
        """
        try:
            self._for_each(lambda shard: self._request(shard, shard.request_kind))
        except ConfigError:
            self._for_each(self._leave)
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._closed = True
            there = [shard for shard in self._shards if shard.connection]
            connections = list(self._connections)
            self._changed.notify_all()
        for connection in connections:
            connection.close()
        for thread in self._threads:
            thread.join()
        self._for_each(self._leave, there)

    @property
    def description(self) -> str:
        """A description for the user."""
        addresses = ', '.join(shard.address for shard in self._shards)
        return f'Replay of trajectories of {self._packing.nbytes:,} bytes, held at {addresses}'

    def __len__(self) -> int:
        with self._changed:
            return sum(shard.held for shard in self._shards)

    def add(self, unrolls: Sequence[np.ndarray]) -> None:
        """Queues unrolls to be sent to the shards in turn, without waiting.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
        """
        for unroll in self._packing.columns(unrolls):
            with self._changed:
                shard = self._next_with_room()
                if shard is None:
                    self._num_lost += 1
                    continue
            packed = self._packing.new()
            with self._packing_lock:
                is_packed = self._packing.pack(unroll, packed)
            with self._changed:
                if not is_packed:
                    self._num_left_out += 1
                elif shard.connection is None:
                    self._num_lost += 1
                else:
                    shard.outgoing.append(packed)
                    self._changed.notify_all()

    def reserve(self, number: int) -> bool:
        """Samples unrolls for a call of `sample` that must follow.

        Args:
          number: number of unrolls.

        Returns:
          Whether that many are available; if not, none is reserved.
        """
        with self._changed:
            has_all = self._draw(number, time.monotonic() + _PATIENCE_SECONDS)
            if has_all:
                self._reserved += self._drawn[:number]
                del self._drawn[:number]
            return has_all

    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None:
        """Writes reserved unrolls into columns.

        Args:
          unrolls: K arrays, `[T+1, N, ...]` where time-major, else `[N, ...]`.
          first_column: first column to write; all later ones are written, too.
        """
        number = self._packing.num_columns(unrolls) - first_column
        with self._changed:
            drawn, self._reserved = self._reserved[:number], self._reserved[number:]
        for column, packed in enumerate(drawn, first_column):
            self._packing.unpack(packed, unrolls, column)

    def metrics(self) -> dict[str, float]:
        """Returns metrics for the log, by name."""
        with self._changed:
            values: dict[str, float] = {
                'replay_unrolls': sum(shard.held for shard in self._shards),
                'replay_jobs': sum(shard.connection is not None for shard in self._shards),
            }
            if self._num_left_out:
                values['replay_unrolls_left_out'] = self._num_left_out
            if self._num_lost:
                values['replay_unrolls_lost'] = self._num_lost
        return values

    def stage_seconds(self) -> dict[str, float]:
        """Returns the seconds spent so far in each stage, summed over the shards."""
        with self._changed:
            return dict(self._seconds)

    def _next_with_room(self) -> '_Shard | None':
        """Returns the next connected shard in turn whose queue has room, or None."""
        num_there = sum(shard.connection is not None for shard in self._shards)
        for _ in self._shards:
            shard = self._shards[self._next_shard]
            self._next_shard = (self._next_shard + 1) % len(self._shards)
            if shard.connection is not None:
                most = 2 * -(-self._batch_size // num_there)
                if len(shard.outgoing) < most:
                    return shard
        return None

    def _draw(self, number: int, deadline: float) -> bool:
        """Collects `number` sampled unrolls; returns whether the shards delivered them in time."""
        while True:
            # Even if `number` is 0: replay counts as unavailable while no shard has unrolls.
            shards = [shard for shard in self._shards if shard.held and not shard.is_late]
            if self._closed or not shards:
                return False
            if len(self._drawn) >= number:
                return True
            held = np.array([shard.held for shard in shards], np.float64)
            shard = shards[self._random.choice(len(shards), p=held / held.sum())]
            if self._wait_for(shard, deadline):
                self._drawn.append(shard.ready.popleft())
                self._changed.notify_all()

    def _wait_for(self, shard: '_Shard', deadline: float) -> bool:
        """Waits for a sampled unroll of a shard; returns whether there is one."""
        started = time.monotonic()
        grown = shard.patience + _PATIENCE_SHARE * (started - shard.patience_at)
        patience = min(_PATIENCE_SECONDS, grown)
        is_settled = self._changed.wait_for(
            lambda: bool(self._closed or shard.ready or not shard.held),
            max(0.0, min(_PROMPT_SECONDS + patience, deadline - started)),
        )
        shard.is_late = not is_settled
        shard.patience_at = time.monotonic()
        excess = max(0.0, shard.patience_at - started - _PROMPT_SECONDS)
        shard.patience = max(0.0, patience - excess)
        return bool(shard.ready) and not self._closed

    def _for_each(
        self, call: Callable[['_Shard'], None], shards: Sequence['_Shard'] | None = None
    ) -> None:
        """Calls a function with each of the given shards (default: all) concurrently."""
        with concurrent.futures.ThreadPoolExecutor(len(self._shards)) as executor:
            list(executor.map(call, self._shards if shards is None else shards))

    def _request(self, shard: '_Shard', kind: RequestKind) -> None:
        """Sends a request to a shard and waits for the answer; marks the shard as lost if it fails.

        Raises:
          ConfigError: the shard refuses.
        """
        try:
            with self._control_connection(shard) as control:
                self._ask(control, kind)
                shard.begins &= kind is RequestKind.QUERY
        except ConfigError:
            raise
        except Exception as error:
            self._lose(shard, error)

    def _leave(self, shard: '_Shard') -> None:
        """Releases a shard, so that another run need not wait for the lease to end."""
        with (
            contextlib.suppress(RemoteError),
            ReplayConnection(
                shard.address, REQUEST_COMPONENTS, (), _LEAVE_SECONDS, REQUESTS, BOARD
            ) as control,
        ):
            self._send(control, RequestKind.RELEASE)

    def _keep(self, shard: '_Shard') -> None:
        """Connects to a shard, sends it its unrolls, and reconnects when that fails."""
        back_off = _FIRST_BACK_OFF_SECONDS
        while True:
            try:
                with self._control_connection(shard) as control:
                    held, answer = self._ask(control, shard.request_kind)
                    shard.begins = False
                    with self._connected(shard, answer) as connection:
                        back_off = _FIRST_BACK_OFF_SECONDS
                        try:
                            self._use(shard, control, answer, connection, held)
                        except Exception as error:
                            # Before the connection closes: otherwise the other thread would report
                            # the closing as the cause.
                            self._lose(shard, error)
            # Any exception: without this thread the shard would be lost forever.
            except Exception as error:
                self._lose(shard, error)
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, back_off):
                    return
            back_off = min(2 * back_off, _MAX_BACK_OFF_SECONDS)

    def _use(
        self,
        shard: '_Shard',
        control: Connection,
        answer: Answer,
        connection: ReplayConnection,
        held: int,
    ) -> None:
        """Sends unrolls and renews the lease until a call fails or this object is closed."""
        renewal_seconds = shard.lease_seconds / _RENEWALS_PER_LEASE
        pause = min(_POLL_SECONDS, renewal_seconds)
        renewed_at = time.monotonic()
        with self._changed:
            shard.connection, shard.held, shard.is_missed = connection, held, False
            num_there = sum(each.connection is not None for each in self._shards)
            self._changed.notify_all()
        self._report(
            f'Replay job {shard.task} at {shard.address} is there, with {held:,} of at most '
            f'{shard.capacity:,} trajectories: {num_there} of {len(self._shards)}'
        )
        for sequence in itertools.count(1):
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or shard.outgoing or not shard.connection, pause
                )
                if self._closed or not shard.connection:
                    return
            if time.monotonic() - renewed_at >= renewal_seconds:
                if self._ask(control, RequestKind.ACQUIRE)[1].inbox != answer.inbox:
                    raise Disconnected(f'The replay job at {shard.address} begins anew.')
                renewed_at = time.monotonic()
            with self._changed:
                unroll = shard.outgoing.popleft() if shard.outgoing else None
            started = time.perf_counter()
            try:
                if unroll is None:
                    status = connection.status()
                else:
                    status = connection.put(unroll, shard.task, '', sequence)
            except Rejected:
                with self._changed:
                    self._num_left_out += 1
                continue
            with self._changed:
                if unroll is not None:
                    self._seconds['replay/send'] += time.perf_counter() - started
                if shard.connection:
                    shard.held = status.version
                    self._changed.notify_all()

    def _fetch(self, shard: '_Shard') -> None:
        """Prefetches sampled unrolls of a shard."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_room(shard))
                if self._closed:
                    return
                connection = shard.connection
                assert connection is not None
            started = time.perf_counter()
            try:
                arrays = connection.take()
            except Exception as error:  # Any exception: see `_keep`.
                with self._changed:
                    is_news = shard.connection is connection
                if is_news:
                    self._lose(shard, error)
                # Fails a pending call of the thread that sends, which would wait in vain.
                connection.close()
                continue
            with self._changed:
                self._seconds['replay/fetch'] += time.perf_counter() - started
                if shard.connection is connection:
                    for i in range(self._num_taken):
                        shard.ready.append([array[i, ...] for array in arrays])
                    shard.is_late = False
                    self._changed.notify_all()

    def _has_room(self, shard: '_Shard') -> bool:
        """Returns whether the shard holds unrolls and there is room to prefetch more."""
        has_some = shard.connection is not None and shard.held > 0
        return has_some and len(shard.ready) <= self._num_taken

    def _lose(self, shard: '_Shard', error: Exception) -> None:
        """Marks a shard as lost, and reports that once."""
        with self._changed:
            is_known = shard.is_missed or self._closed
            shard.is_missed = True
            self._num_lost += len(shard.outgoing)
            shard.connection, shard.held, shard.is_late = None, 0, False
            shard.ready.clear()
            shard.outgoing.clear()
            num_there = sum(each.connection is not None for each in self._shards)
            self._changed.notify_all()
        if not is_known:
            rest = f'{num_there} of the replay jobs' if num_there else 'no replayed trajectories'
            if not isinstance(error, RemoteError | ConfigError):
                what = f'{type(error).__name__}: {error}'
                error = RemoteError(f'The replay job at {shard.address} cannot be used: {what}.')
            self._report(f'{error} Continuing with {rest} until it is back')

    @contextlib.contextmanager
    def _control_connection(self, shard: '_Shard') -> Iterator[Connection]:
        """Opens a connection for requests to a shard.

        Raises:
          RemoteError: the shard does not answer.
          ConfigError: the peer runs another version or is not a replay job.
        """
        with self._opened(
            ReplayConnection(
                shard.address,
                REQUEST_COMPONENTS,
                [tf.TensorSpec([], tf.string)],
                _DEADLINE_SECONDS,
                REQUESTS,
                BOARD,
            )
        ) as control:
            try:
                settings = json.loads(control.settings())
            except WrongPeer as error:
                raise ConfigError(
                    f'{error} Give the learner the --replay_addresses of its replay jobs.'
                ) from error
            if settings['protocol'] != PROTOCOL:
                raise ConfigError(
                    f'The replay job at {shard.address} runs another version of this program '
                    f'(protocol {settings["protocol"]}, here {PROTOCOL}): install the same one.'
                )
            shard.capacity = settings['capacity']
            shard.lease_seconds = settings['lease_seconds']
            yield control

    def _connected(
        self, shard: '_Shard', answer: Answer
    ) -> contextlib.AbstractContextManager[ReplayConnection]:
        """Opens a connection for unrolls to a shard that this run has acquired."""
        return self._opened(
            ReplayConnection(
                shard.address,
                self._packing.packed,
                (),
                _DEADLINE_SECONDS,
                answer.inbox,
                BOARD,
                outbox=answer.outbox,
                num_taken=self._num_taken,
            )
        )

    def _ask(self, control: Connection, kind: RequestKind) -> tuple[int, Answer]:
        """Sends a request; returns the number of unrolls that the shard holds, and its answer.

        Raises:
          RemoteError: there is no answer.
          ConfigError: the shard refuses.
        """
        number = self._send(control, kind)
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while True:
            held, answer = _read(control)
            refusal = answer.outcomes.get(str(number))
            if refusal:
                raise ConfigError(f'The replay job at {control.address} refuses: {refusal}')
            if refusal is not None and (kind is RequestKind.QUERY or answer.run == self._run_id):
                return held, answer
            if time.monotonic() > deadline:
                raise Disconnected(f'The replay job at {control.address} does not answer.')
            time.sleep(0.02)

    def _send(self, control: Connection, kind: RequestKind) -> int:
        """Sends a request and returns its number."""
        number = secrets.randbits(62)
        request = Request(number, self._run_id, self._learner, self._layout, kind)
        # Sequence numbers must grow, as the clock does.
        control.put([np.int64(0), request.to_array()], 0, '', time.monotonic_ns())
        return number

    @contextlib.contextmanager
    def _opened(self, connection: AnyConnection) -> Iterator[AnyConnection]:
        """Closes a connection at the end of the block, or when this object is closed."""
        with connection:
            with self._changed:
                self._connections.add(connection)
                if self._closed:
                    connection.close()
            try:
                yield connection
            finally:
                with self._changed:
                    self._connections.remove(connection)


@dataclasses.dataclass(eq=False)
class _Shard:
    """The learner's view of a replay job.

    Attributes:
      task: index of the replay job.
      address: `host:port`.
      capacity: last known capacity in unrolls.
      lease_seconds: last known duration of its lease, in seconds.
      begins: the run begins, and the shard must still drop its unrolls.
      connection: None while the shard is lost.
      held: last known number of unrolls that it holds; 0 while the shard is lost.
      ready: packed unrolls that it has sampled.
      outgoing: packed unrolls to be sent to it.
      is_late: the shard missed its last deadline.
      patience: seconds, beyond `_PROMPT_SECONDS`, that the learner would have waited for the shard
        at `patience_at`.
      patience_at: time of the monotonic clock, in seconds.
      is_missed: the loss has been reported.
    """

    task: int
    address: str
    capacity: int = 0
    lease_seconds: float = 0.0
    begins: bool = False
    connection: ReplayConnection | None = None
    held: int = 0
    ready: collections.deque[list[np.ndarray]] = dataclasses.field(
        default_factory=collections.deque
    )
    outgoing: collections.deque[list[np.ndarray]] = dataclasses.field(
        default_factory=collections.deque
    )
    is_late: bool = False
    patience: float = _PATIENCE_SECONDS
    patience_at: float = 0.0
    is_missed: bool = False

    @property
    def request_kind(self) -> RequestKind:
        """The request to send once the shard answers."""
        return RequestKind.RESET if self.begins else RequestKind.ACQUIRE


def _read(control: Connection) -> tuple[int, Answer]:
    held, (text,) = control.weights()
    return held, Answer.from_text(bytes(text))
