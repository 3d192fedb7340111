"""Tests of impala/runs/flag_file.py, on real files."""

import os
import re

import pytest
from absl import flags

from impala.runs import flag_file


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(f'{line}\n' for line in lines))
    return f'--flagfile={path}'


def texts(*arguments):
    return [argument.text for argument in flag_file.expand(arguments)]


def test_flag_files_are_expanded_in_place(tmp_path):
    inner = write(tmp_path / 'inner.flags', '', '  --b=2', '# --c=3', '// no flag')
    outer = write(tmp_path / 'outer.flags', '\ufeff--a=1', inner, '--nod')
    assert texts('--a=0', outer, '--d') == ['--a=0', '--a=1', '--b=2', '--nod', '--d']
    assert texts('--flagfile', str(tmp_path / 'inner.flags')) == ['--b=2']
    assert texts(inner, inner) == ['--b=2', '--b=2']
    assert texts('--', outer) == ['--', outer]
    origins = [argument.origin for argument in flag_file.expand([outer, '--d'])]
    outer, inner = tmp_path / 'outer.flags', tmp_path / 'inner.flags'
    assert origins == [f'{outer}, line 1', f'{inner}, line 2', f'{outer}, line 3', '']


def test_a_runs_flag_file_implies_its_logdir(tmp_path):
    flags = write(tmp_path / 'run' / 'flags.txt', '--notable=1', '--a=1')
    # Without a run next to it, a file of that name is like any other.
    assert texts(flags) == ['--notable=1', '--a=1']
    (tmp_path / 'run' / 'network.json').touch()
    here = f'--logdir={tmp_path}/run'
    assert texts(flags) == ['--notable=1', '--a=1', here]
    (tmp_path / 'run').rename(tmp_path / 'moved')
    moved = f'--flagfile={tmp_path}/moved/flags.txt'
    there = f'--logdir={tmp_path}/moved'
    assert texts(moved, '--a=2') == ['--notable=1', '--a=1', there, '--a=2']
    # A given --logdir takes precedence, wherever it stands.
    assert texts('--logdir=x', moved) == ['--logdir=x', '--notable=1', '--a=1']
    assert texts(moved, '--logdir', 'x') == ['--notable=1', '--a=1', '--logdir', 'x']
    outer = write(tmp_path / 'outer.flags', moved, '--b=3')
    assert texts(outer)[-2:] == [there, '--b=3']


def test_the_implied_logdir_is_absolute(tmp_path, monkeypatch):
    write(tmp_path / 'run' / 'flags.txt', '--a=1')
    (tmp_path / 'run' / 'checkpoints').mkdir()
    monkeypatch.chdir(tmp_path / 'run')
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in ('flags.txt', '../run/flags.txt', '~/run/flags.txt'):
        assert texts(f'--flagfile={path}') == ['--a=1', f'--logdir={tmp_path}/run']


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'--a=1\n--b=\xff\n', 'x.flags, line 2 is not UTF-8 text'),
        (b'\n\nCartPole-v1\n', "x.flags, line 3: 'CartPole-v1' is not a flag"),
        (b'--a=\0\n', 'x.flags, line 1: .* is not a flag'),
        (b'--flagfile=\n', r'--flagfile names no file \(.*x.flags, line 1\)'),
        (b'--flagfile\n', '--flagfile names no file'),
        (b'#' * (1 << 21), 'x.flags is too long for a flag file'),
        (None, 'Cannot read the flag file .*x.flags: Is a directory'),
    ],
)
def test_invalid_flag_files_give_one_sentence(tmp_path, content, sentence):
    path = tmp_path / 'x.flags'
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(flag_file.FlagFileError, match=sentence) as error:
        flag_file.expand([f'--flagfile={path}'])
    assert '\n' not in str(error.value) and len(str(error.value)) < 200 + len(str(path))


@pytest.mark.parametrize('path', ['/dev/zero', '/nowhere/x', ''])
def test_invalid_paths_give_one_sentence(path):
    with pytest.raises(flag_file.FlagFileError, match='flag file|names no file'):
        flag_file.expand([f'--flagfile={path}'])


def test_recursive_flag_files_give_one_sentence(tmp_path):
    first, second = tmp_path / 'first.flags', tmp_path / 'second.flags'
    write(first, '--a=1', f'--flagfile={second}')
    write(second, f'--flagfile={os.path.relpath(first)}')
    sentence = f'{re.escape(str(second))}, line 1: the flag file .*first.flags includes itself'
    with pytest.raises(flag_file.FlagFileError, match=sentence):
        flag_file.expand([f'--flagfile={first}'])


@pytest.mark.parametrize(
    ('argument', 'sentence'),
    [
        ('--size=x', '--size=x is not a whole number.'),
        ('--size=', '--size= is not a whole number.'),
        ('--size=1.5', '--size=1.5 is not a whole number.'),
        ('--size=a: b\nc', '--size=a: b c is not a whole number.'),
        ('--size=' + 5000 * '9', f'--size={80 * "9"}... has too many digits.'),
        ('--size=0', 'flag --size=0: 0 is not an integer in the range [1, 10]'),
        ('--rate=fast', '--rate=fast is not a number.'),
        ('--popart=maybe', '--popart=maybe is not true or false.'),
        ('--sise=3', "Unknown command line flag 'sise'. Did you mean: size ?"),
    ],
)
def test_errors_of_absl_are_reworded(argument, sentence):
    values = flags.FlagValues()
    flags.DEFINE_integer('size', 2, '', 1, 10, flag_values=values)
    flags.DEFINE_float('rate', 0.1, '', flag_values=values)
    flags.DEFINE_boolean('popart', False, '', flag_values=values)
    with pytest.raises(flags.Error) as error:
        values(['program', argument])
    assert flag_file.plainly(str(error.value)) == sentence
