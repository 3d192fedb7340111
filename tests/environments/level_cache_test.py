"""Compiled maps that processes and users share."""

import contextlib
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import time

import pytest
from level_maps import maps_in, write_map
from playing import ROOT

from impala.environments.level_cache import LevelCache, level_cache_statistics


def test_level_cache(tmp_path, caplog):
    folder = tmp_path / 'cache'
    cache = LevelCache(str(folder))
    path = tmp_path / 'map.pk3'
    assert not cache.fetch('some/../key', str(path)) and not path.exists()
    write_map(path, 'one')
    cache.write('some/../key', str(path))
    first = path.read_bytes()
    write_map(path, 'another')
    # A file left at the path by an earlier episode is replaced.
    assert LevelCache(str(folder)).fetch('some/../key', str(path))
    assert path.read_bytes() == first
    assert not cache.fetch('other', str(path))
    assert len(maps_in(folder)) == 1 and not caplog.records

    # A truncated map is not kept.
    path.write_bytes(first[:-1])
    cache.write('broken', str(path))
    assert len(maps_in(folder)) == 1 and len(caplog.records) == 1
    # A flipped bit is found, although the archive looks intact.
    (name,) = maps_in(folder)
    spoilt = bytearray(first)
    spoilt[first.index(b'one')] ^= 1
    (folder / name).write_bytes(spoilt)
    assert not cache.fetch('some/../key', str(path))
    assert not maps_in(folder)
    assert sorted(os.listdir(tmp_path)) == ['cache', 'map.pk3']


def test_level_cache_removes_the_least_recently_used_maps(tmp_path):
    folder, path = tmp_path / 'cache', tmp_path / 'map.pk3'
    size = 5000
    cache = LevelCache(str(folder), limit_bytes=4.5 * size)
    (tmp_path / 'cache').mkdir()
    abandoned, fresh, foreign = (
        folder / name for name in ('impala_map_old.tmp', 'impala_map_new.tmp', 'notes.txt')
    )
    for each in (abandoned, fresh, foreign):
        each.write_bytes(bytes(10 * size))
    for each in (abandoned, foreign):
        os.utime(each, (1e9, 1e9))

    def write(key):
        write_map(path, bytes(size))
        cache.write(key, str(path))

    for number in range(4):
        write(f'map {number}')
        os.utime(cache._path(f'map {number}'), (1.5e9 + number, 1.5e9 + number))
    assert len(maps_in(folder)) == 4
    # Map 0 is used again, so the fifth map evicts two others: nine tenths are 4.05 maps.
    assert LevelCache(str(folder)).fetch('map 0', str(path))
    write('map 4')
    there = [number for number in range(5) if os.path.exists(cache._path(f'map {number}'))]
    assert there == [0, 3, 4]
    assert sum(os.path.getsize(folder / name) for name in maps_in(folder)) <= 4.05 * size
    seconds = [name for name in os.listdir(folder) if name.endswith('.seconds')]
    assert len(seconds) == len(there)
    assert not abandoned.exists() and fresh.exists() and foreign.exists()


@pytest.mark.parametrize(
    ('folder_mode', 'file_mode'),
    [(0o700, 0o644), (0o755, 0o644), (0o2775, 0o664), (0o777, 0o666)],
)
def test_level_cache_files_take_the_permissions_of_their_folder(tmp_path, folder_mode, file_mode):
    folder = tmp_path / 'cache'
    folder.mkdir()
    folder.chmod(folder_mode)
    write_map(tmp_path / 'map.pk3', 'one')
    LevelCache(str(folder)).write('key', str(tmp_path / 'map.pk3'))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()]
    assert modes == [file_mode] * 2


# zipfile imports encodings.cp437 on use, when the other user may be unable to read it.
LEVEL_CACHE_OF_ANOTHER_USER = """
import encodings.cp437, os, sys
from impala.environments.level_cache import LevelCache
folder, path = sys.argv[1:]
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
cache = LevelCache(folder)
assert cache.fetch('key', path), 'cannot read the map'
print(cache.seconds_saved)
"""


