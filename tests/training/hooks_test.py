"""Tests of impala/training/hooks.py: what hooks see, when they run, and what their errors do."""

import json
import time

import pytest

from configs import config
from impala import training
from impala.config import ConfigError
from impala.runs.log import Log
from impala.training import hooks
from impala.training.hooks import Logging, NonFiniteGuard, StageTimer, Update


class RecordingLog(Log):
    """A log that records its calls in order, and whose lines are due always or never."""

    def __init__(self, line_is_due=True):
        self.due = line_is_due
        self.calls = []

    @property
    def line_is_due(self):
        return self.due

    def record_update(self, metrics):
        self.calls.append(metrics)

    def maybe_write(self, frames, agent_steps, updates):
        self.calls.append((frames, agent_steps, updates))
        return self.due


class Watch(hooks.Hook):
    """Records what it sees."""

    def __init__(self):
        self.updates, self.lines = [], []

    def after_update(self, update):
        self.updates.append(update._replace(batch=()))
        assert [part.actor_output.level_id.shape for part in update.batch] == [(2,)]

    def at_line(self, log):
        self.lines.append(len(self.updates))
        log.record_update({'seen': len(self.updates)})


def update(log=None, is_fresh=True, **metrics):
    return Update((), is_fresh, metrics, 3, 20, 80, None, log or RecordingLog())


def test_a_users_hook_sees_every_update_and_adds_to_lines(tmp_path):
    watch = Watch()
    training.train(config(tmp_path), hooks=[watch])
    assert [each.updates for each in watch.updates] == [1, 2, 3, 4, 5]
    assert [each.frames for each in watch.updates] == [20, 40, 60, 80, 100]
    assert all(each.is_fresh and 'loss/total' in each.metrics for each in watch.updates)
    # The last call is for what remains at the end.
    assert watch.lines == [1, 2, 3, 4, 5, 5]
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['seen'] for line in lines] == [1, 2, 3, 4, 5]


def test_an_error_of_a_hook_ends_the_run_and_saves_it(tmp_path):
    class Ends(training.Hook):
        def after_update(self, update):
            if update.updates == 2:
                raise training.TrainingError('Enough.')

    with pytest.raises(training.TrainingError, match='Enough'):
        training.train(config(tmp_path), hooks=[Ends()])
    assert (tmp_path / 'checkpoints' / 'ckpt-1.index').exists()
    # The run resumes from there.
    watch = Watch()
    training.train(config(tmp_path), hooks=[watch])
    assert [each.updates for each in watch.updates] == [3, 4, 5]


@pytest.mark.parametrize('line_is_due', [True, False])
def test_lines_are_written_after_all_hooks_have_recorded(line_is_due):
    log = RecordingLog(line_is_due)

    class Records(hooks.Hook):
        def after_update(self, update):
            update.log.calls.append('update')

        def at_line(self, log):
            log.calls.append('line')

    Logging([Records(), Records()]).after_update(update(log))
    assert log.calls == [
        'update',
        'update',
        *(['line', 'line'] if line_is_due else []),
        (80, 20, 3),
    ]


def test_policy_lags_of_reused_batches_are_logged_separately():
    log = RecordingLog()
    for is_fresh in (True, False):
        hooks.Metrics().after_update(update(log, is_fresh, policy_lag_max=3.0, gradient_norm=1.0))
    assert log.calls == [
        {'policy_lag_max': 3.0, 'gradient_norm': 1.0},
        {'reused_policy_lag_max': 3.0, 'gradient_norm': 1.0},
    ]


def test_only_consecutive_skipped_updates_end_a_run():
    guard = NonFiniteGuard(sample_reuse=2)
    for _ in range(3):
        for _ in range(2 * hooks.MAX_SKIPPED_UPDATES - 1):
            guard.after_update(update(skipped=1.0))
        guard.after_update(update(skipped=0.0))
    for _ in range(2 * hooks.MAX_SKIPPED_UPDATES - 1):
        guard.after_update(update(skipped=1.0))
    with pytest.raises(training.TrainingError, match='not finite in 20 updates in a row'):
        guard.after_update(update(skipped=1.0))


def test_stage_timer_includes_failed_stages():
    timer = StageTimer()
    for _ in range(2):
        with pytest.raises(KeyError), timer('a'):
            time.sleep(0.02)
            raise KeyError
    with timer('b'):
        pass
    assert timer.seconds.keys() == {'a', 'b'}
    assert timer.seconds['a'] >= 0.04
    assert timer.seconds['b'] < timer.seconds['a']


def test_a_profile_of_some_updates_is_written(tmp_path):
    run = config(tmp_path, profile_updates='2:4')
    training.train(run)
    (profile,) = (tmp_path / 'plugins' / 'profile').iterdir()
    assert any(path.name.endswith('.xplane.pb') for path in profile.iterdir())


def test_a_profile_ends_with_the_run(tmp_path):
    training.train(config(tmp_path, profile_updates='4:400'))
    assert list((tmp_path / 'plugins' / 'profile').iterdir())


@pytest.mark.parametrize('updates', ['4', '4:4', '5:4', 'a:b', '-1:3'])
def test_wrong_updates_to_profile_are_refused(tmp_path, updates):
    with pytest.raises(ConfigError, match='is not of the form 100:110'):
        config(tmp_path, profile_updates=updates)
