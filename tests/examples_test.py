"""Every example trains, in the way that its docstring says."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from gymnasium.utils.env_checker import check_env

from configs import config
from examples import (
    action_masks,
    own_environment,
    random_network_distillation,
    rooms,
    tuple_actions,
)
from impala import evaluation, training
from impala.config import Config, ConfigError
from impala.environments import create_environment
from impala.errors import LevelError, TrainingError
from impala.networks.core import OwnCore
from impala.runs import flag_file, flags
from impala.runs.files import LogdirError
from impala.trajectory import ActionSpec, ArraySpec

ROOT = pathlib.Path(__file__).resolve().parents[1]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def run_of(name, logdir, updates=3, **changes):
    """Returns the settings of a flag file, for a run of a few updates of the whole program."""
    stored = flags.parse_stored(flag_file.read(str(ROOT / 'configs' / f'{name}.flags')))
    run = Config.of(**stored)
    steps = updates * run.learner.batch_size * run.learner.unroll_length
    return run.replace(
        **{
            'logdir': str(logdir),
            'total_environment_frames': steps * (run.environment.num_action_repeats or 1),
            'log_secs': 0.0,
            'max_actor_restarts': 0,
            'num_actors': 2,
            'envs_per_process': 2,
        }
        | changes
    )


def assert_learned(folder):
    """Asserts that all updates of a run were applied, and that no actor died."""
    lines = metrics_of(folder)
    losses = [line[name] for line in lines for name in line if name.startswith('loss/')]
    assert losses and np.isfinite(losses).all()
    for name in ('updates_skipped', 'actor_restarts', 'unrolls_discarded'):
        assert sum(line.get(name, 0) for line in lines) == 0


def episodes(env, policy, count):
    """Plays episodes; returns their returns, and all steps as (observation, action, info)."""
    returns, steps = [], []
    for seed in range(count):
        observation, info = env.reset(seed=seed)
        total, ended = 0.0, False
        while not ended:
            action = policy(observation, info)
            steps.append((observation, action, info))
            observation, reward, terminated, truncated, info = env.step(action)
            total, ended = total + reward, terminated or truncated
        returns.append(total)
    return returns, steps


def test_an_own_torso_trains_and_is_part_of_the_checkpoint(tmp_path):
    run = config(
        tmp_path,
        level_name='levels:picture',
        torso='examples.own_torso:VisionTransformer',
        core='lstm',
    )
    assert training.train(run) is not None
    losses = [line['loss/total'] for line in metrics_of(tmp_path)]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    longer = run.replace(total_environment_frames=200)
    assert training.train(longer).endswith('ckpt-2')
    with pytest.raises(
        LogdirError, match='--torso was "examples.own_torso:VisionTransformer" and is now'
    ):
        training.train(longer.replace(torso='deep', total_environment_frames=300))


def test_an_own_core_trains_with_all_that_uses_its_state(tmp_path):
    name = 'examples.own_core:AttentionMemory'
    run = config(
        tmp_path, level_name='levels:picture', core=name, loss='appo', target_update_steps=2,
        replay_fraction=0.5, sample_reuse=2, compute_dtype='bfloat16',
    )  # fmt: skip
    assert training.train(run).endswith('ckpt-1')
    lines = metrics_of(tmp_path)
    assert lines[-1]['replayed_fraction'] == 0.5
    assert np.isfinite([line['loss/total'] for line in lines]).all()
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    network = json.loads((tmp_path / 'network.json').read_text())
    assert network['core'] == 'examples.own_core:AttentionMemory'
    with pytest.raises(
        LogdirError, match='--core was "examples.own_core:AttentionMemory" and is now "gru"'
    ):
        training.train(run.replace(core='gru', total_environment_frames=300))
    scores = [
        evaluation.evaluate(run.replace(mode='test', test_num_episodes=3, num_actors=actors), print)
        for actors in (1, 3)
    ]
    assert scores[0] == scores[1]


def test_the_attention_ends_with_the_last_steps_and_with_the_episode():
    from examples import own_core

    steps, features = 20, 5
    core = OwnCore('examples.own_core:AttentionMemory', features)
    inputs = tf.random.stateless_normal([steps, 1, features], [1, 2])
    begins = tf.constant([[t in (0, 14)] for t in range(steps)])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        outputs, _ = core.unroll(inputs, begins, core.initial_state(1))
        sums = [tf.reduce_sum(outputs[t]) for t in (12, 17)]
    for last, total in zip((12, 17), sums, strict=True):
        seen = np.flatnonzero(np.any(tape.gradient(total, inputs).numpy(), axis=(1, 2)))
        assert seen.tolist() == list(
            range(max(last - own_core.STEPS + 1, last // 14 * 14), last + 1)
        )


def test_an_own_loss_logs_its_parts(tmp_path):
    run = config(tmp_path, loss='examples.own_loss:penalized_loss')
    training.train(run)
    for line in metrics_of(tmp_path):
        plain = line['loss/policy_gradient'] + 0.5 * line['loss/baseline']
        plain += 0.00025 * line['loss/entropy']
        np.testing.assert_allclose(
            line['loss/total'], plain + 0.1 * line['loss/penalty'], rtol=1e-4, atol=1e-4
        )


def test_an_own_hook_adds_a_metric_and_stops_the_run(tmp_path, monkeypatch):
    run = config(tmp_path, hooks=('examples.own_hook:EntropyWatch',), total_environment_frames=400)
    training.train(run)
    entropies = [line['mean_entropy'] for line in metrics_of(tmp_path)]
    assert all(0 < entropy <= np.log(2) + 1e-6 for entropy in entropies)
    from examples import own_hook

    monkeypatch.setattr(own_hook, 'LEAST_ENTROPY', 1.0)
    longer = run.replace(total_environment_frames=4000)
    assert training.train(longer).endswith('ckpt-2')
    assert metrics_of(tmp_path)[-1]['frames'] == 420


@pytest.mark.parametrize(
    ('changes', 'error', 'sentence'),
    [
        ({'torso': 'no_such_module:Torso'}, ConfigError, "module 'no_such_module' cannot be found"),
        (
            {'torso': 'examples.own_torso:Missing'},
            ConfigError,
            "module 'examples.own_torso' has no 'Missing'",
        ),
        (
            {'torso': 'examples.own_torso:VisionTransformer'},
            ConfigError,
            r'fails with observations of float32 \[2\]: .* must have rank 4',
        ),
        (
            {'core': 'examples.own_core:Missing'},
            ConfigError,
            "--core=examples.own_core:Missing: .* has no 'Missing'",
        ),
        ({'core': 'math:sqrt'}, ConfigError, '--core=math:sqrt cannot be made: TypeError'),
        ({'core': 'sonnet:LSTM'}, ConfigError, '--core=sonnet:LSTM cannot be made: TypeError'),
        (
            {'loss': 'examples.own_loss:missing'},
            ConfigError,
            "--loss=examples.own_loss:missing: .* has no 'missing'",
        ),
        ({'loss': 'math:sqrt'}, TrainingError, '--loss=math:sqrt fails: TypeError'),
        ({'loss': 'builtins:print'}, TrainingError, '--loss=builtins:print returns NoneType'),
        (
            {'hooks': ('examples.own_hook:Missing',)},
            ConfigError,
            '--hooks=examples.own_hook:Missing: .* has no',
        ),
        ({'hooks': ('math:sqrt',)}, ConfigError, '--hooks=math:sqrt cannot be made: TypeError'),
        ({'hooks': ('builtins:dict',)}, ConfigError, '--hooks=builtins:dict makes dict'),
    ],
)
def test_mistakes_in_own_code_are_one_sentence(tmp_path, changes, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        training.train(config(tmp_path, **changes))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'changes', [{'torso': 'own'}, {'core': 'own'}, {'loss': ':x'}, {'hooks': ('a.b',)}]
)
def test_names_without_a_module_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match='my_module:'):
        config(tmp_path, **changes)


def test_the_own_environment_rewards_catches(tmp_path):
    env = own_environment.make(0, None)
    check_env(env, skip_render_check=True)

    def follow(observation, info):
        yellow = np.nonzero((observation['image'] == [255, 220, 80]).all(-1))
        place = 7 * (1 + observation['basket'][0]) / 2
        return 1 + int(np.sign(np.mean(yellow[1] // 4) - round(place)))

    assert episodes(own_environment.make(0, None, difficulty=0), follow, 20)[0] == [1.0] * 20
    # Nothing can be done about wind in the last step, except at a wall.
    windy = own_environment.make(0, None, difficulty=5)
    assert 0.4 < np.mean(episodes(windy, follow, 300)[0]) < 0.7
    assert 0.05 < np.mean(episodes(env, lambda *_: 1, 300)[0]) < 0.2
    run = run_of('own_environment', tmp_path, env_kwargs='{"difficulty": 3}')
    training.train(run)
    assert_learned(tmp_path)
    environment = create_environment(run.run.level_name, 1, run.environment)
    assert environment.spec.observation == {
        'frame': ArraySpec((32, 32, 3), 'uint8'),
        'vector': ArraySpec((1,), 'float32'),
    }
    with pytest.raises(LevelError, match='difficulty must be from 0 to 10, not 11'):
        training.train(run.replace(env_kwargs='{"difficulty": 11}', logdir=str(tmp_path / 'other')))


@pytest.mark.parametrize('mask_in', ['observation', 'info'])
def test_masked_actions_are_never_taken(tmp_path, mask_in):
    env = action_masks.make(0, None, mask_in=mask_in)
    check_env(env, skip_render_check=True)

    def mask_of(observation, info):
        return (observation if mask_in == 'observation' else info)['action_mask']

    returns, steps = episodes(env, lambda *seen: int(np.argmax(mask_of(*seen))), 5)
    allowed = [mask_of(observation, info).mean() for observation, _, info in steps]
    assert np.min(allowed) == 6 / 9 and np.mean(allowed) == pytest.approx(
        (9 + 8 + 7 + 27 * 6) / 270
    )
    env.reset(seed=0)
    env.step(4)
    with pytest.raises(ValueError, match='worker 4 is busy'):
        env.step(4)
    # An actor that takes a forbidden action dies, which ends this run.
    changes = {'info_action_mask': True, 'env_kwargs': '{"mask_in": "info"}'}
    training.train(run_of('action_masks', tmp_path, **changes if mask_in == 'info' else {}))
    assert_learned(tmp_path)


def test_a_tuple_of_actions_trains(tmp_path):
    env = tuple_actions.make(0, None)
    check_env(env, skip_render_check=True)
    assert episodes(env, lambda seen, info: (seen[0], seen[1]), 2)[0] == [10.0, 10.0]
    assert episodes(env, lambda seen, info: ((seen[0] + 1) % 3, seen[1]), 2)[0] == [0.0, 0.0]
    near = episodes(env, lambda seen, info: (seen[0], seen[1] + [0.03, -0.04]), 2)[0]
    np.testing.assert_allclose(near, 10 * np.exp(-0.1), rtol=1e-6)
    training.train(run_of('tuple_actions', tmp_path))
    assert_learned(tmp_path)


def test_continuous_control_trains_and_is_tested(tmp_path):
    run = run_of('pendulum', tmp_path)
    training.train(run)
    assert_learned(tmp_path)
    test = run.replace(mode='test', test_num_episodes=2, test_policy='greedy')
    (returns,) = evaluation.evaluate(test, lambda line: None).values()
    # 200 steps, each of which costs at most pi^2 + 0.1 * 8^2 + 0.001 * 2^2.
    assert len(returns) == 2 and all(-3300 < each < 0 for each in returns)


def test_vizdoom_presses_several_buttons_at_once():
    level = run_of('vizdoom_buttons', 'nowhere')
    environment = create_environment(level.run.level_name, 1, level.environment)
    assert environment.spec.action == ActionSpec((2, 2, 2))
    first = {name: array.copy() for name, array in environment.reset().items()}
    for _ in range(4):
        _, _, last = environment.step(np.array([1, 0, 1], np.int32))
    # It has turned, and has shot some of its ammunition.
    assert (last['frame'] != first['frame']).mean() > 0.5
    assert last['vector'][0] < first['vector'][0] == 26
    environment.close()


def test_the_rooms_have_a_way_to_the_reward():
    env = rooms.make(0, None, rooms=3)
    check_env(env, skip_render_check=True)
    right, down, up = 1, 3, 2
    # Down to the first door and through it; up to the second.
    actions = iter([*[down] * 4, *[right] * 6, *[up] * 4, *[right] * 6])
    returns, steps = episodes(env, lambda *_: next(actions), 1)
    assert returns == [10.0] and len(steps) == 20
    assert [tuple(seen) for seen, _, _ in steps[::5]] == [(0, 0), (1, 4), (6, 4), (7, 0)]
    assert rooms.make(0, None).observation_space.nvec.tolist() == [48, 5]


def test_the_predictor_learns_once_from_every_row(tmp_path):
    run = run_of('rooms_rnd', tmp_path, replay_fraction=0.5, replay_capacity=20)
    training.train(run)
    assert_learned(tmp_path)
    rewards = [line['intrinsic_reward'] for line in metrics_of(tmp_path)]
    assert all(0 < reward < 10 for reward in rewards)
    reader = tf.train.load_checkpoint(str(tmp_path / 'checkpoints' / 'ckpt-1'))
    counts = [name for name in reader.get_variable_to_shape_map() if '_inputs/_count' in name]
    # Replayed and reused unrolls are not learned from again.
    steps = metrics_of(tmp_path)[-1]['agent_steps']
    assert [reader.get_tensor(name) for name in counts] == [pytest.approx(steps)]


def test_the_error_of_the_predictor_is_novelty():
    random = np.random.default_rng(0)
    tf.random.set_seed(1)
    networks = random_network_distillation.Networks(6)
    seen = random.normal(3, 2, [21, 4, 2, 3]).astype(np.float32)
    new = random.normal(-9, 2, [21, 4, 2, 3]).astype(np.float32)
    done = np.zeros([21, 4], bool)
    done[7, 1] = True
    for _ in range(200):
        networks.learn(seen)
    known, novel = networks.reward(seen, done).numpy(), networks.reward(new, done).numpy()
    assert known.shape == (20, 4) and known[6, 1] == novel[6, 1] == 0
    assert novel.mean() > 10 * known.mean()


def test_moments_are_those_of_all_values():
    moments = random_network_distillation.Moments([3])
    values = np.random.default_rng(0).normal(5, [1, 2, 3], [9, 4, 3]).astype(np.float32)
    for part in np.split(values, [1, 3]):
        moments.add(part)
    flat = values.reshape(-1, 3)
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.stddev(), flat.std(0), rtol=1e-3)
