"""Several learners and their actor jobs as real commands on this machine."""

import csv
import json
import os
import re
import signal
import time

import pytest
from command_line import (
    CARTPOLE,
    PACED,
    PROGRAM,
    WarmRun,
    assert_one_sentence,
    checkpoints,
    frames,
    metrics,
)
from ports import free_ports

ENDLESS = '--total_environment_frames=1000000000'
# Two learners take 4 unrolls of 20 steps each.
STEPS_PER_UPDATE = 2 * 4 * 20


@pytest.fixture
def addresses():
    """The flag with the addresses of two learners on the loopback interface."""
    return '--learner_addresses=' + ','.join(f'localhost:{port}' for port in free_ports(2))


def learner(folder, logdir, task, addresses, *flags, **settings):
    # Resolving `auto` must not start TensorFlow before the learners' strategy is created.
    return WarmRun(folder, *CARTPOLE, addresses, f'--task={task}', f'--logdir={logdir}',
                   '--batch_size=4', '--trusted_network', '--compute_dtype=auto', *flags,
                   **settings)  # fmt: skip


def actor(folder, task, addresses):
    return WarmRun(folder, '--job_name=actor', f'--task={task}', addresses,
                   '--envs_per_actor=4', '--envs_per_process=4')  # fmt: skip


def changed_program(folder, change):
    """Settings of a `WarmRun` that first runs the Python code in `change`."""
    program = folder / 'program.py'
    program.write_text(
        f'{change}\nimport runpy\nrunpy.run_path({str(PROGRAM)!r}, run_name="__main__")\n'
    )
    return {'program': program, 'pythonpath': [PROGRAM.parent]}


def tasks(logdir):
    """Numbers of the actors in the last line of metrics."""
    lines = metrics(logdir)
    return {row['task'] for row in lines[-1]['actors']} if lines else set()


def test_learners_train_one_model(tmp_path, addresses):
    logdir, nowhere = tmp_path / 'run', tmp_path / 'nowhere'
    endless = PACED, ENDLESS
    with (
        learner(tmp_path / 'first', logdir, 0, addresses, *endless) as first,
        learner(tmp_path / 'odd', nowhere, 1, addresses, *endless, '--entropy_cost=0.5') as odd,
        actor(tmp_path / 'a', 0, addresses) as a,
        actor(tmp_path / 'b', 1, addresses) as b,
    ):
        assert odd.wait() == 2
        assert re.search('--entropy_cost is 0.5 here and 0.01 at the first learner', odd.stderr)
        assert 'Waiting for the learners --task=1' in first.stderr
        with learner(tmp_path / 'second', nowhere, 1, addresses, *endless) as second:
            # The log has the actors of both learners.
            first.wait_until(lambda: tasks(logdir) == {0, 1})
            assert 'Actor 0 ' in first.stderr
            assert 'Actor 1 ' not in first.stderr
            assert 'Actor 1 ' in second.stderr
            first.wait_until(lambda: checkpoints(logdir))
            with (
                learner(tmp_path / 'third', tmp_path / 'other', 0, addresses, PACED) as third,
                learner(tmp_path / 'fourth', nowhere, 1, addresses, *endless) as fourth,
            ):
                for run, task in ((third, 0), (fourth, 1)):
                    assert run.wait() == 2
                    assert f'There is another learner with --task={task} at' in run.stderr
                    assert 'Traceback' not in run.stderr
            reached = frames(logdir)
            first.wait_until(lambda: frames(logdir) > reached)
            os.kill(second.id, signal.SIGKILL)
            killed_at = time.monotonic()
            second.process.wait()
        assert first.wait() == 1
        assert time.monotonic() - killed_at < 60
        assert re.search(r'Learner 1 \(localhost:\d+\) has ended. Start all', first.stderr)
        assert 'Traceback' not in first.stderr
        assert 'Cluster check' not in first.stderr
        assert not nowhere.exists()

        reached = frames(logdir)
        enough = f'--total_environment_frames={reached + 40_000}'
        with (
            learner(tmp_path / 'fifth', logdir, 0, addresses, PACED, enough) as first,
            learner(tmp_path / 'sixth', nowhere, 1, addresses, PACED, enough) as second,
        ):
            for each in (first, second, a, b):
                assert each.wait() == 0, each.stderr
                assert 'Traceback' not in each.stderr
        assert 'Resuming from' in first.stderr
        for each in (a, b):
            assert 'Training is complete.' in each.stdout
    lines = metrics(logdir)
    assert lines[-1]['frames'] >= reached + 40_000
    assert all(line['frames'] == STEPS_PER_UPDATE * line['updates'] for line in lines)
    assert all(row['rejected'] == 0 for row in lines[-1]['actors'])
    with open(logdir / 'episodes.csv', newline='') as file:
        returns = [float(row['episode_return']) for row in csv.DictReader(file)]
    # A frame is rewarded with 1, so the sum shows that the episodes of both learners are there.
    assert 0.8 * lines[-1]['frames'] < sum(returns) <= lines[-1]['frames']

    # Enough episodes to know their mean to a few steps.
    flags = '--mode=test', f'--logdir={logdir}', '--test_num_episodes=100'
    with WarmRun(tmp_path / 'reader', *flags) as reader:
        assert reader.wait() == 0, reader.stderr
    scores = json.loads((logdir / 'test_scores.json').read_text())['levels']['levels:paced']
    assert len(scores['returns']) == 100
    # A random policy's is 22, with a standard error of 1.2.
    assert scores['mean'] > 33


