import dataclasses
import json
import time
from typing import ClassVar

import cv2
import levels
import numpy as np
import pytest
from scipy import stats

from impala import environments
from impala.acting import episode_series
from impala.acting.episode_series import Episode, EpisodeQueues, Episodes, Schedule, episode_seed
from impala.trajectory import ActionSpec, EpisodeEnd


@pytest.mark.parametrize(
    ('suite', 'channels', 'filmed'),
    [
        ('', (200, 90, 30), (200, 90, 30)),
        # The fourth channel is opacity.
        ('', (200, 90, 30, 255), (200, 90, 30)),
        ('', (140,), (140, 140, 140)),
        ('', (20, 140), (140, 140, 140)),
        # Stacks of grey frames, the newest last.
        ('atari', (200, 90, 30, 140), (140, 140, 140)),
        ('atari', (200, 90, 140), (140, 140, 140)),
    ],
)
@pytest.mark.parametrize('is_float', [False, True])
def test_a_film_has_the_colours_of_the_newest_frame(tmp_path, suite, channels, filmed, is_float):
    level = levels.short(0, None)
    level.spec = dataclasses.replace(level.spec, suite=suite)
    film = episode_series._Film(str(tmp_path / 'film'), level)
    frame = np.tile(np.array(channels, np.uint8), (64, 64, 1))
    if is_float:
        frame = frame.astype(np.float32) / 255
    for _ in range(3):
        film.take({'frame': frame})
    film.close()
    video = cv2.VideoCapture(str(tmp_path / 'film_agent.mp4'))
    pictures = [video.read()[1] for _ in range(3)]
    assert video.read()[0] is False
    video.release()
    # Encoding is lossy.
    for picture in pictures:
        np.testing.assert_allclose(picture.mean((0, 1))[::-1], filmed, atol=8)


@pytest.mark.parametrize(
    ('level_name', 'repeats', 'rate'),
    [
        # From its metadata.
        ('CartPole-v1', None, 50),
        ('CartPole-v1', 3, 50 / 3),
        ('ALE/Pong-v5', None, 15),
        ('ALE/Pong-v5', 1, 60),
        # 35 tics a second, 4 in a step.
        ('VizdoomBasic-v1', None, 8.75),
        ('levels:short', None, 10),
    ],
)
def test_a_film_has_the_speed_of_the_environment(tmp_path, level_name, repeats, rate):
    config = environments.EnvironmentConfig(num_action_repeats=repeats)
    environment = environments.create_environment(level_name, 1, config)
    film = episode_series._Film(str(tmp_path / 'film'), environment)
    film.take({'frame': np.zeros((64, 64, 3), np.uint8)})
    film.close()
    environment.close()
    video = cv2.VideoCapture(str(tmp_path / 'film_agent.mp4'))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, abs=0.001)
    video.release()


def test_a_film_of_floats_shows_numbers_out_of_range_as_the_nearest_colour(tmp_path):
    film = episode_series._Film(str(tmp_path / 'film'), levels.short(0, None))
    frame = np.empty((64, 64, 3), np.float32)
    frame[...] = [-np.inf, np.nan, 7.0]
    film.take({'frame': frame})
    film.close()
    video = cv2.VideoCapture(str(tmp_path / 'film_agent.mp4'))
    picture = video.read()[1]
    video.release()
    np.testing.assert_allclose(picture.mean((0, 1))[::-1], [0, 0, 255], atol=8)


def test_a_schedule_gives_each_level_all_its_episodes_and_takes_results_in_any_order():
    """Three actors for two levels: one actor has the second level to itself."""
    ended = []
    schedule = Schedule(['a', 'b'], 3, 5, 7, ended.append)
    numbers = [
        [(episode.level_name, episode.number) for episode in schedule.episodes_of(actor)]
        for actor in range(3)
    ]
    assert numbers == [
        [('a', 0), ('a', 2), ('a', 4)],
        [('b', number) for number in range(5)],
        [('a', 1), ('a', 3)],
    ]
    for number in (3, 1, 4, 0, 2):
        for name in ('b', 'a'):
            assert not schedule.is_complete
            schedule.record(name, number, 10.0 * number + (name == 'b'), number + 100)
        if number == 1:
            assert list(schedule.episodes_of(2)) == []
            assert schedule.returns() == {'a': [10.0, 30.0], 'b': [11.0, 31.0]}
            assert schedule.levels_text() == '; 0 of 2 levels are complete'
            assert [episode.number for episode in schedule.episodes_of(1)] == [0, 2, 4]
    assert schedule.is_complete
    assert schedule.returns() == {
        'a': [0.0, 10.0, 20.0, 30.0, 40.0],
        'b': [1.0, 11.0, 21.0, 31.0, 41.0],
    }
    assert ended == [103, 103, 101, 101, 104, 104, 100, 100, 102, 102]


