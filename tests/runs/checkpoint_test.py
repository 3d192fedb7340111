"""Tests of impala/runs/checkpoint.py, on real files with real damage and limited space."""

import contextlib
import os
import pathlib
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from impala.runs import checkpoint
from impala.runs import files as run_files

NUM_WEIGHTS = 5000


class Learner(tf.Module):
    """A stand-in for what a learner saves: weights, an optimizer slot and counters."""

    def __init__(self, num_weights=NUM_WEIGHTS):
        super().__init__()
        self.weights = tf.Variable(tf.zeros([num_weights]))
        self.slots = [tf.Variable(tf.ones([num_weights]))]
        self.updates = tf.Variable(0, dtype=tf.int64)

    def train(self, updates):
        """Sets values that follow from the number of updates."""
        self.updates.assign(updates)
        self.weights.assign(tf.random.stateless_normal(self.weights.shape, [updates, 0]))
        self.slots[0].assign(tf.random.stateless_normal(self.weights.shape, [updates, 1]))

    def numpy(self):
        """Returns all values."""
        return [variable.numpy() for variable in self.variables]


def write_flags(logdir, text):
    path = os.path.join(logdir, run_files.FLAG_FILE)
    run_files.write_atomically(path, text)
    return path


def trained(updates, **kwargs):
    learner = Learner(**kwargs)
    learner.train(updates)
    return learner


def assert_same(learner, other):
    for left, right in zip(learner.numpy(), other.numpy(), strict=True):
        np.testing.assert_array_equal(left, right)


def save_two(logdir):
    """Saves after 1 and 2 updates."""
    learner = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, learner)
    for updates in (1, 2):
        learner.train(updates)
        checkpointer.save(10.0 * updates)
    return checkpointer.latest


