"""Tests of how actor processes are started and ended, and of what is asked of levels beforehand."""

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
from impala.acting.actor_processes import ActorError, ActorHost
from impala.config import ActorsConfig, ConfigError, with_common_actions
from impala.environments import EnvironmentConfig
from impala.errors import LevelError
from impala.runs import start_progress


def test_the_folder_goes_when_its_janitor_was_killed():
    with ActorHost(EnvironmentConfig()) as actor_host:
        folder = actor_host.config.temp_folder
        assert os.path.isdir(folder)
        janitor(psutil.Process(), folder).kill()
    assert not os.path.exists(folder)


def test_specs_come_from_a_process_of_their_own():
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


def test_several_levels_have_one_spec_or_are_refused_by_name():
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


def test_several_atari_games_have_one_set_of_actions():
    names = ['ALE/Pong-v5', 'ALE/Breakout-v5']
    with ActorHost(EnvironmentConfig()) as actor_host, pytest.raises(LevelError, match='actions'):
        actor_host.common_spec(names, 1)
    config = with_common_actions(EnvironmentConfig(), names)
    with ActorHost(config) as actor_host:
        assert actor_host.common_spec(names, 1).num_actions == 18
    assert with_common_actions(EnvironmentConfig(), names[:1]) == EnvironmentConfig()


def test_what_an_environment_starts_neither_holds_up_its_description_nor_stays():
    """It holds the pipes of the process that tells what the level is like."""
    with ActorHost(EnvironmentConfig()) as actor_host:
        spec = actor_host.environment_spec('troubled_levels:has_a_fork', 1)
        assert spec == troubled_levels.Level.spec
        (path,) = glob.glob(f'{actor_host.config.temp_folder}/child-*')
        wait_until(lambda: not is_running(int(path.rpartition('-')[2])))


def test_an_environment_that_is_never_made_is_named_and_given_up(monkeypatch):
    monkeypatch.setattr(actor_processes, 'WATCH_SECONDS', 0.05)
    monkeypatch.setattr(start_progress, '_FIRST_SECONDS', 0.1)
    monkeypatch.setattr(start_progress, '_PAUSE_SECONDS', 0.5)
    told = []
    with (
        ActorHost(
            EnvironmentConfig(), ActorsConfig(silence_secs=0.3, actor_timeout=3.0), told.append
        ) as actor_host,
        pytest.raises(ActorError) as error,
    ):
        actor_host.common_spec(['troubled_levels:good', 'troubled_levels:hangs_to_start'], 1)
    text = str(error.value)
    assert 'The environment troubled_levels:hangs_to_start failed.' in text
    assert 'It did not answer for 3 seconds (--actor_timeout).' in text
    # Where it hangs.
    assert 'in hangs_to_start' in text
    assert 'Starting: troubled_levels:hangs_to_start is tried, level 2 of 2' in told
    assert any(
        line.startswith('The environment troubled_levels:hangs_to_start, which is tried before')
        and line.endswith('the run ends after 3 s (--actor_timeout)')
        for line in told
    )


def test_an_environment_that_ends_its_process_failed():
    with ActorHost(EnvironmentConfig()) as actor_host, pytest.raises(ActorError) as error:
        actor_host.environment_spec('troubled_levels:exits_to_start', 1)
    assert 'exits_to_start failed. It ended with exit code 83.' in str(error.value)


def test_an_interruption_ends_the_process_that_describes(monkeypatch):
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
            actor_host.environment_spec('troubled_levels:hangs_to_start', 1)
        assert processes[0].returncode is not None
        assert not os.listdir(os.path.join(actor_host.config.temp_folder, 'process_groups'))


def test_a_process_that_was_ended_gets_no_more_signals(monkeypatch):
    with ActorHost(EnvironmentConfig()) as actor_host, tempfile.TemporaryFile() as errors:
        process = actor_host.start({'no': 'settings'}, [], errors)
        code = actor_host.end(process)
        # By now the system may have given its number to somebody else's group.
        signals = []
        monkeypatch.setattr(os, 'killpg', lambda *sent: signals.append(sent))
        assert actor_host.end(process) == code
        actor_host.signal(process, signal.SIGTERM)
        assert not signals


def test_open_files_are_had_or_refused_in_a_sentence(monkeypatch):
    limits = [(256, 256)]
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: limits[-1])
    monkeypatch.setattr(resource, 'setrlimit', lambda kind, limit: limits.append(limit))
    with pytest.raises(ConfigError) as error:
        actor_processes.require_files(200, 'num_actors', 400)
    text = str(error.value)
    assert text.startswith('--num_actors=400 needs ')
    assert 'permits 256 (`ulimit -n`)' in text
    # As many as the sentence says are possible.
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
def test_a_process_that_is_not_permitted_is_one_sentence(number, limit, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with ActorHost(EnvironmentConfig()) as actor_host:
        monkeypatch.setattr(actor_processes.subprocess, 'Popen', refuse)
        with pytest.raises(ConfigError, match=f'no more {limit}.*--num_actors'):
            actor_host.environment_spec('troubled_levels:good', 1)
