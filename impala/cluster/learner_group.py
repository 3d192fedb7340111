"""Several learners that train one model together.

TensorFlow's strategies do the arithmetic: they sum gradients over replicas that stay equal. This
module does the rest over a plain connection of every learner to the first one: the handshake before
training, the notice that a learner has ended, and the statistics of each learner's actors for the
log.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from impala.cluster.calls import listen
from impala.cluster.channel import (
    Channel,
    Disconnected,
    RemoteError,
    ServerError,
    Silent,
    Values,
    WrongPeer,
    WrongSecret,
    accept,
    connect,
    printable,
)
from impala.config import (
    GRADIENTS_PORT_OFFSET,
    GROUP_PORT_OFFSET,
    ConfigError,
    split_address,
)
from impala.private_tensorflow import abort_collectives, disable_coordination_service
from impala.runs.log import Log, TestResult
from impala.runs.progress import report_to_stderr
from impala.runs.run_settings import flags_of
from impala.trajectory import EpisodeEnd

# Changes when learners of two versions could misunderstand each other.
PROTOCOL = 4

_HEARTBEAT_SECONDS = 1.0
# A learner process that dies is noticed at once, because its connection closes. The failure of a
# machine or a network is noticed after this many seconds.
_SILENCE_SECONDS = 30.0
_RETRY_SECONDS = 0.5
# The strategy notices the end of a learner, too, at most this many seconds earlier.
_EXPLANATION_SECONDS = 5.0
_FINISH_SECONDS = 60.0
KIND = 'learner group'
_ENDED = 'a learner has ended or was stopped'


class LearnerGroupError(Exception):
    """The learners cannot continue together; the text is one sentence."""


class Member(NamedTuple):
    """A learner's place among several.

    Attributes:
      addresses: `host:port` of all learners, to which their actors connect.
      task: index of this learner.
      secret: the secret of the run; None without one.
    """

    addresses: tuple[str, ...]
    task: int
    secret: bytes | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the learner that writes checkpoints and logs."""
        return self.task == 0


def strategy_of_learners(addresses: Sequence[str], task: int) -> tf.distribute.Strategy:
    """Returns a strategy with one replica per learner, or per GPU of each learner.

    Waits for the other learners. This process must not have run any TensorFlow operation before.

    Args:
      addresses: `host:port` of all learners, to which their actors connect. The strategy uses the
        ports `GRADIENTS_PORT_OFFSET` above these.
      task: index of this learner.

    Raises:
      ServerError: the port is in use, or the other learners cannot be reached.
    """
    ports = [split_address(address) for address in addresses]
    workers = [f'{host}:{port + GRADIENTS_PORT_OFFSET}' for host, port in ports]
    if _is_in_use(ports[task][1] + GRADIENTS_PORT_OFFSET):
        raise ServerError(
            f'The learner cannot listen on {workers[task]}: another process does; learners use '
            f'the port of their address + {GRADIENTS_PORT_OFFSET}.'
        )
    disable_coordination_service()
    # The strategy's health check logs in many lines what `LearnerGroup` reports in one.
    tf.get_logger().addFilter(lambda record: not record.getMessage().startswith('Cluster check'))
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(
            tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec({'worker': workers}),
                task_type='worker',
                task_id=task,
                rpc_layer='grpc',
            )
        )
    except tf.errors.OpError as error:
        raise ServerError(
            f'The learners cannot reach each other at {", ".join(workers)}: {error.message}.'
        ) from error