def files_under(logdir):
    folder = os.path.join(logdir, 'checkpoints')
    return sorted(
        os.path.join(root, name)
        for root, folders, files in os.walk(folder)
        for name in [*folders, *files]
    )


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """Makes the operating system refuse to write files beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def logdir(tmp_path):
    return str(tmp_path / 'log (1)')


def test_restoring_nothing_creates_nothing(logdir):
    checkpointer = checkpoint.Checkpointer(logdir, Learner())
    assert not checkpointer.restore()
    assert checkpointer.latest is None
    assert not os.path.exists(logdir)


def test_restores_everything(logdir):
    learner = trained(7)
    saver = checkpoint.Checkpointer(logdir, learner)
    path = saver.save(123.456)
    assert path == saver.latest == os.path.join(logdir, 'checkpoints', 'ckpt-1')

    restored = Learner()
    restorer = checkpoint.Checkpointer(logdir, restored)
    assert restorer.restore()
    assert restorer.latest == path
    assert restorer.wall_seconds == 123.456
    assert_same(restored, learner)


def test_restores_a_part_of_the_learner(logdir):
    class Outer(tf.Module):
        def __init__(self):
            super().__init__()
            self.agent = Learner(3)

    outer, part = Outer(), Outer()
    outer.agent.train(5)
    outer.optimizer_slot = tf.Variable(1.0)
    checkpoint.Checkpointer(logdir, outer).save(0.0)
    assert checkpoint.Checkpointer(logdir, part).restore()
    assert_same(part.agent, outer.agent)


def test_keeps_the_newest_and_continues_counting_when_resumed(logdir):
    learner = Learner()
    for start in (0, 3):
        checkpointer = checkpoint.Checkpointer(logdir, learner, max_to_keep=2)
        checkpointer.restore()
        for updates in range(start + 1, start + 4):
            learner.train(updates)
            checkpointer.save(float(updates))
    names = [os.path.basename(name) for name in files_under(logdir) if name.endswith('.index')]
    assert names == ['ckpt-5.index', 'ckpt-6.index']
    restored = Learner()
    assert checkpoint.Checkpointer(logdir, restored).restore()
    assert_same(restored, trained(6))


def test_maybe_save_by_training_time(logdir):
    learner = trained(1)
    checkpointer = checkpoint.Checkpointer(logdir, learner, save_secs=600)
    saved = [checkpointer.maybe_save(t) for t in (0.0, 599.0, 600.0, 601.0, 1199.0, 1200.5)]
    assert saved == [False, False, True, False, False, True]
    resumed = checkpoint.Checkpointer(logdir, learner, save_secs=600)
    resumed.restore()
    assert not resumed.maybe_save(1800.0)
    assert resumed.maybe_save(1800.5)


@pytest.mark.parametrize('suffix', ['.index', '.data-00000-of-00001'])
@pytest.mark.parametrize('damage', ['truncated', 'emptied', 'removed', 'flipped'])
def test_falls_back_to_the_newest_intact_checkpoint(logdir, suffix, damage):
    newest = save_two(logdir)
    name = newest + suffix
    content = bytearray(pathlib.Path(name).read_bytes())
    if damage == 'removed':
        os.remove(name)
    else:
        if damage == 'flipped':
            content[len(content) // 2] ^= 0x10
        kept = {'truncated': len(content) // 2, 'emptied': 0, 'flipped': len(content)}[damage]
        with open(name, 'wb') as file:
            file.write(content[:kept])

    lines = []
    restored = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, restored, report=lines.append)
    assert checkpointer.restore()
    assert_same(restored, trained(1))
    assert checkpointer.wall_seconds == 10.0
    (line,) = lines
    assert newest in line and os.path.join(logdir, 'checkpoints', 'ckpt-1') in line
    assert '\n' not in line

    # The next checkpoint counts as newer than the damaged one.
    restored.train(9)
    checkpointer.save(30.0)
    again = Learner()
    lines.clear()
    assert checkpoint.Checkpointer(logdir, again, report=lines.append).restore()
    assert_same(again, trained(9))
    assert not lines


def test_a_checkpoint_saved_after_falling_back_is_the_newest(logdir):
    learner = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, learner)
    for updates in (1, 2, 3):
        learner.train(updates)
        path = checkpointer.save(0.0)
        if updates > 1:
            os.truncate(f'{path}.index', 10)
    lines = []
    resumed = checkpoint.Checkpointer(logdir, learner, report=lines.append)
    assert resumed.restore()
    assert_same(learner, trained(1))
    assert len(lines) == 1
    learner.train(4)
    assert resumed.save(0.0) == os.path.join(logdir, 'checkpoints', 'ckpt-4')
    restored = Learner()
    assert checkpoint.Checkpointer(logdir, restored, report=lines.append).restore()
    assert_same(restored, trained(4))
    assert len(lines) == 1


def test_no_flipped_byte_goes_unnoticed(logdir):
    """Flips each byte: it is noticed, or it is padding and the values are the same."""
    learner = trained(1, num_weights=40)
    path = checkpoint.Checkpointer(logdir, learner).save(0.0)
    seen = 0
    names = [f'{path}.index', f'{path}.data-00000-of-00001']
    for name in names:
        with open(name, 'rb') as file:
            content = file.read()
        for position in range(len(content)):
            with open(name, 'wb') as file:
                file.write(content[:position])
                file.write(bytes([content[position] ^ 0xFF]))
                file.write(content[position + 1 :])
            restored = Learner(40)
            try:
                assert checkpoint.Checkpointer(logdir, restored).restore()
            except checkpoint.LogdirError as error:
                assert path in str(error)
                seen += 1
            else:
                assert_same(restored, learner)
        with open(name, 'wb') as file:
            file.write(content)
    assert seen > 0.9 * sum(os.path.getsize(name) for name in names)


def test_if_all_are_damaged_one_sentence_names_them(logdir):
    save_two(logdir)
    names = [name for name in files_under(logdir) if '.data-' in name]
    for name in names:
        with open(name, 'r+b') as file:
            file.truncate(100)
    with pytest.raises(checkpoint.LogdirError) as error:
        checkpoint.Checkpointer(logdir, Learner()).restore()
    text = str(error.value)
    assert '\n' not in text and text.endswith('.')
    for name in names:
        assert name.partition('.data-')[0] in text


@pytest.mark.parametrize('content', [None, b'', b'\xff\x00nonsense'])
def test_a_lost_or_damaged_state_file_loses_nothing(logdir, content):
    save_two(logdir)
    state = os.path.join(logdir, 'checkpoints', 'checkpoint')
    os.remove(state)
    if content is not None:
        with open(state, 'wb') as file:
            file.write(content)
    learner = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, learner, max_to_keep=2)
    assert checkpointer.restore()
    assert_same(learner, trained(2))
    checkpointer.save(1.0)
    assert tf.train.latest_checkpoint(os.path.dirname(state)) == checkpointer.latest
    assert [os.path.basename(name) for name in files_under(logdir) if '.index' in name] == [
        'ckpt-2.index',
        'ckpt-3.index',
    ]


def test_ten_is_newer_than_nine(logdir):
    learner = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, learner, max_to_keep=20)
    for updates in range(1, 11):
        learner.train(updates)
        checkpointer.save(0.0)
    restored = Learner()
    checkpoint.Checkpointer(logdir, restored).restore()
    assert int(restored.updates.numpy()) == 10


def test_what_hooks_add_is_restored_if_it_is_there(logdir):
    def restored(extras):
        learner = Learner()
        checkpointer = checkpoint.Checkpointer(logdir, learner, extras=extras)
        assert checkpointer.restore()
        return learner, checkpointer

    checkpoint.Checkpointer(logdir, trained(1)).save(1.0)
    added = Learner(3)
    _, checkpointer = restored({'A': added})
    # This checkpoint lacks it.
    assert_same(added, Learner(3))
    added.train(5)
    assert checkpointer.save(2.0).endswith('ckpt-2')
    again, other = Learner(3), trained(7, num_weights=4)
    learner, checkpointer = restored({'A': again, 'A 2': other})
    assert_same(learner, trained(1))
    assert_same(again, added)
    assert_same(other, trained(7, num_weights=4))
    checkpointer.save(3.0)
    learner, _ = restored({})
    assert_same(learner, trained(1))
    with pytest.raises(run_files.LogdirError, match=r'does not fit a hook of this run \(.*\): use'):
        restored({'A': Learner(4)})


def test_another_network_is_refused_in_one_sentence(logdir):
    path = checkpoint.Checkpointer(logdir, trained(1)).save(0.0)
    with pytest.raises(checkpoint.LogdirError, match=re.escape(path)) as error:
        checkpoint.Checkpointer(logdir, Learner(NUM_WEIGHTS + 1)).restore()
    assert '\n' not in str(error.value)
    bigger = Learner()
    bigger.more = tf.Variable(1.0)
    with pytest.raises(checkpoint.LogdirError, match='does not fit'):
        checkpoint.Checkpointer(logdir, bigger).restore()


# The index takes some hundred bytes and the data 2 * 4 * NUM_WEIGHTS. These limits stop the write
# in the middle of the data, and at once.
@pytest.mark.parametrize('space', [NUM_WEIGHTS * 4, 0])
def test_a_full_disk_leaves_only_the_previous_checkpoint(logdir, space):
    lines = []
    learner = trained(1)
    checkpointer = checkpoint.Checkpointer(logdir, learner, save_secs=600, report=lines.append)
    previous = checkpointer.save(0.0)
    before = files_under(logdir)

    learner.train(2)
    with file_size_limit(space):
        saved = checkpointer.maybe_save(600.0)
    assert not saved
    (line,) = lines
    assert 'File too large' in line and previous in line and '600 s' in line
    assert files_under(logdir) == before
    with file_size_limit(space), pytest.raises(checkpoint.LogdirError) as error:
        checkpointer.save(700.0)
    assert '\n' not in str(error.value)
    assert files_under(logdir) == before
    restored = Learner()
    assert checkpoint.Checkpointer(logdir, restored).restore()
    assert_same(restored, trained(1))

    # There is space again.
    assert not checkpointer.maybe_save(1299.0)
    assert checkpointer.maybe_save(1300.0)
    assert os.path.exists(f'{checkpointer.latest}.index')
    assert checkpoint.Checkpointer(logdir, restored).restore()
    assert_same(restored, trained(2))


def test_first_save_without_space_or_folder(logdir):
    checkpointer = checkpoint.Checkpointer(logdir, trained(1))
    with file_size_limit(1000), pytest.raises(checkpoint.LogdirError, match='there is none yet'):
        checkpointer.save(0.0)
    assert not checkpoint.Checkpointer(logdir, Learner()).restore()

    other = os.path.join(logdir, 'other')
    os.makedirs(other)
    open(os.path.join(other, 'checkpoints'), 'w').close()
    with pytest.raises(checkpoint.LogdirError, match=re.escape(other)):
        checkpoint.Checkpointer(other, trained(1)).save(0.0)


def test_a_folder_lost_while_running_is_reported_and_recreated(logdir):
    lines = []
    checkpointer = checkpoint.Checkpointer(logdir, trained(1), save_secs=1, report=lines.append)
    checkpointer.save(0.0)
    folder = os.path.join(logdir, 'checkpoints')
    for name in files_under(logdir):
        os.remove(name)
    os.rmdir(folder)
    open(folder, 'w').close()
    assert not checkpointer.maybe_save(1.0)
    assert len(lines) == 1 and folder in lines[0]
    os.remove(folder)
    assert checkpointer.maybe_save(2.0)
    assert checkpoint.Checkpointer(logdir, Learner()).restore()


def test_leftovers_of_a_killed_save_are_removed(logdir):
    save_two(logdir)
    leftover = os.path.join(logdir, 'checkpoints', 'ckpt-3_temp')
    os.makedirs(leftover)
    open(os.path.join(leftover, 'part-00000-of-00001.data-00000-of-00001'), 'w').close()
    learner = Learner()
    checkpointer = checkpoint.Checkpointer(logdir, learner)
    assert checkpointer.restore()
    assert_same(learner, trained(2))
    checkpointer.save(0.0)
    assert not os.path.exists(leftover)


def test_flags_are_replaced_atomically(logdir):
    path = write_flags(logdir, '--seed=1\n')
    with file_size_limit(4), pytest.raises(checkpoint.LogdirError, match=re.escape(path)):
        write_flags(logdir, '--seed=2\n')
    assert pathlib.Path(path).read_text() == '--seed=1\n'
    assert os.listdir(logdir) == ['flags.txt']
    write_flags(logdir, '--seed=3\n')
    assert pathlib.Path(path).read_text() == '--seed=3\n'


def test_a_logdir_is_locked_until_its_run_ends_or_is_killed(logdir):
    program = (
        'import fcntl, os, sys\n'
        'fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n'
        'print("locked", flush=True)\n'
        'sys.stdin.read()\n'
    )
    os.makedirs(logdir)
    other = subprocess.Popen(
        [sys.executable, '-c', program, logdir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        try:
            assert other.stdout.readline() == b'locked\n'
            with pytest.raises(checkpoint.LogdirError, match='Another run'):
                run_files.lock_logdir(logdir)
        finally:
            other.kill()
    os.close(run_files.lock_logdir(logdir))


@pytest.mark.parametrize('name', ['run[1]', 'run*', 'run?', 'a\\b'])
def test_names_that_tensorflow_cannot_restore_from_are_refused(tmp_path, name):
    with pytest.raises(checkpoint.LogdirError, match=re.escape(name)):
        checkpoint.Checkpointer(str(tmp_path / name), Learner())


def test_unusable_logdir(tmp_path):
    path = tmp_path / 'file'
    path.write_text('')
    for use in (run_files.lock_logdir, lambda name: write_flags(name, '')):
        with pytest.raises(checkpoint.LogdirError, match=re.escape(str(path))):
            use(str(path))


def test_a_run_keeps_its_id(tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    ids = [run_files.run_id(str(folder)) for folder in (first, second, first)]
    assert ids[0] == ids[2] != ids[1]
    path = first / 'run_id.txt'
    path.write_text('half of')
    new = run_files.run_id(str(first))
    assert new not in ids
    assert run_files.run_id(str(first)) == new
    path.unlink()
    path.mkdir()
    with pytest.raises(checkpoint.LogdirError, match='Cannot read .*run_id.txt: Is a directory'):
        run_files.run_id(str(first))
