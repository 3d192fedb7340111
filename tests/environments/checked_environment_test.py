"""Tests of user-defined environments, each with a mistake that its author could make."""

import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from impala.acting import actor
from impala.environments import (
    DeclarationError,
    Environment,
    EnvironmentConfig,
    checked_environment,
    create_environment,
)
from impala.errors import LevelError
from impala.trajectory import ActionSpec, ArraySpec, EnvironmentSpec, EpisodeEnd, Part

FRAME = ArraySpec((2,), 'float32')
WORDS = ArraySpec((3,), 'int32')


class Own(Environment):
    """A correct environment, to which tests add mistakes."""

    spec = EnvironmentSpec({'frame': FRAME}, 2, 1)
    answer = (1.0, EpisodeEnd.NOT_ENDED, {'frame': np.ones(2, np.float32)})
    first = {'frame': np.zeros(2, np.float32)}

    def reset(self):
        return self.first

    def step(self, action):
        return self.answer


@pytest.fixture
def create(monkeypatch):
    """Creates an environment from the given attribute of a module."""
    module = types.ModuleType('own_environment_mistakes')
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def create_one(make):
        module.make = make
        return create_environment('own_environment_mistakes:make', 7, EnvironmentConfig(width=4))

    return create_one


def returning(**members):
    """Returns a callable that makes `Own` with other members."""
    return lambda seed, config: type('Mistaken', (Own,), members)()


def sentence(error):
    """Returns the text of an error, which must be one sentence that names the level."""
    text = str(error.value)
    assert 'own_environment_mistakes:make' in text
    assert text.endswith('.') and '\n' not in text
    return text


def spec_of(observation=None, **values):
    arguments = {'action': 2, 'num_action_repeats': 1} | values
    return EnvironmentSpec({'frame': FRAME} if observation is None else observation, **arguments)


@pytest.mark.parametrize(
    ('spec', 'text'),
    [
        (None, "attribute 'spec' is None, not an impala.trajectory.EnvironmentSpec"),
        ({'frame': FRAME}, "attribute 'spec' is a dict"),
        (spec_of(action=0), 'has categories=0, and it must be an integer of at least 1'),
        (spec_of(action=2.0), 'has action=2.0, and it must be an impala.trajectory.ActionSpec'),
        (spec_of(action=ActionSpec()), 'has no actions'),
        (spec_of(action=ActionSpec((3, 2.5))), 'has categories=2.5'),
        (spec_of(action=ActionSpec(3)), 'has categories=3, and it must be a tuple'),
        (spec_of(action=ActionSpec((2**24 + 1,))), 'has 16,777,217 categories, and a component'),
        (spec_of(action=ActionSpec((3, 2), is_scalar=True)), 'has is_scalar=True, and there'),
        (spec_of(action=ActionSpec((3,), (None,), is_scalar=True)), 'has is_scalar=True, and'),
        (spec_of(action=ActionSpec(bounds=(0, 1))), 'has the bounds 0, and they must be None or'),
        (spec_of(action=ActionSpec(bounds=((0, 1, 2),))), 'has the bounds (0, 1, 2), and'),
        (spec_of(action=ActionSpec(bounds=(('a', 'b'),))), "has the bounds ('a', 'b'), and"),
        (spec_of(action=ActionSpec(bounds=((0, 1e308),))), 'has the bounds (0, 1e+308), and'),
        (spec_of(action=ActionSpec(bounds=((0, np.inf),))), 'has the bounds (0, inf), and'),
        (spec_of(action=ActionSpec(bounds=((np.nan, 1),))), 'has the bounds (nan, 1), and'),
        (spec_of(action=ActionSpec(bounds=((1, 1),))), 'has the bounds (1, 1), and'),
        (spec_of(num_action_repeats=0), 'has num_action_repeats=0'),
        (spec_of({}), "declares nothing, but no observation 'frame'"),
        (spec_of({'image': FRAME}), "declares 'image', but no observation 'frame'"),
        (spec_of({'frame': (2,)}), 'must have a dict of name -> impala.trajectory.ArraySpec'),
        (spec_of([FRAME]), 'must have a dict of name'),
        (spec_of({'frame': ArraySpec((2,), 'flaot32')}), "'frame' as flaot32, and it may be one"),
        (spec_of({'frame': ArraySpec((2,), 'float64')}), "'frame' as float64, and it may be one"),
        (spec_of({'frame': ArraySpec((2, 0), 'uint8')}), 'with the shape (2, 0), and it must'),
        (spec_of({'frame': ArraySpec((-1,), 'uint8')}), 'with the shape (-1,)'),
        (spec_of({'frame': ArraySpec(2, 'uint8')}), 'with the shape 2, and it must be a tuple'),
        (spec_of({'frame': ArraySpec((2, 2, 2, 2), 'uint8')}), 'three dimensions at most'),
        (spec_of({'frame': FRAME, 'instruction': FRAME}), "'instruction' as float32 [2], and"),
        (
            spec_of({'frame': FRAME} | {f'more_{i}': FRAME for i in range(11)}),
            'declares 12 observations, and there may be 11',
        ),
        (spec_of({'frame': FRAME, 'action_noise': FRAME}), "'action_noise', a name that test mode"),
        (spec_of(suite='procgen'), "suite='procgen'"),
        (spec_of(suite='atari'), "'frame' as float32 [2], and it must be uint8"),
    ],
)
def test_invalid_specs_are_refused(create, spec, text):
    with pytest.raises(LevelError) as error:
        create(returning(spec=spec))
    assert text in sentence(error)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ('make', 'text'),
    [
        (lambda seed, config: None, 'returned None, which is not an environments.Environment'),
        (lambda seed, config: {'a': 1}, 'returned a dict'),
        (lambda seed: Own(), 'must be a callable that takes (seed, config): too many'),
        (3, 'is an int, not a callable'),
        (lambda seed, config: Environment(), 'cannot be made: TypeError: Can'),
    ],
)
def test_factories_that_make_no_environment_are_refused(create, make, text):
    with pytest.raises(LevelError) as error:
        create(make)
    assert text in sentence(error)


