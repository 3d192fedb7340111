"""Tests of impala/experience/replay.py."""

import concurrent.futures
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf

from impala.environments import EnvironmentConfig, create_environment
from impala.experience.batch import (
    batch_components,
    batch_of_components,
    compiled,
    unroll_components,
)
from impala.experience.mixture import ReplayMixer
from impala.experience.replay import Packing, Replay, unroll_nbytes
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd, UnrollArray

T = 20
# An unroll of one number, in two components: one per unroll and one per row.
NUMBERED = [
    UnrollArray((), 'int64', 'number', False),
    UnrollArray((4, 3), 'float32', 'rows'),
]


def numbered(numbers):
    """Returns unrolls `[T+1, N, ...]` whose contents follow from their numbers."""
    numbers = np.asarray(numbers, np.int64)
    rows = numbers[np.newaxis, :, np.newaxis] * 100 + np.arange(12).reshape(4, 1, 3)
    return [numbers, rows.astype(np.float32)]


def drawn(replay, size):
    """Draws unrolls, checks that their components match and returns their numbers."""
    unrolls = [np.empty(size, np.int64), np.empty((4, size, 3), np.float32)]
    replay.sample(unrolls)
    np.testing.assert_array_equal(unrolls[1], numbered(unrolls[0])[1])
    return unrolls[0]


def filled(capacity, num_added, seed=0):
    replay = Replay(NUMBERED, capacity, seed)
    for number in range(num_added):
        replay.add(numbered([number]))
    return replay


def test_each_unroll_is_drawn_equally_often():
    draws = np.concatenate([drawn(filled(100, 250, seed=5), 20_000)])
    counts = np.bincount(draws, minlength=250)
    assert not counts[:150].any()
    chi_square = np.sum(np.square(counts[150:] - 200) / 200)
    # Quantiles 0.0005 and 0.9995 with 99 degrees of freedom, from a table: counts may be neither
    # too even nor too uneven.
    assert 59.14 < chi_square < 152.04


def test_draws_follow_from_the_seed():
    first = drawn(filled(10, 10, seed=(1, 0)), 50)
    np.testing.assert_array_equal(drawn(filled(10, 10, seed=(1, 0)), 50), first)
    assert (drawn(filled(10, 10, seed=(1, 1)), 50) != first).any()


def test_the_oldest_unrolls_are_replaced_first():
    replay = Replay(NUMBERED, capacity=5, seed=0)
    assert len(replay) == 0
    with pytest.raises(ValueError, match='high <= 0'):
        drawn(replay, 1)
    for last in range(12):
        replay.add(numbered([last]))
        assert len(replay) == min(5, last + 1)
        assert set(drawn(replay, 200)) == set(range(max(0, last - 4), last + 1))
    # More unrolls at once than the capacity.
    replay.add(numbered(range(12, 20)))
    assert set(drawn(replay, 200)) == {15, 16, 17, 18, 19}


def test_threads_draw_consistent_unrolls():
    replay = filled(3, 3)

    def use(thread):
        for i in range(300):
            replay.add(numbered([1000 * thread + i]))
            drawn(replay, 3)

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        list(executor.map(use, range(4)))
    assert len(replay) == 3


@pytest.mark.parametrize(
    ('fraction', 'batch_size'),
    [
        (0.5, 2),
        (0.25, 2),
        (0.001, 2),
        (0.9, 10),
        (0.3, 10),
        (0.29, 10),
        (0.5, 32),
        (0.75, 32),
        (1 / 3, 32),
        (0.1, 32),
        (0.29, 100),
    ],
)
def test_the_fraction_is_exact_over_time(fraction, batch_size):
    mixer = ReplayMixer(filled(1, 1), fraction, batch_size)
    exact = Fraction(str(fraction)) * batch_size
    replayed = 0
    for k in range(1, 1001):
        num_fresh = mixer.next_num_fresh()
        assert 1 <= num_fresh <= batch_size
        replayed += batch_size - num_fresh
        assert 0 <= k * exact - replayed < 1
    if fraction != 1 / 3:
        assert replayed == round(1000 * batch_size * fraction)


def test_batches_are_fresh_while_replay_is_empty():
    replay = Replay(NUMBERED, 10, 0)
    mixer = ReplayMixer(replay, 0.5, 4)
    assert [mixer.next_num_fresh() for _ in range(3)] == [4, 4, 4]
    replay.add(numbered([1]))
    assert [mixer.next_num_fresh() for _ in range(3)] == [2, 2, 2]


def atari_unrolls(game, num_unrolls, unroll_length=T, **config):
    """A random agent's unrolls as actors write them: each starts with the last row before it."""
    environment = create_environment(f'ALE/{game}-v5', 3, EnvironmentConfig(**config))
    try:
        random = np.random.default_rng(0)
        frames, ends = [environment.reset()['frame'].copy()], [EpisodeEnd.TERMINATED]
        for _ in range(num_unrolls * unroll_length):
            _, end, observation = environment.step(
                int(random.integers(environment.spec.num_actions))
            )
            frames.append(observation['frame'].copy())
            ends.append(end)
    finally:
        environment.close()
    begins = range(0, len(frames) - 1, unroll_length)
    rows = [slice(begin, begin + unroll_length + 1) for begin in begins]
    return (
        np.stack([frames[each] for each in rows], 1),
        np.stack([np.array(ends[each], np.uint8) for each in rows], 1),
    )


