"""The replay job: holds a shard of a run's experience replay for its learners.

It knows nothing of levels or networks: the first learner that connects says which arrays an unroll
consists of. The job then belongs to that learner's run, whose learners renew the lease. Another run
can acquire it once the owner has released it or has been silent for `LEASE_SECONDS`. Learners
access it as actor jobs access the learner, by named objects:

- `REQUESTS`, an inbox for the learners' requests, as text.
- `BOARD`: its settings describe the job, its only "weight" is the current `Answer`, and its version
  is the number of unrolls held.
- Two inboxes of unrolls, packed by `impala.experience.replay.Packing`: learners put unrolls into
  one, and take from the other, which this job keeps filled with a few sampled unrolls.
"""

import contextlib
import dataclasses
import enum
import itertools
import json
import math
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from impala.cluster.exchange import UnrollInbox, WeightsBoard
from impala.cluster.transport import ReplayServer, warn_of_network
from impala.config import Config
from impala.experience.replay import Replay, aligned
from impala.memory import room_bytes
from impala.runs.stop_signal import StopSignal
from impala.trajectory import UnrollArray

# Changes when a learner and a replay job of two versions could misunderstand each other.
PROTOCOL = 3

# A run that has been silent for this long counts as ended, and its unrolls may be dropped.
LEASE_SECONDS = 30.0

BOARD = 'replay'
REQUESTS = 'replay requests'
_TEXT_BYTES = 1 << 17
REQUEST_COMPONENTS = [
    UnrollArray((), 'int64', 'version', False),
    UnrollArray((_TEXT_BYTES,), 'uint8', 'text', False),
]
# Capacity of each inbox, in unrolls or requests.
_NUM_WAITING = 8
# Number of latest requests whose outcomes are shown.
_NUM_OUTCOMES = 64
# The job accepts unrolls of any policy version.
_ANY_VERSION = 2**62


