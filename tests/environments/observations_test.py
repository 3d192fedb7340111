"""How the parts of Dict and Tuple observations are arranged, by the docstring of the module."""

import json

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

from impala.environments import DeclarationError, hash_instruction
from impala.environments.observations import Observations
from impala.errors import LevelError
from impala.trajectory import ArraySpec, EnvironmentSpec, Part

SIDE = 32
IMAGE = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
PLANE = Box(-1, 1, (1, SIDE, SIDE))


def observations_of(space, *keys, size=None, **options):
    return Observations(space, size, 'Level-v0', keys, **options)


def image(value):
    return np.full(IMAGE.shape, value, np.uint8)


def take(observations, value):
    """Returns a copy of the arrays after a reset, and after a step, which must be equal."""
    observations.take(value, True)
    arrays = {name: array.copy() for name, array in observations.arrays.items()}
    observations.take(value, False)
    for name, array in observations.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
        spec = observations.spec[name]
        assert spec == ArraySpec(array.shape, array.dtype.name, parts=spec.parts)
    return arrays


def test_a_single_space_is_the_frame():
    assert take(observations_of(IMAGE), image(7))['frame'].tolist() == image(7).tolist()
    assert take(observations_of(Discrete(3)), 1)['frame'].tolist() == [0, 1, 0]
    assert take(observations_of(Tuple([Discrete(3)])), (1,))['frame'].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ('space', 'frame', 'others'),
    [
        (
            Dict(a=IMAGE, image=IMAGE, observation=IMAGE, screen=IMAGE),
            'screen',
            'a image observation',
        ),
        (Dict(a=IMAGE, image=IMAGE, observation=IMAGE), 'image', 'a observation'),
        (Dict(a=IMAGE, observation=IMAGE), 'observation', 'a'),
        (Dict({'b': IMAGE, 'a': IMAGE}), 'a', 'b'),
        (Dict([('b', IMAGE), ('a', IMAGE)]), 'b', 'a'),
        (Dict(a=IMAGE, z=Dict(image=IMAGE)), 'z/image', 'a'),
        (Dict(screen=Discrete(3), a=IMAGE), 'a', ''),
        (Tuple([IMAGE, IMAGE, Tuple([IMAGE, Dict(b=IMAGE)])]), '0', '1 2/0 2/1/b'),
        (Dict(a=Tuple([IMAGE, IMAGE])), 'a/0', 'a/1'),
        (Dict({3: IMAGE, 7: Dict({0: IMAGE})}), '3', '7/0'),
    ],
)
def test_images_get_arrays_by_their_keys(space, frame, others):
    observations = observations_of(space)
    values = {}

    def sample(part, path):
        if isinstance(part, Dict):
            return {key: sample(each, [*path, str(key)]) for key, each in part.items()}
        if isinstance(part, Tuple):
            return tuple(sample(each, [*path, str(i)]) for i, each in enumerate(part))
        if part != IMAGE:
            return part.sample()
        values['/'.join(path)] = len(values)
        return image(len(values) - 1)

    arrays = take(observations, sample(space, []))
    images = {name: array for name, array in arrays.items() if array.ndim == 3}
    assert images.keys() == {'frame', *others.split()}
    for name, array in images.items():
        assert (array == values[frame if name == 'frame' else name]).all()
        assert array.shape == IMAGE.shape


NUMBERS = Dict(
    [
        ('z', Box(-9, 9, (2, 2))),
        ('y', Tuple([Discrete(2), Dict({'b': MultiDiscrete([2, 3]), 'a': MultiBinary(2)})])),
        ('text', Text(5)),
        ('x', Box(-5, 5, (), np.int64)),
    ]
)
VALUE = {
    'x': np.array(-3),
    'text': 'go',
    'y': (1, {'a': np.array([0, 1], np.int8), 'b': np.array([1, 2])}),
    'z': np.array([[1, 2], [3, 4]], np.float32),
}
# A space that is made of a dict sorts its keys; one made of a list does not.
VECTOR = [1, 2, 3, 4, 0, 1, 0, 1, 0, 1, 0, 0, 1, -3]
PARTS = (
    Part('numbers', (4,)),
    Part('categories', (2,)),
    Part('bits', (2,)),
    Part('categories', (2, 3)),
    Part('numbers', (1,)),
)