def frame_components(shape):
    return [
        UnrollArray((), 'int64', 'number', False),
        UnrollArray(shape, 'uint8', 'frame'),
    ]


def assert_kept(frames):
    """Checks that unrolls `[T+1, N, H, W, C]` come out unchanged, even from reused places."""
    rows, size, *rest = frames.shape
    replay = Replay(frame_components((rows, *rest)), size, 0, stack='frame')
    for _ in range(2):
        # In the second round every place has held another unroll.
        order = np.random.default_rng(0).permutation(size)
        replay.add([order, frames[:, order]])
    assert (len(replay), replay.left_out) == (size, 0)
    numbers = np.empty(2 * size, np.int64)
    out = np.random.default_rng(1).integers(0, 256, (rows, 2 * size, *rest), np.uint8)
    replay.sample([numbers, out])
    assert len(set(numbers)) > size / 2
    np.testing.assert_array_equal(out, frames[:, numbers])


@pytest.mark.parametrize(
    ('num_unrolls', 'config'),
    [
        (15, {'num_action_repeats': 12}),
        (16, {'end_episode_on_life_loss': True, 'unroll_length': 50}),
        (20, {'frame_stack': 2, 'num_action_repeats': 16}),
        # Games are so short that several end in one unroll.
        (4, {'frame_stack': 5, 'num_action_repeats': 64, 'unroll_length': 40}),
    ],
)
def test_atari_stacks_come_out_unchanged(num_unrolls, config):
    frames, ends = atari_unrolls('Breakout', num_unrolls, **config)
    games = np.isin(ends[1:], (EpisodeEnd.TERMINATED, EpisodeEnd.TRUNCATED))
    assert games.sum() > 2
    if config.get('end_episode_on_life_loss'):
        assert (ends[1:] == EpisodeEnd.LIFE_LOST).any()
    if config.get('num_action_repeats', 4) > 16:
        assert games.sum(0).max() > 1
    assert_kept(frames)


def test_episodes_of_any_length_come_out_unchanged():
    """Even of one row, which no game has. With two pixel values many rows look alike."""
    random = np.random.default_rng(0)
    unrolls = []
    for chance in np.linspace(0, 1, 40):
        stack = random.integers(0, 2, (2, 1, 4), np.uint8)
        rows = [stack]
        for _ in range(T):
            frame = random.integers(0, 2, (2, 1, 1), np.uint8)
            is_first = random.random() < chance
            stack = (
                np.repeat(frame, 4, -1) if is_first else np.concatenate([stack[..., 1:], frame], -1)
            )
            rows.append(stack)
        unrolls.append(np.stack(rows))
    assert_kept(np.stack(unrolls, 1))


def test_unrolls_whose_rows_are_not_shifted_stacks_are_left_out():
    frames, _ = atari_unrolls('Breakout', 3)
    broken = frames[:, 1].copy()
    broken[7, 3, 5, 1] ^= 1
    replay = Replay(frame_components(frames.shape[:1] + frames.shape[2:]), 10, 0, stack='frame')
    replay.add([np.arange(3), np.stack([frames[:, 0], broken, frames[:, 2]], 1)])
    assert (len(replay), replay.left_out) == (2, 1)
    out = [np.empty(100, np.int64), np.empty((T + 1, 100, 84, 84, 4), np.uint8)]
    replay.sample(out)
    assert set(out[0]) == {0, 2}


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_unrolls_are_left_out(value):
    replay = Replay(NUMBERED, 10, 0)
    unrolls = numbered(range(5))
    unrolls[1][2, 3, 1] = value
    replay.add(unrolls)
    assert (len(replay), replay.left_out) == (4, 1)
    assert replay.metrics() == {'replay_unrolls': 4, 'replay_unrolls_left_out': 1}
    assert set(drawn(replay, 200)) == {0, 1, 2, 4}


MIXED = [
    UnrollArray((), 'uint8', 'byte', False),
    UnrollArray((3,), 'float64', 'floats', False),
    UnrollArray((2,), 'int32', 'level', False, -1, 5),
    UnrollArray((2, 2), 'bool', 'flags', False),
]


def test_a_packed_unroll_lies_in_memory_array_after_array():
    packing = Packing(MIXED)
    assert packing.nbytes == 1 + 24 + 8 + 4
    arrays = [
        np.uint8(255),
        np.array([0.5, -1.0, 2.0]),
        np.array([-1, 5], np.int32),
        np.array([[True, False], [False, True]]),
    ]
    memory = np.full(packing.nbytes, 9, np.uint8)
    assert packing.pack(arrays, packing.views(memory))
    assert memory.tobytes() == b''.join(array.tobytes() for array in arrays)
    assert packing.accepts(memory)