@pytest.mark.parametrize(
    ('make', 'text'),
    [
        (lambda seed, config: _raise(ValueError('no\nmap')), 'cannot be made: ValueError: no map'),
        (lambda seed, config: _raise(SystemExit(5)), 'cannot be made: SystemExit: 5'),
        (lambda seed, config: {}['map'], "KeyError: 'map' (checked_environment_test.py, line "),
    ],
)
def test_failures_before_the_start_are_one_sentence(create, make, text):
    """Later, in an actor, failures may be transient."""
    with pytest.raises((ValueError, SystemExit, KeyError)):
        create(make)
    described = actor._describe('own_environment_mistakes:make', 7, EnvironmentConfig())
    assert text in json.loads(described)['error']


ANSWER = Own.answer[2]
STEPS = [
    ((*Own.answer, {}), 'returned a tuple of 4 from step, which must return three values'),
    (None, 'returned None from step'),
    ((None, *Own.answer[1:]), 'returned None as its reward, which must be a number'),
    (('one', *Own.answer[1:]), 'returned a str as its reward'),
    ((1j, *Own.answer[1:]), 'returned a complex as its reward'),
    ((np.ones(2), *Own.answer[1:]), 'returned an array float64 [2] as its reward'),
    ((np.ones(1), *Own.answer[1:]), 'returned an array float64 [1] as its reward'),
    ((1.0, 7, ANSWER), 'returned 7, an int, as the end of the episode, which must be one of'),
    ((1.0, True, ANSWER), 'returned True, a bool, as the end of the episode'),
    ((1.0, 'done', ANSWER), "returned 'done', a str, as the end of the episode"),
]
OBSERVATIONS = [
    (None, "returned None as its observation, which must be a dict with 'frame'"),
    (np.zeros(2, np.float32), 'returned an array float32 [2] as its observation'),
    ({}, "an observation without 'frame', which its spec declares"),
    ({'frame': [0.0, 1.0]}, "'frame' as a list of 2, but its spec declares float32 [2]"),
    ({'frame': np.zeros(3, np.float32)}, "'frame' as float32 [3], but its spec declares"),
    ({'frame': np.zeros(2)}, "'frame' as float64 [2], but its spec declares float32 [2]"),
]


