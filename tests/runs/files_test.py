"""Tests of impala/runs/files.py, on files with real damage."""

import json
import os
import shutil

import pytest

from impala.runs import files as run_files

METRICS = {'wall_seconds': 1.5, 'frames': 40, 'agent_steps': 10, 'updates': 1, 'loss/total': 0.5}


@pytest.mark.parametrize(
    'line',
    [
        json.dumps({'agent_steps': None, 'wall_seconds': 3, 'frames': 1}).encode(),
        json.dumps(METRICS | {'agent_steps': '10'}).encode(),
        json.dumps(METRICS | {'frames': -4}).encode(),
        json.dumps(METRICS | {'updates': 1.5}).encode(),
        json.dumps(METRICS | {'wall_seconds': float('nan')}).encode(),
        json.dumps(METRICS | {'wall_seconds': -1}).encode(),
        json.dumps(METRICS | {'loss/total': float('inf')}).encode(),
        json.dumps(METRICS | {'loss/total': True}).encode(),
        json.dumps(METRICS | {'frames': 10**30}).encode(),
        json.dumps(METRICS | {'actors': [3]}).encode(),
        json.dumps([METRICS]).encode(),
        b'{"agent_steps": ' + b'9' * 5000 + b'}',
        b'[' * 100_000,
        b'\xff\xfe',
        b'',
    ],
)
def test_invalid_lines_of_metrics_are_refused(line):
    with pytest.raises(ValueError):
        run_files.parse_metrics(line)


def test_a_line_of_metrics():
    row = METRICS | {'actors': [{'task': 0}]}
    assert run_files.parse_metrics(json.dumps(row).encode()) == row


@pytest.mark.parametrize(
    'line',
    [
        b'1.5,40,ten,a,1.0,5,terminated',
        b'1.5,-40,10,a,1.0,5,terminated',
        b'nan,40,10,a,1.0,5,terminated',
        b'inf,40,10,a,1.0,5,terminated',
        b'1.5,40,10,a,,5,terminated',
        b'1.5,40,' + b'9' * 30 + b',a,1.0,5,terminated',
        b'1.5,40,10,a,1.0,5',
        b'1.5,40,10,a\rb,1.0,5,terminated',
        b'1.5,40,10,\xff,1.0,5,terminated',
        b'1.5,40,10,' + b'a' * 200_000 + b',1.0,5,terminated',
        b'',
    ],
)
def test_invalid_episodes_are_refused(line):
    with pytest.raises(ValueError):
        run_files.parse_episode(line)


def test_damaged_lines_are_left_out_and_reported_once(tmp_path):
    path = tmp_path / 'episodes.csv'
    header = 'wall_seconds,frames,agent_steps,level,episode_return,episode_frames,ended_by\n'
    row = '1.5,40,10,a,-inf,5,terminated\n'
    told = []
    path.write_text(header + row + 'x\n' + row + '\n' + '1.5,4')
    rows = list(run_files.read_episodes(str(tmp_path), told.append))
    assert [each['return'] for each in rows] == [-float('inf')] * 2
    assert told == [f'WARNING: {path}, line 3 (and 1 more) is damaged and left out.']
    # The header and a truncated last line do not count as damage.
    path.write_text(header + row + '1.5,4')
    assert len([*run_files.read_episodes(str(tmp_path), told.append)]) == 1 == len(told)
    path.write_text(header + 'x\n')
    assert not [*run_files.read_episodes(str(tmp_path), told.append)]
    assert told[1] == f'WARNING: {path}, line 2 is damaged and left out.'


def test_an_unwritable_checkpoint_folder_is_reported(tmp_path):
    run_files.try_checkpoint_folder(str(tmp_path))
    assert os.listdir(tmp_path) == []
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'ckpt-1.index').touch()
    run_files.try_checkpoint_folder(str(tmp_path))
    assert os.listdir(tmp_path / 'checkpoints') == ['ckpt-1.index']
    shutil.rmtree(tmp_path / 'checkpoints')
    (tmp_path / 'checkpoints').write_text('x')
    with pytest.raises(
        run_files.LogdirError,
        match=f'^Cannot write checkpoints in {tmp_path}/checkpoints: Not a directory. Make room',
    ):
        run_files.try_checkpoint_folder(str(tmp_path))
    (tmp_path / 'checkpoints').unlink()
    (tmp_path / 'checkpoints').symlink_to('/proc')
    with pytest.raises(run_files.LogdirError, match='Cannot write checkpoints'):
        run_files.try_checkpoint_folder(str(tmp_path))


def test_files_with_impossible_numbers_are_not_checkpoints(tmp_path):
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    for number in ('3', '9' * 25, '\u0663'):
        (folder / f'ckpt-{number}.index').touch()
    assert run_files.checkpoint_paths(str(tmp_path)) == [str(folder / 'ckpt-3')]
