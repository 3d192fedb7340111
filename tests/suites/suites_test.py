import csv
import math
import os
import re

import pytest

from impala import suites
from impala.environments.atari import atari_games
from impala.environments.level_names import DMLAB30_LEVELS
from impala.errors import LevelError


def test_atari57():
    suite = suites.load('atari57')
    assert suite.name == 'atari57' and suite.has_scores
    assert len(suite.levels) == 57
    games = atari_games()
    assert {name.removeprefix('ALE/').removesuffix('-v5') for name in suite.level_names} <= {*games}
    pong = next(level for level in suite.levels if level.name == 'ALE/Pong-v5')
    assert (pong.random, pong.human) == (-20.7, 14.6)
    assert pong.published['impala_deep'] == 20.98
    assert suite.for_testing() == suite


def test_dmlab30():
    suite = suites.load('dmlab30')
    assert len(suite.levels) == 30
    played = {*suite.level_names, *suite.for_testing().level_names}
    assert played == DMLAB30_LEVELS
    # Lab refuses to train on the two hold-out levels.
    assert not [name for name in suite.level_names if name.endswith('_test')]
    assert sum(name.endswith('_test') for name in suite.for_testing().level_names) == 2
    watermaze = next(level for level in suite.levels if level.name == 'rooms_watermaze')
    assert (watermaze.random, watermaze.human) == (4.065, 54)


def test_every_published_agent_has_a_readable_name():
    for name in suites.packaged_suites():
        for column in suites.load(name).levels[0].published:
            assert re.fullmatch(r'IMPALA, [a-zA-Z ,]+ \(published\)', suites.published_name(column))
    assert suites.published_name('impala_deep') == 'IMPALA, deep network (published)'
    assert suites.published_name('our_own_agent') == 'our own agent (published)'


def test_levels_by_name():
    suite = suites.load('ALE/Pong-v5, CartPole-v1,my_levels:easy')
    assert suite.name == ''
    assert suite.level_names == ('ALE/Pong-v5', 'CartPole-v1', 'my_levels:easy')
    assert [level.human for level in suite.levels] == [14.6, None, None]
    assert not suite.has_scores
    single = suites.load('rooms_collect_good_objects_test')
    assert single.level_names == ('rooms_collect_good_objects_test',)
    assert single.levels[0].human == 10
    # A level given by name is tested itself, not its test level.
    train = suites.load('rooms_collect_good_objects_train').for_testing()
    assert train.level_names == ('rooms_collect_good_objects_train',)


def test_a_users_suite_file(tmp_path):
    path = tmp_path / 'mine.csv'
    path.write_text(
        'human,level,random,others,test_level\n10,a:train,1.5,7,a:test\n20,b:both,-1,,\n,c:new,,,\n'
    )
    suite = suites.load(str(path))
    assert suite.name == 'mine' and not suite.has_scores
    assert suite.levels == (
        suites.Level('a:train', 'a:test', 1.5, 10, {'others': 7}),
        suites.Level('b:both', 'b:both', -1, 20),
        suites.Level('c:new', 'c:new'),
    )
    assert suite.for_testing().level_names == ('a:test', 'b:both', 'c:new')
    # As spreadsheets write it, with a byte-order mark.
    path.write_text('level,random,human\na:train,1,2\n', encoding='utf-8-sig')
    assert suites.load(str(path)).levels == (suites.Level('a:train', 'a:train', 1, 2),)


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('level,random\na,1\n', "no column 'human'"),
        ('', "no column 'level'"),
        ('level,random,human\n', 'has no level'),
        ('level,random,human\na,1,2\n,1,2\n', 'line 3: there is no level'),
        ('level,random,human\na,1,two\n', "line 2: human is 'two', which is not a number"),
        ('level,random,human\na,nan,2\n', "line 2: random is 'nan'"),
        ('level,random,human\na,2,2\n', 'line 2: random and human score of a are both 2'),
        ('level,random,human\na,1,2\nb,1,2\na,1,2\n', 'names the level a twice'),
        (
            'level,random,human,test_level\na,1,2,c\nd,1,2,\nb,1,2,c\n',
            'has c as the test_level of both a and b: each needs one of its own',
        ),
        (
            'level,random,human,test_level\na,1,2,\nb,1,2,a\n',
            'has a as the test_level of both a and b',
        ),
        (b'\xff\xfe', 'is not a CSV file'),
    ],
)
def test_mistakes_in_a_file_give_one_sentence(tmp_path, text, sentence):
    path = tmp_path / 'mine.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LevelError, match=re.escape(sentence)) as error:
        suites.load(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ('level_name', 'sentence'),
    [
        ('/nowhere/mine.csv', 'Cannot read the suite /nowhere/mine.csv: No such file'),
        ('a,,b', 'an empty name'),
        ('', 'an empty name'),
        ('a,b,a', 'names the level a twice'),
        ('dmlab30,ALE/Pong-v5', 'dmlab30 is a suite'),
        ('dmlab', "Did you mean 'dmlab30'"),
    ],
)
def test_invalid_names_are_refused(level_name, sentence):
    with pytest.raises(LevelError, match=re.escape(sentence)):
        suites.load(level_name)


def test_the_tables_are_complete():
    """Every row has a number in every column."""
    for name in suites.packaged_suites():
        path = os.path.join(os.path.dirname(suites.__file__), f'{name}.csv')
        with open(path) as file:
            rows = list(csv.DictReader(file))
        assert len({row['level'] for row in rows}) == len(rows)
        for row in rows:
            assert all(math.isfinite(float(row[column])) for column in list(row)[2:])