@pytest.mark.parametrize(('answer', 'text'), STEPS)
def test_invalid_steps_are_refused(create, answer, text):
    environment = create(returning(answer=answer))
    environment.reset()
    for find in (lambda: environment.step(0), environment.check):
        with pytest.raises(DeclarationError) as error:
            find()
        assert text in sentence(error)


@pytest.mark.parametrize(('observation', 'text'), OBSERVATIONS)
def test_observations_must_match_the_spec(create, observation, text):
    environment = create(returning(first=observation))
    for find in (environment.reset, environment.check):
        with pytest.raises(DeclarationError) as error:
            find()
        assert text in sentence(error)
    # `check` tries the first step, too.
    with pytest.raises(DeclarationError) as error:
        create(returning(answer=(*Own.answer[:2], observation))).check()
    assert text in sentence(error)


@pytest.mark.parametrize('word', [-1, 1000])
def test_words_beyond_the_hash_range_are_refused(create, word):
    spec = EnvironmentSpec({'frame': FRAME, 'instruction': WORDS}, 2, 1)
    good = Own.first | {'instruction': np.array([999, 1, 0], np.int32)}
    bad = Own.first | {'instruction': np.array([999, word, 0], np.int32)}
    create(returning(spec=spec, first=good, answer=(*Own.answer[:2], good))).check()
    with pytest.raises(DeclarationError) as error:
        create(returning(spec=spec, first=bad)).reset()
    assert "'instruction' with numbers outside of 0 to 999" in sentence(error)
    with pytest.raises(DeclarationError):
        create(returning(spec=spec, first=good, answer=(*Own.answer[:2], bad))).step(0)


def test_masks_must_allow_an_action_of_each_component(create):
    frame = {'frame': np.zeros(2, np.float32)}
    mask = ArraySpec((5,), 'bool')
    spec = spec_of({'frame': FRAME, 'action_mask': mask}, action=ActionSpec((2, 3)))
    good = frame | {'action_mask': np.array([False, True, False, False, True])}
    create(returning(spec=spec, first=good, answer=(*Own.answer[:2], good))).check()
    for wrong in ([False, False, True, True, True], [True, True, False, False, False]):
        bad = frame | {'action_mask': np.array(wrong)}
        with pytest.raises(DeclarationError) as error:
            create(returning(spec=spec, first=bad)).reset()
        assert "'action_mask' that allows no action" in sentence(error)
        with pytest.raises(DeclarationError):
            create(returning(spec=spec, first=good, answer=(*Own.answer[:2], bad))).step(0)


@pytest.mark.parametrize(
    'reward', [1, 1.0, True, np.float32(1), np.float64(1), np.int8(1), np.array(1.0), np.bool_(1)]
)
def test_rewards_may_be_numbers_of_any_type(create, reward):
    environment = create(returning(answer=(reward, *Own.answer[1:])))
    assert environment.step(0)[0] == 1.0
    assert isinstance(environment.step(0)[0], float)


def test_numpy_numbers_in_a_spec_become_python_numbers(create):
    """They come from `np.shape` and Gymnasium's `Discrete.n`."""
    spec = EnvironmentSpec({'frame': ArraySpec([np.int64(2)], np.float32)}, np.int64(2), np.int8(1))
    environment = create(returning(spec=spec))
    assert environment.spec == Own.spec
    assert json.loads(json.dumps(environment.spec.to_json()))['action'] == 2
    environment.check()


def test_numpy_numbers_in_an_action_spec_become_python_numbers(create):
    """They come from Gymnasium's `MultiDiscrete.nvec` and `Box.low`; lists become tuples."""
    bounds = list(zip(np.float32([0, -1]), np.float32([1, 2]), strict=True))
    action = ActionSpec(list(np.int64([3, 2])), [*bounds, None])
    spec = create(returning(spec=spec_of(action=action))).spec.action
    assert spec == ActionSpec((3, 2), ((0.0, 1.0), (-1.0, 2.0), None))
    hash(spec)
    assert ActionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_vector_may_have_parts(create):
    parts = (Part('numbers', (3,)), Part('categories', (2, 4)), Part('bits', (1,)))
    spec = ArraySpec((10,), np.float32, parts=parts)
    environment = create(returning(spec=EnvironmentSpec({'frame': spec}, 2, 1)))
    assert environment.spec.observation['frame'] == ArraySpec((10,), 'float32', parts=parts)


