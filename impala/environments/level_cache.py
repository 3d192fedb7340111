"""Compiled maps of DeepMind Lab, shared by all processes."""

import contextlib
import glob
import hashlib
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator

# Names of files: compile times next to maps, files being written, and statistics of a run.
_SECONDS = '.seconds'
_TEMPORARY = 'impala_map_'
_STATISTICS = 'level_cache_'
_ABANDONED_SECONDS = 3600.0


class LevelCache:
    """Compiled DeepMind Lab maps in a folder that any number of processes and machines share.

    A broken map ends Lab's process, and an exception in the cache ends its environment. So a map
    gets its name only when it is complete and is checked before it is returned, and every failure
    counts as a missing map. A file next to each map holds the seconds that compiling it took.

    Attributes:
      hits: number of maps returned.
      misses: number of maps that were requested but missing.
      seconds_saved: compile time of the returned maps, seconds.
    """

    def __init__(
        self, folder: str, limit_bytes: float = math.inf, statistics_folder: str | None = None
    ) -> None:
        """Uses a folder, which is created when the first map is written.

        Args:
          folder: of the maps; other files in it are left alone.
          limit_bytes: size of all maps together. Above it, the least recently used maps are
            removed. For a while the maps may exceed the limit, by 1% on average, however many
            caches write to the folder.
          statistics_folder: existing folder for the file that `level_cache_statistics` reads.
        """
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._statistics_folder = statistics_folder
        self._warned = False
        self._asked_at: dict[str, float] = {}
        self._has_written = False
        self.hits = self.misses = 0
        self.seconds_saved = 0.0

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copies the map of a key to `pk3_path`, replacing that file; returns whether it could."""
        is_there = self._fetch(key, pk3_path)
        if is_there:
            self.hits += 1
        else:
            self.misses += 1
            self._asked_at = {key: time.monotonic()}
        self._tell()
        return is_there

    def write(self, key: str, pk3_path: str) -> None:
        """Stores the map at `pk3_path` under a key; a failure is only logged."""
        seconds = time.monotonic() - self._asked_at.pop(key, time.monotonic())
        try:
            os.makedirs(self._folder, exist_ok=True)
            cached = self._path(key)
            with _replacing(cached) as copy:
                shutil.copyfile(pk3_path, copy)
                if not _is_intact(copy):
                    raise zipfile.BadZipFile(f'{pk3_path} is not an intact map')
                self._share(copy)
                size = os.path.getsize(copy)
            with _replacing(cached + _SECONDS) as file:
                pathlib.Path(file).write_text(f'{seconds:.3f}', encoding='utf-8')
                self._share(file)
            # Scanning a folder of a hundred thousand maps after each write would be slow, and no
            # cache knows what the others write. So each scans at random, all together once per 1%
            # of the limit on average.
            if not self._has_written or random.random() * self._limit_bytes < 100 * size:
                self._prune()
            self._has_written = True
        except Exception as error:
            self._warn(error)

    def _fetch(self, key: str, pk3_path: str) -> bool:
        cached = self._path(key)
        try:
            if not os.path.exists(cached):
                return False
            with _replacing(pk3_path) as copy:
                shutil.copyfile(cached, copy)
                if not _is_intact(copy):
                    # Removed, so that the map is compiled and written again.
                    os.unlink(cached)
                    raise zipfile.BadZipFile(f'{cached} is not an intact map')
        except Exception as error:
            self._warn(error)
            return False
        # A failure of either is no reason to compile: another process may just have removed it.
        with contextlib.suppress(OSError):
            os.utime(cached)
        with contextlib.suppress(OSError, ValueError):
            text = pathlib.Path(cached + _SECONDS).read_text(encoding='utf-8')
            self.seconds_saved += float(text)
        return True

    def _share(self, path: str) -> None:
        # Temporary files belong to one user, while several may share the folder. Whoever may write
        # there may also touch the map, which marks it as recently used.
        os.chmod(path, 0o644 | os.stat(self._folder).st_mode & 0o022)

    def _prune(self) -> None:
        """Removes maps until they take 90% of the limit, if they take more than all of it."""
        maps = []
        now = time.time()
        with os.scandir(self._folder) as entries:
            for entry in entries:
                # Other processes, maybe on other machines, remove files at the same time.
                with contextlib.suppress(OSError):
                    if re.fullmatch(r'[0-9a-f]{64}\.pk3', entry.name):
                        maps.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                    elif (
                        entry.name.startswith(_TEMPORARY)
                        and now - entry.stat().st_mtime > _ABANDONED_SECONDS
                    ):
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in maps)
        if total <= self._limit_bytes:
            return
        for _, size, path in sorted(maps):
            if total <= 0.9 * self._limit_bytes:
                return
            total -= size
            for each in (path, path + _SECONDS):
                with contextlib.suppress(OSError):
                    os.unlink(each)

    def _tell(self) -> None:
        if self._statistics_folder is None:
            return
        path = os.path.join(self._statistics_folder, f'{_STATISTICS}{os.getpid()}_{id(self)}')
        with contextlib.suppress(OSError), _replacing(path) as file:
            pathlib.Path(file).write_text(
                json.dumps([self.hits, self.misses, self.seconds_saved]), encoding='utf-8'
            )

    def _path(self, key: str) -> str:
        # A key may have characters that file names cannot have.
        return os.path.join(self._folder, hashlib.sha256(key.encode()).hexdigest() + '.pk3')

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                'The level cache in %s fails, and each failure costs seconds: %s',
                self._folder,
                error,
            )


def level_cache_statistics(folder: str) -> dict[str, float]:
    """Returns the statistics of the level caches of a run so far.

    Args:
      folder: the `EnvironmentConfig.temp_folder` of the environments.

    Returns:
      The sums of `hits`, `misses` and `seconds_saved` of `LevelCache`; empty without a cache.
    """
    rows = []
    for path in glob.glob(os.path.join(glob.escape(folder), f'{_STATISTICS}*')):
        with contextlib.suppress(OSError, ValueError):
            rows.append(json.loads(pathlib.Path(path).read_text(encoding='utf-8')))
    names = ('hits', 'misses', 'seconds_saved')
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True)) if rows else {}


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Yields the path of a temporary file, which replaces `path` unless the block raises."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=_TEMPORARY, suffix='.tmp', dir=os.path.dirname(path) or '.'
    )
    os.close(descriptor)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _is_intact(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:
        # zipfile raises errors of many types when an archive is damaged.
        return False