class ReplayJobError(Exception):
    """The job cannot continue; the text is one sentence."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a shard holds.

    Attributes:
      level_names: the run's levels; unrolls of other levels must not be mixed with theirs.
      components: the arrays of a packed unroll.
    """

    level_names: tuple[str, ...]
    components: tuple[UnrollArray, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {
            'level_names': list(self.level_names),
            'components': [dataclasses.asdict(component) for component in self.components],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Layout':
        """Reads what `to_json` returned; raises KeyError, TypeError or ValueError if invalid."""
        return cls(
            tuple(values['level_names']),
            tuple(
                UnrollArray(**component | {'shape': tuple(component['shape'])})
                for component in values['components']
            ),
        )


class RequestKind(enum.Enum):
    """What a learner requests of a replay job for its run."""

    # Asks whether the run could acquire the job; changes nothing.
    QUERY = 'query'
    # Acquires the job or renews the lease; unrolls of the same run are kept.
    ACQUIRE = 'acquire'
    # Acquires the job and drops all unrolls, because the run begins.
    RESET = 'reset'
    # Gives the job up. Its unrolls stay until another run acquires it.
    RELEASE = 'release'


@dataclasses.dataclass(frozen=True)
class Request:
    """A learner's request.

    Attributes:
      number: random number of the request, by which the learner finds the outcome.
      run: id of the run, the same for all learners of the run.
      learner: random number of the learner, the same in all of its requests.
      layout: layout of the learner's unrolls.
      kind: what it requests.
    """

    number: int
    run: str
    learner: int
    layout: Layout
    kind: RequestKind

    def to_array(self) -> np.ndarray:
        """Returns the request as the second array of `REQUEST_COMPONENTS`, u8."""
        values = {
            'number': self.number,
            'run': self.run,
            'learner': self.learner,
            'layout': self.layout.to_json(),
            'kind': self.kind.value,
        }
        text = json.dumps(values).encode()
        array = aligned([_TEXT_BYTES], np.dtype('uint8'))
        array[:] = np.frombuffer(text.ljust(_TEXT_BYTES, b' '), np.uint8)
        return array

    @classmethod
    def from_array(cls, array: np.ndarray) -> 'Request':
        """Reads what `to_array` returned; raises KeyError, TypeError or ValueError if invalid."""
        values = json.loads(array.tobytes())
        layout = Layout.from_json(values['layout'])
        kind = RequestKind(values['kind'])
        return cls(values['number'], values['run'], values['learner'], layout, kind)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a replay job shows on its board.

    Attributes:
      run: id of the run that owns the job; empty while there is none.
      inbox: name of the `UnrollInbox` to put unrolls into.
      outbox: name of the `UnrollInbox` to take sampled unrolls from.
      outcomes: number of a request -> empty, or a sentence that says why it was refused.
    """

    run: str = ''
    inbox: str = ''
    outbox: str = ''
    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_text(self) -> str:
        """Returns what `from_text` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: bytes | str) -> 'Answer':
        """Reads what `to_text` returned."""
        return cls(**json.loads(text))


def own_capacity(config: Config) -> int:
    """Returns the capacity of this replay job in unrolls, an equal share of the total."""
    return -(-config.learner.replay.replay_capacity // len(config.cluster.replay_addresses))


def run(config: Config, report: Callable[[str], None]) -> str:
    """Serves until a signal arrives. Main thread only.

    Args:
      config: settings of the job.
      report: takes lines of progress.

    Returns:
      A sentence that says why the job ended.

    Raises:
      ServerError: the address is invalid or in use.
      ReplayJobError: storing or sampling has failed.
      KeyboardInterrupt: a signal arrived before the job held anything.
    """
    task = config.cluster.task
    errors: list[Exception] = []
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        requests = UnrollInbox(_NUM_WAITING, REQUEST_COMPONENTS, 'version', REQUESTS)
        settings = {
            'protocol': PROTOCOL,
            'capacity': own_capacity(config),
            'lease_seconds': LEASE_SECONDS,
        }
        board = WeightsBoard(json.dumps(settings), BOARD)
        server = ReplayServer(config.cluster.replay_addresses[task])
        if not config.cluster.trusted_network:
            warn_of_network(server.port, report)

        def fail(error: Exception) -> None:
            errors.append(error)
            requests.close()

        shard = stack.enter_context(_Shard(config, board, report, fail))
        stop.then(requests.close)
        report(
            f'Replay job {task} of {len(config.cluster.replay_addresses)}: holds up to '
            f'{own_capacity(config):,} trajectories; waiting for a learner on port {server.port}'
        )
        with contextlib.suppress(tf.errors.CancelledError):
            while True:
                _, (_, text) = requests.take(1)
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    shard.answer(Request.from_array(np.asarray(text)[0]))
        number = shard.close()
    if errors:
        report(''.join(traceback.format_exception(errors[0])).rstrip())
        raise ReplayJobError(
            f'Replay job {task} cannot continue: {type(errors[0]).__name__}: {errors[0]}; the '
            f'{number:,} trajectories held here are gone.'
        ) from errors[0]
    return f'Stopped; the {number:,} trajectories held here are gone.'


class _Shard:
    """The job's current owner and replay buffer. A context manager."""

    def __init__(
        self,
        config: Config,
        board: WeightsBoard,
        report: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ):
        self._on_error = on_error
        self._task, self._seed = config.cluster.task, config.run.seed
        self._capacity = own_capacity(config)
        self._board = board
        self._report = report
        self._buffer: _ReplayBuffer | None = None
        self._owner: Request | None = None
        # For each learner of the owner, the time of its last request.
        self._seen_at: dict[int, float] = {}
        self._numbers = itertools.count()
        # Guards the answer, which the thread that stores unrolls publishes, too.
        self._lock = threading.Lock()
        self._answer = Answer()
        self._show()

    def __enter__(self) -> '_Shard':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._board.close()

    def answer(self, request: Request) -> None:
        """Fulfils a request if possible, and shows the outcome."""
        try:
            self._fulfil(request)
            outcome = ''
        except _RefusedError as error:
            outcome = str(error)
            self._report(f'WARNING: a learner is refused: {error}')
        outcomes = self._answer.outcomes | {str(request.number): outcome}
        latest = dict(list(outcomes.items())[-_NUM_OUTCOMES:])
        with self._lock:
            self._answer = dataclasses.replace(self._answer, outcomes=latest)
        self._show()

    def close(self) -> int:
        """Drops all unrolls and returns their number. May be called again."""
        if self._buffer is None:
            return 0
        self._seen_at.clear()
        with self._lock:
            buffer, self._buffer, self._owner = self._buffer, None, None
            self._answer = dataclasses.replace(self._answer, run='')
        buffer.close()
        return len(buffer.replay)

    def _fulfil(self, request: Request) -> None:
        owner = self._owner
        is_owner = owner is not None and owner.run == request.run
        if request.kind is RequestKind.RELEASE:
            if is_owner:
                self._seen_at.pop(request.learner, None)
            return
        silence = time.monotonic() - max(self._seen_at.values(), default=-math.inf)
        if owner is not None and not is_owner and silence < LEASE_SECONDS:
            levels = ', '.join(owner.layout.level_names)
            raise _RefusedError(
                f'another run, of {textwrap.shorten(levels, 100, placeholder=" ...")}, uses it and '
                f'was last seen {silence:.0f} seconds ago: set other --replay_addresses, or end '
                f'that run; a killed run counts as ended after {LEASE_SECONDS:.0f} seconds.'
            )
        is_there = owner is not None and is_owner and owner.layout == request.layout
        if not is_there:
            self._check_room(request.layout)
        if request.kind is RequestKind.QUERY:
            return
        if not is_there or request.kind is RequestKind.RESET:
            held = self.close()
            if held:
                what = 'The run begins anew' if is_owner else 'Another run begins'
                self._report(f'{what}; the {held:,} earlier trajectories are gone')
            self._begin(request)
        self._seen_at[request.learner] = time.monotonic()

    def _check_room(self, layout: Layout) -> None:
        nbytes = Replay(layout.components, 1, 0).nbytes
        # The present unrolls are dropped first, so their memory counts as free.
        replay = None if self._buffer is None else self._buffer.replay
        held = 0 if replay is None else len(replay) * (replay.nbytes // replay.capacity)
        room = room_bytes(held)
        if self._capacity * nbytes > room:
            raise self._no_room(nbytes, room)

    def _no_room(self, nbytes: int, room: int) -> '_RefusedError':
        return _RefusedError(
            f'{self._capacity:,} trajectories of {nbytes:,} bytes are more than there '
            f'is room for in replay job {self._task}: {room / 1e9:.1f} GB, which is most of '
            'the memory that is free now; start it with a smaller --replay_capacity, or start more '
            'of them elsewhere.'
        )

    def _begin(self, request: Request) -> None:
        layout, number = request.layout, next(self._numbers)
        capacity = self._capacity
        nbytes = Replay(layout.components, 1, 0).nbytes
        try:
            replay = Replay(layout.components, capacity, (self._seed, self._task, number))
        except MemoryError as error:
            raise self._no_room(nbytes, room_bytes()) from error
        buffer = _ReplayBuffer(replay, number, self._show, self._on_error)
        self._report(
            f'Holding trajectories of {nbytes:,} bytes, {capacity * nbytes / 1e9:.2f} GB at most, '
            f'of {", ".join(layout.level_names[:3])}{" ..." * (len(layout.level_names) > 3)}'
        )
        with self._lock:
            self._buffer, self._owner = buffer, request
            self._answer = dataclasses.replace(
                self._answer, run=request.run, inbox=buffer.inbox_name, outbox=buffer.outbox_name
            )

    def _show(self) -> None:
        with self._lock:
            held = 0 if self._buffer is None else len(self._buffer.replay)
            self._board.publish([tf.constant(self._answer.to_text())], tf.constant(held, tf.int64))


class _ReplayBuffer:
    """A replay buffer for unrolls of one layout, with the threads that store and sample.

    Attributes:
      replay: the packed unrolls.
      inbox_name: name of the inbox that learners put into.
      outbox_name: name of the inbox that they take from.
    """

    def __init__(
        self,
        replay: Replay,
        number: int,
        on_stored: Callable[[], None],
        on_error: Callable[[Exception], None],
    ):
        """Opens the inboxes and starts the threads.

        Args:
          replay: an empty replay.
          number: unique among the buffers of this process.
          on_stored: called after each stored unroll.
          on_error: called by a thread that has failed.
        """
        self.replay = replay
        self.inbox_name, self.outbox_name = f'unrolls {number}', f'drawn {number}'
        self._on_stored = on_stored
        self._on_error = on_error
        self._inbox = self._open(self.inbox_name)
        self._outbox = self._open(self.outbox_name)
        self._has_some = threading.Event()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(work,), name=work.__name__, daemon=True)
            for work in (self._store, self._sample)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Fails all further puts and takes, and ends the threads."""
        self._closed = True
        self._inbox.close()
        self._outbox.close()
        self._has_some.set()
        for thread in self._threads:
            thread.join()

    def _open(self, name: str) -> UnrollInbox:
        inbox = UnrollInbox(_NUM_WAITING, self.replay.components, 'policy_version', name)
        inbox.set_latest_version(tf.constant(_ANY_VERSION, tf.int64))
        return inbox

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except tf.errors.CancelledError:
            pass
        except Exception as error:
            # Without this thread the job would keep answering, but never change what it holds.
            self._on_error(error)

    def _store(self) -> None:
        while True:
            self.replay.add(_arrays(self._inbox.take(1).components))
            self._has_some.set()
            self._on_stored()

    def _sample(self) -> None:
        self._has_some.wait()
        for sequence in itertools.count(1):
            if self._closed:
                return
            # New arrays each time: the outbox keeps references to them.
            drawn = [
                aligned((1, *component.shape), np.dtype(component.dtype))
                for component in self.replay.components
            ]
            self.replay.sample(drawn)
            self._outbox.put([array[0, ...] for array in drawn], 0, 0, sequence)


class _RefusedError(Exception):
    """A request cannot be fulfilled; the text is one sentence."""


def _arrays(tensors: Sequence[tf.Tensor]) -> list[np.ndarray]:
    return [np.asarray(tensor) for tensor in tensors]
