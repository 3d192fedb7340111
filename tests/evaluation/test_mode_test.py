import csv
import json
import os
import re
import shutil
import signal
import threading

import cv2
import gymnasium
import numpy as np
import pytest
import tensorflow as tf

from configs import VECTOR, config
from impala import config as run_config
from impala import training
from impala.acting.actor_processes import ActorError
from impala.acting.episode_series import Schedule, episode_seed, with_action_noise
from impala.evaluation import test_mode as evaluation
from impala.evaluation.test_agents import GreedyAgent, SamplingAgent
from impala.evaluation.test_mode import evaluate
from impala.networks.agent import Agent, AgentConfig
from impala.runs import checkpoint
from impala.runs import files as run_files
from impala.tools import export
from impala.trajectory import ArraySpec, EnvironmentSpec, StepOutput, StepOutputInfo


@pytest.fixture(scope='module')
def logdir(tmp_path_factory):
    """A short run that was trained with every life as an episode."""
    folder = tmp_path_factory.mktemp('run')
    training.train(lives_config(folder))
    return folder


def lives_config(logdir, **changes):
    lives_count = {'level_name': 'levels:lives', 'end_episode_on_life_loss': True}
    return config(logdir, **(lives_count | changes))


def to_test(run, num_episodes=10, policy='sample', num_videos=0, max_frames=None, **changes):
    """Returns the settings for a test of a run."""
    return run.replace(
        mode='test', test_num_episodes=num_episodes, test_policy=policy, save_video=num_videos,
        test_max_frames=max_frames, **changes,
    )  # fmt: skip


@pytest.mark.parametrize('num_episodes', [1, 5])
def test_plays_exactly_the_requested_number_of_whole_games(logdir, num_episodes):
    lines = []
    returns = evaluate(to_test(lives_config(logdir), num_episodes), lines.append)
    # Three lives of four steps with a reward of 1.
    assert returns == {'levels:lives': [12.0] * num_episodes}
    assert lines[0] == f'Testing {logdir}/checkpoints/ckpt-1'
    with open(logdir / 'test_scores.json') as file:
        scores = json.load(file)
    assert scores == {
        'checkpoint': f'{logdir}/checkpoints/ckpt-1',
        'agent_steps': 100,
        'frames': 100,
        'policy': 'sample',
        'seed': 1,
        'partial': False,
        'max_frames': 1_000_000,
        'levels': {
            'levels:lives': {
                'returns': [12.0] * num_episodes,
                'not_finite': 0,
                'cut_off': 0,
                'mean': 12.0,
                'interval_95': None if num_episodes == 1 else [12.0, 12.0],
                'median': 12.0,
            }
        },
    }


def test_checkpoints_with_target_network_and_adam_can_be_tested(tmp_path):
    run = config(tmp_path, loss='appo', target_update_steps=3, optimizer='adam')
    training.train(run)
    assert evaluate(to_test(run, 2), print) == {'levels:short': [5.0] * 2}
    network, spec = export.spec_of_run(str(tmp_path))
    assert (network.torso, network.core, spec.num_actions) == ('mlp', 'none', 2)


def test_seeds_do_not_depend_on_the_number_of_actors(logdir):
    """Each return of this level is a function of the environment's seed."""
    names = 'levels:seeded,levels:short'
    expected = [float(episode_seed(1, 'levels:seeded', number) % 1_000_000) for number in range(5)]
    assert len({*expected}) == 5
    for num_actors, envs_per_process in ((1, 1), (6, 2), (20, 7)):
        run = lives_config(
            logdir, level_name=names, num_actors=num_actors, envs_per_process=envs_per_process
        )
        returns = evaluate(to_test(run, 5), print)
        assert returns == {'levels:seeded': expected, 'levels:short': [5.0] * 5}