class LearnerGroup:
    """Connects a learner to the others. A context manager.

    The first learner listens, the others connect to it. Until `then` is
    called, the end of another learner ends this process at once.

    Attributes:
      run_id: id of the run, chosen by the first learner; the others know it after the handshake.
    """

    def __init__(
        self,
        member: Member,
        settings: dict[str, Any],
        report: Callable[[str], None],
        run_id: str = '',
    ):
        """Connects only when the context is entered.

        Args:
          member: this learner's place in the group.
          settings: name -> JSON-serializable value of each setting on which all learners must
            agree.
          report: takes lines that say which learners are missing.
          run_id: id of the run; used only by the first learner.
        """
        self.run_id = run_id
        self._member = member
        self._settings = json.loads(json.dumps(settings))
        self._report = report
        host, port = split_address(member.addresses[0])
        self._group_address = f'{host}:{port + GROUP_PORT_OFFSET}'
        # Guards everything below.
        self._changed = threading.Condition()
        self._peers: dict[int, _PeerConnection] = {}
        self._hosts: dict[int, str] = {}
        self._complete: set[int] = set()
        self._reason: str | None = None
        self._stopped = False
        self._has_begun = False
        self._finishing = False
        self._stop: Callable[[], Any] | None = None
        self._news: list[tuple[int, dict[str, Any]]] = []
        self._closed = threading.Event()
        self._listener: socket.socket | None = None

    def __enter__(self) -> 'LearnerGroup':
        """Waits until all learners are connected.

        Raises:
          ConfigError, ServerError: one sentence for the user.
        """
        threading.Thread(target=self._beat, name='learner heartbeat', daemon=True).start()
        try:
            if self._member.is_first:
                self._await_learners()
            else:
                self._join()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *unused: Any) -> None:
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._finishing = True
            peers = list(self._peers.values())
        self._closed.set()
        if self._listener is not None:
            self._listener.close()
        for peer in peers:
            peer.close()

    def _await_learners(self) -> None:
        host, port = split_address(self._group_address)
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip('[]'), port), timeout=2.0).close()
            raise ConfigError(
                f'There is another learner with --task=0 at {self._member.addresses[0]}: each '
                'needs a number of its own.'
            )
        self._listener = listen(self._group_address, 'first learner')
        threading.Thread(target=self._accept, name='learner handshake', daemon=True).start()
        everybody = set(range(1, len(self._member.addresses)))
        reported: set[int] = set()
        with self._changed:
            while missing := everybody - self._peers.keys():
                if missing != reported:
                    tasks = ', '.join(f'--task={task}' for task in sorted(missing))
                    self._report(f'Waiting for the learners {tasks} on port {port}')
                    reported = missing
                self._changed.wait()
            self._has_begun = True
        self._send({'begin': True, 'run_id': self.run_id})

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closed.is_set():
            try:
                connection, (address, *_) = self._listener.accept()
                threading.Thread(
                    target=self._serve, args=(connection, address), name='learner', daemon=True
                ).start()
            # For instance, there are too many open files or threads.
            except (OSError, RuntimeError):
                self._closed.wait(_RETRY_SECONDS)

    def _serve(self, connection: socket.socket, address: str) -> None:
        """The first learner's end of a connection to another one."""
        with (
            contextlib.suppress(RemoteError, OSError),
            _PeerConnection(accept(connection, KIND, self._member.secret)) as peer,
        ):
            hello = peer.receive() or {}
            task, settings = hello.get('task'), hello.get('settings', {})
            if type(task) is not int or not isinstance(settings, dict):
                return  # Not a learner.
            with self._changed:
                if self._reason is not None or self._finishing:
                    return  # The learner retries until a new group forms.
                refusal = self._refusal(task, hello.get('protocol'), settings)
                if refusal is None:
                    self._peers[task], self._hosts[task] = peer, address
                    self._changed.notify_all()
            if refusal is not None:
                host = printable(str(hello.get('host')))
                self._report(printable(f'Learner {task} on {host} is refused: {refusal}'))
                peer.send({'refused': refusal})
                return
            self._listen(peer, task)

    def _refusal(self, task: int, protocol: Any, theirs: dict[str, Any]) -> str | None:
        if protocol != PROTOCOL:
            return (
                f'The first learner runs another version of this program (protocol {PROTOCOL}, '
                f'here {protocol}): install the same one.'
            )
        if task in self._peers:
            return (
                f'There is another learner with --task={task} at {self._hosts[task]}: each '
                'needs a number of its own.'
            )
        for name in sorted({*self._settings, *theirs}):
            if self._settings.get(name) != theirs.get(name):
                return (
                    f'{flags_of(name)} is {theirs.get(name)} here and {self._settings.get(name)} '
                    'at the first learner: give all learners the same.'
                )
        if not 0 < task < len(self._member.addresses):
            return f'There is no learner with --task={task} among {len(self._member.addresses)}.'
        return None

    def _join(self) -> None:
        self._report(f'Waiting for the first learner at {self._group_address}')
        hello = {
            'task': self._member.task,
            'host': socket.gethostname(),
            'protocol': PROTOCOL,
            'settings': self._settings,
        }
        while True:
            with contextlib.suppress(Disconnected):
                peer = _PeerConnection(self._connect())
                peer.send(hello)
                with self._changed:
                    self._peers[0] = peer
                while (answer := peer.receive()) is not None:
                    if 'refused' in answer:
                        raise ConfigError(answer['refused'])
                    if 'begin' in answer:
                        self.run_id = answer['run_id']
                        self._has_begun = True
                        threading.Thread(
                            target=self._listen, args=(peer, 0), name='learner', daemon=True
                        ).start()
                        return
                peer.close()
            time.sleep(_RETRY_SECONDS)

    def _connect(self) -> Channel:
        try:
            return connect(self._group_address, KIND, self._member.secret, _SILENCE_SECONDS)
        except (WrongPeer, WrongSecret) as error:
            raise ConfigError(str(error)) from error

    def _beat(self) -> None:
        while not self._closed.wait(_HEARTBEAT_SECONDS):
            self._send({})

    def _listen(self, peer: '_PeerConnection', task: int) -> None:
        """Handles another learner's messages until it has ended."""
        while (message := peer.receive()) is not None:
            if 'lost' in message:
                self._end(message['lost'])
            with self._changed:
                if message.get('complete'):
                    self._complete.add(task)
                    self._changed.notify_all()
                elif {'episodes', 'actors', 'unrolls_of'} & message.keys():
                    self._news.append((task, message))
        with self._changed:
            self._peers.pop(task, None)
            self._changed.notify_all()
            # During the handshake it may reconnect.
            is_expected = self._finishing or task in self._complete or not self._has_begun
        if not is_expected:
            what = (
                f'has not been heard of for {_SILENCE_SECONDS:g} seconds'
                if peer.is_silent
                else 'has ended'
            )
            self._end(f'Learner {task} ({self._member.addresses[task]}) {what}.')

    def _end(self, reason: str) -> None:
        with self._changed:
            if self._reason is not None or self._finishing or self._stopped:
                return
            self._reason = reason
            stop = self._stop
            self._changed.notify_all()
        if self._member.is_first:
            self._send({'lost': reason})
        if stop is None:
            # The main thread may be inside TensorFlow, waiting for the learner that has ended.
            report_to_stderr(reason)
            os._exit(1)
        stop()
        abort_collectives(_ENDED)

    def _send(self, message: dict[str, Any]) -> None:
        with self._changed:
            peers = list(self._peers.values())
        for peer in peers:
            with contextlib.suppress(Disconnected):
                peer.send(message)

    def then(self, stop: Callable[[], Any]) -> None:
        """From now on, the end of another learner calls a function and makes `Learner.step` fail.

        Args:
          stop: called on another thread, at most once.
        """
        with self._changed:
            self._stop = stop
            reason = self._reason
        if reason is not None:
            stop()

    def stop(self) -> None:
        """Stops the training of all learners. May be called from any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._send({'lost': f'Learner {self._member.task} was stopped.'})
        abort_collectives(_ENDED)

    def explain(self, error: tf.errors.OpError) -> None:
        """Finds out, for `check`, why a step failed; usually because another learner has ended.

        Args:
          error: the error that the step raised.
        """
        with self._changed:
            is_known = self._changed.wait_for(
                lambda: self._reason is not None or self._stopped, _EXPLANATION_SECONDS
            )
        if not is_known:
            said = (error.message.strip().splitlines() or ['no reason given'])[0].rstrip('.')
            self._end(f'Learner {self._member.task} failed in an update: {said}.')

    def check(self) -> None:
        """Raises the reason if the training has ended for a reason other than `stop`.

        Raises:
          LearnerGroupError: one sentence.
        """
        if self._reason is not None:
            raise LearnerGroupError(
                f'{self._reason} Start all learners again: they continue from the last checkpoint.'
            )

    def finish(self) -> None:
        """Waits until all learners have taken their last step, since none may end before that."""
        if not self._member.is_first:
            self._send({'complete': True})
        with self._changed:
            self._changed.wait_for(lambda: self._peers.keys() <= self._complete, _FINISH_SECONDS)
            self._finishing = True
        if self._member.is_first:
            self._send({'complete': True})

    def tell(self, news: dict[str, Any]) -> None:
        """Sends the first learner entries for its log."""
        self._send(news)

    def collect(self, log: Log) -> None:
        """Records in the first learner's log what the other learners have sent."""
        with self._changed:
            news, self._news = self._news, []
        for task, message in news:
            if 'actors' in message:
                log.record_actors(message['actors'], task)
                continue
            if 'unrolls_of' in message:
                log.record_agent_steps(np.array(message['unrolls_of'], np.int32), message['steps'])
                continue
            level_ids, returns, frames, ends = message['episodes']
            log.record_episodes(
                np.array(level_ids, np.int32),
                np.array(returns, np.float32),
                np.array(frames, np.int32),
                np.array(ends, np.uint8),
            )


