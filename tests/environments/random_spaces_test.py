"""Random pairs of observation and action spaces: each is refused by its rule, or played exactly.

What is supported, the names of arrays and their values are computed here a second time, slowly,
from the documentation.
"""

import collections
import contextlib
import threading

import hypothesis
import numpy as np
import pytest
import space_levels
import tensorflow as tf
from gymnasium import spaces
from hypothesis import strategies as st

from dynamic_batching.unroll_batcher import UnrollBatcher
from impala.acting.actor_pool import ActorPool
from impala.acting.actor_processes import ActorHost
from impala.config import ActorsConfig
from impala.environments import EnvironmentConfig, hash_instruction
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.environments.observation_spaces import RULE
from impala.errors import LevelError
from impala.trajectory import ArraySpec

PAIRS = 60
STEPS = 200
# Images of this size are not resized.
HEIGHT, WIDTH = 33, 40
CONFIG = EnvironmentConfig(height=HEIGHT, width=WIDTH)
# Of a row of an unroll: reward, return, agent step, frames and end of the episode.
FIXED = [ArraySpec((), dtype) for dtype in ('float32', 'float32', 'int32', 'int32', 'uint8')]
ACTION_RULES = ('actions may be Discrete, ', 'has no actions', 'give --clip_actions')


def integers(low, high):
    # Those of hypothesis also depend on which modules are imported.
    return st.sampled_from(range(low, high + 1))


@st.composite
def images(draw):
    channels = draw(integers(1, 6))
    shapes = [(HEIGHT, WIDTH, channels), (channels, HEIGHT, WIDTH)]
    if draw(st.booleans()):
        return spaces.Box(0, 255, draw(st.sampled_from([*shapes, (HEIGHT, WIDTH)])), np.uint8)
    low = draw(integers(-3, 3))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    return spaces.Box(low, low + draw(integers(1, 5)), draw(st.sampled_from(shapes)), dtype)


@st.composite
def float_boxes(draw, may_have_one_bound=True):
    bounds = [(-np.inf, np.inf), (-2, 3), (0, 1e-3), (-1000, 0)]
    bounds += [(0, np.inf), (-np.inf, 5)] if may_have_one_bound else []
    low, high = draw(st.sampled_from(bounds))
    shape = draw(st.lists(integers(1, 3), max_size=3))
    return spaces.Box(low, high, shape, draw(st.sampled_from([np.float32, np.float64])))


@st.composite
def integer_boxes(draw):
    dtype = draw(st.sampled_from([np.uint8, np.int8, np.int32, np.int64, np.uint16]))
    low = 0 if np.dtype(dtype).kind == 'u' else draw(integers(-9, 9))
    shape = draw(st.lists(integers(1, 3), max_size=4))
    return spaces.Box(low, low + draw(integers(0, 99)), shape, dtype)


@st.composite
def multi_discretes(draw):
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    sizes = np.reshape(draw(st.lists(integers(1, 4), min_size=4, max_size=4)), (2, 2))
    sizes = np.resize(sizes, shape)
    return spaces.MultiDiscrete(sizes, start=sizes * 0 + draw(integers(-2, 2)))


discretes = st.builds(
    lambda n, start: spaces.Discrete(n, start=start), integers(1, 6), integers(-3, 3)
)
multi_binaries = st.sampled_from([3, (2, 2)]).map(spaces.MultiBinary)
unsupported = st.sampled_from(
    [
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]),
        spaces.Box(-np.inf, np.inf, (64, 64, 3)),
        spaces.Box(0, 1, (101, 100)),
        spaces.Box(0, 255, (31, 31, 11), np.uint8),
        spaces.Discrete(10_001),
        spaces.MultiBinary(10_001),
    ]
)
KEYS = st.sampled_from(['a', 'b', 'image', 'screen', 'vector', 'frame', 'a/b', 'a/0', '0', 0])


def nested(leaves, keys):
    """Returns a strategy of leaves, and of Dicts and Tuples of them."""
    return st.recursive(
        leaves,
        lambda parts: st.one_of(
            st.dictionaries(keys, parts, max_size=4).map(lambda d: spaces.Dict(list(d.items()))),
            st.lists(parts, max_size=3).map(spaces.Tuple),
        ),
        max_leaves=6,
    )


def rarely(strategy, other):
    """Chooses the first of two strategies in one of 16 cases."""
    return integers(0, 15).flatmap(lambda number: strategy if number == 7 else other)