def test_levels_with_short_and_long_episodes_play_equally_many(logdir, tmp_path):
    """In one process, whose environment for the short ones takes over some of the long ones."""
    suite = tmp_path / 'both.csv'
    suite.write_text('level,random,human\nlevels:short,0,10\nlevels:long,0,10\n')
    run = lives_config(logdir, num_actors=3, envs_per_process=3, level_name=str(suite))
    lines = []
    returns = evaluate(to_test(run, 4), lines.append)
    assert returns == {'levels:short': [5.0] * 4, 'levels:long': [20.0] * 4}
    with open(logdir / 'test_scores.json') as file:
        scores = json.load(file)
    assert scores['levels']['levels:long']['human_normalized'] == 200
    assert scores['suite']['name'] == 'both'
    assert scores['suite']['mean_no_cap'] == 125
    assert scores['suite']['mean_cap_100'] == 75
    assert scores['suite']['intervals_95']['mean_no_cap'] == [125, 125]
    assert 'mean over levels, each capped at 100' in lines[-1]


def test_a_greedy_policy_takes_the_most_probable_action(logdir):
    """The return counts how often action 1 was chosen; observations are always the same."""
    run = lives_config(logdir, level_name='levels:counting')
    greedy = evaluate(to_test(run, 4, 'greedy'), print)['levels:counting']
    assert set(greedy) in ({0.0}, {50.0})
    sampled = evaluate(to_test(run, 4), print)['levels:counting']
    assert all(5 < value < 45 for value in sampled)


def test_a_chosen_checkpoint(logdir, tmp_path):
    shutil.copytree(logdir, tmp_path, dirs_exist_ok=True)
    older = str(tmp_path / 'checkpoints' / 'ckpt-1')
    training.train(lives_config(tmp_path, total_environment_frames=140))
    lines = []
    evaluate(to_test(lives_config(tmp_path), 1, checkpoint=older), lines.append)
    assert lines[0] == f'Testing {older}'
    assert json.loads((tmp_path / 'test_scores.json').read_text())['agent_steps'] == 100
    for path, sentence in (
        (str(tmp_path / 'checkpoints' / 'ckpt-7'), 'ckpt-7 cannot be used: its .index file is mis'),
        (str(tmp_path / 'flags'), 'flags cannot be used'),
    ):
        with pytest.raises(checkpoint.LogdirError, match=sentence):
            evaluate(to_test(lives_config(tmp_path), 1, checkpoint=path), print)


def test_watching_scores_each_checkpoint_until_training_is_complete(logdir, tmp_path, monkeypatch):
    """Incomplete checkpoints are skipped until their files are complete."""
    monkeypatch.setattr(evaluation, '_WATCH_SECONDS', 0.2)
    run = lives_config(tmp_path, total_environment_frames=100)
    ready = tmp_path / 'ready'
    shutil.copytree(logdir / 'checkpoints', ready)
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    shutil.copy(ready / 'ckpt-1.index', folder / 'ckpt-1.index')
    lines = []

    def finish_writing():
        for path in ready.iterdir():
            shutil.copy(path, folder / path.name)

    timer = threading.Timer(0.5, finish_writing)

    def report(line):
        lines.append(line)
        if line.startswith('Waiting for the first checkpoint'):
            timer.start()

    try:
        returns = evaluate(to_test(run, 2, watch=True), report)
    finally:
        timer.join()
    assert returns == {'levels:lives': [12.0, 12.0]}
    assert lines[-1] == 'Training is complete.'
    evaluate(to_test(run, 2, watch=True), lines.append)
    rows = (tmp_path / 'test_history.csv').read_text().splitlines()
    assert rows == [
        'checkpoint,agent_steps,frames,level,episodes,mean,low,high,policy,seed',
        f'{folder}/ckpt-1,100,100,levels:lives,2,12.0,12.0,12.0,sample,1',
    ]
    # Another policy or number of episodes is another test.
    for num_episodes, policy in ((2, 'greedy'), (1, 'sample')):
        evaluate(to_test(run, num_episodes, policy, watch=True), lines.append)
    assert (tmp_path / 'test_history.csv').read_text().splitlines() == [
        *rows,
        f'{folder}/ckpt-1,100,100,levels:lives,2,12.0,12.0,12.0,greedy,1',
        f'{folder}/ckpt-1,100,100,levels:lives,1,12.0,,,sample,1',
    ]


