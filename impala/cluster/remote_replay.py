"""The learner's client of replay jobs, which hold the unrolls in shards.

Letters: T unroll length, K arrays of an unroll, N unrolls.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from impala.cluster.calls import Client
from impala.cluster.channel import Rejected, RemoteError, WrongPeer, WrongSecret
from impala.cluster.replay_job import KIND, MAX_ADDED, MAX_DRAWN, layout
from impala.config import ConfigError
from impala.experience.replay import Packing, aligned
from impala.trajectory import UnrollArray

# The learner waits at most this many seconds per batch, for all shards together.
_PATIENCE_SECONDS = 1.0
# A limit per wait is not enough: a shard that is slow each time would still slow the learner down.
# So waits up to `_PROMPT_SECONDS` are free, and what exceeds them is limited, for each shard, to
# `_PATIENCE_SHARE` of the time. A shard that misses its deadline is skipped until it delivers.
_PROMPT_SECONDS = 0.05
_PATIENCE_SHARE = 0.1
# A shard with which there is nothing to exchange is called this often.
_POLL_SECONDS = 2.0
_FIRST_BACK_OFF_SECONDS, _MAX_BACK_OFF_SECONDS = 0.25, 5.0
_LEAVE_SECONDS = 5.0


class RemoteReplay:
    """Replay over shards, with the interface of `impala.experience.replay.Replay`.

    A context manager. Each shard has a thread and a connection here, which send it unrolls, in turn
    with the other shards, prefetch sampled ones, and call it again when it was lost. Shards sample
    uniformly from what they hold, and each unroll comes from shard i with a probability
    proportional to the number that shard i holds. So all unrolls are sampled equally often, even if
    a shard that came back holds fewer than the others.

    The memory is bounded: at most twice the replayed unrolls of a batch, rounded up for each shard,
    plus those in transit; and each shard's part of two batches of unrolls to be sent, which waits
    while the shard is lost. Unrolls for which no shard has room are dropped. The learner never
    waits longer than a second for the shards, nor repeatedly for a slow one; unrolls that arrive
    late are used later.

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
        secret: bytes | None = None,
    ):
        """Asks the shards that answer whether the run can have them.

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
          secret: see `impala.cluster.calls.Client`.

        Raises:
          ConfigError: an address is invalid, what listens there is no replay job of this run, or a
            replay job cannot hold these unrolls or belongs to another run that has not ended.
        """
        self.components = list(components)
        self._packing = Packing(components, stack)
        self._learner = {'run': run_id, 'learner': secrets.token_hex(8)}
        self._layout = layout(level_names, self._packing.packed)
        self._batch_size = batch_size
        self._num_drawn = -(-max(1, num_replayed) // len(addresses))
        self._random = np.random.default_rng(seed)
        self._report = report
        self._secret = secret
        self._packing_lock = threading.Lock()
        # Guards everything below and the shards.
        self._changed = threading.Condition()
        self._closed = False
        self._shards = [
            _Shard(task, Client(address, KIND, secret)) for task, address in enumerate(addresses)
        ]
        self._drawn: list[np.ndarray] = []
        self._reserved: list[np.ndarray] = []
        self._next_shard = 0
        self._num_left_out = 0
        self._num_lost = 0
        self._seconds = {'replay/fetch': 0.0, 'replay/send': 0.0}
        self._threads = [
            threading.Thread(target=self._keep, args=(shard,), name=f'replay job {shard.task}')
            for shard in self._shards
        ]
        self._for_each(self._ask, self._shards)

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
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for shard in self._shards:
            shard.client.close()
        for thread in self._threads:
            thread.join()
        self._for_each(self._leave, [shard for shard in self._shards if not shard.is_missed])

    @property
    def description(self) -> str:
        """A description for the user."""
        addresses = ', '.join(shard.address for shard in self._shards)
        return f'Replay of trajectories of {self._packing.nbytes:,} bytes, held at {addresses}'

    def __len__(self) -> int:
        with self._changed:
            return sum(shard.held for shard in self._shards)

    def add(self, unrolls: Sequence[np.ndarray]) -> None:
        """Queues unrolls to be sent to the shards in turn, without waiting; see `Replay`."""
        for unroll in self._packing.columns(unrolls):
            with self._changed:
                shard = self._next_with_room()
                if shard is None:
                    self._num_lost += 1
                    continue
            memory = aligned([self._packing.nbytes], np.dtype('uint8'))
            with self._packing_lock:
                is_packed = self._packing.pack(unroll, self._packing.views(memory))
            with self._changed:
                if is_packed:
                    shard.outgoing.append(memory)
                    self._changed.notify_all()
                else:
                    self._num_left_out += 1

    def reserve(self, number: int) -> bool:
        """Reserves unrolls for a call of `sample` if they arrive in time; see `Replay`."""
        with self._changed:
            has_all = self._draw(number, time.monotonic() + _PATIENCE_SECONDS)
            if has_all:
                self._reserved += self._drawn[:number]
                del self._drawn[:number]
            return has_all

    def sample(self, unrolls: Sequence[np.ndarray], first_column: int = 0) -> None:
        """Writes reserved unrolls into columns; see `Replay`."""
        number = self._packing.num_columns(unrolls) - first_column
        with self._changed:
            drawn, self._reserved = self._reserved[:number], self._reserved[number:]
        for column, memory in enumerate(drawn, first_column):
            self._packing.unpack(self._packing.views(memory), unrolls, column)

    def metrics(self) -> dict[str, float]:
        """Returns metrics for the log, by name."""
        with self._changed:
            values: dict[str, float] = {
                'replay_unrolls': sum(shard.held for shard in self._shards),
                'replay_jobs': self._num_there(),
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
        """Returns the next shard in turn that is there and whose queue has room, or None."""
        num_there = self._num_there()
        for _ in self._shards:
            shard = self._shards[self._next_shard]
            self._next_shard = (self._next_shard + 1) % len(self._shards)
            if shard.is_there:
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

    def _num_there(self) -> int:
        return sum(shard.is_there for shard in self._shards)

    def _for_each(self, call: Callable[['_Shard'], None], shards: Sequence['_Shard']) -> None:
        """Calls a function with each shard concurrently."""
        with concurrent.futures.ThreadPoolExecutor(len(self._shards)) as executor:
            list(executor.map(call, shards))

    def _begin(self, shard: '_Shard', client: Client, only_asks: bool = False) -> dict[str, Any]:
        """Asks a shard to hold unrolls of this run, or whether it could; returns the answer.

        Raises ConfigError if the shard refuses.
        """
        request = {'layout': self._layout, 'anew': shard.begins, 'only_asks': only_asks}
        try:
            return client.call('begin', self._learner | request)[0]
        except (WrongPeer, WrongSecret) as error:
            raise ConfigError(str(error)) from error
        except Rejected as error:
            raise ConfigError(f'The replay job at {shard.address} refuses: {error}') from error

    def _ask(self, shard: '_Shard') -> None:
        """Asks a shard whether it could hold unrolls of this run; raises ConfigError if not."""
        try:
            with Client(shard.address, KIND, self._secret) as client:
                self._begin(shard, client, only_asks=True)
        except RemoteError as error:
            self._lose(shard, str(error))

    def _leave(self, shard: '_Shard') -> None:
        """Tells a shard that this learner ends, so that another run need not wait."""
        client = Client(shard.address, KIND, self._secret, _LEAVE_SECONDS)
        with contextlib.suppress(RemoteError), client:
            client.call('leave', self._learner)

    def _keep(self, shard: '_Shard') -> None:
        """Exchanges unrolls with a shard, and calls it again when that fails."""
        back_off = _FIRST_BACK_OFF_SECONDS
        while True:
            try:
                key = self._welcome(shard)
                back_off = _FIRST_BACK_OFF_SECONDS
                while self._wait_for_work(shard):
                    is_idle = not self._send(shard, key)
                    if is_idle or self._has_room(shard):
                        self._fetch(shard, key)
            except (RemoteError, ConfigError) as error:
                self._lose(shard, str(error))
            # Without this thread the shard would be lost forever.
            except Exception as error:
                what = f'{type(error).__name__}: {error}'
                self._lose(shard, f'The replay job at {shard.address} cannot be used: {what}.')
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, back_off):
                    return
            back_off = min(2 * back_off, _MAX_BACK_OFF_SECONDS)

    def _welcome(self, shard: '_Shard') -> str:
        """Begins to use a shard; returns the key of what it holds."""
        answer = self._begin(shard, shard.client)
        with self._changed:
            shard.is_there, shard.held = True, answer['held']
            shard.begins = shard.is_missed = False
            num_there = self._num_there()
            self._changed.notify_all()
        self._report(
            f'Replay job {shard.task} at {shard.address} is there, with {answer["held"]:,} of at '
            f'most {answer["capacity"]:,} trajectories: {num_there} of {len(self._shards)}'
        )
        return answer['key']

    def _wait_for_work(self, shard: '_Shard') -> bool:
        """Waits until a call of a shard is due; returns whether this object is still open."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or shard.outgoing or shard.sent or self._has_room(shard),
                _POLL_SECONDS,
            )
            return not self._closed

    def _has_room(self, shard: '_Shard') -> bool:
        """Returns whether the shard holds unrolls and there is room to prefetch more."""
        return shard.held > 0 and len(shard.ready) <= self._num_drawn

    def _send(self, shard: '_Shard', key: str) -> bool:
        """Sends unrolls, first those that the shard may not have got; returns if there were any."""
        with self._changed:
            if not shard.sent and shard.outgoing:
                shard.number += 1
                number = min(MAX_ADDED, len(shard.outgoing))
                shard.sent = [shard.outgoing.popleft() for _ in range(number)]
        if not shard.sent:
            return False
        started = time.perf_counter()
        values = self._learner | {'key': key, 'number': shard.number}
        answer, _ = shard.client.call('add', values, shard.sent)
        with self._changed:
            self._seconds['replay/send'] += time.perf_counter() - started
            self._num_left_out += answer['left_out']
            shard.held, shard.sent = answer['held'], []
            self._changed.notify_all()
        return True

    def _fetch(self, shard: '_Shard', key: str) -> None:
        """Prefetches sampled unrolls if there is room; otherwise only asks how many are held."""
        with self._changed:
            number = min(self._num_drawn, MAX_DRAWN) if self._has_room(shard) else 0
        nbytes = self._packing.nbytes
        started = time.perf_counter()
        values = self._learner | {'key': key, 'number': number}
        answer, body = shard.client.call('draw', values, max_bytes=number * nbytes)
        with self._changed:
            self._seconds['replay/fetch'] += time.perf_counter() - started
            shard.held = answer['held']
            shard.ready.extend(body.reshape(-1, nbytes))
            shard.is_late &= number == 0
            self._changed.notify_all()

    def _lose(self, shard: '_Shard', reason: str) -> None:
        """Marks a shard as lost, and reports that once."""
        with self._changed:
            if self._closed:
                return
            is_known = shard.is_missed
            shard.is_there, shard.is_missed, shard.held, shard.is_late = False, True, 0, False
            shard.ready.clear()
            num_there = self._num_there()
            self._changed.notify_all()
        if not is_known:
            rest = f'{num_there} of the replay jobs' if num_there else 'no replayed trajectories'
            self._report(f'{reason} Continuing with {rest} until it is back')


@dataclasses.dataclass(eq=False)
class _Shard:
    """The learner's view of a replay job.

    Attributes:
      task: index of the replay job.
      client: makes the calls.
      begins: the run begins, and the shard must still drop its unrolls.
      is_there: it answers and belongs to this run.
      held: last known number of unrolls that it holds; 0 while it is not there.
      ready: packed unrolls that it has sampled.
      outgoing: packed unrolls to be sent to it.
      sent: packed unrolls of the last call of `add` until that is answered. When the shard was
        lost, it is unknown whether it has stored them, so the same call is made again.
      number: of that call.
      is_late: the shard missed its last deadline.
      patience: seconds, beyond `_PROMPT_SECONDS`, that the learner would have waited for the shard
        at `patience_at`.
      patience_at: time of the monotonic clock, in seconds.
      is_missed: the loss has been reported.
    """

    task: int
    client: Client
    begins: bool = False
    is_there: bool = False
    held: int = 0
    ready: collections.deque[np.ndarray] = dataclasses.field(default_factory=collections.deque)
    outgoing: collections.deque[np.ndarray] = dataclasses.field(default_factory=collections.deque)
    sent: list[np.ndarray] = dataclasses.field(default_factory=list)
    number: int = 0
    is_late: bool = False
    patience: float = _PATIENCE_SECONDS
    patience_at: float = 0.0
    is_missed: bool = False

    @property
    def address(self) -> str:
        """`host:port`."""
        return self.client.address