@pytest.mark.skipif(os.getuid() != 0, reason='only root can act as another user')
def test_another_users_level_cache(tmp_path):
    """A hit marks the map as used and counts the seconds saved."""
    # Other users cannot enter pytest's folders.
    with tempfile.TemporaryDirectory(dir='/tmp') as name:
        os.chmod(name, 0o755)
        shared, own = pathlib.Path(name, 'shared'), pathlib.Path(name, 'own')
        for folder in (shared, own):
            folder.mkdir()
            folder.chmod(0o777)
        write_map(tmp_path / 'map.pk3', 'one')
        cache = LevelCache(str(shared))
        cache.write('key', str(tmp_path / 'map.pk3'))
        (cached,) = shared.glob('*.pk3')
        cached.with_name(cached.name + '.seconds').write_text('7.5')
        os.utime(cached, (1e9, 1e9))
        output = subprocess.run(
            [sys.executable, '-c', LEVEL_CACHE_OF_ANOTHER_USER, str(shared), str(own / 'map.pk3')],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (output.stdout, output.stderr) == ('7.5\n', '')
        assert cached.stat().st_mtime > 1.5e9


def test_level_cache_reports_what_it_saves(tmp_path, make, deepmind_lab, monkeypatch):
    monkeypatch.setenv('DEEPMIND_LAB_COMPILE_SECONDS', '0.2')
    assert level_cache_statistics(str(tmp_path)) == {}
    # Maps repeat after four seeds; each environment resets once more at its start.
    for _ in range(3):
        temp_folder = tmp_path / 'temp'
        temp_folder.mkdir(exist_ok=True)
        lab = make(
            'rooms_watermaze',
            level_cache_dir=str(tmp_path / 'maps'),
            temp_folder=str(temp_folder),
        )
        lab.reset()
    statistics = level_cache_statistics(str(temp_folder))
    assert statistics['hits'] == 5 and statistics['misses'] == 1
    assert 5 * 0.2 <= statistics['seconds_saved'] < 5 * 0.2 + 5


LEVEL_CACHE_PROCESS = """
import sys, zipfile
from impala.environments.level_cache import LevelCache
folder, path = sys.argv[1:]
cache = LevelCache(folder, limit_bytes=30_000)
for repetition in range(6):
    for number in range(8):
        if not cache.fetch(f'key {number}', path):
            with zipfile.ZipFile(path, 'w') as archive:
                archive.writestr('map', str(number) * 5000)
            cache.write(f'key {number}', path)
        with zipfile.ZipFile(path) as archive:
            assert archive.read('map') == str(number).encode() * 5000
"""


def test_processes_share_a_level_cache_that_is_too_small(tmp_path):
    """They write, use and remove the same maps at once, while the test truncates some."""
    folder = tmp_path / 'cache'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', LEVEL_CACHE_PROCESS, str(folder), str(tmp_path / f'{i}.pk3')],
            stderr=subprocess.PIPE,
        )
        for i in range(4)
    ]
    while any(process.poll() is None for process in processes):
        for name in maps_in(folder) if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):
                os.truncate(folder / name, 100)
        time.sleep(0.01)
    assert [process.communicate()[1].decode() for process in processes if process.returncode] == []
    assert not [name for name in os.listdir(folder) if name.endswith('.tmp')]


@pytest.mark.parametrize('num_caches', [1, 200])
def test_a_level_cache_is_bounded_for_any_number_of_writers(tmp_path, num_caches):
    path, folder = tmp_path / 'map.pk3', tmp_path / 'cache'
    write_map(path, 'one')
    # 300 maps fit.
    limit = 300 * path.stat().st_size
    caches = [LevelCache(str(folder), limit) for _ in range(num_caches)]
    largest = 0
    for number in range(900):
        caches[number % num_caches].write(f'key {number}', str(path))
        if number % 20 == 0:
            largest = max(largest, len(maps_in(folder)))
    # The size is checked once every three maps on average.
    assert 270 <= largest <= 400


def test_level_cache_never_raises(tmp_path, caplog):
    path = tmp_path / 'map.pk3'
    write_map(path, 'one')
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        cache = LevelCache(str(folder))
        cache.write('key', str(path))
        assert not cache.fetch('key', str(path))
    cache = LevelCache(str(tmp_path / 'cache'))
    cache.write('key', str(tmp_path / 'nothing.pk3'))
    cache.write('key', str(path))
    assert not cache.fetch('key', str(tmp_path / 'nowhere' / 'map.pk3'))
    assert len(caplog.records) == 3
