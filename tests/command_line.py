"""Runs experiment.py for tests."""

import contextlib
import csv
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

from warm_process import WarmProcess

TESTS = pathlib.Path(__file__).resolve().parent

PROGRAM = TESTS.parent / 'experiment.py'

PATIENCE_SECONDS = 180

NOISE = re.compile(r'oneDNN|cuda|absl::InitializeLog|TF-TRT|WARNING:tensorflow|rebuild TensorFlow')

# CartPole-v1 is the cheapest end-to-end check of learning: a random policy's mean return is 22.
CARTPOLE = (
    '--level_name=CartPole-v1',
    '--num_actors=8',
    # Each process takes a third of a second of processor time to start.
    '--envs_per_process=4',
    '--batch_size=8',
    '--unroll_length=20',
    '--learning_rate=0.003',
    '--epsilon=0.01',
    '--entropy_cost=0.01',
    '--gradient_clip_norm=40',
    '--log_secs=0.3',
    '--save_checkpoint_secs=2',
)

# A slow level, for runs that wait for other processes: it leaves them the processor.
PACED = '--level_name=levels:paced'


class Run:
    """A run of experiment.py in its own session, with its own folder for temporary files.

    A context manager: leaving it kills all processes of the run. `prefix` is a command that must
    exec the run; `program` may be a script that runs experiment.py; `network` is the name of a
    network namespace.
    """

    def __init__(
        self,
        folder,
        *flags,
        pythonpath=(),
        file_bytes=None,
        prefix=(),
        network=None,
        program=PROGRAM,
    ):
        self.temp_folder = folder / 'tmp'
        self.temp_folder.mkdir(parents=True)
        self.output_paths = folder / 'stdout', folder / 'stderr'
        environment = {k: v for k, v in os.environ.items() if k != 'TF_CPP_MIN_LOG_LEVEL'} | {
            'TMPDIR': str(self.temp_folder),
            'PYTHONPATH': os.pathsep.join(map(str, [*pythonpath, TESTS])),
        }
        self.process = self._start(program, flags, environment, folder, file_bytes, prefix, network)
        self.id = self.process.pid

    def _start(self, program, flags, environment, folder, file_bytes, prefix, network):
        if network is not None:
            prefix = ('ip', 'netns', 'exec', network, *prefix)

        def prepare():
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        with open(self.output_paths[0], 'wb') as stdout, open(self.output_paths[1], 'wb') as stderr:
            return subprocess.Popen(
                [*prefix, sys.executable, str(program), *map(str, flags)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd=folder,
                start_new_session=True,
                preexec_fn=prepare,
            )

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for process_id in [*self.children(), self.id]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.process.wait()

    @property
    def stdout(self):
        return self.output_paths[0].read_text()

    @property
    def stderr(self):
        return self.output_paths[1].read_text()

    def children(self):
        """Ids of the run's other live processes in any session, recognized by their TMPDIR."""
        mark = f'TMPDIR={self.temp_folder}\0'.encode()
        ids = []
        for entry in os.listdir('/proc'):
            if entry.isdigit() and int(entry) != self.id:
                # Zombies have no environment.
                with contextlib.suppress(OSError):
                    if mark in pathlib.Path('/proc', entry, 'environ').read_bytes():
                        ids.append(int(entry))
        return ids

    def actors(self):
        """Ids of the actor processes."""
        ids = []
        for process_id in self.children():
            with contextlib.suppress(OSError):
                if (
                    b'impala.acting.actor'
                    in pathlib.Path(f'/proc/{process_id}/cmdline').read_bytes()
                ):
                    ids.append(process_id)
        return ids

    def wait_until(self, happened):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert self.process.poll() is None, f'the run ended: {self.stdout}{self.stderr}'
            assert time.monotonic() < deadline, f'timed out: {self.stdout}{self.stderr}'
            time.sleep(0.05)

    def send(self, number):
        """Sends a signal to the whole session, as a terminal does."""
        os.killpg(self.id, number)

    def wait(self):
        """Waits for the end and returns the exit code; fails on leftovers or printed noise."""
        code = self.process.wait(PATIENCE_SECONDS)
        assert not NOISE.search(self.stdout + self.stderr), self.stderr
        assert 'Exception ignored' not in self.stderr
        self.assert_nothing_left()
        return code

    def assert_nothing_left(self):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.children() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.children()
        folders = [path for path in self.temp_folder.iterdir() if path.is_dir()]
        assert not folders


class WarmRun(Run):
    """A run with TensorFlow imported in advance, for tests of anything but the start of a run."""

    def _start(self, program, flags, environment, folder, file_bytes, prefix, network):
        assert not prefix
        return WarmProcess(
            program, flags, environment, folder, self.output_paths, file_bytes, network
        )


def metrics(logdir):
    """Returns the lines of metrics.jsonl; rejects NaN and infinity, which are not JSON."""

    def refuse(constant):
        raise AssertionError(f'{constant} in metrics.jsonl')

    path = logdir / 'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in lines if line.endswith('\n')]


def episodes(logdir):
    with open(logdir / 'episodes.csv', newline='') as file:
        return list(csv.DictReader(file))


def frames(logdir):
    lines = metrics(logdir)
    return lines[-1]['frames'] if lines else 0


def checkpoints(logdir):
    """Numbers of the checkpoints, ascending."""
    return sorted(int(path.stem[5:]) for path in (logdir / 'checkpoints').glob('ckpt-*.index'))


def sockets(process_id):
    found = []
    for path in pathlib.Path(f'/proc/{process_id}/fd').iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(path)
            if target.startswith('socket:'):
                found.append(target[len('socket:[') : -1])
    return found


def internet_sockets(process_id):
    """Inodes of the TCP and UDP sockets that a process holds."""
    inodes = set()
    for name in ('tcp', 'tcp6', 'udp', 'udp6'):
        path = pathlib.Path('/proc/net', name)
        if path.exists():
            inodes |= {line.split()[9] for line in path.read_text().splitlines()[1:]}
    return inodes & set(sockets(process_id))


def assert_one_sentence(run, code, pattern):
    assert run.wait() == code, run.stdout + run.stderr
    # Progress reports of a slow start do not count.
    text = re.sub('^Starting: .*\n', '', run.stderr, flags=re.MULTILINE)
    assert re.search(pattern, text), run.stderr
    assert 'Traceback' not in run.stderr
    assert run.stdout == ''
    # A second line may say where to find help.
    assert len(text.strip().splitlines()) <= 2