observation_spaces = nested(
    rarely(
        unsupported,
        st.one_of(
            images(), images(), float_boxes(), integer_boxes(), discretes, multi_discretes(),
            multi_binaries, st.just(spaces.Text(9)),
        ),
    ),
    KEYS,
)  # fmt: skip
action_spaces = nested(
    rarely(
        st.one_of(st.just(spaces.Text(3)), integer_boxes(), unsupported, float_boxes()),
        st.one_of(
            discretes, multi_discretes(), multi_binaries, float_boxes(may_have_one_bound=False)
        ),
    ),
    st.sampled_from('abc'),
)


def leaves_of(space, value=None, path=()):
    """Returns `(path, space, value)` of all parts that are no Dict or Tuple."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        is_dict = isinstance(space, spaces.Dict)
        keys = list(space) if is_dict else range(len(space))
        parts = [leaves_of(space[k], None if value is None else value[k], (*path, k)) for k in keys]
        return [leaf for part in parts for leaf in part]
    return [(path, space, value)]


def is_image(space):
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    if space.dtype != np.uint8 and (len(space.shape) == 2 or not is_bounded_float(space)):
        return False
    return min(space.shape[:2]) >= 32 or (len(space.shape) == 3 and min(space.shape[1:]) >= 32)


def is_bounded_float(space):
    return space.dtype.kind == 'f' and np.isfinite([space.low, space.high]).all()


def is_observable(space):
    leaves = [leaf for _, leaf, _ in leaves_of(space) if not isinstance(leaf, spaces.Text)]
    known = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return bool(leaves) and all(
        isinstance(leaf, known) and (is_image(leaf) or spaces.flatdim(leaf) <= 10_000)
        for leaf in leaves
    )


def is_playable(space):
    leaves = [leaf for _, leaf, _ in leaves_of(space)]
    for leaf in leaves:
        if isinstance(leaf, spaces.Box):
            low, high = np.isfinite(leaf.low), np.isfinite(leaf.high)
            if leaf.dtype.kind != 'f' or (low != high).any():
                return False
        elif not isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            return False
    return bool(leaves)


def expected_arrays(space, value):
    """Returns name -> array of what the agent should see."""
    arrays = {}
    reserved = {'frame', 'vector', 'instruction', 'action_mask', 'action_noise'}
    leaves = leaves_of(space, value)
    pictures = [path for path, leaf, _ in leaves if is_image(leaf)]
    for key in ('observation', 'image', 'screen'):
        # Sorting is stable, so the last of these keys counts most.
        pictures.sort(key=lambda path: path[-1:] != (key,))
    numbers, words = [], []
    for path, leaf, part in leaves:
        if isinstance(leaf, spaces.Text):
            words.append(part)
        elif path not in pictures:
            numbers += [float(number) for number in spaces.flatten(leaf, part)]
        else:
            name = '/'.join(map(str, path))
            candidates = [name, *(f'{name}_{number}' for number in range(2, 20))]
            name = [each for each in candidates if each not in arrays.keys() | reserved][0]
            arrays['frame' if path == pictures[0] else name] = picture(leaf, part)
    if numbers:
        arrays['vector' if pictures else 'frame'] = np.float32(numbers)
    if words:
        arrays['instruction'] = hash_instruction(' '.join(words))
    return arrays


def picture(space, value):
    """Returns an image with its channels last, floats scaled to [0, 1]."""
    if space.dtype.kind == 'f':
        low, high = float(space.low.min()), float(space.high.max())
        value = ((value.astype(np.float64) - low) / (high - low)).astype(np.float32)
    if value.ndim == 2:
        return value[:, :, np.newaxis]
    if value.shape[0] < 32:
        return np.stack([value[channel] for channel in range(value.shape[0])], -1)
    return value


def assert_arrays_match(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        if array.ndim == 3 and array.dtype == np.float32:
            np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-6)
        else:
            assert np.array_equal(arrays[name], array), (name, arrays[name], array)


def agent_action(spec, rng):
    """Returns a random action of the agent."""
    values = [rng.integers(size) for size in spec.categories]
    values += list(3 * rng.standard_normal(len(spec.bounds)))
    return np.array(values).astype(spec.array.dtype).reshape(spec.array.shape)


def random_action(spec, rng):
    """Returns an action as an actor gives it to its environment."""
    action = agent_action(spec, rng)
    return int(action) if spec.is_scalar else spec.to_environment(action)


def refusal(error):
    """Checks the form of a sentence; returns whether it is about actions or observations."""
    text = str(error)
    assert text.startswith("'Random-v0' has ") and text.endswith('.') and '\n' not in text
    is_of_actions = any(rule in text for rule in ACTION_RULES)
    assert is_of_actions != text.endswith(f'{RULE}.'), text
    return 'actions refused' if is_of_actions else 'observations refused'


def outcome_of(observation_space, action_space):
    """Plays a pair of spaces and checks everything; returns what happened."""
    env = space_levels.Sampled(observation_space, action_space)
    try:
        environment = GymnasiumEnvironment('Random-v0', env, 1, 1, CONFIG)
    except LevelError as error:
        outcome = refusal(error)
        if outcome == 'actions refused':
            assert not is_playable(action_space), error
        else:
            assert not is_observable(observation_space), error
        return outcome
    assert is_playable(action_space) and is_observable(observation_space)
    expected = [expected_arrays(observation_space, value) for value in env.pool]
    assert list(environment.spec.observation) == list(environment.reset())
    assert_arrays_match(environment.reset(), expected[0])
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        # The environment fails if the action is not in its space.
        reward, _, observation = environment.step(random_action(environment.spec.action, rng))
        assert_arrays_match(observation, expected[int(reward)])
        for name, spec in environment.spec.observation.items():
            assert (observation[name].shape, observation[name].dtype) == (spec.shape, spec.dtype)
            assert observation[name].flags.c_contiguous
    return 'played'


def test_random_spaces_are_played_or_refused():
    outcomes = collections.Counter()

    @hypothesis.settings(
        max_examples=PAIRS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(observation_spaces, action_spaces)
    def check(observation_space, action_space):
        outcomes[outcome_of(observation_space, action_space)] += 1

    check()
    assert outcomes.total() == PAIRS
    assert outcomes['played'] >= PAIRS / 2
    assert min(outcomes['actions refused'], outcomes['observations refused']) >= 3


def test_actions_with_one_bound_are_played_if_they_are_clipped():
    action_space = spaces.Tuple([spaces.Box(0, np.inf, (2,)), spaces.Box(-2, 3, (1,), np.float64)])
    env = space_levels.Sampled(spaces.Discrete(2), action_space)
    config = EnvironmentConfig(clip_actions=True)
    environment = GymnasiumEnvironment('Random-v0', env, 1, 1, config)
    environment.reset()
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        environment.step(random_action(environment.spec.action, rng))


@pytest.mark.parametrize('level', ['mixed', 'tuples', 'numbers'])
def test_observations_arrive_unchanged_from_actor_processes(level):
    level_name = f'space_levels:{level}'
    env = getattr(space_levels, level)(1, CONFIG)
    expected = [expected_arrays(env.observation_space, value) for value in env.pool]
    config = EnvironmentConfig(height=36, width=40)
    seen = set()
    with ActorHost(config, ActorsConfig()) as actor_host:
        spec = actor_host.environment_spec(level_name, 1)
        batcher = UnrollBatcher(
            inputs=[*FIXED, *spec.observation.values()],
            outputs=[spec.action.array],
            states=[],
            level_ids=[0],
            unroll_length=STEPS // 4,
            queue_capacity=2,
            timeout_ms=1,
        )
        thread = threading.Thread(target=answer, args=(batcher, spec.action))
        thread.start()
        try:
            with ActorPool(actor_host, batcher, [level_name], 1, 0, print):
                for _ in range(4):
                    inputs = batcher.dequeue(1).inputs
                    for t, reward in enumerate(inputs[0].numpy()[:, 0]):
                        observation = [array.numpy()[t, 0] for array in inputs[len(FIXED) :]]
                        arrays = dict(zip(spec.observation, observation, strict=True))
                        assert_arrays_match(arrays, expected[int(reward)])
                        seen.add(int(reward))
        finally:
            batcher.close()
            thread.join()
    assert seen == set(range(len(env.pool)))


def answer(batcher, spec):
    """Answers an actor with random actions until the batcher is closed."""
    rng = np.random.default_rng(4)
    with contextlib.suppress(tf.errors.CancelledError):
        while True:
            tickets = batcher.get_inputs().tickets
            action = tf.constant(agent_action(spec, rng))[tf.newaxis]
            batcher.set_outputs(tickets, tf.constant(0, tf.int64), [action], [])