@pytest.mark.parametrize(
    ('shape', 'dtype', 'parts'),
    [
        ((3,), 'float32', [('numbers', (2,))]),
        ((2,), 'uint8', [('numbers', (2,))]),
        ((2, 1), 'float32', [('numbers', (2,))]),
        ((2,), 'float32', [('numbers', (1, 1))]),
        ((2,), 'float32', [('words', (2,))]),
        ((2,), 'float32', [('categories', (2, 0))]),
        ((2,), 'float32', [('bits', (2,)), ('bits', ())]),
    ],
)
def test_parts_must_make_up_the_vector(shape, dtype, parts):
    with pytest.raises(ValueError, match='Part'):
        ArraySpec(shape, dtype, parts=tuple(Part(*each) for each in parts))


def test_failures_during_the_check_are_left_to_the_actors(create):
    """They may be transient; actors are restarted and show the traceback."""
    environment = create(returning(step=lambda self, action: 1 / 0))
    environment.check()
    with pytest.raises(ZeroDivisionError):
        environment.step(0)


def test_last_action_frames_is_passed_through(create):
    environment = create(lambda seed, config: Own())
    assert environment.last_action_frames is None
    environment = create(returning(last_action_frames=3))
    assert environment.last_action_frames == 3


def test_the_last_observation_is_passed_through_and_checked(create):
    assert create(lambda seed, config: Own()).last_observation is None
    last = {'frame': np.ones(2, np.float32)}
    assert create(returning(last_observation=last)).last_observation is last
    with pytest.raises(DeclarationError) as error:
        _ = create(returning(last_observation={'frame': np.ones(3, np.float32)})).last_observation
    assert "'frame' as float32 [3], but its spec declares float32 [2]" in sentence(error)


def test_the_last_observation_of_an_earlier_episode_is_not_that_of_a_later_one(create):
    class Once(Own):
        answer = (1.0, EpisodeEnd.TRUNCATED, Own.first)

        def step(self, action):
            if action == 1:
                self.last_observation = self.first
            return self.answer

    class Always(Once):
        last_observation = property(lambda self: self.first)

        def step(self, action):
            return self.answer

    environment = create(lambda seed, config: Once())
    environment.step(1)
    assert environment.last_observation is Own.first
    environment.step(0)
    assert environment.last_observation is None
    environment = create(lambda seed, config: Always())
    environment.step(1)
    environment.step(1)
    assert environment.last_observation is Own.first


def test_everything_else_is_passed_to_the_environment(create):
    calls = []
    members = {
        name: lambda self, *arguments, name=name: calls.append((name, *arguments)) or name
        for name in ('seed_next', 'render', 'check', 'close')
    }
    members['frames_per_second'] = 25.0
    environment = create(returning(**members))
    assert environment.seed_next(3) == 'seed_next' and environment.render() == 'render'
    assert environment.frames_per_second == 25
    environment.check()
    environment.close()
    assert calls == [('seed_next', 3), ('render',), ('check',), ('close',)]


def test_max_observations_is_what_the_segment_holds():
    folder = pathlib.Path(__file__).resolve().parents[2] / 'dynamic_batching' / 'cc'
    source = (folder / 'shared_segment.h').read_text(encoding='utf-8')
    fields = int(re.search(r'kMaxFields = (\d+)', source)[1])
    fixed = re.search(r'enum FixedField : int \{(.*?)\}', source, re.DOTALL)[1]
    first = fixed.partition('kFirstObservation')[0].count(',')
    # Test mode adds an observation, the noise of its actions.
    assert fields - first == checked_environment.MAX_OBSERVATIONS + 1