def test_a_billion_episodes_are_scheduled_and_serialized_quickly():
    """Some of actor 0's episodes are done: early ones, and the last, which actor 1 took over."""
    started = time.monotonic()
    schedule = Schedule(['a'], 2, 10**9, 7)
    for number in (0, 2, 6, 8, 10**9 - 2):
        schedule.record('a', number, 1.0, 5)
    text = json.dumps([schedule.episodes_of(actor).to_json() for actor in range(2)])
    even, odd = (Episodes.from_json(each) for each in json.loads(text))
    assert (len(even), len(odd)) == (5 * 10**8 - 5, 5 * 10**8)
    assert [episode.number for episode, _ in zip(even, range(4), strict=False)] == [4, 10, 12, 14]
    assert even[len(even) - 1] == Episode('a', episode_seed(7, 'a', 10**9 - 4), 10**9 - 4)
    queues = EpisodeQueues([even, odd])
    assert [queues.take(0).number, queues.take(0).number, queues.take(1).number] == [4, 10, 1]
    assert time.monotonic() - started < 5 and len(text) < 1000


@pytest.mark.parametrize('logits', [[0.0, 0.0, 0.0], [2.0, -1.0, 0.5], [0.0, 5.0, -5.0]])
def test_noise_makes_the_most_probable_action_a_sample_of_the_policy(logits):
    """Samples are independent within an episode, and among the first steps of episodes."""
    within = episode_series._NoiseStream(11, ActionSpec.discrete(3))
    noises = [
        np.array([within.next() for _ in range(20_000)]),
        np.array(
            [
                episode_series._NoiseStream(seed, ActionSpec.discrete(3)).next()
                for seed in range(5000)
            ]
        ),
    ]
    policy = np.exp(logits) / np.exp(logits).sum()
    for noise in noises:
        assert noise.dtype == np.float32
        actions = (np.array(logits, np.float32) + noise).argmax(1)
        pairs = np.bincount(3 * actions[::2] + actions[1::2], minlength=9)
        expected = np.outer(policy, policy).ravel() * len(actions) / 2
        frequent = expected > 5
        assert pairs[~frequent].sum() < 30
        chosen = np.append(pairs[frequent], pairs[~frequent].sum())
        hoped = np.append(expected[frequent], expected[~frequent].sum() + 1e-9)
        assert stats.chisquare(chosen[hoped > 1], hoped[hoped > 1], sum_check=False).pvalue > 1e-4


def test_noise_depends_on_the_episode_alone():
    """It depends neither on the number of steps nor on the environment's own stream."""

    def noise(seed, number):
        stream = episode_series._NoiseStream(seed, ActionSpec.discrete(4))
        return np.array([stream.next() for _ in range(number)])

    np.testing.assert_array_equal(noise(3, 200)[:70], noise(3, 70))
    assert len(np.unique(noise(3, 200))) == 800
    assert not np.isin(noise(3, 200), noise(4, 200)).any()
    own = np.random.default_rng(3).gumbel(size=(200, 4)).astype(np.float32)
    assert not np.isin(noise(3, 200), own).any()


def test_seeds_differ_between_runs_levels_and_episodes():
    seeds = {
        episode_seed(seed, name, number)
        for seed in range(20)
        for name in ('ALE/Pong-v5', 'ALE/Boxing-v5')
        for number in range(20)
    }
    assert len(seeds) == 800 and all(0 <= seed < 2**31 for seed in seeds)


def test_an_idle_actor_takes_the_last_episodes_of_the_longest_queue():
    a, b, c = (
        [Episode(name, 0, number) for number in range(n)]
        for name, n in zip('abc', (1, 3, 4), strict=True)
    )
    queues = EpisodeQueues([a, b, c])
    assert (queues.first(0), queues.take(0), queues.first(0)) == (a[0], a[0], None)
    # It stays with that queue, though another is longer by then.
    assert (queues.take(0), queues.first(0), queues.take(0)) == (c[3], c[2], c[2])
    assert queues.first(2) == queues.take(2) == c[0]
    # An actor with episodes of its own plays those.
    assert [queues.take(1), queues.take(1)] == [b[0], b[1]]
    assert (queues.first(0), queues.take(2), queues.first(0)) == (c[1], c[1], None)
    assert queues.take(0) == b[2]
    assert [queues.take(index) for index in range(3)] == [None] * 3