def test_scores_that_cannot_be_written_are_shown(logdir, tmp_path, capsys):
    run = lives_config(tmp_path, total_environment_frames=100)
    shutil.copytree(logdir / 'checkpoints', tmp_path / 'checkpoints')
    (tmp_path / 'test_scores.csv').mkdir()
    sentence = f'Cannot write the scores in {tmp_path}: Is a directory.'
    lines = []
    with pytest.raises(checkpoint.LogdirError, match=re.escape(sentence)):
        evaluate(to_test(run, 2), lines.append)
    assert re.search(r'levels:lives +2 +12\.00', lines[-1])
    # `--watch` only warns and continues.
    evaluate(to_test(run, 2, watch=True), lines.append)
    assert lines[-1] == 'Training is complete.'
    assert f'WARNING: {sentence}' in capsys.readouterr().err


def test_watching_tests_all_checkpoints_saved_during_a_test(logdir, tmp_path, monkeypatch, capsys):
    """Except those that are removed or damaged by then."""
    monkeypatch.setattr(evaluation, '_WATCH_SECONDS', 0.05)
    ready = tmp_path / 'ready' / 'checkpoints'
    kept = tmp_path / 'kept'
    shutil.copytree(logdir, ready.parent)
    for frames in (120, 140, 160, 180):
        training.train(lives_config(ready.parent, total_environment_frames=frames))
        # Training keeps three checkpoints.
        shutil.copytree(ready, kept, dirs_exist_ok=True)
    folder = tmp_path / 'run' / 'checkpoints'
    folder.mkdir(parents=True)

    def files_of(number, where):
        return list(where.glob(f'ckpt-{number}.*'))

    def add(*numbers):
        for number in numbers:
            for path in sorted(files_of(number, kept)):
                shutil.copy(path, folder)

    tested = []

    def report(line):
        if not line.startswith('Testing '):
            return
        tested.append(line.rpartition('/')[2])
        if tested[-1] == 'ckpt-1':
            add(2, 3)
        elif tested[-1] == 'ckpt-2':
            for path in files_of(3, folder):
                path.unlink()
            add(4, 5)
            (data,) = folder.glob('ckpt-4.data*')
            data.write_bytes(data.read_bytes()[:-1])

    add(1)
    capsys.readouterr()
    run = lives_config(tmp_path / 'run', total_environment_frames=180)
    evaluate(to_test(run, 1, watch=True), report)
    assert tested == ['ckpt-1', 'ckpt-2', 'ckpt-5']
    rows = (tmp_path / 'run' / 'test_history.csv').read_text().splitlines()[1:]
    assert [row.split(',')[1] for row in rows] == ['100', '120', '180']
    warnings = capsys.readouterr().err
    assert warnings.count('ckpt-4 cannot be used') == 1 and 'ckpt-3' not in warnings


@pytest.fixture(scope='module')
def cartpole(tmp_path_factory):
    """A trained policy, and its returns in further training with learning rate 0."""
    learned = config(
        tmp_path_factory.mktemp('cartpole'), level_name='CartPole-v1', num_actors=8,
        envs_per_process=4, queue_capacity=8, total_environment_frames=20_000, batch_size=8,
        unroll_length=20, learning_rate=0.003, epsilon=0.01, entropy_cost=0.01,
        gradient_clip_norm=40, log_secs=0.5,
    )  # fmt: skip
    before = tf.train.load_checkpoint(training.train(learned))
    num_episodes = sum(1 for _ in run_files.read_episodes(learned.run.logdir))
    run = learned.replace(total_environment_frames=40_000, learning_rate=0.0)
    after = tf.train.load_checkpoint(training.train(run))
    weights = [name for name in after.get_variable_to_shape_map() if '/agent/' in name]
    assert len(weights) >= 8
    for name in weights:
        np.testing.assert_array_equal(before.get_tensor(name), after.get_tensor(name))
    rows = list(run_files.read_episodes(run.run.logdir))[num_episodes:]
    return run, [row['return'] for row in rows]


