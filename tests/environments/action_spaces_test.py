import json

import numpy as np
import pytest
from gymnasium import spaces

from impala.environments.action_spaces import ActionSpace
from impala.errors import LevelError
from impala.trajectory import ActionSpec

BOX = spaces.Box(np.array([[-2, 0]], np.float32), np.array([[2, 10]], np.float32))
NESTED = spaces.Dict(
    buttons=spaces.MultiBinary(3),
    stick=BOX,
    rest=spaces.Tuple([spaces.Discrete(4, start=-1), spaces.MultiDiscrete([[2, 3], [4, 5]])]),
)
SPACES = [
    spaces.Discrete(5, start=7),
    spaces.MultiDiscrete([3, 2], start=[1, -4]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    BOX,
    spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    spaces.Box(-np.inf, np.inf, (2,)),
    spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
    NESTED,
]


def agent_actions(spec, count, scale=3.0):
    rng = np.random.default_rng(0)
    categories = np.stack([rng.integers(size, size=count) for size in spec.categories] or [()], -1)
    if spec.is_scalar:
        return categories[:, 0].astype(np.int32)
    if not spec.bounds:
        return categories.astype(np.int32)
    values = rng.normal(size=(count, len(spec.bounds))) * scale
    return np.concatenate([categories.reshape(count, -1), values], 1).astype(np.float32)


@pytest.mark.parametrize('space', SPACES, ids=str)
def test_agents_actions_become_actions_of_the_space(space):
    actions = ActionSpace(space, 'level')
    spec = actions.spec
    assert ActionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert actions.decode(spec.zero) in space
    for action in agent_actions(spec, 500):
        before = action.copy()
        decoded = actions.decode(action if spec.is_scalar else spec.to_environment(action))
        assert decoded in space
        assert (action == before).all()


def flat(space, value):
    return np.asarray(spaces.flatten(space, value), np.float64)


@pytest.mark.parametrize('space', SPACES[:5], ids=str)
def test_all_categories_can_be_chosen(space):
    actions = ActionSpace(space, 'level')
    decoded = [flat(space, actions.decode(each)) for each in agent_actions(actions.spec, 500)]
    # Gymnasium flattens categories to one-hot vectors, and binary values to themselves.
    assert (np.max(decoded, 0) == 1).all()
    if isinstance(space, spaces.MultiBinary):
        assert (np.min(decoded, 0) == 0).all()


def test_parts_of_a_nested_space_get_their_own_components():
    actions = ActionSpace(NESTED, 'level')
    spec = actions.spec
    # Gymnasium sorts the keys of a Dict.
    assert spec.categories == (2, 2, 2, 4, 2, 3, 4, 5)
    assert spec.bounds == ((-2, 2), (0, 10))
    action = np.array([0, 1, 1, 3, 1, 2, 0, 4, 0, np.arctanh(0.5)], np.float32)
    decoded = actions.decode(spec.to_environment(action))
    assert decoded['buttons'].tolist() == [0, 1, 1]
    np.testing.assert_allclose(decoded['stick'], [[0, 7.5]], rtol=1e-6)
    assert decoded['rest'][0] == 2
    assert decoded['rest'][1].tolist() == [[1, 2], [0, 4]]


def test_clipped_actions_are_scaled_to_two_bounds_and_clipped_to_any():
    low = np.array([-2, 0, 1, -np.inf], np.float32)
    high = np.array([2, 10, np.inf, np.inf], np.float32)
    actions = ActionSpace(spaces.Box(low, high), 'level', is_clipped=True)
    assert actions.spec == ActionSpec(bounds=(None,) * 4)
    for values, expected in (
        ([0, 0, 0, 0], [0, 5, 1, 0]),
        ([0.5, -0.5, 3, -9], [1, 2.5, 3, -9]),
        ([7, -7, -7, 7], [2, 0, 1, 7]),
    ):
        action = actions.spec.to_environment(np.array(values, np.float32))
        assert actions.decode(action).tolist() == expected


@pytest.mark.parametrize(
    ('space', 'sentence'),
    [
        (spaces.Text(3), 'has the action space Text.*: actions may be Discrete'),
        (spaces.Box(0, 9, (2,), np.int32), r'the action space Box\(0, 9, \(2,\), int32\): actions'),
        (
            spaces.Tuple([spaces.Discrete(2), spaces.Text(3)]),
            r'the action space Tuple\(Discrete\(2\), Text.*, of which Text.* is not supported',
        ),
        (spaces.Tuple([]), r'has no actions: its space is Tuple\(\)'),
        (spaces.Box(0, np.inf, (2,)), 'has a component with one bound: give --clip_actions'),
        (spaces.Box(1, 1, (2,)), 'has a component whose bounds are equal: give --clip_actions'),
        (spaces.Discrete(2**25), 'a component may have at most 16,777,216 categories'),
    ],
)
def test_other_spaces_are_refused(space, sentence):
    with pytest.raises(LevelError, match=f"^'level' .*{sentence}"):
        ActionSpace(space, 'level')
