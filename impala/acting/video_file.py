"""Writes pictures as an MP4 file.

With PyAV (the extra `video`) the file is H.264, which browsers play; without it, or if its FFmpeg
has no such encoder, OpenCV writes MPEG-4 Part 2, which few of them do.
"""

import contextlib
import fractions
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from impala import environments
from impala.errors import LevelError

# Frames last a whole number of the file's ticks, so a rate needs a small denominator.
_MAX_DENOMINATOR = 1001
_MIN_RATE = 0.1
# 0 is lossless, 51 the worst.
_QUALITY = {'crf': '20', 'preset': 'veryfast'}


class VideoFile(Protocol):
    """A video file that is being written."""

    def write(self, rgb: np.ndarray) -> None:
        """Appends a picture, uint8 `[height, width, 3]`, with the sides given at the start."""

    def close(self) -> None:
        """Completes the file."""


def create(path: str, frames_per_second: float, size: tuple[int, int]) -> VideoFile:
    """Starts a video file.

    Args:
      path: of the file, which ends in `.mp4`.
      frames_per_second: of the video; raised to 0.1 if it is less.
      size: width and height in pixels, both even.

    Raises:
      LevelError: the file cannot be written.
    """
    rate = fractions.Fraction(max(_MIN_RATE, frames_per_second)).limit_denominator(_MAX_DENOMINATOR)
    return (_H264File if _has_h264() else _Mpeg4File)(path, rate, size)


def _has_h264() -> bool:
    try:
        import av
    except ImportError:
        return False
    return 'libx264' in av.codecs_available


class _H264File:
    """Writes H.264 with PyAV."""

    def __init__(self, path: str, rate: fractions.Fraction, size: tuple[int, int]) -> None:
        import av

        self._path = path
        self._is_lost = False
        try:
            # Players on the web start before they have the whole file.
            self._file: Any = av.open(path, 'w', options={'movflags': 'faststart'})
            self._stream = self._file.add_stream('libx264', rate=rate, options=dict(_QUALITY))
            self._stream.width, self._stream.height = size
            self._stream.pix_fmt = 'yuv420p'
            # There are more actor processes than cores already.
            self._stream.codec_context.thread_count = 1
            # Opens the file.
            self._file.start_encoding()
        except (OSError, av.FFmpegError) as error:
            raise LevelError(_cannot_write(path, error.strerror or str(error))) from error

    def write(self, rgb: np.ndarray) -> None:
        import av

        self._append(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format='rgb24'))

    def close(self) -> None:
        self._append(None)
        with self._warning():
            # Most of a short video is written only now.
            self._file.close()

    def _append(self, frame: Any) -> None:
        """Encodes a frame, or what is left if it is None."""
        if self._is_lost:
            return
        with self._warning():
            self._file.mux(self._stream.encode(frame))

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Warns once if writing fails: a full disk must not end a test."""
        import av

        try:
            yield
        except (OSError, av.FFmpegError) as error:
            if not self._is_lost:
                # Warnings of this logger reach the user from an actor process.
                logger = logging.getLogger(environments.__name__)
                logger.warning('%s is incomplete: %s.', self._path, error.strerror)
            self._is_lost = True


class _Mpeg4File:
    """Writes MPEG-4 Part 2 with OpenCV."""

    def __init__(self, path: str, rate: fractions.Fraction, size: tuple[int, int]) -> None:
        import cv2

        # OpenCV's encoder accepts only fractions of small integers.
        rounded = round(float(rate), 2)
        self._writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*'mp4v'), rounded, size)
        if not self._writer.isOpened():
            raise LevelError(_cannot_write(path, 'OpenCV must be able to encode mp4v'))

    def write(self, rgb: np.ndarray) -> None:
        self._writer.write(np.ascontiguousarray(rgb[..., ::-1]))

    def close(self) -> None:
        self._writer.release()


def _cannot_write(path: str, reason: str) -> str:
    return f'--save_video: cannot write {path}: the folder must be writable ({reason}).'