def test_learners_have_separate_replays(tmp_path, addresses):
    logdir = tmp_path / 'run'
    flags = ['--replay_fraction=0.5', '--total_environment_frames=2000']
    with (
        learner(tmp_path / 'first', logdir, 0, addresses, *flags) as first,
        learner(tmp_path / 'second', logdir, 1, addresses, *flags) as second,
        actor(tmp_path / 'a', 0, addresses) as a,
        actor(tmp_path / 'b', 1, addresses) as b,
    ):
        for each in (first, second, a, b):
            assert each.wait() == 0, each.stderr
    lines = metrics(logdir)
    # The first update is all fresh.
    expected = [(1 + line['updates']) * STEPS_PER_UPDATE // 2 for line in lines]
    assert [line['frames'] for line in lines] == expected
    assert lines[-1]['replayed_fraction'] == 0.5
    assert lines[-1]['replayed_policy_lag_mean'] > lines[-1]['policy_lag_mean']


@pytest.mark.parametrize(
    ('task', 'number', 'sentence'),
    [
        (0, signal.SIGTERM, 'Learner 0 was stopped.'),
        (1, signal.SIGTERM, 'Learner 1 was stopped.'),
        (0, signal.SIGKILL, r'Learner 0 \(localhost:\d+\) has ended.'),
        (1, signal.SIGSTOP, r'Learner 1 \(.*\) has not been heard of for 12 seconds.'),
    ],
    ids=['first stopped', 'second stopped', 'first killed', 'second hangs'],
)
def test_a_learner_that_ends_also_ends_the_others(tmp_path, addresses, task, number, sentence):
    """Learner 0 has an actor, and in its update waits for learner 1, which has none."""
    logdir = tmp_path / 'run'
    impatient = changed_program(
        tmp_path, 'from impala.cluster import learner_group\nlearner_group._SILENCE_SECONDS = 12.0'
    )
    with (
        learner(tmp_path / 'a', logdir, 0, addresses, **impatient) as first,
        learner(tmp_path / 'b', logdir, 1, addresses) as second,
        actor(tmp_path / 'actor', 0, addresses) as only,
    ):
        first.wait_until(lambda: 'Actor 0 ' in first.stderr)
        second.wait_until(lambda: 'one of 2 learners' in second.stderr)
        one, other = (first, second) if task == 0 else (second, first)
        os.kill(one.id, number)
        if number == signal.SIGTERM:
            # Only learner 0 saves checkpoints, and none before the first update.
            assert one.wait() == (130 if task == 0 else 0)
            assert 'Traceback' not in one.stderr
        assert other.wait() == 1
        assert re.search(f'^{sentence} Start all learners again', other.stderr, re.MULTILINE)
        assert 'Traceback' not in other.stderr
        only.send(signal.SIGTERM)
        assert only.wait() == 0
    assert not checkpoints(logdir)


def test_a_stopped_learner_says_so_even_if_its_signal_thread_is_late(tmp_path, addresses):
    late = changed_program(
        tmp_path,
        """
import threading, time
from impala.cluster.learner_group import LearnerGroup

stop = LearnerGroup.stop

def stop_late(group):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(3)
    stop(group)

LearnerGroup.stop = stop_late""",
    )
    logdir = tmp_path / 'run'
    with (
        learner(tmp_path / 'a', logdir, 0, addresses) as first,
        learner(tmp_path / 'b', logdir, 1, addresses, **late) as second,
    ):
        first.wait_until(lambda: 'one of 2 learners' in first.stderr)
        second.wait_until(lambda: 'one of 2 learners' in second.stderr)
        os.kill(second.id, signal.SIGTERM)
        assert second.wait() == 0
        assert first.wait() == 1
        assert re.search('^Learner 1 was stopped. Start all', first.stderr, re.MULTILINE)


def test_a_run_on_several_devices(tmp_path):
    logdir = tmp_path / 'run'
    flags = ['--learner_devices=/cpu:0,/cpu:1', '--total_environment_frames=3000']
    flags += ['--loss=appo', '--sample_reuse=3', '--target_update_steps=4', '--optimizer=adam']
    flags += ['--epsilon=0.1', '--normalize_advantages', '--kl_cost=0.1', '--loaders=4']
    with WarmRun(tmp_path / 'run of two', *CARTPOLE, f'--logdir={logdir}', *flags) as run:
        assert run.wait() == 0, run.stderr
    assert 'learner on /cpu:0 and /cpu:1' in run.stderr
    last = metrics(logdir)[-1]
    batches, more = divmod(last['frames'], 8 * 20)
    assert last['frames'] >= 3000
    assert more == 0
    # The run ends with the last frame, so the last batch is used once.
    assert last['updates'] == (batches - 1) * 3 + 1
    assert checkpoints(logdir)


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['--task=2', '--learner_addresses=a:8000,b:8000'], '--task=2: there are 2 --learner_addr'),
        (['--learner_addresses=a:8000,b:8000'], '--learner_addresses needs the number'),
        (['--learner_devices=gpu0'], "'gpu0' is not a valid device"),
        (
            [*CARTPOLE, '--batch_size=3', '--learner_devices=/cpu:0,/cpu:1'],
            '--batch_size=3 does not fit: a batch of 3 unrolls cannot be divided among 2',
        ),
    ],
)
def test_bad_flags(tmp_path, flags, sentence):
    flags = [f'--logdir={tmp_path / "run"}', '--trusted_network', *flags]
    with WarmRun(tmp_path / 'bad', *flags) as run:
        assert_one_sentence(run, 2, sentence)
