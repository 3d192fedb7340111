"""Compares Atari games with those of Gymnasium and the Arcade Learning Environment."""

import dataclasses
import re

import ale_py
import gymnasium
import numpy as np
import pytest
from playing import play, random_actions

from impala import suites
from impala.environments import EnvironmentConfig
from impala.environments.atari import (
    ATARI_MAX_EPISODE_FRAMES,
    AtariEnvironment,
    AtariGame,
    atari_games,
)
from impala.errors import LevelError
from impala.trajectory import EpisodeEnd

# The Atari-57 suite as in Table C.1 of the paper.
ATARI_57 = re.findall(
    r'\w+',
    """
    Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling
    Boxing Breakout Centipede ChopperCommand CrazyClimber Defender DemonAttack DoubleDunk Enduro
    FishingDerby Freeway Frostbite Gopher Gravitar Hero IceHockey Jamesbond Kangaroo Krull
    KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix Pitfall Pong PrivateEye Qbert
    Riverraid RoadRunner Robotank Seaquest Skiing Solaris SpaceInvaders StarGunner Surround Tennis
    TimePilot Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge Zaxxon
""",
)


@pytest.mark.parametrize('frames_per_noop', [1, 4])
def test_no_ops_last_the_given_number_of_frames(frames_per_noop, make):
    environment = make('ALE/Pong-v5', frames_per_noop=frames_per_noop)
    frames = []
    for _ in range(200):
        environment.reset()
        frames.append(environment._ale.getEpisodeFrameNumber())
    assert set(frames) == {noops * frames_per_noop for noops in range(1, 31)}


def gymnasium_atari(game, frame_skip=4, noop_max=30, screen_size=84, **options):
    env = gymnasium.make(
        f'ALE/{game}-v5',
        frameskip=1,
        disable_env_checker=True,
        **{'repeat_action_probability': 0.0, **options},
    )
    env = gymnasium.wrappers.AtariPreprocessing(
        env, noop_max=noop_max, frame_skip=frame_skip, screen_size=screen_size
    )
    return gymnasium.wrappers.FrameStackObservation(env, 4)


def test_every_game_of_atari57(make):
    for name in suites.load('atari57').level_names:
        environment = make(name, full_action_set=True)
        assert environment.spec.num_actions == 18
        first = environment.reset()['frame'].copy()
        # Some games show a still picture at first.
        actions = random_actions(environment, 2000)
        assert any(
            not np.array_equal(environment.step(action)[2]['frame'], first) for action in actions
        ), name
        environment.close()


@pytest.mark.parametrize(
    'game, seed, config, options',
    [
        ('Pong', 1, {}, {}),
        ('Breakout', 2, {}, {}),
        ('Boxing', 3, {'sticky_actions': 0.25}, {'repeat_action_probability': 0.25}),
        ('Seaquest', 4, {'num_action_repeats': 2}, {'frame_skip': 2}),
        ('Breakout', 5, {'num_action_repeats': 1}, {'frame_skip': 1}),
        ('Breakout', 6, {'full_action_set': True}, {'full_action_space': True}),
        ('MsPacman', 7, {'max_noops': 0}, {'noop_max': 0}),
        ('Pong', 8, {}, {'max_num_frames_per_episode': 300}),
        ('Pong', 9, {'width': 42, 'height': 42}, {'screen_size': 42}),
        ('Boxing', 10, {'width': 64, 'height': 48}, {'screen_size': (64, 48)}),
        ('SpaceInvaders', 11, {'atari_mode': 9}, {'mode': 9}),
        (
            'Freeway',
            12,
            {'atari_mode': 5, 'atari_difficulty': 1},
            {'mode': 5, 'difficulty': 1},
        ),
    ],
)
def test_atari_matches_gymnasium(game, seed, config, options, make):
    limit = options.get('max_num_frames_per_episode')
    environment = make(f'ALE/{game}-v5', seed, **config)
    if limit:
        short = AtariGame(game.lower(), max_episode_frames=limit)
        environment = AtariEnvironment(short, seed, EnvironmentConfig(**config))
    truth = gymnasium_atari(game, **options)
    assert environment.spec.num_actions == truth.action_space.n

    expected, _ = truth.reset(seed=seed)
    np.testing.assert_array_equal(environment.reset()['frame'], np.moveaxis(expected, 0, -1))
    ends = []
    for action in random_actions(environment, 500, seed):
        reward, end, observation = environment.step(action)
        expected, expected_reward, terminated, truncated, _ = truth.step(action)
        assert reward == expected_reward
        assert end == (
            EpisodeEnd.TERMINATED
            if terminated
            else EpisodeEnd.TRUNCATED
            if truncated
            else EpisodeEnd.NOT_ENDED
        )
        if end:
            ends.append(end)
            expected, _ = truth.reset()
        np.testing.assert_array_equal(observation['frame'], np.moveaxis(expected, 0, -1))
    truth.close()
    if limit:
        assert len(ends) > 4 and set(ends) == {EpisodeEnd.TRUNCATED}
    elif game == 'Breakout' and not config:
        assert EpisodeEnd.TERMINATED in ends