def warn_of_gradients(member: Member, report: Callable[[str], None]) -> None:
    """Reports that strangers can run code in this process, unless there is no network.

    TensorFlow's server, over which learners exchange gradients, has no authentication, listens on
    all interfaces and runs any graph that it receives.

    Args:
      member: this learner.
      report: takes the warning.
    """
    port = split_address(member.addresses[member.task])[1] + GRADIENTS_PORT_OFFSET
    if any(name != 'lo' for _, name in socket.if_nameindex()):
        report(
            f'WARNING: whoever reaches port {port} of this machine, over which learners exchange '
            'gradients, can run code in this process: see docs/distributed.md, then say '
            '--trusted_network.'
        )


def _is_in_use(port: int) -> bool:
    """Returns whether a process on this machine listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class FollowerLog(Log):
    """The log of any learner but the first; sends its records to the first learner."""

    def __init__(self, group: LearnerGroup, task: int, log_secs: float):
        """Makes a log that writes no files.

        Args:
          group: connection to the first learner.
          task: index of this learner.
          log_secs: seconds between records of the actors.
        """
        self._group = group
        self._task = task
        self._log_secs = log_secs
        self._started = self._written_at = time.monotonic()

    def message(self, text: str) -> None:
        """Shows a line."""
        report_to_stderr(f'Learner {self._task}: {text}')

    def record_update(self, metrics: Mapping[str, Any]) -> None:
        """Does nothing: the first learner records the same."""

    def record_actor_restart(self, count: int = 1) -> None:
        """Does nothing: actor jobs count their own."""

    def record_discarded_unrolls(self, count: int) -> None:
        """Does nothing: actor jobs count their own."""

    def record_stage_seconds(self, seconds: Mapping[str, float]) -> None:
        """Does nothing: the first learner's are in the log."""

    def record_test(self, result: TestResult) -> None:
        """Does nothing: only the first learner tests."""

    def record_episodes(
        self, level_ids: np.ndarray, returns: np.ndarray, frames: np.ndarray, ends: np.ndarray
    ) -> None:
        """See `Log.record_episodes`."""
        columns = np.broadcast_arrays(level_ids, returns, frames, ends)
        is_end = np.isin(columns[3], (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED))
        if is_end.any():
            self._group.tell({'episodes': [column[is_end].tolist() for column in columns]})

    def record_agent_steps(self, level_ids: np.ndarray, steps: int) -> None:
        """See `Log.record_agent_steps`."""
        self._group.tell({'unrolls_of': level_ids.tolist(), 'steps': steps})

    def record_actors(self, rows: Sequence[Mapping[str, Any]], learner: int = 0) -> None:
        """See `Log.record_actors`; `learner` is not used."""
        self._group.tell({'actors': list(rows)})

    @property
    def wall_seconds(self) -> float:
        """Seconds since this log was made."""
        return time.monotonic() - self._started

    @property
    def line_is_due(self) -> bool:
        """See `Log`."""
        return time.monotonic() - self._written_at >= self._log_secs

    @property
    def picture_is_due(self) -> bool:
        """Always False: the first learner records its own pictures."""
        return False

    def record_picture(self, name: str, pixels: np.ndarray) -> None:
        """Does nothing: the first learner records its own pictures."""

    def maybe_write(self, frames: int, agent_steps: int, updates: int) -> bool:
        """See `Log.maybe_write`."""
        if not self.line_is_due:
            return False
        self._written_at = time.monotonic()
        return True


class _PeerConnection:
    """A connection between two learners. A context manager; any thread may send.

    Attributes:
      is_silent: whether `receive` has returned None because no message arrived in time.
    """

    def __init__(self, channel: Channel):
        channel.set_deadline(_SILENCE_SECONDS)
        self._channel = channel
        self._sending = threading.Lock()
        self.is_silent = False

    def __enter__(self) -> '_PeerConnection':
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def send(self, message: Values) -> None:
        """Sends a message.

        Raises:
          Disconnected: the connection is broken.
        """
        with self._sending:
            self._channel.send(message)

    def receive(self) -> Values | None:
        """Returns the next message; None if the other end is gone, silent or not a learner."""
        try:
            return self._channel.receive(lambda _: 0)[0]
        except RemoteError as error:
            self.is_silent = isinstance(error, Silent)
            return None

    def close(self) -> None:
        """Ends the connection; `receive` returns None at both ends."""
        self._channel.shut()
