import numpy as np
import pytest
from gymnasium import spaces

from impala.environments.action_masks import ActionMask
from impala.environments.environment import DeclarationError
from impala.trajectory import ActionSpec

SPEC = ActionSpec((2, 3))
COMPONENTS = {'a': spaces.Tuple([spaces.Discrete(2)]), 'b': spaces.Discrete(3)}
SPACE = spaces.Dict(COMPONENTS)


@pytest.mark.parametrize(
    'value',
    [
        np.array([1, 0, 0, 1, 1], np.int8),
        [True, False, False, True, True],
        (np.array([1, 0]), np.array([0, 1, 1])),
        {'a': (np.array([True, False]),), 'b': np.array([False, True, True])},
        {'b': np.array([False, True, True]), 'a': (np.array([True, False]),)},
        np.array([1, 0, 0, 1, 1], bool),
    ],
)
def test_masks_are_taken_in_any_form(value):
    mask = ActionMask(SPEC, SPACE, 'level', 'an info')
    mask.take(np.ones(5, np.int8))
    mask.take(value)
    assert mask.array.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    ('value', 'sentence'),
    [
        (np.ones(4, np.int8), 'is not 5 values of 0 or 1'),
        (np.ones(5), 'is not 5 values of 0 or 1'),
        (np.array([1, 2, 1, 1, 1]), 'is not 5 values of 0 or 1'),
        (None, 'is not 5 values of 0 or 1'),
        ('masks', 'is not 5 values of 0 or 1'),
        ((), 'is not 5 values of 0 or 1'),
        (np.array([1, 0, 0, 0, 0]), 'allows no action'),
        (np.array([0, 0, 1, 0, 0]), 'allows no action'),
    ],
)
def test_other_values_are_refused(value, sentence):
    mask = ActionMask(SPEC, SPACE, 'level', 'an info')
    with pytest.raises(DeclarationError, match=f"^'level' returned an info that {sentence}"):
        mask.take(value)


def test_boxes_among_the_actions_need_no_mask():
    space = spaces.Dict(COMPONENTS | {'Box': spaces.Box(0, 1, (4,))})
    mask = ActionMask(ActionSpec((2, 3), 4 * ((0.0, 1.0),)), space, 'level', 'an info')
    parts = {'b': np.array([0, 1, 1]), 'a': (np.array([1, 0]),)}
    for value in (parts, parts | {'Box': None}, (parts['a'], parts['b'])):
        mask.take(np.ones(5, np.int8))
        mask.take(value)
        assert mask.array.tolist() == [True, False, False, True, True]


def test_masks_need_the_keys_of_the_actions():
    mask = ActionMask(SPEC, SPACE, 'level', 'an info')
    with pytest.raises(DeclarationError) as error:
        mask.take({'a': (np.ones(2, np.int8),), 'c': np.ones(3, np.int8)})
    assert str(error.value) == (
        "'level' returned an info with the keys ['a', 'c'], where its actions have ['a', 'b']."
    )