@pytest.mark.parametrize(('repeats', 'limit'), [(4, 300), (4, 302), (1, 75)])
def test_the_last_observation_of_a_truncated_game_is_that_of_a_game_without_a_limit(repeats, limit):
    config = EnvironmentConfig(num_action_repeats=repeats, max_noops=0)
    cut = AtariEnvironment(
        AtariGame('breakout', max_episode_frames=limit),
        4,
        dataclasses.replace(config, bootstrap_truncated=True),
    )
    endless = AtariEnvironment(AtariGame('breakout'), 4, config)
    cut.reset()
    endless.reset()
    steps, rest = divmod(limit, repeats)
    actions = random_actions(cut, steps + 1)
    for action in actions[:steps]:
        before = endless.step(action)[2]['frame']
        _, end, _ = cut.step(action)
    if rest:
        # The limit cuts the next action short, so the game stands still at its last screen.
        _, end, _ = cut.step(actions[steps])
        single = AtariEnvironment(
            AtariGame('breakout'), 4, dataclasses.replace(config, num_action_repeats=1)
        )
        single.reset()
        for frame in range(limit):
            newest = single.step(actions[frame // repeats])[2]['frame'][..., -1]
        before = np.concatenate([before[..., 1:], newest[..., np.newaxis]], -1)
    assert end == EpisodeEnd.TRUNCATED
    assert cut.last_action_frames == (rest or repeats)
    np.testing.assert_array_equal(cut.last_observation['frame'], before)
    for environment in (cut, endless):
        environment.close()


def test_a_game_that_ends_at_its_frame_limit_is_terminated():
    config = EnvironmentConfig(num_action_repeats=1, max_noops=0)
    whole = AtariEnvironment(AtariGame('breakout'), 4, config)
    whole.reset()
    ends = []
    for action in random_actions(whole, 5000):
        ends.append(whole.step(action)[1])
        if ends[-1]:
            break
    assert ends[-1] == EpisodeEnd.TERMINATED
    for limit, end in ((len(ends), EpisodeEnd.TERMINATED), (len(ends) - 1, EpisodeEnd.TRUNCATED)):
        cut = AtariEnvironment(AtariGame('breakout', max_episode_frames=limit), 4, config)
        cut.reset()
        actions = random_actions(whole, 5000)[:limit]
        assert [cut.step(action)[1] for action in actions][-1] == end
        cut.close()
    whole.close()


def test_atari_matches_ales_vector_environment(make):
    environment = make('ALE/Pong-v5', max_noops=0)
    truth = ale_py.AtariVectorEnv(
        'pong', 1, num_threads=1, noop_max=0, use_fire_reset=False, reward_clipping=False
    )
    environment.reset()
    truth.reset(seed=1)
    rewards = 0
    for action in random_actions(environment, 300):
        reward, end, observation = environment.step(action)
        expected, expected_rewards, _, _, _ = truth.step(np.array([action]))
        assert reward == expected_rewards[0] and not end
        np.testing.assert_array_equal(observation['frame'][..., -1], expected[0, -1])
        rewards += abs(reward)
    truth.close()
    assert rewards > 0


def test_atari_limit_is_half_an_hour_of_play():
    assert ATARI_MAX_EPISODE_FRAMES == 30 * 60 * 60


# With no life left Breakout is over, but in Bank Heist the last car still drives.
@pytest.mark.parametrize('game, lives', [('Breakout', 5), ('BankHeist', 4)])
def test_atari_reports_lost_lives_and_continues_the_game(game, lives, make):
    environment = make(f'ALE/{game}-v5', 3, end_episode_on_life_loss=True)
    undisturbed = make(f'ALE/{game}-v5', 3)
    raw = gymnasium.make(f'ALE/{game}-v5', frameskip=4, repeat_action_probability=0.0)
    raw.reset(seed=3)
    for _ in range(raw.unwrapped.np_random.integers(1, 31)):
        raw.unwrapped.ale.act(0)

    actions = random_actions(environment, 1200)
    rows = play(environment, actions)
    undisturbed_rows = play(undisturbed, actions)
    losses = 0
    for t, action in enumerate(actions, start=1):
        _, _, terminated, _, info = raw.step(action)
        np.testing.assert_array_equal(rows[t][2]['frame'], undisturbed_rows[t][2]['frame'])
        assert rows[t][0] == undisturbed_rows[t][0]
        if terminated:
            assert rows[t][1] == EpisodeEnd.TERMINATED
            break
        assert rows[t][1] == (EpisodeEnd.LIFE_LOST if info['lives'] < lives else 0)
        losses += info['lives'] < lives
        lives = info['lives']
    raw.close()
    assert losses == 4 and terminated


@pytest.mark.parametrize('frame_stack', [1, 3])
def test_atari_stacks_end_with_the_newest_frame(frame_stack, make):
    environment = make('ALE/Pong-v5', frame_stack=frame_stack)
    whole = make('ALE/Pong-v5', frame_stack=8)
    actions = random_actions(environment, 30)
    for row, whole_row in zip(play(environment, actions), play(whole, actions), strict=True):
        np.testing.assert_array_equal(row[2]['frame'], whole_row[2]['frame'][..., -frame_stack:])


def test_every_atari_id_of_gymnasium_is_known(make):
    registered = {
        name: spec.kwargs['game']
        for name, spec in gymnasium.registry.items()
        if str(spec.entry_point).startswith('ale_py')
    }
    ours = {f'ALE/{name}-v5': rom for name, rom in atari_games().items()}
    assert ours == {name: rom for name, rom in registered.items() if name.startswith('ALE/')}
    assert {f'ALE/{game}-v5' for game in ATARI_57} <= set(ours) and len(ATARI_57) == 57

    np.testing.assert_array_equal(
        make('PongNoFrameskip-v4').reset()['frame'], make('ALE/Pong-v5').reset()['frame']
    )
    assert make('SpaceInvaders-v0').spec.num_action_repeats == 4


@pytest.mark.parametrize('game', ATARI_57[::4])
def test_atari_games_start(game, make):
    environment = make(f'ALE/{game}-v5')
    frames = [row[2]['frame'] for row in play(environment, random_actions(environment, 150))]
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.parametrize(
    'changes, seen',
    [({'atari_mode': 1}, True), ({'atari_difficulty': 3}, True), ({'atari_mode': 0}, False)],
)
def test_mode_and_difficulty_change_the_game(changes, seen, make):
    """Pong's second mode and its last difficulty differ from the default, mode 0."""

    def frames(**config):
        environment = make('ALE/Pong-v5', max_noops=0, **config)
        return [row[2]['frame'] for row in play(environment, [2] * 300)]

    assert np.array_equal(frames(), frames(**changes)) != seen


@pytest.mark.parametrize(
    'level_name, config, sentence',
    [
        ('Pong', {'atari_mode': 7}, "--atari_mode=7: the game 'pong' offers the modes 0, 1."),
        (
            'Pong',
            {'atari_difficulty': 4},
            "--atari_difficulty=4: the game 'pong' offers the difficulties 0, 1, 2, 3.",
        ),
        (
            'DemonAttack',
            {'atari_mode': 2},
            "--atari_mode=2: the game 'demon_attack' offers the modes 1, 3, 5, 7.",
        ),
        ('VideoCube', {'atari_mode': 3}, '1502, 1600, ..., 5002 (153 of them).'),
    ],
)
def test_modes_that_a_game_lacks_are_refused_with_those_it_has(level_name, config, sentence, make):
    with pytest.raises(LevelError) as error:
        make(f'ALE/{level_name}-v5', **config)
    assert str(error.value).endswith(sentence)