def test_greedy_episodes_follow_from_weights_and_seeds(cartpole):
    """The test repeats them, all at once, with only Gymnasium and the network."""
    count = 24
    run = cartpole[0]
    (returns,) = evaluate(to_test(run, count, 'greedy'), print).values()

    agent = Agent(AgentConfig(torso='mlp', core='none'), VECTOR)
    restored = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=agent))
    newest = run_files.newest_checkpoint(run.run.logdir)
    restored.restore(newest).expect_partial().assert_existing_objects_matched()
    logits_of = tf.function(lambda *row: agent.step(row[0], row[1], ())[0].policy)
    games = [gymnasium.make('CartPole-v1') for _ in range(count)]
    frames = np.array(
        [
            game.reset(seed=episode_seed(run.run.seed, 'CartPole-v1', number))[0]
            for number, game in enumerate(games)
        ],
        np.float32,
    )
    lengths, margins = np.zeros(count), np.full(count, np.inf)
    is_over, actions = np.zeros(count, bool), np.zeros(count, np.int32)
    while not is_over.all():
        reward = tf.fill([count], float(lengths.any()))
        info = StepOutputInfo(reward, *2 * [tf.zeros(count, tf.int32)])
        done = tf.fill([count], not lengths.any())
        row = StepOutput(reward, info, done, {'frame': tf.constant(frames)})
        logits = logits_of(tf.constant(actions), row).numpy()
        actions = logits.argmax(1).astype(np.int32)
        for i in np.flatnonzero(~is_over):
            frames[i], _, terminated, truncated, _ = games[i].step(int(actions[i]))
            lengths[i] += 1
            margins[i] = min(margins[i], abs(logits[i, 1] - logits[i, 0]))
            is_over[i] = terminated or truncated
    # If rows are summed in another order, rounding may swap two actions this close.
    is_clear = margins > 1e-5
    assert is_clear.sum() > count / 2
    np.testing.assert_array_equal(np.array(returns)[is_clear], lengths[is_clear])


def test_returns_do_not_depend_on_the_number_of_actors(cartpole):
    """Actions are sampled, and batch sizes vary."""
    played = []
    for num_actors, envs_per_process, count in ((8, 4, 12), (12, 4, 12), (1, 1, 4)):
        run = cartpole[0].replace(num_actors=num_actors, envs_per_process=envs_per_process)
        played.append(evaluate(to_test(run, count), print)['CartPole-v1'])
    assert played[0] == played[1]
    # A shorter test plays the first of the same episodes.
    assert played[2] == played[0][:4]
    assert len(set(played[0])) > 6


IMAGE = {'frame': ArraySpec((84, 84, 4), 'uint8')}
SPEAKING = {'frame': ArraySpec((72, 96, 3), 'uint8'), 'instruction': ArraySpec((32,), 'int32')}


