import cv2
import levels
import numpy as np
import pytest

from impala import episode_series


@pytest.mark.parametrize(
    ('suite', 'channels', 'filmed'),
    [
        ('', (200, 90, 30), (200, 90, 30)),
        # The fourth says how opaque it is.
        ('', (200, 90, 30, 255), (200, 90, 30)),
        ('', (140,), (140, 140, 140)),
        ('', (20, 140), (140, 140, 140)),
        # Stacks of grey frames, the newest last.
        ('atari', (200, 90, 30, 140), (140, 140, 140)),
        ('atari', (200, 90, 140), (140, 140, 140)),
    ],
)
def test_a_film_has_the_colours_of_the_newest_frame(tmp_path, suite, channels, filmed):
    film = episode_series._Film(str(tmp_path / 'film'), 4, suite)
    frame = np.tile(np.array(channels, np.uint8), (64, 64, 1))
    level = levels.short(0, None)
    for _ in range(3):
        film.take({'frame': frame}, level)
    film.close()
    video = cv2.VideoCapture(str(tmp_path / 'film_agent.mp4'))
    pictures = [video.read()[1] for _ in range(3)]
    assert video.read()[0] is False
    video.release()
    # Encoding loses a little.
    for picture in pictures:
        np.testing.assert_allclose(picture.mean((0, 1))[::-1], filmed, atol=8)
