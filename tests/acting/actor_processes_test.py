"""Tests of starting and ending actor processes, and of reading the specs of levels beforehand."""

import errno
import glob
import os
import resource
import signal
import tempfile

import psutil
import pytest
import troubled_levels
from processes import is_running, janitor, wait_until

from impala.acting import actor_processes
from impala.acting.actor_processes import ActorError, ActorHost, shared_spec
from impala.config import ActorsConfig, ConfigError, with_common_actions
from impala.environments import EnvironmentConfig
from impala.errors import LevelError
from impala.runs import start_progress
from impala.trajectory import ArraySpec, EnvironmentSpec, Part


def test_the_folder_is_removed_even_if_its_janitor_was_killed():
    with ActorHost(EnvironmentConfig()) as actor_host:
        folder = actor_host.config.temp_folder
        assert os.path.isdir(folder)
        janitor(psutil.Process(), folder).kill()
    assert not os.path.exists(folder)


def test_specs_are_read_in_a_separate_process():
    with ActorHost(EnvironmentConfig()) as actor_host:
        spec = actor_host.environment_spec('troubled_levels:good', 1)
        assert spec == troubled_levels.Level.spec
        with pytest.raises(LevelError, match=r'^.*no_such_module.*$'):
            actor_host.environment_spec('no_such_module:level', 1)
        with pytest.raises(
            LevelError, match=r'RuntimeError: there is no joystick \(troubled_levels.py, line \d+\)'
        ):
            actor_host.environment_spec('troubled_levels:fails_to_start', 1)
        with pytest.raises(ActorError, match='engine: out of polygons'):
            actor_host.environment_spec('troubled_levels:prints_and_exits', 1)


def test_levels_without_a_common_spec_are_refused_by_name():
    with ActorHost(EnvironmentConfig()) as actor_host:
        spec = actor_host.common_spec(['levels:short', 'levels:long', 'levels:short'], 1)
        assert spec == actor_host.environment_spec('levels:long', 1)
        for other, what in (
            ('levels:wide', 'observations: levels:short has frame float32 2, but levels:wide'),
            ('levels:three_actions', 'actions: levels:short has 2, but levels:three_actions 3'),
        ):
            with pytest.raises(LevelError, match=what):
                actor_host.common_spec(['levels:short', other, 'levels:long'], 1)
        with pytest.raises(LevelError) as error:
            actor_host.common_spec(
                ['levels:none', 'levels:short', 'levels:incomplete', 'CartPol-v1'], 1
            )
        text = str(error.value)
        assert text.startswith('3 of the 4 levels cannot be played here.')
        assert 'levels:incomplete: Its map is missing.' in text
        assert "CartPol-v1: Gymnasium has no 'CartPol-v1'. Did you mean 'CartPole-v1'?" in text
        assert 'levels:short' not in text
        with pytest.raises(ActorError, match='(?s)troubled_levels:prints_and_exits.*polygons'):
            actor_host.common_spec(['levels:short', 'troubled_levels:prints_and_exits'], 1)


def test_levels_whose_numbers_mean_something_else_are_refused():
    numbers = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, 2, 1)
    choice = ArraySpec((4,), 'float32', parts=(Part('categories', (3,)), Part('bits', (1,))))
    choices = EnvironmentSpec({'frame': choice}, 2, 1)
    assert shared_spec({'a': choices, 'b': choices}) == choices
    with pytest.raises(LevelError) as error:
        shared_spec({'a': numbers, 'b': choices})
    assert 'differ in their observations: a has frame float32 4, but b ' in str(error.value)
    assert 'b frame float32 4 (categories 3, bits 1).' in str(error.value)


def test_several_atari_games_share_a_set_of_actions():
    names = ['ALE/Pong-v5', 'ALE/Breakout-v5']
    with ActorHost(EnvironmentConfig()) as actor_host, pytest.raises(LevelError, match='actions'):
        actor_host.common_spec(names, 1)
    config = with_common_actions(EnvironmentConfig(), names)
    with ActorHost(config) as actor_host:
        assert actor_host.common_spec(names, 1).num_actions == 18
    assert with_common_actions(EnvironmentConfig(), names[:1]) == EnvironmentConfig()


def test_child_processes_of_an_environment_do_not_block_its_spec_and_are_killed():
    """The child holds the pipes of the process that sends the spec."""
    with ActorHost(EnvironmentConfig()) as actor_host:
        spec = actor_host.environment_spec('troubled_levels:has_a_fork', 1)
        assert spec == troubled_levels.Level.spec
        (path,) = glob.glob(f'{actor_host.config.temp_folder}/child-*')
        wait_until(lambda: not is_running(int(path.rpartition('-')[2])))


