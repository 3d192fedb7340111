"""Tests of impala/acting/in_process.py and of the debug mode that it serves."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from command_line import PATIENCE_SECONDS, PROGRAM, TESTS, checkpoints

from configs import config
from impala import training
from impala.acting.actor_processes import ActorError
from impala.config import ConfigError
from impala.errors import LevelError
from impala.runs import files, stop_signal

OWN_PARTS = """
import numpy as np
import sonnet as snt

import impala
from environments import Environment
from impala.learning import losses
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd


class Level(Environment):
    spec = EnvironmentSpec({'frame': ArraySpec((2,), 'float32')}, 2, 1)

    def reset(self):
        self.steps = 0
        return {'frame': np.zeros(2, np.float32)}

    def step(self, action):
        self.steps += 1
        if self.steps == 3 and seen == ['torso']:
            seen.append('step')
            breakpoint()
        if self.steps == 5:
            return 1.0, EpisodeEnd.TERMINATED, self.reset()
        return 0.0, EpisodeEnd.NOT_ENDED, {'frame': np.ones(2, np.float32)}


def make(seed, config):
    return Level()


class Torso(snt.Module):
    def __init__(self):
        super().__init__()
        self.layer = snt.Linear(3)

    def __call__(self, frame):
        if not seen:
            seen.append('torso')
            breakpoint()
        return self.layer(frame)


def loss(inputs, config):
    found = losses.vtrace_loss(inputs, config)
    if 'loss' not in seen:
        seen.append('loss')
        breakpoint()
    return found


class Hook(impala.Hook):
    def after_update(self, update):
        if update.updates == 3:
            breakpoint()


