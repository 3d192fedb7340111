import numpy as np
import pytest
from PIL import Image

from benchmarks import animation
from impala.acting import video_file

GREYS = [10 * i for i in range(24)]


@pytest.fixture
def video(tmp_path):
    """Three seconds, 8 pictures a second, each a little brighter than the one before."""
    path = str(tmp_path / 'video.mp4')
    file = video_file.create(path, 8.0, (64, 48))
    for grey in GREYS:
        file.write(np.full((48, 64, 3), grey, np.uint8))
    file.close()
    return path


def played(path):
    """Returns the brightness of each picture of an animation, and its length in ms."""
    greys, length = [], 0
    with Image.open(path) as image:
        assert image.size == (32, 24) and image.info['loop'] == 0
        for i in range(image.n_frames):
            image.seek(i)
            greys.append(np.asarray(image.convert('RGB')).mean())
            length += image.info['duration']
    return greys, length


@pytest.mark.parametrize('ending', ['gif', 'webp'])
@pytest.mark.parametrize(('start', 'first'), [(0.5, 4), (-1.5, 12)])
def test_an_animation_is_a_part_of_the_video_at_its_speed(tmp_path, video, ending, start, first):
    path = str(tmp_path / f'part.{ending}')
    command = [video, path, f'--start={start}', '--seconds=1.25', '--height=24']
    assert animation.main(command) == 0
    greys, length = played(path)
    np.testing.assert_allclose(greys, GREYS[first : first + 10], atol=6)
    assert length == pytest.approx(1250, abs=5)


def test_several_videos_play_in_turn_and_slower(tmp_path, video):
    path = str(tmp_path / 'both.gif')
    command = [video, video, path, '--start=1', '--seconds=0.5', '--speed=0.5', '--height=24']
    assert animation.main(command) == 0
    greys, length = played(path)
    np.testing.assert_allclose(greys, 2 * GREYS[8:12], atol=6)
    assert length == pytest.approx(2000, abs=5)


def test_mistakes_give_one_sentence(tmp_path, video, capsys):
    assert animation.main([video, str(tmp_path / 'a.gif'), '--start=9']) == 2
    assert capsys.readouterr().err == f'{video} lasts 3.0 s: nothing is at 9 s.\n'
    assert animation.main([str(tmp_path / 'none.mp4'), str(tmp_path / 'a.gif')]) == 2
    assert 'cannot be read as a video' in capsys.readouterr().err