@pytest.mark.parametrize(
    ('agent_class', 'network', 'observation'),
    [
        (SamplingAgent, AgentConfig('mlp', 'lstm'), {'frame': ArraySpec((376,), 'float32')}),
        (SamplingAgent, AgentConfig('shallow', 'none'), IMAGE),
        (SamplingAgent, AgentConfig('nature', 'none'), IMAGE),
        (SamplingAgent, AgentConfig('deep', 'lstm'), SPEAKING),
        (GreedyAgent, AgentConfig('shallow', 'none'), IMAGE),
    ],
)
def test_a_row_gives_the_same_bits_in_any_batch(agent_class, network, observation):
    spec = with_action_noise(EnvironmentSpec(observation, 5, 1))
    agent = agent_class(network, spec)
    random = np.random.default_rng(1)
    count = 20

    def rows_of(array):
        shape = (count, *array.shape)
        if array.dtype == 'float32':
            return random.normal(size=shape).astype(np.float32)
        high = {'uint8': 256, 'int32': 1000}[array.dtype]
        return random.integers(high, size=shape, dtype=array.dtype)

    reward = rows_of(ArraySpec((), 'float32'))
    info = StepOutputInfo(reward, *2 * [np.zeros(count, np.int32)])
    frames = {name: rows_of(array) for name, array in spec.observation.items()}
    done = random.random(count) < 0.3
    last_action = random.integers(5, size=count, dtype=np.int32)
    state = tf.nest.map_structure(rows_of, agent.state_spec)

    compiled = tf.function(agent.step, autograph=False, reduce_retracing=True)

    def step(last_action, reward, done, state, chosen=slice(None)):
        rows = (last_action, StepOutput(reward, info, done, frames), state)
        rows = tf.nest.map_structure(lambda array: tf.constant(array[chosen]), rows)
        return [output.numpy() for output in tf.nest.flatten(compiled(*rows))]

    together = step(last_action, reward, done, state)
    for chosen in ([7], [19, 7], [3, 7, *range(8, 17)]):
        some = step(last_action, reward, done, state, np.array(chosen))
        for part, whole in zip(some, together, strict=True):
            np.testing.assert_array_equal(part, whole[chosen])
    # An episode does not depend on the previous one.
    all_first = np.ones(count, bool)
    nothing = tf.nest.map_structure(np.zeros_like, (last_action, reward, all_first, state))
    nothing = (*nothing[:2], all_first, nothing[3])
    for one, other in zip(step(last_action, reward, all_first, state), step(*nothing), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_match_training_with_learning_rate_0(cartpole):
    """The same weights act in both, with different seeds.

    Means of hundreds of episodes are off by six standard errors less than once in a million times.
    The log of training lacks unfinished episodes, at most one per environment.
    """
    run, trained = cartpole
    (tested,) = evaluate(to_test(run, 300), print).values()
    assert len(trained) > 100
    missing = run.actors.num_actors * np.ptp(trained + tested) / len(trained)
    error = np.hypot(*(np.std(returns) / len(returns) ** 0.5 for returns in (trained, tested)))
    assert abs(np.mean(trained) - np.mean(tested)) < 6 * error + missing


def test_videos_show_what_agent_and_person_see(tmp_path):
    run = config(
        tmp_path, level_name='ALE/Boxing-v5', total_environment_frames=20, num_action_repeats=60
    )
    training.train(run)
    evaluate(to_test(run, 2, num_videos=1), print)
    folder = tmp_path / 'videos' / 'ckpt-1'
    assert sorted(os.listdir(folder)) == ['ALE_Boxing_v5_0_agent.mp4', 'ALE_Boxing_v5_0_person.mp4']
    counts = set()
    for path, shape in (('agent', (168, 168, 3)), ('person', (210, 160, 3))):
        video = cv2.VideoCapture(str(folder / f'ALE_Boxing_v5_0_{path}.mp4'))
        frames = []
        while True:
            is_there, frame = video.read()
            if not is_there:
                break
            frames.append(frame)
        assert frames[0].shape == shape or frames[0].shape == (420, 320, 3)
        assert np.ptp(frames[0]) > 50
        counts.add(len(frames))
    # A game of Boxing lasts two minutes: 120 actions of a second.
    assert len(counts) == 1 and 60 < counts.pop() < 130


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(checkpoint.LogdirError, match='There is no checkpoint in'):
        evaluate(to_test(config(tmp_path), 1), print)
    assert not list(tmp_path.iterdir())
    with pytest.raises(run_config.ConfigError, match='--watch'):
        evaluate(to_test(config(tmp_path), checkpoint='a', watch=True), print)


def test_another_network_is_refused(logdir):
    with pytest.raises(checkpoint.LogdirError, match='--core was "none" and is now "lstm"'):
        evaluate(to_test(lives_config(logdir, core='lstm'), 1), print)


def test_endless_episodes_are_cut_off(logdir):
    run = lives_config(logdir, level_name='levels:endless')
    lines = []
    returns = evaluate(to_test(run, 6, max_frames=30), lines.append)
    assert returns == {'levels:endless': [30.0] * 6}
    assert lines[-1].endswith(
        '\n6 of 6 episodes of levels:endless were cut off at --test_max_frames=30.'
    )
    scores = json.loads((logdir / 'test_scores.json').read_text())
    assert (scores['max_frames'], scores['levels']['levels:endless']['cut_off']) == (30, 6)
    atari = EnvironmentSpec(IMAGE, 4, 4, 'atari')
    assert evaluation.default_max_frames(atari) == 108_000
    assert evaluation.default_max_frames(VECTOR) == 1_000_000


def after_results(monkeypatch, number, act):
    """Calls `act` as soon as `number` episodes have a result."""
    record = Schedule.record

    def record_and_act(schedule, *result):
        record(schedule, *result)
        if schedule.num_played == number:
            act()

    monkeypatch.setattr(Schedule, 'record', record_and_act)


def test_an_interrupted_test_writes_the_scores_so_far(logdir, tmp_path, monkeypatch):
    shutil.copytree(logdir, tmp_path, dirs_exist_ok=True)
    names = 'levels:short,levels:endless'
    run = lives_config(tmp_path, level_name=names, num_actors=2)
    after_results(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    lines = []
    with pytest.raises(evaluation.EvaluationInterrupted, match='3 of 6 episodes were played'):
        evaluate(to_test(run, 3), lines.append)
    assert 'PARTIAL: 3 of 6 episodes were played before' in lines[-1]
    scores = json.loads((tmp_path / 'test_scores.json').read_text())
    assert scores['partial'] is True
    assert scores['levels']['levels:short']['mean'] == 5.0
    assert scores['levels']['levels:endless'] == {
        'returns': [], 'not_finite': 0, 'cut_off': 0, 'mean': None, 'interval_95': None,
        'median': None,
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / 'test_scores.csv').read_text().splitlines()))
    assert [(row['episodes'], row['mean'], row['partial']) for row in rows] == [
        ('3', '5.0', 'true'),
        ('0', '', 'true'),
    ]
    # The history has complete tests only.
    with pytest.raises(evaluation.EvaluationInterrupted):
        evaluate(to_test(run, 3, watch=True), lines.append)
    assert not (tmp_path / 'test_history.csv').exists()


