"""Videos are read back with OpenCV and PyAV."""

import fractions
import resource
import sys

import av
import cv2
import numpy as np
import pytest

from impala.acting import video_file
from impala.errors import LevelError

PICTURES = [np.full((48, 64, 3), (200, 30 * i, 90), np.uint8) for i in range(6)]


def write(path, rate):
    file = video_file.create(str(path), rate, (64, 48))
    for picture in PICTURES:
        file.write(picture)
    file.close()


def check_pictures(path):
    video = cv2.VideoCapture(str(path))
    for picture in PICTURES:
        is_there, bgr = video.read()
        assert is_there and bgr.shape == (48, 64, 3)
        # Encoding is lossy.
        np.testing.assert_allclose(bgr[..., ::-1].mean((0, 1)), picture[0, 0], atol=8)
    assert video.read()[0] is False
    video.release()


@pytest.mark.parametrize('rate', [15.0, 8.75, 50 / 3, 60.0, 1000.0, 0.25, 0.001])
def test_videos_are_h264_at_the_given_rate(tmp_path, rate):
    path = tmp_path / 'video.mp4'
    write(path, rate)
    with av.open(str(path)) as file:
        (stream,) = file.streams.video
        assert stream.codec_context.name == 'h264' and stream.pix_fmt == 'yuv420p'
        assert stream.average_rate == fractions.Fraction(max(rate, 0.1)).limit_denominator(1001)
        assert stream.frames == len(PICTURES)
    check_pictures(path)


def test_without_pyav_videos_are_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    path = tmp_path / 'video.mp4'
    write(path, 8.75)
    video = cv2.VideoCapture(str(path))
    assert int(video.get(cv2.CAP_PROP_FOURCC)) in (
        cv2.VideoWriter.fourcc(*c) for c in ('mp4v', 'FMP4')
    )
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(8.75)
    video.release()
    check_pictures(path)


def test_without_an_encoder_for_h264_videos_are_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, 'codecs_available', {'mpeg4'})
    path = tmp_path / 'video.mp4'
    write(path, 10)
    check_pictures(path)
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == 'mpeg4'


@pytest.mark.parametrize('has_av', [True, False])
def test_a_file_that_cannot_be_written_gives_one_sentence(tmp_path, monkeypatch, has_av):
    if not has_av:
        monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(LevelError, match='--save_video: cannot write .*: the folder must be writ'):
        video_file.create(str(tmp_path / 'none' / 'video.mp4'), 10, (64, 48))


def test_a_full_disk_costs_the_video_only(caplog):
    """Writing to /dev/full fails as on a full disk."""
    file = video_file._H264File.__new__(video_file._H264File)
    with av.open('/dev/full', 'w', format='mp4') as container:
        file._file, file._path, file._is_lost = container, 'video.mp4', False
        file._stream = container.add_stream('libx264', rate=10)
        file._stream.width, file._stream.height, file._stream.pix_fmt = 64, 48, 'yuv420p'
        for _ in range(200):
            file.write(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))
        file.close()
    assert [record.getMessage()[:23] for record in caplog.records] == ['video.mp4 is incomplete']


def test_a_disk_that_is_full_at_the_end_of_a_short_video_gives_a_warning(tmp_path, caplog):
    """Most of such a video is written when it is closed; a limit of 200 bytes is the full disk."""
    file = video_file.create(str(tmp_path / 'video.mp4'), 10, (64, 48))
    for picture in PICTURES:
        file.write(picture)
    assert not caplog.records
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (record,) = caplog.records
    assert 'video.mp4 is incomplete: File too large' in record.getMessage()