@pytest.mark.parametrize(
    ('space', 'parts'),
    [
        (Box(-1, 1, (3,)), ()),
        (Dict(a=Box(-1, 1, (3,))), ()),
        (Discrete(3), (Part('categories', (3,)),)),
        (Tuple([MultiDiscrete([[2, 3], [4, 5]])]), (Part('categories', (2, 3, 4, 5)),)),
        (MultiBinary([2, 3]), (Part('bits', (6,)),)),
        (Tuple([Discrete(3), Discrete(2)]), (Part('categories', (3,)), Part('categories', (2,)))),
        (IMAGE, ()),
    ],
)
def test_a_spec_says_what_its_numbers_are_also_in_another_process(space, parts):
    spec = observations_of(space).spec['frame']
    assert spec.parts == parts
    whole = EnvironmentSpec({'frame': spec}, 2, 1)
    assert EnvironmentSpec.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize('has_image', [False, True])
def test_numbers_are_one_vector_in_the_order_of_the_space(has_image):
    space = Dict([*NUMBERS.items(), *([('view', IMAGE)] if has_image else [])])
    observations = observations_of(space)
    arrays = take(observations, VALUE | {'view': image(9)})
    name = 'vector' if has_image else 'frame'
    assert arrays[name].tolist() == VECTOR and arrays[name].dtype == np.float32
    assert observations.spec[name].parts == PARTS
    assert not any(each.parts for other, each in observations.spec.items() if other != name)
    assert arrays.keys() == {'frame', name, 'instruction'}
    if has_image:
        assert (arrays['frame'] == 9).all()


def test_an_entry_does_not_keep_the_values_of_others():
    space = Dict(a=Discrete(3), b=Box(0, 9, (2,)), c=Discrete(2))
    observations = observations_of(space)
    for a, b, c in ((2, [1, 2], 0), (0, [3, 4], 1), (1, [5, 6], 0)):
        arrays = take(observations, {'a': a, 'b': b, 'c': c})
        assert arrays['frame'].tolist() == [*np.eye(3)[a], *b, *np.eye(2)[c]]


def test_texts_are_one_instruction():
    space = Dict(a=Text(9), b=Discrete(2), c=Dict(d=Text(9)), e=Text(9))
    observations = observations_of(space)
    for texts in (('go', 'to', 'it'), ('', '', ''), ('go', 'to', ''), ('go to', '', 'it'), 'abc'):
        value = {'a': texts[0], 'b': 1, 'c': {'d': texts[1]}, 'e': texts[2]}
        expected = hash_instruction(' '.join(texts))
        np.testing.assert_array_equal(take(observations, value)['instruction'], expected)


def test_an_outermost_action_mask_is_no_part_of_the_observation():
    mask = MultiBinary(2)
    assert observations_of(Dict(a=Discrete(2), action_mask=mask)).spec['frame'].shape == (2,)
    chosen = observations_of(Dict(a=Discrete(2), action_mask=mask), 'action_mask', 'a')
    assert chosen.spec['frame'].shape == (2,)
    # Elsewhere it is like any other key.
    nested = observations_of(Dict(a=Dict(b=Discrete(2), action_mask=mask)))
    assert nested.spec['frame'].shape == (4,)


def test_names_that_are_taken_get_a_number():
    space = Dict(
        [
            ('image', Box(0, 255, (40, 40), np.uint8)),
            ('a/b', Box(0, 255, (41, 40), np.uint8)),
            ('a', Dict(b=Box(0, 255, (42, 40), np.uint8))),
            ('vector', Box(0, 255, (43, 40), np.uint8)),
            ('frame', Box(0, 255, (44, 40), np.uint8)),
            ('instruction', Box(0, 255, (45, 40), np.uint8)),
            ('action_noise', Box(0, 255, (46, 40), np.uint8)),
            ('number', Discrete(2)),
            ('b', Dict(action_mask=Box(0, 255, (47, 40), np.uint8))),
            ('a/b_2', Box(0, 255, (48, 40), np.uint8)),
            (0, Box(0, 255, (49, 40), np.uint8)),
            ('0', Box(0, 255, (50, 40), np.uint8)),
        ]
    )
    spec = observations_of(space).spec
    assert {name: each.shape[0] for name, each in spec.items()} == {
        'frame': 40,
        'a/b': 41,
        'a/b_2': 42,
        'vector_2': 43,
        'frame_2': 44,
        'instruction_2': 45,
        'action_noise_2': 46,
        'vector': 2,
        'b/action_mask': 47,
        'a/b_2_2': 48,
        '0': 49,
        '0_2': 50,
    }


