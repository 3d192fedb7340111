import bdb
import functools
import os
import signal
import threading
import time

import pytest

from impala.runs import stop_signal

PATIENCE_SECONDS = 120


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_start_and_stops_the_run(number, request):
    # The tests may inherit an ignored signal, from `nohup` for example.
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stop_signal.StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(PATIENCE_SECONDS)
        assert stop.received

    stopped = threading.Event()
    with stop_signal.StopSignal() as stop:
        stop.then(stopped.set)
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stopped.wait(PATIENCE_SECONDS)
        assert stop.received
    with stop_signal.StopSignal() as stop:
        stop.then(stopped.clear)
    assert stopped.is_set()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert 'stop signal' not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize('is_started', [False, True])
def test_a_process_with_nothing_to_lose_is_ended_by_force(monkeypatch, is_started, capfd):
    """It is in a call that cannot be interrupted."""
    has_exited, codes = threading.Event(), []

    def exit_with(code):
        codes.append(code)
        has_exited.set()

    monkeypatch.setattr(stop_signal.os, '_exit', exit_with)
    monkeypatch.setattr(stop_signal, 'START_SECONDS', 0.01)
    with stop_signal.StopSignal() as stop:
        if is_started:
            stop.then(lambda: None, nothing_to_lose=True)
            os.kill(os.getpid(), signal.SIGINT)
        else:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(PATIENCE_SECONDS)
        assert has_exited.wait(PATIENCE_SECONDS)
        stop.begun()
    assert codes[0] == 130
    assert capfd.readouterr().err.startswith(stop_signal.INTERRUPTED)


@pytest.mark.parametrize('begins', [False, True])
def test_a_process_with_something_to_lose_is_not_ended_by_force(monkeypatch, begins):
    codes = []
    monkeypatch.setattr(stop_signal.os, '_exit', codes.append)
    monkeypatch.setattr(stop_signal, 'START_SECONDS', 0.01)
    stopped = threading.Event()
    with stop_signal.StopSignal() as stop:
        stop.then(stopped.set, nothing_to_lose=begins)
        if begins:
            stop.begun()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(PATIENCE_SECONDS)
        time.sleep(0.1)  # Ten times START_SECONDS.
    assert not codes


def test_work_that_may_be_left_unfinished_is_interrupted():
    stopped = threading.Event()
    with stop_signal.StopSignal() as stop:
        stop.then(stopped.set)
        with stop.interrupting():
            pass
        with pytest.raises(KeyboardInterrupt), stop.interrupting():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE_SECONDS)
        assert stopped.wait(PATIENCE_SECONDS)
        # Later blocks are not entered.
        with pytest.raises(KeyboardInterrupt), stop.interrupting():
            pytest.fail('the block was entered')


@pytest.mark.parametrize(('seconds', 'exits'), [(1e9, []), (0, [128 + signal.SIGTERM])])
def test_a_second_signal_ends_the_process_unless_it_comes_with_the_first(
    monkeypatch, seconds, exits
):
    codes = []
    monkeypatch.setattr(stop_signal.os, '_exit', codes.append)
    monkeypatch.setattr(stop_signal, 'SAME_SIGNAL_SECONDS', seconds)
    stopped = threading.Event()
    with stop_signal.StopSignal() as stop:
        stop.then(stopped.set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.wait(PATIENCE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
    assert codes == exits


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_at_any_time_in_debug_mode(number):
    before = signal.getsignal(number)
    with stop_signal.RaisedStopSignal() as stop:
        stop.then(lambda: pytest.fail('no other thread may act'))
        for _ in range(2):
            with pytest.raises(stop.raised), stop.interrupting():
                os.kill(os.getpid(), number)
                time.sleep(PATIENCE_SECONDS)
        # A debugger that catches it may go on.
        assert not stop.received
        assert 'stop signal' not in {thread.name for thread in threading.enumerate()}
    assert signal.getsignal(number) == before


@pytest.mark.parametrize('kind', [stop_signal.StopSignal, stop_signal.RaisedStopSignal])
def test_of_ignored_signals_only_sighup_remains_ignored(request, kind):
    for number in (signal.SIGINT, signal.SIGHUP):
        request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
        signal.signal(number, signal.SIG_IGN)
    with kind():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE_SECONDS)


@pytest.mark.parametrize('error', [KeyboardInterrupt, stop_signal.Terminated, bdb.BdbQuit])
def test_whatever_ends_debugging_is_an_interrupt(error):
    with pytest.raises(KeyboardInterrupt), stop_signal.RaisedStopSignal():
        raise error
    with pytest.raises(ZeroDivisionError), stop_signal.RaisedStopSignal():
        raise ZeroDivisionError