seen = []
"""

RETRY_SECONDS = 5


class Terminal:
    """experiment.py on a terminal of its own, typed at; a context manager that kills it."""

    def __init__(self, folder, *flags):
        (folder / 'own_parts.py').write_text(OWN_PARTS)
        self.number, theirs = os.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), '--debug', *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # Without it, readline would write escape sequences.
            env=os.environ | {'PYTHONPATH': f'{folder}{os.pathsep}{TESTS}', 'TERM': 'dumb'},
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(theirs)
        self.text = ''
        self.end = 0

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()
        os.close(self.number)

    def read_until(self, text):
        """Returns what is printed up to a text that it waits for."""
        assert self._arrives(text, PATIENCE_SECONDS), self.text
        return self._up_to(text)

    def _arrives(self, text, seconds):
        """Returns whether a text is printed in time."""
        deadline = time.monotonic() + seconds
        while text not in self.text[self.end :]:
            if time.monotonic() > deadline:
                return False
            if select.select([self.number], [], [], 0.1)[0]:
                try:
                    new = os.read(self.number, 65536)
                except OSError:  # The program has ended.
                    new = b''
                assert new, self.text
                self.text += new.decode().replace('\r\n', '\n')
        return True

    def _up_to(self, text):
        """Returns what has been printed since the last call, up to a text."""
        start, self.end = self.end, self.text.index(text, self.end) + len(text)
        return self.text[start : self.end]

    def answer(self, line):
        """Types a line at the debugger's prompt and returns what it prints up to the next one."""
        os.write(self.number, f'{line}\n'.encode())
        return self.read_until('(Pdb) ')

    def interrupt(self, text):
        """Types Ctrl-C and returns what is printed up to a text that it waits for.

        Again every few seconds: readline sleeps through a signal that comes between its prompt and
        its wait for a key.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        os.write(self.number, b'\x03')
        while not self._arrives(text, RETRY_SECONDS):
            assert time.monotonic() < deadline, self.text
            os.write(self.number, b'\x03')
        return self._up_to(text)


def test_a_debugger_stops_in_each_of_the_users_own_parts(tmp_path):
    """On a real terminal, with Ctrl-C at the prompt and while the program runs."""
    logdir = tmp_path / 'run'
    flags = (
        '--level_name=own_parts:make', '--torso=own_parts:Torso', '--loss=own_parts:loss',
        '--hooks=own_parts:Hook', f'--logdir={logdir}', '--num_actors=2', '--batch_size=2',
        '--unroll_length=4', '--log_secs=0',
    )  # fmt: skip
    with Terminal(tmp_path, *flags) as terminal:
        assert '__call__()' in terminal.read_until('(Pdb) ')
        assert '[1, 2]' in terminal.answer('p list(frame.shape)')
        assert 'step()' in terminal.answer('c')
        assert '333' in terminal.answer('p self.steps * 111')
        # It cancels the line, however often, and nothing else happens.
        for _ in range(3):
            terminal.interrupt('KeyboardInterrupt')
            terminal.read_until('(Pdb) ')
            time.sleep(stop_signal.SAME_SIGNAL_SECONDS / 2)
        assert 'loss()' in terminal.answer('c')
        assert "['baseline', 'entropy', 'policy_gradient']" in terminal.answer(
            'sorted(found.parts)'
        )
        assert '(5, 2)' in terminal.answer('p inputs.env_outputs.reward.numpy().shape')
        assert 'after_update()' in terminal.answer('c')
        assert '24' in terminal.answer('p update.agent_steps')
        # From here on it runs until it is interrupted.
        os.write(terminal.number, b'c\n')
        terminal.read_until('frames (')
        terminal.interrupt('Program interrupted')
        terminal.read_until('(Pdb) ')
        os.write(terminal.number, b'q\n')
        text = terminal.read_until('The same command resumes from there.')
        assert terminal.process.wait(PATIENCE_SECONDS) == 0
    assert 'Traceback' not in text
    assert checkpoints(logdir) == [1]


def _weights(path):
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith('learner/') and '.ATTRIBUTES/VARIABLE_VALUE' in name
    }


def _lines(logdir):
    return [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_learns_the_same_as_with_processes_and_graphs(tmp_path):
    """The level leaves the policy no choice, so that both learn from the same unrolls."""
    runs = []
    for debug in (False, True):
        logdir = tmp_path / str(debug)
        run = config(
            logdir, level_name='levels:determined', num_actors=1, unroll_length=5,
            learning_rate=0.01, total_environment_frames=60, debug=debug,
        )  # fmt: skip
        runs.append((_weights(training.train(run)), _lines(logdir), logdir))
    (weights, lines, logdir), (debug_weights, debug_lines, debug_logdir) = runs
    assert weights.keys() == debug_weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(debug_weights[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # The last line may report the end of the actors.
    for name in ('frames', 'loss/total', 'gradient_norm', 'loss/baseline'):
        values, debug_values = ([line[name] for line in each[:6]] for each in (lines, debug_lines))
        np.testing.assert_allclose(debug_values, values, rtol=1e-4, err_msg=name)
    assert len({line['loss/total'] for line in lines[:6]}) == 6
    episodes = [
        file.read_text() for file in (logdir / 'episodes.csv', debug_logdir / 'episodes.csv')
    ]
    assert _without_time(episodes[0]) == _without_time(episodes[1])


def _without_time(text):
    rows = [line.split(',') for line in text.splitlines()]
    (time_column,) = [i for i, name in enumerate(rows[0]) if 'seconds' in name]
    return [row[:time_column] + row[time_column + 1 :] for row in rows]


def test_actors_take_turns_in_this_thread_and_nothing_is_left(tmp_path):
    threads = {*threading.enumerate()}
    others = []

    class Look(training.Hook):
        def after_update(self, update):
            assert threading.current_thread() is threading.main_thread()
            others.extend({*threading.enumerate()} - threads)
            assert pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text() == children
            actors.append(update.batch[0].actors.numpy().tolist())

    actors = []
    children = pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text()
    before = signal.getsignal(signal.SIGINT)
    run = config(tmp_path, level_name='levels:short,levels:long', num_actors=3, debug=True)
    training.train(run, hooks=[Look()])
    assert actors == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 0]]
    assert not others
    assert not tf.config.functions_run_eagerly()
    assert signal.getsignal(signal.SIGINT) == before
    # Actors 0 and 2 have episodes of 5 steps, actor 1 one episode of 20; unrolls have 10.
    rows = list(files.read_episodes(run.run.logdir))
    assert [row['level'] for row in rows].count('levels:short') == 14
    assert [row['level'] for row in rows].count('levels:long') == 1


def test_replayed_and_discarded_unrolls(tmp_path, capfd):
    """The reward of every 37th step is infinite."""
    run = config(
        tmp_path, level_name='levels:sometimes_infinite', unroll_length=2, replay_fraction=0.5,
        replay_capacity=9, total_environment_frames=100, debug=True,
    )  # fmt: skip
    training.train(run)
    lines = _lines(tmp_path)
    assert lines[-1]['frames'] == 100
    assert sum(line['unrolls_discarded'] for line in lines) >= 2
    assert sum(line['updates_skipped'] for line in lines) == 0
    assert [line['replayed_fraction'] for line in lines] == [0] + [0.5] * (len(lines) - 1)
    text = capfd.readouterr().err
    assert text.count('WARNING: the reward of levels:sometimes_infinite is inf') == 1


def test_an_error_of_an_environment_is_its_own(tmp_path):
    with pytest.raises(RuntimeError, match='the joystick is broken'):
        training.train(config(tmp_path / '1', level_name='levels:failing', debug=True))
    assert not tf.config.functions_run_eagerly()
    with pytest.raises(ActorError, match="the observation 'frame' of levels:not_a_number is nan"):
        run = config(tmp_path / '2', level_name='levels:not_a_number', unroll_length=1, debug=True)
        training.train(run)
    with pytest.raises(ActorError, match='but its spec declares'):
        training.train(
            config(tmp_path / '3', level_name='troubled_levels:breaks_its_declaration', debug=True)
        )
    with pytest.raises(LevelError, match=r'differ in their actions: levels:short has 2, but'):
        levels = 'levels:short,levels:three_actions'
        training.train(config(tmp_path / '4', level_name=levels, debug=True))
    with pytest.raises(LevelError, match='Its map is missing'):
        training.train(config(tmp_path / '5', level_name='levels:incomplete', debug=True))
    with pytest.raises(ConfigError, match='--num_actors=2 would leave some of the 3 levels out'):
        levels = 'levels:short,levels:long,levels:lives'
        training.train(config(tmp_path / '6', level_name=levels, debug=True))


def test_an_interrupted_run_is_saved_and_resumes_without_debugging(tmp_path):
    class Interrupts(training.Hook):
        def after_update(self, update):
            if update.updates == 2:
                signal.raise_signal(signal.SIGINT)

    run = config(tmp_path, debug=True)
    path = training.train(run, hooks=[Interrupts()])
    assert path == str(tmp_path / 'checkpoints' / 'ckpt-1')
    assert '--debug' not in (tmp_path / 'flags.txt').read_text()
    assert training.train(run.replace(debug=False)) == str(tmp_path / 'checkpoints' / 'ckpt-2')
    assert [line['frames'] for line in _lines(tmp_path)][-1] == 100
