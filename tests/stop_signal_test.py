import functools
import os
import signal
import threading
import time

import pytest

from impala import stop_signal

PATIENCE_SECONDS = 120


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_start_and_stops_the_run(number, request):
    # Whoever runs the tests may ignore it, as `nohup` does.
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
