"""The replay job: holds a shard of a run's experience replay for its learners.

It knows nothing of levels or networks: the first learner that calls says which arrays an unroll
consists of. Learners call the functions of `Shard`. Each may be called again when its answer was
lost.
"""

import contextlib
import dataclasses
import math
import secrets
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from impala.cluster.calls import Function, Refused, Server, argument, warn_of_strangers
from impala.cluster.channel import Buffer, Values, printable
from impala.config import Config
from impala.experience.replay import Packing, Replay
from impala.memory import room_bytes
from impala.runs.stop_signal import StopSignal
from impala.trajectory import UnrollArray

KIND = 'replay job'
# A run that has been silent for this long counts as ended, and its unrolls may be dropped.
LEASE_SECONDS = 30.0
# Unrolls in a call of `add` and of `draw`, at most.
MAX_ADDED = 16
MAX_DRAWN = 64
# Longest unroll.
_MAX_UNROLL_BYTES = 1 << 40

Answer: TypeAlias = tuple[Values, Sequence[Buffer]]


class ReplayJobError(Exception):
    """The job cannot continue; the text is one sentence."""


def layout(level_names: Sequence[str], components: Sequence[UnrollArray]) -> Values:
    """Returns what a shard needs to know of unrolls, JSON-serializable.

    Args:
      level_names: the run's levels; unrolls of other levels must not be mixed with theirs.
      components: the arrays of a packed unroll.
    """
    arrays = [
        [list(each.shape), each.dtype, each.name, each.time_major, each.low, each.high]
        for each in components
    ]
    return {'levels': list(level_names), 'arrays': arrays}