def test_a_failing_environment_raises_its_error(logdir):
    run = lives_config(logdir, level_name='levels:failing')
    with pytest.raises(Exception, match='the joystick is broken'):
        evaluate(to_test(run, 1), print)


def test_no_episode_is_lost_or_played_twice_when_an_actor_dies(logdir, tmp_path, monkeypatch):
    run = lives_config(logdir, level_name='levels:dies_once', num_actors=1, max_actor_restarts=1)
    monkeypatch.setenv('LEVELS_FOLDER', str(tmp_path))
    seeds = [episode_seed(1, 'levels:dies_once', number) for number in range(8)]
    returns = evaluate(to_test(run, 8), print)
    assert returns == {'levels:dies_once': [float(seed % 1_000_000) for seed in seeds]}
    assert (tmp_path / 'died').read_text().split() == [str(seeds[4])]
    assert (tmp_path / 'played').read_text().split() == list(map(str, seeds))


def test_an_episode_that_cannot_be_played_ends_the_test(logdir, tmp_path, monkeypatch):
    run = lives_config(logdir, level_name='levels:dies_again', num_actors=1, max_actor_restarts=2)
    monkeypatch.setenv('LEVELS_FOLDER', str(tmp_path))
    with pytest.raises(ActorError, match='restarted 2 times'):
        evaluate(to_test(run, 8), print)
    # Earlier episodes are kept.
    scores = json.loads((logdir / 'test_scores.json').read_text())
    assert scores['partial'] and len(scores['levels']['levels:dies_again']['returns']) == 4
    deadly = str(episode_seed(1, 'levels:dies_again', 4))
    assert (tmp_path / 'died').read_text().split() == [deadly] * 3


def test_an_episode_between_restarts_resets_their_limit(logdir, capsys):
    """Five processes play an episode each; the first four die in their next one."""
    run = lives_config(logdir, level_name='levels:mortal', num_actors=1, max_actor_restarts=1)
    seeds = [episode_seed(1, 'levels:mortal', number) for number in range(5)]
    returns = evaluate(to_test(run, 5), print)
    assert returns == {'levels:mortal': [float(seed % 1_000_000) for seed in seeds]}
    said = capsys.readouterr().err
    # Repetitions of the same error are reported in short, the 2nd and the 4th time.
    assert said.count('ended with exit code 1 and is restarted') == 1
    assert 'as before, 2 times so far' in said and 'as before, 4 times so far' in said
    assert 'Actor processes died and were restarted 4 times.' in said
