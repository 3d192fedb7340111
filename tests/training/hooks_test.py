"""Tests of impala/training/hooks.py: what hooks see, when they run, and what their errors do."""

import json
import time

import pytest
import tensorflow as tf
from agents import batch_of

from configs import config
from impala import training
from impala.config import ConfigError, LearnerConfig
from impala.experience.batch import UnrollBatch
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


class Counts(hooks.Hook):
    """Rewards actions by the number of updates that it has seen; the number is saved."""

    def at_start(self, spec, config):
        assert spec.observation['frame'].shape == (2,) and config.learner.batch_size == 2
        self.seen = tf.Module()
        self.seen.number = tf.Variable(1.0)

    @property
    def module(self):
        return self.seen

    def intrinsic_reward(self, batch):
        return tf.fill([10, 2], self.seen.number)

    def after_update(self, update):
        self.seen.number.assign_add(1.0)


class Other(Counts):
    """Another class of hooks."""


def intrinsic_rewards(logdir):
    lines = [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]
    return [line.get('intrinsic_reward') for line in lines]


def test_intrinsic_rewards_add_up_and_modules_of_hooks_resume(tmp_path):
    run = config(tmp_path, total_environment_frames=40)
    training.train(run)
    # A run may get hooks when it resumes, lose them, or get others.
    training.train(run.replace(total_environment_frames=80), hooks=[Counts(), Counts()])
    training.train(run.replace(total_environment_frames=120), hooks=[Other(), Counts()])
    assert intrinsic_rewards(tmp_path) == [None, None, 1 + 1, 2 + 2, 1 + 3, 2 + 4]


@pytest.mark.parametrize(
    ('reward', 'sentence'),
    [
        (lambda: None, r'returns None, and it must return a float32 tensor \(10, 2\)'),
        (lambda: tf.zeros([11, 2]), r'returns float32 \(11, 2\)'),
        (lambda: tf.zeros([10, 2], tf.float64), 'Bad.intrinsic_reward returns float64'),
    ],
)
def test_intrinsic_rewards_of_another_form_are_one_sentence(reward, sentence):
    class Bad(training.Hook):
        def intrinsic_reward(self, batch):
            return reward()

    rows = batch_of(LearnerConfig.of(batch_size=2, unroll_length=10))
    with pytest.raises(training.TrainingError, match=sentence):
        hooks.IntrinsicRewards([Bad()])([UnrollBatch(rows, None, None, None)])


def test_intrinsic_rewards_of_several_learners_are_refused(tmp_path):
    addresses = ('localhost:1', 'localhost:2')
    run = config(tmp_path, learner_addresses=addresses, task=0)
    intrinsic = hooks.IntrinsicRewards([Watch(), Counts()])
    with pytest.raises(ConfigError, match='of Counts cannot be combined with .*learner_addresses'):
        intrinsic.check(run)
    hooks.IntrinsicRewards([Watch()]).check(run)


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