def run(config: Config, report: Callable[[str], None]) -> str:
    """Serves until a signal arrives. Main thread only.

    Args:
      config: settings of the job.
      report: takes lines of progress.

    Returns:
      A sentence that says why the job ended.

    Raises:
      ConfigError: the file of the secret cannot be used.
      ServerError: the address is in use.
      ReplayJobError: storing or sampling has failed.
      KeyboardInterrupt: a signal arrived before the job held anything.
    """
    task, addresses = config.cluster.task, config.cluster.replay_addresses
    # An equal share of the total.
    capacity = -(-config.learner.replay.replay_capacity // len(addresses))
    ends = threading.Event()
    secret = config.cluster.secret()
    with StopSignal() as stop:
        shard = Shard(capacity, (config.run.seed, task), report, ends.set)
        with Server(addresses[task], shard.functions, KIND, secret, report) as server:
            stop.then(ends.set)
            if not config.cluster.trusted_network:
                warn_of_strangers(addresses[task], server.port, secret, report)
            report(
                f'Replay job {task} of {len(addresses)}: holds up to {capacity:,} trajectories; '
                f'waiting for a learner on port {server.port}'
            )
            ends.wait()
    gone = f'the {len(shard):,} trajectories held here are gone.'
    if shard.error is not None:
        report(''.join(traceback.format_exception(shard.error)).rstrip())
        what = f'{type(shard.error).__name__}: {shard.error}'
        raise ReplayJobError(f'Replay job {task} cannot continue: {what}; {gone}') from shard.error
    return f'Stopped; {gone}'


class Shard:
    """The unrolls that a job holds, which belong to one run at a time. Any thread may use it.

    Learners call these functions; `->` is followed by what they return:

        begin   run, learner, layout, anew, only_asks -> capacity, held, key
                makes the run the owner; drops all unrolls if the run begins anew or if those held
                are of another run or layout; with `only_asks` changes nothing
        add     key, learner, number; at most `MAX_ADDED` packed unrolls -> held, left_out
                stores unrolls, except for a number of left out ones, whose values are invalid; does
                nothing if the number is that of the learner's last call
        draw    key, learner, number -> held; that many packed unrolls, but no more than are held or
                `MAX_DRAWN`
                samples uniformly, with replacement; a repeated call samples again, because that
                changes nothing
        leave   run, learner
                says that the learner has ended

    `run` is the id of a run, and `learner` a random text, the same in all calls of a learner.
    `layout` is what the function of this name returns. `key` identifies what is held: calls with
    that of unrolls that were dropped are refused. Another run can have the job once each learner of
    its owner has left or has been silent for `LEASE_SECONDS`.

    Attributes:
      functions: name -> function, for `Server`.
      error: why the job cannot continue; None if it can.
    """

    def __init__(
        self, capacity: int, seed: Any, report: Callable[[str], None], on_error: Callable[[], None]
    ):
        """Begins without an owner.

        Args:
          capacity: unrolls.
          seed: of the sampling; see `numpy.random.SeedSequence`.
          report: takes lines of progress.
          on_error: called when `error` is set.
        """
        self.functions = {
            'begin': Function(self._begin),
            'add': Function(self._add),
            'draw': Function(self._draw),
            'leave': Function(self._leave),
        }
        self.error: Exception | None = None
        self._capacity = capacity
        self._seed = np.random.SeedSequence(seed)
        self._report = report
        self._on_error = on_error
        self._lock = threading.Lock()
        self._owner: _Owner | None = None

    def __len__(self) -> int:
        return 0 if self._owner is None else len(self._owner.replay)

    def _begin(self, values: Values, body: np.ndarray) -> Answer:
        run, learner = argument(values, 'run', str), argument(values, 'learner', str)
        anew, only_asks = argument(values, 'anew', bool), argument(values, 'only_asks', bool)
        layout = argument(values, 'layout', dict)
        packing = _packing_of(layout)
        with self._lock:
            owner = self._owner
            try:
                self._check_owner_ended(run)
                if owner is None or (owner.run, owner.layout) != (run, layout):
                    self._check_room(packing.nbytes)
                    owner = None
                if only_asks:
                    return {}, ()
                if owner is None or anew:
                    owner = self._replace_owner(run, layout, packing)
            except (Refused, MemoryError) as error:
                self._report(f'WARNING: a learner is refused: {printable(str(error))}')
                raise Refused(str(error)) from error
            owner.seen_at[learner] = time.monotonic()
            return {'capacity': self._capacity, 'held': len(self), 'key': owner.key}, ()

    def _add(self, values: Values, body: np.ndarray) -> Answer:
        with self._lock:
            owner, learner = self._owner_of(values), values['learner']
            call_number = argument(values, 'number', int)
            if body.size % owner.packing.nbytes:
                raise Refused(f'{body.size:,} bytes are no unrolls of {owner.packing.nbytes:,}.')
            last, left_out = owner.added.get(learner, (None, 0))
            if last != call_number:
                rows = body.reshape(-1, owner.packing.nbytes)
                valid = [row for row in rows if owner.packing.accepts(row)]
                left_out = len(rows) - len(valid)
                with self._ending_on_error():
                    for row in valid:
                        owner.replay.add([row[np.newaxis]])
                owner.added[learner] = call_number, left_out
            return {'held': len(self), 'left_out': left_out}, ()

    def _draw(self, values: Values, body: np.ndarray) -> Answer:
        with self._lock:
            owner = self._owner_of(values)
            # New memory each time: it is being sent while the next call samples.
            number = max(0, min(argument(values, 'number', int), len(self), MAX_DRAWN))
            drawn = np.empty((number, owner.packing.nbytes), np.uint8)
            if number:
                with self._ending_on_error():
                    owner.replay.sample([drawn])
            return {'held': len(self)}, [drawn]

    def _leave(self, values: Values, body: np.ndarray) -> Answer:
        with self._lock:
            if self._owner is not None and self._owner.run == values.get('run'):
                self._owner.seen_at.pop(argument(values, 'learner', str), None)
            return {}, ()

    def _owner_of(self, values: Values) -> '_Owner':
        """Returns the owner, and notes that its learner calls."""
        owner, learner = self._owner, argument(values, 'learner', str)
        if owner is None or owner.key != values.get('key'):
            raise Refused('The replay job has dropped the trajectories that it held.')
        if learner in owner.seen_at:
            owner.seen_at[learner] = time.monotonic()
        return owner

    def _check_owner_ended(self, run: str) -> None:
        owner = self._owner
        if owner is None or owner.run == run or not owner.seen_at:
            return
        silence = time.monotonic() - max(owner.seen_at.values())
        if silence < LEASE_SECONDS:
            levels = ', '.join(owner.layout['levels'])
            raise Refused(
                f'another run, of {textwrap.shorten(levels, 100, placeholder=" ...")}, uses it and '
                f'was last seen {silence:.0f} seconds ago: set other --replay_addresses, or end '
                f'that run; a killed run counts as ended after {LEASE_SECONDS:.0f} seconds.'
            )

    def _check_room(self, nbytes: int) -> None:
        # The present unrolls are dropped first, so their memory counts as free.
        room = room_bytes(0 if self._owner is None else len(self) * self._owner.packing.nbytes)
        if self._capacity * nbytes > room:
            raise Refused(
                f'{self._capacity:,} trajectories of {nbytes:,} bytes are more than there is room '
                f'for: {room / 1e9:.1f} GB, which is most of the memory that is free now; start it '
                'with a smaller --replay_capacity, or start more replay jobs elsewhere.'
            )

    def _replace_owner(self, run: str, layout: Values, packing: Packing) -> '_Owner':
        if len(self):
            is_owner = self._owner is not None and self._owner.run == run
            what = 'The run begins anew' if is_owner else 'Another run begins'
            self._report(f'{what}; the {len(self):,} earlier trajectories are gone')
        # First, which frees the memory.
        self._owner = None
        unroll = UnrollArray((packing.nbytes,), 'uint8', 'unroll', False)
        replay = Replay([unroll], self._capacity, self._seed.spawn(1)[0])
        self._owner = _Owner(run, layout, secrets.token_hex(8), packing, replay)
        self.functions['add'] = Function(self._add, MAX_ADDED * packing.nbytes)
        levels = layout['levels']
        self._report(
            f'Holding trajectories of {packing.nbytes:,} bytes, {replay.nbytes / 1e9:.2f} GB at '
            f'most, of {printable(", ".join(levels[:3]))}{" ..." * (len(levels) > 3)}'
        )
        return self._owner

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Otherwise the job would keep answering, but never change what it holds.
            self.error = error
            self._on_error()
            raise


def _packing_of(layout: Values) -> Packing:
    """Returns the format of packed unrolls.

    Args:
      layout: what the function of this name returns; may come from a stranger.

    Raises:
      Refused: it is malformed.
    """
    try:
        is_valid = all(isinstance(level, str) for level in layout['levels'])
        packing = Packing([UnrollArray(tuple(shape), *rest) for shape, *rest in layout['arrays']])
        for each in packing.packed:
            sizes_are_valid = all(type(size) is int and size >= 0 for size in each.shape)
            is_short = math.prod(each.shape) <= _MAX_UNROLL_BYTES
            is_number = np.dtype(each.dtype).kind in 'biuf'
            is_valid = is_valid and sizes_are_valid and is_short and is_number
        is_valid = is_valid and 0 < packing.nbytes <= _MAX_UNROLL_BYTES
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Refused('the layout of the trajectories is malformed.') from error
    if not is_valid:
        raise Refused('the layout of the trajectories is malformed.')
    return packing


@dataclasses.dataclass
class _Owner:
    """The run that owns a job, and its unrolls.

    Attributes:
      run, layout, key: see `Shard`.
      packing: format of an unroll.
      replay: the packed unrolls, u8 `[nbytes]`.
      seen_at: for each learner that has not left, the time of its last call.
      added: for each learner, the number of its last `add`, and how many that left out.
    """

    run: str
    layout: Values
    key: str
    packing: Packing
    replay: Replay
    seen_at: dict[str, float] = dataclasses.field(default_factory=dict)
    added: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