@pytest.mark.parametrize(
    ('index', 'value'),
    [(1, np.nan), (1, np.inf), (1, -np.inf), (2, 6), (2, -2), (3, 2), (3, 255)],
)
def test_bytes_that_are_no_valid_unroll_are_not_accepted(index, value):
    packing = Packing(MIXED)
    memory = np.zeros(packing.nbytes, np.uint8)
    assert packing.accepts(memory)
    array = packing.views(memory)[index]
    array.view(np.uint8 if index == 3 else array.dtype).flat[1] = value
    assert not packing.accepts(memory)


def components_of(shape, num_actions=6, **observation):
    spec = EnvironmentSpec(
        {'frame': ArraySpec(shape, 'uint8'), **observation}, num_actions, 4, 'atari'
    )
    return unroll_components(spec, (), T, 1)


def test_frames_are_held_once_and_memory_is_bounded():
    components = components_of((84, 84, 4))
    frames, _ = atari_unrolls('Breakout', 4)
    tracemalloc.start()
    try:
        replay = Replay(components, 12, 0, stack='frame')
        unrolls = [
            frames
            if component.name == 'frame'
            else np.zeros(
                (*component.shape[:1], 4, *component.shape[1:])
                if component.time_major
                else (4, *component.shape),
                component.dtype,
            )
            for component in components
        ]
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(10):
            replay.add(unrolls)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(replay) == 12
    # T+4 frames, and per row: reward, return, step, frames, end, action, six logits, baseline, and
    # whether an episode begins; level and policy version.
    per_unroll = (T + 4) * 84 * 84 + (T + 1) * (4 + 4 + 4 + 4 + 1 + 4 + 6 * 4 + 4 + 1) + 4 + 8
    assert unroll_nbytes(components, 'frame') == per_unroll == 170_406
    assert replay.nbytes == 12 * per_unroll
    assert after - before < 100_000
    # Without stacks every byte is held.
    plain = components_of((72, 96, 3), 9, instruction=ArraySpec((32,), 'int32'))
    per_row = 72 * 96 * 3 + 32 * 4 + 4 + 4 + 4 + 4 + 1 + 4 + 9 * 4 + 4
    assert Replay(plain, 2, 0).nbytes == 2 * unroll_nbytes(plain)
    assert unroll_nbytes(plain) == (T + 1) * per_row + 12


def test_batches_have_fresh_unrolls_before_replayed_ones():
    """A quarter of ten unrolls is replayed; their numbers modulo 7 are their actors and levels."""
    spec = EnvironmentSpec({'frame': ArraySpec((4, 5, 3), 'uint8')}, 2, 1)
    state = {'h': ArraySpec((3,), 'float32')}
    components = unroll_components(spec, state, 6, 7)
    next_number = tf.Variable(0, dtype=tf.int64)

    def dequeue(size):
        end = next_number.assign_add(size)
        numbers = tf.range(end - size, end)

        def fill(component):
            shape = list(component.shape)
            shape.insert(int(component.time_major), size)
            column = [1] * len(shape)
            column[int(component.time_major)] = size
            values = numbers % 7 if component.name == 'level_id' else numbers
            values = values % 2 if component.name == 'end' else values
            return tf.cast(tf.broadcast_to(tf.reshape(values, column), shape), component.dtype)

        return batch_of_components(
            [fill(component) for component in components],
            tf.cast(numbers % 7, tf.int32),
            state,
            ['frame'],
        )

    mixer = ReplayMixer(Replay(components, 30, 0), 0.25, 10)
    assemble = compiled(lambda: mixer.batch(dequeue))
    num_fresh, seen = [], 0
    for _ in range(40):
        batch = assemble()
        is_replayed = batch.is_replayed.numpy()
        num_fresh.append(int((~is_replayed).sum()))
        assert (np.diff(is_replayed.astype(int)) >= 0).all()
        versions = batch.actor_output.policy_version.numpy()
        fresh, replayed = versions[~is_replayed], versions[is_replayed]
        np.testing.assert_array_equal(fresh, seen + np.arange(len(fresh)))
        assert ((replayed < seen) & (replayed >= seen - 30)).all()
        seen += len(fresh)
        np.testing.assert_array_equal(batch.actors.numpy(), np.where(is_replayed, -1, versions % 7))
        np.testing.assert_array_equal(batch.actor_output.level_id.numpy(), versions % 7)
        done = batch.actor_output.env_outputs.done.numpy()
        np.testing.assert_array_equal(done, np.tile(versions % 2 == 1, (7, 1)))
        assert batch.actor_output.agent_state.keys() == {'h'}
        for component, tensor in zip(components, batch_components(batch), strict=True):
            array = np.moveaxis(tensor.numpy(), int(component.time_major), 0)
            assert array.shape == (10, *component.shape)
            if component.name not in ('level_id', 'end'):
                expected = versions.reshape(10, *[1] * len(component.shape)).astype(array.dtype)
                np.testing.assert_array_equal(array, np.broadcast_to(expected, array.shape))
    assert num_fresh == [10] + [8, 7] * 19 + [8]
    assert mixer.replay.left_out == 0
