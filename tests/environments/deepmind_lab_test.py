"""DeepMind Lab levels, played with a stand-in for its module."""

import importlib
import os
import signal
import zipfile
import zlib

import numpy as np
import pytest
from level_maps import maps_in
from playing import play, random_actions, run_python, same

from impala import suites
from impala.environments import EnvironmentConfig, create_environment
from impala.errors import LevelError
from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd


def first_pixels(rows):
    return [row[2]['frame'][0, 0].tolist() for row in rows]


def digest_pixel(digest):
    return [digest & 255, digest >> 8 & 255, digest >> 16 & 255]


def test_deepmind_lab_actions_seeds_and_discarded_first_reset(make, deepmind_lab):
    # Look left-right, look down-up, strafe, move, fire, jump, crouch.
    expected_actions = [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, -1, 0, 0, 0],
        [0, 0, -1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [-20, 0, 0, 0, 0, 0, 0],
        [20, 0, 0, 0, 0, 0, 0],
        [-20, 0, 0, 1, 0, 0, 0],
        [20, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ]
    environment = make('explore_goal_locations_small', 11)
    assert environment.spec == EnvironmentSpec(
        {
            'frame': ArraySpec((72, 96, 3), 'uint8'),
            'instruction': ArraySpec((32,), 'int32'),
        },
        9,
        4,
        'dmlab',
    )
    rows = play(environment, range(9))
    seed = np.random.RandomState(11).randint(2**31, dtype=np.int64)
    # The stand-in's frames hold a digest of the level, the seed, whether this is the first episode
    # of its Lab, and the actions.
    text = f'contributed/dmlab30/explore_goal_locations_small {seed} False'
    digest = zlib.crc32(text.encode())
    assert first_pixels(rows)[0] == digest_pixel(digest)
    for t, action in enumerate(expected_actions, start=1):
        digest = zlib.crc32(np.array(action, np.intc).tobytes(), digest)
        assert first_pixels(rows)[t] == digest_pixel(digest)
        assert rows[t][0] == 4 * action[3]


def test_deepmind_lab_episodes_end_and_begin_in_one_step(make, deepmind_lab):
    environment = make('rooms_select_nonmatching_object', 2, num_action_repeats=7)
    rows = play(environment, [0] * 250)
    ends = [t for t, row in enumerate(rows) if row[1]]
    # 720 frames are 102 steps of 7 frames and one of 6.
    assert ends == [103, 206]
    assert rows[103][1] == EpisodeEnd.TERMINATED
    assert [rows[102][0], rows[103][0], rows[104][0]] == [7, 6, 7]
    assert not np.array_equal(rows[0][2]['frame'], rows[103][2]['frame'])


def test_deepmind_lab_instructions_are_hashed(make, deepmind_lab):
    environment = make('language_select_described_object', 2)
    instructions = {tuple(environment.reset()['instruction'].tolist()) for _ in range(20)}
    assert instructions == {
        tuple(zlib.crc32(word.encode()) % 999 + 1 for word in ('get', 'the', colour, 'hat'))
        + (0,) * 28
        for colour in ('red', 'green', 'blue')
    }
    silent = make('seekavoid_arena_01', 2)
    assert not silent.reset()['instruction'].any()


def test_deepmind_lab_prints_nothing_and_removes_its_files(make, deepmind_lab, tmp_path, capfd):
    environment = make('contributed/dmlab30/rooms_watermaze', temp_folder=str(tmp_path))
    environment.reset()
    assert os.environ['LP_NUM_THREADS'] == '0'
    assert capfd.readouterr().out == ''
    assert len(os.listdir(tmp_path)) == 1
    environment.close()
    environment.close()
    assert not os.listdir(tmp_path)
    # The real Lab would crash this process.
    with pytest.raises(RuntimeError, match='closed'):
        environment.reset()
    with pytest.raises(RuntimeError, match='closed'):
        environment.step(0)


def test_invalid_deepmind_lab_levels_are_refused(make, deepmind_lab, tmp_path):
    for level_name, config, parts in (
        ('explore_goal_location_small', {}, ["Did you mean 'explore_goal_locations_small'?"]),
        ('rooms_collect_good_objects_test', {}, ['hold-out']),
        ('rooms_watermaze', {'width': 98}, ['98', 'multiples of 4']),
        (
            'rooms_watermaze',
            {'bootstrap_truncated': True},
            ["--bootstrap_truncated has no effect on 'rooms_watermaze'", 'does not say'],
        ),
    ):
        with pytest.raises(LevelError) as error:
            config = {'level_cache_dir': '', 'temp_folder': tmp_path, **config}
            create_environment(level_name, 1, EnvironmentConfig(**config))
        for part in parts:
            assert part in str(error.value)
        assert not os.listdir(tmp_path)
    make('rooms_collect_good_objects_test', is_test=True).reset()


def make_images(folder, name='0001.jpg'):
    """Makes a stand-in for the data set that two levels need."""
    (folder / 'brady_konkle_oliva2008').mkdir(parents=True, exist_ok=True)
    (folder / 'brady_konkle_oliva2008' / name).write_bytes(b'a picture')


@pytest.mark.parametrize('is_test', [False, True])
@pytest.mark.parametrize('prefix', ['', 'contributed/dmlab30/'])
def test_deepmind_lab_levels_with_images_check_for_them_first(
    is_test, prefix, make, deepmind_lab, tmp_path
):
    """Without them the module, like its stand-in, ends the process in mid-episode."""
    level_name = f'{prefix}psychlab_continuous_recognition'
    folder = tmp_path / 'brady_konkle_oliva2008'

    def assert_refused(dataset_path, why):
        with pytest.raises(LevelError) as error:
            make(level_name, dataset_path=dataset_path, is_test=is_test)
        for part in (repr(level_name), why, '--dataset_path'):
            assert part in str(error.value)

    assert_refused('', 'there is no --dataset_path')
    assert_refused(str(tmp_path / 'nowhere'), 'nowhere/brady_konkle_oliva2008')
    assert_refused(str(tmp_path), f'there is no folder {folder}')
    make_images(tmp_path, 'README.md')
    (folder / '0001.jpg').touch()
    (folder / '0002.jpg').mkdir()
    (folder / 'thumb_0001.jpg').write_bytes(b'a picture')
    assert_refused(str(tmp_path), f'{folder} has no numbered pictures')
    for name in ('7.png', '00013.JPEG', '0001.jpg'):
        make_images(tmp_path, name)
        environment = make(level_name, dataset_path=str(tmp_path), is_test=is_test)
        environment.check()
        play(environment, random_actions(environment, 100))
        (folder / name).unlink()


@pytest.mark.parametrize('is_test', [False, True])
def test_every_level_of_dmlab30(is_test, make, deepmind_lab, tmp_path):
    make_images(tmp_path)
    suite = suites.load('dmlab30')
    for name in (suite.for_testing() if is_test else suite).level_names:
        environment = make(name, dataset_path=str(tmp_path), is_test=is_test)
        environment.check()
        rows = play(environment, random_actions(environment, 3))
        assert rows[-1][2]['frame'].shape == (72, 96, 3) and environment.spec.num_actions == 9
        environment.close()


def test_only_tests_set_the_mixer_seed(make, deepmind_lab, monkeypatch):
    configs = []
    lab = importlib.import_module('deepmind_lab')
    real = lab.Lab
    monkeypatch.setattr(lab, 'Lab', lambda *a, **k: configs.append(a[2]) or real(*a, **k))
    for is_test in (True, False):
        make('rooms_watermaze', is_test=is_test)
    assert configs[0]['mixerSeed'] == str(0x600D5EED)
    assert 'mixerSeed' not in configs[1]


def test_deepmind_lab_compiles_a_map_once_for_all_environments(make, deepmind_lab, tmp_path):
    folder = tmp_path / 'not' / 'there' / 'yet'
    rows = play(make('rooms_watermaze', level_cache_dir=str(folder)), [])
    (name,) = maps_in(folder)
    written = (folder / name).stat()
    again = play(make('rooms_watermaze', level_cache_dir=str(folder)), [])
    assert same(rows, again)
    assert (folder / name).stat().st_ino == written.st_ino

    # A broken map would end the process, so it is discarded and compiled again.
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    assert same(rows, play(make('rooms_watermaze', level_cache_dir=str(folder)), []))
    with zipfile.ZipFile(folder / name) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(
    'code, exit_code, message',
    [
        ('lab.close(); lab.reset()', 139, 'reset of a closed Lab'),
        ('lab.close(); lab.observation_spec()', 139, 'observation_spec of a closed Lab'),
        ('lab = Lab(LEVEL, [], level_cache=Liar()); lab.reset()', 1, 'without a valid map'),
        ('lab.step(FORWARD)', 1, 'RuntimeError'),
        ('lab.reset(seed=np.int64(3))', 1, 'ValueError'),
        ('lab.reset(); lab.step(np.zeros(7))', 1, 'ValueError'),
        ('lab.reset(); lab.step(np.zeros((7, 2), np.intc)[:, 0])', 1, 'MisuseError'),
        ('lab.reset(); lab.step(FORWARD, 999999); lab.observations()', 1, 'RuntimeError'),
        ('Lab(LEVEL, ())', 1, 'TypeError'),
        ('Lab(LEVEL, [], {"with": "96"})', 1, 'MisuseError'),
        ('Lab(LEVEL, [], {"width": "98"})', 1, 'multiple of 4'),
        ('Lab(LEVEL, [], {"width": 96})', 1, 'TypeError'),
        ('Lab("no_such_level", [])', 1, 'Level not found'),
        (
            'os.mkdir("brady_konkle_oliva2008")\n'
            'lab = Lab("contributed/dmlab30/psychlab_continuous_recognition", [])\n'
            'lab.reset(); lab.step(FORWARD, 60); lab.step(FORWARD)',
            -signal.SIGABRT,
            'cannot read the image',
        ),
        ('lab.name = 3', 1, 'AttributeError'),
        ('class Mine(Lab): pass', 1, 'TypeError'),
        ('lab.reset(); assert os.fork() or os._exit(0); sys.exit(os.wait()[1] >> 8)', 139, 'fork'),
        ('lab.reset(); lab.step(FORWARD); lab.close() and sys.exit(lab.close())', 0, 'Lua log'),
    ],
)
def test_the_stand_in_is_as_strict_as_the_real_module(code, exit_code, message):
    result = run_python(
        'import os, sys, numpy as np\n'
        'from deepmind_lab import Lab\n'
        'class Liar:\n'
        '    def fetch(self, key, path): return True\n'
        '    def write(self, key, path): pass\n'
        'LEVEL = "seekavoid_arena_01"\n'
        'FORWARD = np.array([0, 0, 0, 1, 0, 0, 0], np.intc)\n'
        'lab = Lab(LEVEL, ["RGB_INTERLEAVED"], {"width": "96", "height": "72"})\n' + code
    )
    assert result.returncode == exit_code, result.stderr
    assert message in result.stdout + result.stderr
