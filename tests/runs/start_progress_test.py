import threading

from impala.runs import start_progress

PATIENCE_SECONDS = 60


def test_a_slow_start_reports_its_progress(monkeypatch):
    monkeypatch.setattr(start_progress.time, 'monotonic', lambda: 100.0)
    told, done = [], 0
    progress = start_progress.StartProgress(told.append, lambda: f'{done} of 30 are up')
    times = []
    for now in range(100, 131):
        done = now - 100
        before = len(told)
        progress.look(now)
        times += [done] * (len(told) - before)
    # After 2 seconds, and then 4, 6 and 9 seconds later.
    assert times == [2, 6, 12, 21]
    assert told[1] == 'Starting: 6 of 30 are up'


def test_a_fast_start_reports_nothing(monkeypatch):
    told, has_told = [], threading.Event()

    def report(text):
        told.append(text)
        has_told.set()

    with start_progress.starting(report, 'the network is built'):
        pass
    monkeypatch.setattr(start_progress, '_FIRST_SECONDS', 0.01)
    with start_progress.starting(report, 'the train step is traced'):
        assert has_told.wait(PATIENCE_SECONDS)
    assert told == ['Starting: the train step is traced']