class SeedShowing(levels._Level):
    """Shows level and seed in each frame; the seed determines length and rewards."""

    made: ClassVar[list] = []

    def __init__(self, level_name, seed, is_reseeded):
        super().__init__()
        self.level, self.seed, self.next_seed = float(level_name), seed, seed
        self.is_reseeded = is_reseeded
        self.is_open = True
        self.made.append(self)

    def seed_next(self, seed):
        if self.is_reseeded:
            self.next_seed = seed
        return self.is_reseeded

    def reset(self):
        self.seed, self.steps, self.length = self.next_seed, 0, 2 + self.next_seed % 3
        return {'frame': np.array([self.level, self.seed], np.float32)}

    def step(self, action):
        assert self.is_open
        reward = 0.1 * self.seed
        self.steps += 1
        if self.steps == self.length:
            return reward, EpisodeEnd.TRUNCATED, self.reset()
        return reward, EpisodeEnd.NOT_ENDED, {'frame': np.array([self.level, self.seed], 'f')}

    def close(self):
        self.is_open = False


@pytest.mark.parametrize('is_reseeded', [True, False])
def test_episodes_that_are_taken_over_are_played_unchanged(monkeypatch, is_reseeded):
    """Two environments take turns; the first has far more to play."""
    monkeypatch.setattr(
        environments,
        'create_environment',
        lambda name, seed, config: SeedShowing(name, seed, is_reseeded),
    )
    SeedShowing.made.clear()
    queues = EpisodeQueues(
        [[Episode('1', 30 + n, n) for n in range(9)], [Episode('2', 60 + n, n) for n in range(2)]]
    )
    results = []
    both = [
        episode_series.EpisodeSeries(
            name, None, queues, index, lambda *result: results.append(result)
        )
        for index, name in enumerate('12')
    ]
    shown = [[tuple(series.reset()['frame'])] for series in both]
    while not all(series.is_done for series in both):
        for series, frames in zip(both, shown, strict=True):
            if not series.is_done:
                _, end, observation = series.step(0)
                if end and not series.is_done:
                    frames.append(tuple(observation['frame']))
    played = {('1', n): 30 + n for n in range(9)} | {('2', n): 60 + n for n in range(2)}
    assert sorted(results) == sorted(
        (name, n, sum([0.1 * seed] * (2 + seed % 3)), 2 + seed % 3, False)
        for (name, n), seed in played.items()
    )
    # Row 0 belongs to its episode, whoever plays it; only the second environment plays both levels.
    first_frames = sorted(shown[0] + shown[1])
    assert first_frames == sorted((float(name), seed) for (name, _), seed in played.items())
    assert {level for level, _ in shown[1]} == {1, 2} and {level for level, _ in shown[0]} == {1}
    assert len(SeedShowing.made) == (3 if is_reseeded else 11)
    for series in both:
        series.close()
    assert not any(level.is_open for level in SeedShowing.made)


@pytest.mark.parametrize('is_reseeded', [True, False])
def test_an_episode_is_cut_off_at_its_limit_and_the_next_is_played(monkeypatch, is_reseeded):
    """Episodes have 2, 3 or 4 agent steps of two frames each; the limit allows three."""

    def make(name, seed, config):
        level = SeedShowing(name, seed, is_reseeded)
        level.spec = dataclasses.replace(level.spec, num_action_repeats=2)
        return level

    monkeypatch.setattr(environments, 'create_environment', make)
    queues = EpisodeQueues([[Episode('1', 30 + n, n) for n in range(6)]])
    results = []
    series = episode_series.EpisodeSeries(
        '1', None, queues, 0, lambda *result: results.append(result), max_frames=5
    )
    seeds, ends = [int(series.reset()['frame'][1])], []
    while not series.is_done:
        _, end, observation = series.step(0)
        assert observation[episode_series.ACTION_NOISE].shape == (2,)
        if end:
            ends.append(end)
            seeds.append(int(observation['frame'][1]))
    lengths = [2, 3, 3, 2, 3, 3]
    assert [(number, steps, is_cut_off) for _, number, _, steps, is_cut_off in results] == [
        (n, lengths[n], n % 3 == 2) for n in range(6)
    ]
    assert ends == [EpisodeEnd.TRUNCATED] * 6 and seeds[:6] == [30, 31, 32, 33, 34, 35]
    series.close()


def test_an_environment_without_an_episode_is_done_at_once():
    queues = EpisodeQueues([[Episode('levels:short', 1, 0)], []])
    both = [
        episode_series.EpisodeSeries('levels:short', None, queues, index, print)
        for index in range(2)
    ]
    assert [series.is_done for series in both] == [False, True]
    assert both[1].spec.num_actions == 2
