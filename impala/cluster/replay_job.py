"""The replay job: holds a shard of a run's experience replay for its learners.

It knows nothing of levels or networks: the first learner that comes says of what arrays an unroll
consists. It belongs to the run of that learner, whose learners ask for it again and again: only
when it has not heard of that run for `LEASE_SECONDS`, or the run has left, can it be another one's.
It is found by learners as the learner is by actor jobs, with the same objects:

- `REQUESTS`, an inbox of texts: what a learner wants to have held.
- `BOARD`, whose settings are what this job is, whose one "weight" is what it holds (`Answer`), and
  whose version is how many unrolls it holds.
- Two inboxes of unrolls, as `impala.experience.replay.Packing` packs them: one that learners put
  into, and one that this job keeps filled with a few drawn ones, out of which learners take.
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

# A run that was not heard of for so long is over, or so it seems: what it left makes room.
LEASE_SECONDS = 30.0

BOARD = 'replay'
REQUESTS = 'replay requests'
_TEXT_BYTES = 1 << 17
REQUEST_COMPONENTS = [
    UnrollArray((), 'int64', 'version', False),
    UnrollArray((_TEXT_BYTES,), 'uint8', 'text', False),
]
# Unrolls that have come in or been drawn, and wait.
_NUM_WAITING = 8
# Requests whose outcome is kept for who asked.
_NUM_OUTCOMES = 64
# Weights of any version may have acted.
_ANY_VERSION = 2**62


class ReplayJobError(Exception):
    """The job cannot go on; the text is one sentence."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a shard holds.

    Attributes:
      level_names: of the run; unrolls of another one's do not belong among them.
      components: of a packed unroll.
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
        """Reads a layout; raises KeyError, TypeError or ValueError where it is none."""
        return cls(
            tuple(values['level_names']),
            tuple(
                UnrollArray(**component | {'shape': tuple(component['shape'])})
                for component in values['components']
            ),
        )


class RequestKind(enum.Enum):
    """What a learner wants of a replay job for its run."""

    # To know whether it could have it; nothing changes.
    QUERY = 'query'
    # To have it, or to keep it; with the unrolls of this run, if there are any.
    ACQUIRE = 'acquire'
    # To have it without any unrolls, since the run begins.
    RESET = 'reset'
    # No more of it. What it holds stays there until it is another run's.
    RELEASE = 'release'


@dataclasses.dataclass(frozen=True)
class Request:
    """What a learner asks for.

    Attributes:
      number: its own, random, by which it finds the outcome.
      run: what tells its run from all others; all learners of a run have the same.
      learner: its own, random, the same in all that it asks for.
      layout: of the unrolls that it has.
      kind: what it wants.
    """

    number: int
    run: str
    learner: int
    layout: Layout
    kind: RequestKind

    def to_array(self) -> np.ndarray:
        """Returns it as the second of `REQUEST_COMPONENTS`."""
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
        """Reads what `to_array` wrote; raises KeyError, TypeError or ValueError if it is not."""
        values = json.loads(array.tobytes())
        layout = Layout.from_json(values['layout'])
        kind = RequestKind(values['kind'])
        return cls(values['number'], values['run'], values['learner'], layout, kind)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a replay job shows.

    Attributes:
      run: whose unrolls it holds; empty as long as nobody has taken it.
      inbox: name of the `UnrollInbox` to put unrolls into.
      outbox: name of the one to take drawn unrolls out of.
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
        """Reads what `to_text` wrote."""
        return cls(**json.loads(text))


def own_capacity(config: Config) -> int:
    """Returns the number of unrolls that this replay job holds, an equal part of all."""
    return -(-config.learner.replay.replay_capacity // len(config.cluster.replay_addresses))


def run(config: Config, report: Callable[[str], None]) -> str:
    """Serves until a signal comes. Main thread only.

    Args:
      config: who this is.
      report: told, in lines, what happens.

    Returns:
      A sentence that says why it ended.

    Raises:
      ServerError: the address makes no sense or is in use.
      ReplayJobError: storing or drawing has failed.
      KeyboardInterrupt: a signal came before anything was held.
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
            f'Replay job {task} of {len(config.cluster.replay_addresses)}: up to '
            f'{own_capacity(config):,} trajectories of what a learner says; waiting for it on port '
            f'{server.port}'
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
            f'Replay job {task} cannot go on: {type(errors[0]).__name__}: {errors[0]}; the '
            f'{number:,} trajectories held here are gone.'
        ) from errors[0]
    return f'Stopped; the {number:,} trajectories held here are gone.'


class _Shard:
    """What the job holds at present. A context manager."""

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
        # By learner of its owner, the time that it was heard of.
        self._heard_at: dict[int, float] = {}
        self._numbers = itertools.count()
        # Guards the answer, which is shown by the thread that stores unrolls, too.
        self._lock = threading.Lock()
        self._answer = Answer()
        self._show()

    def __enter__(self) -> '_Shard':
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._board.close()

    def answer(self, request: Request) -> None:
        """Does what is asked for, if it can be, and shows the outcome."""
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
        """Lets go of what is held; returns how many unrolls that was. May be called again."""
        if self._buffer is None:
            return 0
        self._heard_at.clear()
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
                self._heard_at.pop(request.learner, None)
            return
        silence = time.monotonic() - max(self._heard_at.values(), default=-math.inf)
        if owner is not None and not is_owner and silence < LEASE_SECONDS:
            levels = ', '.join(owner.layout.level_names)
            raise _RefusedError(
                f'another run, of {textwrap.shorten(levels, 100, placeholder=" ...")}, uses it and '
                f'was heard of {silence:.0f} seconds ago: give this one other --replay_addresses, '
                f'or end that one; one that was killed has ended after {LEASE_SECONDS:.0f} seconds.'
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
                self._report(f'{what}; the {held:,} trajectories of before are gone')
            self._begin(request)
        self._heard_at[request.learner] = time.monotonic()

    def _check_room(self, layout: Layout) -> None:
        nbytes = Replay(layout.components, 1, 0).nbytes
        # What is held now is let go of before.
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
    """A replay of unrolls of one layout, with the threads that store and draw.

    Attributes:
      replay: of packed unrolls.
      inbox_name: of the inbox that learners put into.
      outbox_name: of the one that they take out of.
    """

    def __init__(
        self,
        replay: Replay,
        number: int,
        on_stored: Callable[[], None],
        on_error: Callable[[Exception], None],
    ):
        """Begins.

        Args:
          replay: that is empty.
          number: that no buffer of this process has had.
          on_stored: called when there is one more.
          on_error: called when a thread has failed, by that thread.
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
            for work in (self._store, self._draw)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Fails who puts or takes from now on, and ends the threads."""
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
            # Without this thread the job would go on answering, and hold the same for ever.
            self._on_error(error)

    def _store(self) -> None:
        while True:
            self.replay.add(_arrays(self._inbox.take(1).components))
            self._has_some.set()
            self._on_stored()

    def _draw(self) -> None:
        self._has_some.wait()
        for sequence in itertools.count(1):
            if self._closed:
                return
            # Not the same arrays again: those who wait share them.
            drawn = [
                aligned((1, *component.shape), np.dtype(component.dtype))
                for component in self.replay.components
            ]
            self.replay.sample(drawn)
            self._outbox.put([array[0, ...] for array in drawn], 0, 0, sequence)


class _RefusedError(Exception):
    """What a learner asks for cannot be had; the text is one sentence."""


def _arrays(tensors: Sequence[tf.Tensor]) -> list[np.ndarray]:
    return [np.asarray(tensor) for tensor in tensors]