def test_an_environment_that_hangs_at_start_is_named_and_given_up(monkeypatch):
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.05)
    monkeypatch.setattr(start_progress, '_FIRST_SECONDS', 0.1)
    monkeypatch.setattr(start_progress, '_PAUSE_SECONDS', 0.5)
    reports = []
    with (
        ActorHost(
            EnvironmentConfig(), ActorsConfig(silence_secs=0.3, actor_timeout=3.0), reports.append
        ) as actor_host,
        pytest.raises(ActorError) as error,
    ):
        actor_host.common_spec(['troubled_levels:good', 'troubled_levels:hangs_at_start'], 1)
    text = str(error.value)
    assert 'The environment troubled_levels:hangs_at_start failed.' in text
    assert 'It did not answer for 3 seconds (--actor_timeout).' in text
    # The report says where it hangs.
    assert 'in hangs_at_start' in text
    assert 'Starting: troubled_levels:hangs_at_start is tried, level 2 of 2' in reports
    assert any(
        line.startswith('The environment troubled_levels:hangs_at_start, which is tried before')
        and line.endswith('the run ends after 3 s (--actor_timeout)')
        for line in reports
    )


def test_an_environment_that_ends_its_process_has_failed():
    with ActorHost(EnvironmentConfig()) as actor_host, pytest.raises(ActorError) as error:
        actor_host.environment_spec('troubled_levels:exits_at_start', 1)
    assert 'exits_at_start failed. It ended with exit code 83.' in str(error.value)


def test_an_interruption_ends_the_process_that_reads_the_spec(monkeypatch):
    processes = []
    start = ActorHost.start

    def start_and_remember(*args):
        processes.append(start(*args))
        return processes[-1]

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ActorHost, 'start', start_and_remember)
    monkeypatch.setattr(actor_processes, 'have_ended', interrupt)
    with ActorHost(EnvironmentConfig()) as actor_host:
        with pytest.raises(KeyboardInterrupt):
            actor_host.environment_spec('troubled_levels:hangs_at_start', 1)
        assert processes[0].returncode is not None
        assert not os.listdir(os.path.join(actor_host.config.temp_folder, 'process_groups'))


def test_an_ended_process_gets_no_more_signals(monkeypatch):
    with ActorHost(EnvironmentConfig()) as actor_host, tempfile.TemporaryFile() as errors:
        process = actor_host.start({'no': 'settings'}, [], errors)
        code = actor_host.end(process)
        # By now the system may have reused its id for an unrelated group.
        signals = []
        monkeypatch.setattr(os, 'killpg', lambda *sent: signals.append(sent))
        assert actor_host.end(process) == code
        actor_host.signal(process, signal.SIGTERM)
        assert not signals


def test_the_limit_of_open_files_is_raised_or_reported(monkeypatch):
    limits = [(256, 256)]
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: limits[-1])
    monkeypatch.setattr(resource, 'setrlimit', lambda kind, limit: limits.append(limit))
    with pytest.raises(ConfigError) as error:
        actor_processes.require_files(200, 'num_actors', 400)
    text = str(error.value)
    assert text.startswith('--num_actors=400 needs ')
    assert 'permits 256 (`ulimit -n`)' in text
    # The number that the sentence gives is possible.
    possible = int(text.partition('no more than ')[2].split()[0])
    actor_processes.require_files(possible, 'num_actors', 400)
    assert len(limits) == 1
    with pytest.raises(ConfigError):
        actor_processes.require_files(possible + 1, 'num_actors', 400)

    for hard in (4096, resource.RLIM_INFINITY):
        limits[:] = [(256, hard)]
        actor_processes.require_files(200, 'num_actors', 400)
        assert 400 < limits[-1][0] <= 4096 and limits[-1][1] == hard
    limits[:] = [(resource.RLIM_INFINITY, resource.RLIM_INFINITY)]
    actor_processes.require_files(10**6, 'num_actors', 10**6)


@pytest.mark.parametrize(
    ('number', 'limit'),
    [(errno.EAGAIN, 'processes .`ulimit -u`'), (errno.EMFILE, 'open files .`ulimit -n`')],
)
def test_a_process_that_is_not_permitted_raises_one_sentence(number, limit, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with ActorHost(EnvironmentConfig()) as actor_host:
        monkeypatch.setattr(actor_processes.subprocess, 'Popen', refuse)
        with pytest.raises(ConfigError, match=f'no more {limit}.*--num_actors'):
            actor_host.environment_spec('troubled_levels:good', 1)