def test_keys_choose_entries_in_their_order():
    arrays = take(observations_of(NUMBERS, 'x', 'z'), VALUE)
    assert arrays.keys() == {'frame'}
    assert arrays['frame'].tolist() == [-3, 1, 2, 3, 4]
    # The others need not even be supported, nor be there.
    space = Dict({'a': Sequence(Discrete(2)), 'b': Discrete(2), 5: Discrete(3)})
    assert take(observations_of(space, 'b', 'b'), {'b': 1})['frame'].tolist() == [0, 1]
    assert take(observations_of(space, '5'), {5: 1})['frame'].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ('space', 'keys', 'parts'),
    [
        (Dict(a=IMAGE, b=IMAGE), ['a', 'c'], ['--observation_keys=a,c: ', 'the keys a, b.']),
        (Dict(a=Dict(b=IMAGE)), ['b'], ['the keys a.']),
        (Tuple([IMAGE]), ['0'], ['has no keys.']),
        (IMAGE, ['a'], ['has no keys.']),
        (Text(4), [], ['Text(1, 4', 'neither an image nor numbers', 'at most 10,000 numbers']),
        (Dict(a=Text(4)), [], ["Dict('a': Text(1, 4", 'neither an image nor numbers']),
        (Dict(), [], ['Dict()', 'neither an image nor numbers']),
        (Tuple([]), [], ['Tuple()', 'neither an image nor numbers']),
        (Dict(action_mask=MultiBinary(2)), [], ['neither an image nor numbers']),
        (Dict(a=IMAGE, b=Text(4)), ['b'], ['--observation_keys=b chooses neither an image']),
        (
            Dict(a=Tuple([IMAGE, Sequence(Discrete(2))])),
            [],
            ["of which 'a/1', Sequence(Discrete(2), stack=False), is not supported: an "],
        ),
        (Box(0, 1, (101, 100)), [], ['Box(0.0, 1.0, (101, 100), float32): an observation may be']),
    ],
)
def test_what_is_not_supported_is_one_sentence(space, keys, parts):
    with pytest.raises(LevelError) as error:
        observations_of(space, *keys)
    for part in ["'Level-v0'", *parts]:
        assert part in str(error.value)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_errors_name_what_makes_the_observation():
    with pytest.raises(LevelError, match=r'Text\(.*\) of its wrapper X with neither'):
        observations_of(Text(4), made_by=' of its wrapper X')
    with pytest.raises(LevelError, match=r'Sequence\(.*\) of its wrapper X: an observation may'):
        observations_of(Sequence(IMAGE), made_by=' of its wrapper X')


@pytest.mark.parametrize(
    ('value', 'sentence'),
    [
        (3, "declares 'z' in its observation, but returned 3."),
        (None, "declares 'z' in its observation, but returned None."),
        ([1, 2], "declares 'z' in its observation, but returned a list of int64 [2]."),
        (VALUE | {'y': (1,)}, "declares 1 in 'y' of its observation, but returned one without it."),
        (VALUE | {'y': {}}, "declares 0 in 'y' of its observation, but returned one without it."),
        (VALUE | {'y': 5}, "declares 0 in 'y' of its observation, but returned 5."),
        (
            VALUE | {'y': (1, {'b': np.array([1, 2])})},
            "declares 'a' in 'y/1' of its observation, but returned one without it.",
        ),
        (
            VALUE | {'y': (1, {'a': [0, 2], 'b': [1, 2]})},
            "declares MultiBinary(2) as 'y/1/a' of its observation, but returned 2 at [1].",
        ),
        (
            VALUE | {'x': 6},
            "declares int64 values from -5 to 5 as 'x' of its observation, but returned 6.",
        ),
        (VALUE | {'text': 5}, "declares a text as 'text' of its observation, but returned 5."),
        (
            VALUE | {'text': np.array(['go', 'to'])},
            "declares a text as 'text' of its observation, but returned <U2 [2].",
        ),
        (
            {key: value for key, value in VALUE.items() if key != 'text'},
            "declares 'text' in its observation, but returned one without it.",
        ),
    ],
)
def test_values_that_are_not_in_the_space_are_refused_by_their_path(value, sentence):
    for is_first in (True, False):
        observations = observations_of(NUMBERS)
        observations.take(VALUE, True)
        with pytest.raises(DeclarationError) as error:
            observations.take(value, is_first)
        assert str(error.value) == f"'Level-v0' {sentence}"


def test_images_are_resized_and_floats_scaled():
    observations = observations_of(Dict(image=IMAGE, plane=PLANE), size=(40, 50))
    plane = np.full(PLANE.shape, 0.5, np.float32)
    arrays = take(observations, {'image': image(7), 'plane': plane})
    assert arrays['frame'].shape == (50, 40, 3) and (arrays['frame'] == 7).all()
    assert arrays['plane'].shape == (50, 40, 1)
    np.testing.assert_allclose(arrays['plane'], 0.75, rtol=1e-6)
