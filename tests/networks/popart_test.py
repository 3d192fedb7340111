"""Tests of impala/networks/popart.py, alone, in a learner, and in runs of the real command."""

import json
import socket

import numpy as np
import pytest
import tensorflow as tf
from agents import batch_of, mlp_agent
from command_line import WarmRun, assert_one_sentence, metrics

import vtrace
from impala.config import LearnerConfig
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.popart import PopArt
from impala.trajectory import (
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

SPEC = EnvironmentSpec({'frame': ArraySpec((4,), 'float32')}, action=3, num_action_repeats=1)
BETA = 3e-4


def expected_statistics(mean, second_moment, targets, level_id):
    """One step of size beta for each level with targets, in loops."""
    mean, second_moment = np.array(mean), np.array(second_moment)
    for level in set(level_id):
        columns = [i for i, each in enumerate(level_id) if each == level]
        own = [float(row[i]) for row in targets for i in columns]
        mean[level] = (1 - BETA) * mean[level] + BETA * sum(own) / len(own)
        squares = sum(v * v for v in own) / len(own)
        second_moment[level] = (1 - BETA) * second_moment[level] + BETA * squares
    return mean, second_moment


def values(popart, features):
    """Values of all levels, `[N, L]`, by the definition."""
    mean, second_moment = popart.mean.numpy(), popart.second_moment.numpy()
    stddev = np.sqrt(second_moment - mean**2)
    return np.float64(popart(features)) * stddev + mean


def test_statistics_follow_the_equations():
    popart = PopArt(5, 4)
    rng = np.random.default_rng(0)
    mean, second_moment = np.zeros(4), np.ones(4)
    for level_id in ([2, 0, 2], [3, 3, 2], [0, 2, 0]):
        scale = np.array([1.0, 1.0, 1000.0, 1e-3])[level_id]
        targets = np.float32(scale * rng.normal(0.5, size=(6, 3)))
        popart.update(popart.moments(tf.constant(targets), tf.constant(level_id)))
        mean, second_moment = expected_statistics(mean, second_moment, targets, level_id)
    np.testing.assert_allclose(popart.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(popart.second_moment, second_moment, rtol=1e-12)
    # The second level had no targets.
    assert (popart.mean[1], popart.second_moment[1]) == (0, 1)
    np.testing.assert_allclose(
        popart.stddev(tf.constant([2, 1])), np.sqrt(second_moment - mean**2)[[2, 1]], rtol=1e-6
    )


def test_an_update_preserves_the_values():
    tf.random.set_seed(1)
    popart = PopArt(5, 3)
    rng = np.random.default_rng(1)
    features = tf.constant(rng.normal(size=(50, 5)), tf.float32)
    at_first = popart(features).numpy()
    for update in range(20):
        before, outputs = values(popart, features), popart(features).numpy()
        scale = np.array([1000.0, 1.0, 0.001])
        targets = np.float32(scale * rng.normal(0.3, size=(8, 3)))
        if update % 2:
            targets = targets[:, :2]
        level_id = tf.range(targets.shape[1])
        popart.update(popart.moments(tf.constant(targets), level_id))
        # In units of the outputs, since they determine the rounding.
        unit = np.sqrt(popart.second_moment - tf.square(popart.mean))
        np.testing.assert_allclose(values(popart, features) / unit, before / unit, atol=2e-6)
        assert not np.array_equal(popart(features)[:, 0], outputs[:, 0])
        np.testing.assert_array_equal(
            np.array_equal(popart(features)[:, 2], outputs[:, 2]), bool(update % 2)
        )
    # Outputs are not preserved: those of the level with rewards of a thousand have shrunk.
    assert np.abs(popart(features)[:, 0] - at_first[:, 0]).max() > 0.5


def test_values_are_those_of_each_unrolls_level():
    tf.random.set_seed(2)
    popart = PopArt(5, 3)
    popart.mean.assign([1.0, -2.0, 5.0])
    popart.second_moment.assign([2.0, 40.0, 25.01])
    features = tf.constant(np.random.default_rng(2).normal(size=(4 * 2, 5)), tf.float32)
    every = values(popart, features).reshape(4, 2, 3)
    outputs = tf.reshape(popart(features), [4, 2, 3])
    np.testing.assert_allclose(
        popart.values(outputs, tf.constant([2, 1])),
        np.stack([every[:, 0, 2], every[:, 1, 1]], 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ('mean', 'second_moment', 'stddev'),
    [(3.0, 9.0, 1e-4), (3.0, 9.0 - 1e-12, 1e-4), (0.0, 1e14, 1e6), (0.0, 1e-10, 1e-4)],
)
def test_the_standard_deviation_is_bounded(mean, second_moment, stddev):
    popart = PopArt(2, 1)
    popart.mean.assign([mean])
    popart.second_moment.assign([second_moment])
    np.testing.assert_allclose(popart.stddev(tf.constant([0])), [stddev], rtol=1e-6)


@pytest.mark.parametrize('core', ['lstm', 'none'])
def test_acting_computes_only_the_policy(core):
    agent = mlp_agent(core, ('a', 'b'))
    batch = batch_of(LearnerConfig.of(batch_size=3, unroll_length=2), agent.initial_state(3))
    outputs, _ = agent.unroll(batch.agent_outputs.action, batch.env_outputs, batch.agent_state)
    assert outputs.baseline.shape == (3, 3, 2)
    first = tf.nest.map_structure(lambda t: t[0], batch.env_outputs)
    output, _ = agent.step(batch.agent_outputs.action[0], first, batch.agent_state)
    np.testing.assert_allclose(output.policy, outputs.policy[0], atol=1e-5)
    np.testing.assert_array_equal(output.baseline, np.zeros(3, np.float32))


def poisoned(batch):
    return batch._replace(
        env_outputs=batch.env_outputs._replace(reward=batch.env_outputs.reward * np.nan)
    )


def test_only_targets_of_steps_count():
    targets = tf.constant([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    is_counted = tf.constant([[True, False], [False, False], [True, True]])
    moments = mlp_agent('none', ('a', 'b', 'c')).popart.moments(
        targets, tf.constant([2, 0]), is_counted
    )
    np.testing.assert_array_equal(moments, [[1, 40, 1600], [0, 0, 0], [2, 5, 17]])

    config = LearnerConfig.of(batch_size=2, unroll_length=5, reward_clipping='none')
    agent = mlp_agent('none', ('a', 'b'))
    batch = batch_of(config)
    # No transition of the second unroll is a step.
    is_step = tf.constant([[True, False]] * 6)
    env_outputs = batch.env_outputs._replace(is_step=is_step, done=~is_step)
    batch = batch._replace(level_id=tf.constant([0, 1]), env_outputs=env_outputs)
    Learner(agent, config).step(batch)
    assert agent.popart.mean[0] != 0 and agent.popart.mean[1] == 0
    assert agent.popart.second_moment[0] != 1 and agent.popart.second_moment[1] == 1


def test_a_learner_updates_statistics_and_preserves_values():
    config = LearnerConfig.of(
        batch_size=3, unroll_length=5, learning_rate=0.0, reward_clipping='none', discounting=0.9
    )
    agent = mlp_agent('none', ('a', 'b'))
    agent.popart.mean.assign([10.0, 0.5])
    agent.popart.second_moment.assign([500.0, 0.26])
    stddev = np.sqrt([400.0, 0.01])
    learner = Learner(agent, config)
    batch = batch_of(config)._replace(level_id=tf.constant([1, 0, 1]))
    unroll = tf.function(lambda: agent.unroll(batch.agent_outputs.action, batch.env_outputs, ())[0])

    def every_value():
        mean = agent.popart.mean.numpy()
        return mean + unroll().baseline * np.sqrt(agent.popart.second_moment - mean**2)

    before = every_value()
    own = np.stack([before[:, 0, 1], before[:, 1, 0], before[:, 2, 1]], 1)
    outputs = unroll()
    targets = vtrace.from_logits(
        batch.agent_outputs.policy[1:],
        outputs.policy[:-1],
        batch.agent_outputs.action[1:],
        0.9 * np.float32(~batch.env_outputs.done.numpy()[1:]),
        batch.env_outputs.reward[1:],
        own[:-1],
        own[-1],
    )
    metrics = learner.step(batch)
    errors = (targets.vs - own[:-1]) / stddev[[1, 0, 1]]
    np.testing.assert_allclose(metrics['loss/baseline'], 0.5 * np.sum(errors**2), rtol=1e-4)
    advantages = targets.pg_advantages / stddev[[1, 0, 1]]
    np.testing.assert_allclose(
        metrics['loss/policy_gradient'],
        -np.sum(advantages * targets.target_action_log_probs),
        rtol=1e-4,
    )
    mean, second_moment = expected_statistics(
        [10.0, 0.5], [500.0, 0.26], targets.vs.numpy(), [1, 0, 1]
    )
    np.testing.assert_allclose(agent.popart.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(agent.popart.second_moment, second_moment, rtol=1e-6)
    np.testing.assert_allclose(every_value(), before, rtol=1e-4, atol=1e-5)

    kept = [variable.numpy() for variable in agent.variables]
    assert len(kept) == len(agent.trainable_variables) + 2
    assert learner.step(poisoned(batch))['skipped']
    for variable, value in zip(agent.variables, kept, strict=True):
        np.testing.assert_array_equal(variable, value)


class Bandits:
    """Two levels with episodes of one step, whose frame shows which of three actions pays.

    Noise is as large as the pay, so that errors of the baseline never vanish. Every input matters
    in both levels, and what is right in one is wrong in the other.
    """

    SIGNS = np.array([[1, 1, -1], [1, -1, 1], [-1, 1, 1]], np.float32)
    FRAMES = np.stack([np.insert(SIGNS, 0, -1, 1), np.insert(np.roll(SIGNS, 1, 0), 0, 1, 1)])

    def __init__(self, pay, popart):
        self.pay = np.array(pay)
        tf.random.set_seed(0)
        self.rng = np.random.default_rng(0)
        levels = ('small', 'large') if popart else ()
        self.agent = Agent(AgentConfig('mlp', core='none', popart_levels=levels), SPEC)
        self.config = LearnerConfig.of(
            batch_size=32,
            unroll_length=4,
            learning_rate=0.002,
            epsilon=0.01,
            entropy_cost=0.1,
            reward_clipping='none',
            gradient_clip_norm=40.0,
        )
        self.learner = Learner(self.agent, self.config)
        self.unroll = tf.function(lambda action, outputs: self.agent.unroll(action, outputs, ())[0])

    def look(self, frames):
        """Returns rows `[T+1, B]` without rewards, and the agent's logits for them."""
        rows = frames.shape[:2]
        zeros = np.zeros(rows, np.float32)
        outputs = StepOutput(
            reward=zeros,
            info=StepOutputInfo(zeros, *2 * [np.zeros(rows, np.int32)]),
            done=np.ones(rows, bool),
            observation={'frame': frames},
        )
        return outputs, self.unroll(np.zeros(rows, np.int32), outputs).policy.numpy()

    def train(self, updates):
        rows = (self.config.unroll_length + 1, self.config.batch_size)
        level_id = np.arange(self.config.batch_size, dtype=np.int32) % 2
        for _ in range(updates):
            best = self.rng.integers(3, size=rows)
            outputs, logits = self.look(self.FRAMES[level_id, best])
            chosen = np.argmax(logits + self.rng.gumbel(size=logits.shape), -1).astype(np.int32)
            rewards = self.pay[level_id] * ((chosen == best) + self.rng.normal(size=rows))
            # Row t + 1 holds what was decided in row t.
            reward, action, logits = (np.roll(x, 1, 0) for x in (rewards, chosen, logits))
            batch = ActorOutput(
                level_id=level_id,
                policy_version=np.full(len(level_id), self.learner.updates.numpy()),
                agent_state=(),
                env_outputs=outputs._replace(reward=np.float32(reward)),
                agent_outputs=AgentOutput(action, logits, np.zeros(rows, np.float32)),
            )
            self.learner.step(tf.nest.map_structure(tf.convert_to_tensor, batch))

    def skill(self):
        """Returns each level's probability of the right action, averaged over frames."""
        probabilities = tf.nn.softmax(self.look(self.FRAMES)[1]).numpy()
        return probabilities[:, range(3), range(3)].mean(1)


def test_levels_whose_rewards_differ_a_thousandfold_are_both_learned():
    with_it, without, alike = (
        Bandits(pay, popart)
        for pay, popart in (((1.0, 1000.0), True), ((1.0, 1000.0), False), ((1.0, 1.0), False))
    )
    for bandits in (with_it, without, alike):
        np.testing.assert_allclose(bandits.skill(), 1 / 3, atol=0.1)
        bandits.train(300)
    assert with_it.skill().min() > 0.9
    # Plain IMPALA learns only the level with large rewards; with equal rewards it learns both.
    assert without.skill()[0] < 0.5
    assert without.skill()[1] > 0.9
    assert alike.skill().min() > 0.9


LEVELS = 'levels:short', 'levels:long'
FLAGS = (
    '--popart',
    '--reward_clipping=none',
    '--num_actors=2',
    '--unroll_length=10',
    '--log_secs=0',
)


def mean_of_checkpoint(logdir, number, statistic='mean'):
    """Returns each level's mean target, or another statistic, from a checkpoint."""
    reader = tf.train.load_checkpoint(str(logdir / 'checkpoints' / f'ckpt-{number}'))
    (name,) = (n for n in reader.get_variable_to_shape_map() if f'/popart/{statistic}/' in n)
    return reader.get_tensor(name)


def test_a_run_is_resumed_and_tested(tmp_path):
    logdir = tmp_path / 'run'
    common = (*FLAGS, f'--logdir={logdir}')
    levels = f'--level_name={",".join(LEVELS)}'
    with WarmRun(tmp_path / 'a', *common, levels, '--total_environment_frames=400') as first:
        assert first.wait() == 0, first.stderr
    more = '--total_environment_frames=800'
    with WarmRun(tmp_path / 'b', *common, levels, more) as second:
        assert second.wait() == 0, second.stderr
    assert 'Resuming from' in second.stderr
    rows = metrics(logdir)
    assert [row['updates'] for row in rows] == list(range(1, 41))
    last = rows[-1]
    for number, row in ((1, rows[19]), (2, last)):
        mean = [row[f'popart/mean/{level}'] for level in LEVELS]
        np.testing.assert_allclose(mean_of_checkpoint(logdir, number), mean, rtol=1e-5)
    # Each of the ten steps of an unroll earns 1, and values start near 0. The levels of a batch
    # depend on the speed of their actors. The 21st update continues where the 20th ended.
    for level in LEVELS:
        steps = np.diff([row[f'popart/mean/{level}'] for row in rows]) / BETA
        learned = np.diff([row[f'level_frames/{level}'] for row in rows]) > 0
        assert np.all(steps[~learned] == 0)
        assert np.all((steps[learned] > 0.5) & (steps[learned] < 20))
    moments = [mean_of_checkpoint(logdir, 2, name) for name in ('mean', 'second_moment')]
    for level, mu, nu in zip(LEVELS, *moments, strict=True):
        assert last[f'popart/mean/{level}'] == pytest.approx(mu, rel=1e-5)
        assert last[f'popart/stddev/{level}'] == pytest.approx(np.sqrt(nu - mu**2), rel=1e-5)

    backwards = f'--level_name={",".join(reversed(LEVELS))}'
    name = r'--popart or --level_name \(levels whose values are normalized\)'
    for i, (flags, now) in enumerate(
        [((levels, '--nopopart'), r'\[\]'), ((backwards,), r'\["levels:long", "levels:short"\]')]
    ):
        with WarmRun(tmp_path / f'refused {i}', *common, *flags) as refused:
            assert_one_sentence(
                refused, 2, rf'{name} was \["levels:short", "levels:long"\] and is now {now}'
            )
    # The run's own flags, but only on its second level.
    test = ('--mode=test', f'--level_name={LEVELS[1]}', '--test_num_episodes=2')
    with WarmRun(tmp_path / 'c', *test, f'--logdir={logdir}') as run:
        assert run.wait() == 0, run.stderr
    scores = json.loads((logdir / 'test_scores.json').read_text())['levels']
    assert scores.keys() == {LEVELS[1]}
    assert scores[LEVELS[1]]['returns'] == [20, 20]


def test_actor_jobs_take_popart_from_the_learner(tmp_path):
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        address = f'--learner_address=localhost:{probe.getsockname()[1]}'
    logdir = tmp_path / 'run'
    learner = (
        '--task=0',
        '--trusted_network',
        f'--level_name={",".join(LEVELS)}',
        '--total_environment_frames=400',
        f'--logdir={logdir}',
    )
    # The actor job plays only the second level.
    actor = ('--job_name=actor', '--task=0', f'--level_name={LEVELS[1]}')
    with (
        WarmRun(tmp_path / 'learner', *FLAGS, *learner, address) as first,
        WarmRun(tmp_path / 'actor', *actor, address) as job,
    ):
        assert first.wait() == 0, first.stderr
        assert job.wait() == 0, job.stderr
    mean = mean_of_checkpoint(logdir, 1)
    assert mean[0] == 0
    assert mean[1] > 20 * BETA
