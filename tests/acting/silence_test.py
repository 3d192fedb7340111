import datetime

from impala.acting.silence import SilenceWatch, since
from impala.config import ActorsConfig


def looks(watch, sequence):
    """Returns the results of a watch for each (seconds, signs) in turn."""
    return [watch.look(now, signs) for now, signs in sequence]


def test_a_hang_is_reported_at_growing_intervals_and_times_out():
    watch = SilenceWatch(ActorsConfig(silence_secs=60, actor_timeout=500), longest_gap=10)
    due, timed_out = {}, []
    for now in range(0, 520, 10):
        silences = watch.look(now, {0: 'step 3', 1: now})
        assert not silences.back and 1 not in silences.due | silences.timed_out
        due |= {now: silences.due[0]} if silences.due else {}
        timed_out += [now] if 0 in silences.timed_out else []
    # The silence begins at the first look.
    assert due == {60: 60, 120: 120, 240: 240, 480: 480}
    assert timed_out == [500, 510]


def test_an_actor_that_waits_for_an_answer_is_not_silent():
    watch = SilenceWatch(ActorsConfig(silence_secs=60, actor_timeout=60), longest_gap=10)
    for now in range(0, 1000, 10):
        assert watch.look(now, {0: None}) == ({}, {}, {})
    # Silence counts from the answer.
    assert looks(watch, [(1000, {0: 'answered'}), (1010, {0: 'answered'})])[1] == ({}, {}, {})


def test_simultaneous_hangs_are_reported_together():
    watch = SilenceWatch(ActorsConfig(silence_secs=40, actor_timeout=0), longest_gap=10)
    reported = {}
    for now in range(0, 70, 10):
        # Actor 1 has hung 10 seconds longer than actor 2, and actor 3 only briefly.
        signs = {1: 'a', 2: now if now < 10 else 'b', 3: now if now < 40 else 'c'}
        if now == 60:
            signs[1] = 'back'
        silences = watch.look(now, signs)
        reported |= {now: silences} if any(silences) else {}
    assert reported == {40: ({1: 40, 2: 30}, {}, {}), 60: ({}, {1: 60}, {})}


def test_time_in_which_nothing_ran_does_not_count():
    """The watch's own process was stopped for an hour, or the machine slept."""
    watch = SilenceWatch(ActorsConfig(silence_secs=60, actor_timeout=60), longest_gap=5)
    for now in (0, 1, 3601, 7201, 7202):
        assert watch.look(now, {0: 'step'}) == ({}, {}, {})


def test_a_replaced_process_begins_anew():
    watch = SilenceWatch(ActorsConfig(silence_secs=60, actor_timeout=60), longest_gap=100)
    watch.look(0, {0: 'step'})
    watch.forget(0)
    assert watch.look(100, {0: 'step'}) == ({}, {}, {})
    # So does one that was absent for a while.
    looks(watch, [(150, {}), (200, {0: 'step'})])
    assert watch.look(250, {0: 'step'}) == ({}, {}, {})
    assert watch.look(260, {0: 'step'}) == ({0: 60}, {}, {0: 60})


def test_zero_means_never():
    watch = SilenceWatch(ActorsConfig(silence_secs=0, actor_timeout=0), longest_gap=1e9)
    assert looks(watch, [(0, {0: 'step'}), (1e8, {0: 'step'})])[1] == ({}, {}, {})


def test_the_start_of_a_silence_is_a_time_of_day():
    before = datetime.datetime.now()
    text = since(3600)
    after = datetime.datetime.now()
    hour = datetime.timedelta(hours=1)
    assert text in {f'3600 s, since {now - hour:%H:%M:%S}' for now in (before, after)}
