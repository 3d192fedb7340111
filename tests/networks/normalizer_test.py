import numpy as np
import pytest
import tensorflow as tf
from agents import batch_of, mlp_agent

from impala.config import LearnerConfig
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.normalizer import CLIP, Normalizer, vectors_of
from impala.trajectory import ArraySpec, EnvironmentSpec, Part, StepOutput, StepOutputInfo

VECTOR = EnvironmentSpec({'frame': ArraySpec((3,), 'float32')}, 2, 1)
# All kinds of observations; the comments say what of them is normalized.
MIXED = EnvironmentSpec(
    {
        'frame': ArraySpec((4, 5, 3), 'uint8'),
        'depth': ArraySpec((4, 5, 1), 'float32'),
        'ram': ArraySpec((6,), 'uint8'),
        'instruction': ArraySpec((32,), 'int32'),
        'action_mask': ArraySpec((2,), 'bool'),
        'scalar': ArraySpec((), 'float32'),  # All of it.
        'matrix': ArraySpec((2, 3), 'float32'),  # All of it.
        'a/choice': ArraySpec((3,), 'float32', parts=(Part('categories', (3,)),)),
        'bits': ArraySpec((2,), 'float32', parts=(Part('bits', (2,)),)),
        'vector': ArraySpec(  # The third to fifth number.
            (9,),
            'float32',
            parts=(Part('bits', (2,)), Part('numbers', (3,)), Part('categories', (2, 2))),
        ),
    },
    2,
    1,
)


def observe(normalizer, *batches):
    """Adds batches, f32 `[T, B, D]`, of one vector, each as an update of one replica."""
    for batch in batches:
        summary = normalizer.summary({'frame': tf.constant(batch)}, tf.ones(batch.shape[1], bool))
        normalizer.update(summary[tf.newaxis])


def batches_of(size=3, number=6):
    """Batches of different sizes, scales and means, of which the numbers' are far apart."""
    rng = np.random.default_rng(0)
    for i in range(number):
        rows = rng.normal(size=(2 + i, 1 + i % 3, size)) * [1.0, 1e-3, 1e4] + [1e6, 0.5 * i, -3.0]
        yield rows.astype(np.float32)


def assert_statistics(normalizer, rows):
    """Compares with NumPy's statistics of rows `[N, D]`."""
    rows = np.float64(rows)
    assert normalizer.count == len(rows)
    np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(normalizer.variance, rows.var(0), rtol=1e-9)


def flat(batches):
    return np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in batches])


def test_statistics_are_those_of_all_observations():
    normalizer, seen = Normalizer(VECTOR), []
    for batch in batches_of():
        observe(normalizer, batch)
        seen.append(batch)
        assert_statistics(normalizer, flat(seen))


def test_replicas_have_the_statistics_of_all_of_them():
    """Some have no observations that count."""
    normalizer, counted = Normalizer(VECTOR), []
    for update, batch in enumerate(batches_of()):
        parts = [batch, 10 * batch, batch[:1], -batch]
        masks = [np.arange(part.shape[1]) % 2 == (i + update) % 2 for i, part in enumerate(parts)]
        counted += [part[:, mask] for part, mask in zip(parts, masks, strict=True)]
        summaries = [
            normalizer.summary({'frame': tf.constant(part)}, tf.constant(mask))
            for part, mask in zip(parts, masks, strict=True)
        ]
        assert any(not mask.any() for mask in masks) or update != 0
        normalizer.update(tf.stack(summaries))
        assert_statistics(normalizer, flat(counted))


def test_no_observations_change_nothing():
    normalizer = Normalizer(VECTOR)
    for batches in ([], list(batches_of())):
        observe(normalizer, *batches)
        before = [variable.numpy() for variable in normalizer.variables]
        observe(normalizer, np.ones((3, 0, 3), np.float32))
        for variable, value in zip(normalizer.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)
    assert len(before) == 3


def test_values_are_normalized_and_clipped():
    normalizer = Normalizer(VECTOR)
    x = np.array([[-3.0, 50.0, 0.5], [1.0, -50.0, -0.5]], np.float32)
    # Before there are statistics, values are only clipped.
    expected = [[-3, CLIP, 0.5], [1, -CLIP, -0.5]]
    np.testing.assert_array_equal(normalizer({'frame': x})['frame'], expected)
    batches = list(batches_of())
    observe(normalizer, *batches)
    rows = flat(batches)
    mean, stddev = np.float64(rows).mean(0), np.float64(rows).std(0)
    normalized = normalizer({'frame': rows})['frame'].numpy()
    # Near 1e6, float32 is accurate to 0.06.
    np.testing.assert_allclose(normalized, (rows - mean) / stddev, atol=0.05)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(normalized.std(0), 1, rtol=0.01)
    far = np.float32([mean + 11 * stddev, mean - 1e9 * stddev])
    expected = [[CLIP] * 3, [-CLIP] * 3]
    np.testing.assert_array_equal(normalizer({'frame': far})['frame'], expected)


@pytest.mark.parametrize('value', [0.0, 1e6, -0.1, 1e-20, 3e38])
def test_constant_entries_are_shifted(value):
    normalizer = Normalizer(VECTOR)
    value = np.float32(value)
    for size in (1, 3, 7):
        observe(normalizer, np.full((size, size, 3), value))
    assert_statistics(normalizer, np.full((59, 3), value))
    next_to_it = np.nextafter(value, np.float32(1))
    x = np.array([[value, next_to_it, value + np.float32(2)]])
    expected = np.clip(x - value, -CLIP, CLIP)
    # TensorFlow may take the smallest numbers for 0.
    np.testing.assert_allclose(normalizer({'frame': x})['frame'], expected, rtol=0, atol=1e-38)


def test_an_entry_that_ceases_to_be_constant_is_scaled():
    normalizer = Normalizer(VECTOR)
    first = np.full((50, 2, 3), 1e4, np.float32)
    second = np.float32(1e4) + np.arange(30, dtype=np.float32).reshape(10, 1, 3)
    observe(normalizer, first, second)
    rows = flat([first, second])
    assert_statistics(normalizer, rows)
    expected = (second[:, 0] - np.float64(rows).mean(0)) / np.float64(rows).std(0)
    normalized = normalizer({'frame': second[:, 0]})['frame']
    np.testing.assert_allclose(normalized, np.clip(expected, -CLIP, CLIP), rtol=1e-3)


def test_only_vectors_of_numbers_are_normalized():
    assert [vector.name for vector in vectors_of(MIXED)] == ['matrix', 'scalar', 'vector']
    normalizer = Normalizer(MIXED)
    rng = np.random.default_rng(0)
    observation = {
        name: tf.constant((100 * rng.random((4, 3, *array.shape))).astype(array.dtype))
        for name, array in MIXED.observation.items()
    }
    summary = normalizer.summary(observation, tf.constant([True, True, True]))
    normalizer.update(summary[tf.newaxis])
    rows = {
        name: array.numpy().reshape(12, *array.shape[2:]) for name, array in observation.items()
    }
    names = ('matrix', 'scalar', 'vector')
    assert_statistics(normalizer, np.concatenate([rows[n].reshape(12, -1) for n in names], 1))
    normalized = normalizer(rows)
    assert list(normalized) == list(rows)
    for name, array in rows.items():
        scaled = (array - array.mean(0)) / array.std(0) if array.dtype == np.float32 else array
        expected = {'vector': np.concatenate([array[..., :2], scaled[..., 2:5], array[..., 5:]], -1)
                    if name == 'vector' else None, 'matrix': scaled, 'scalar': scaled}  # fmt: skip
        np.testing.assert_allclose(normalized[name], expected.get(name, array), atol=1e-5)


def test_an_agent_sees_no_scale_and_no_shift():
    agents = [mlp_agent(core='none', normalizes=True) for _ in range(2)]
    config = LearnerConfig.of(batch_size=4, unroll_length=9)
    batch = batch_of(config)
    moved = batch._replace(
        env_outputs=batch.env_outputs._replace(
            observation={'frame': 1000 * batch.env_outputs.observation['frame'] + 5000}
        )
    )
    before = [unroll(agent, each) for agent, each in zip(agents, (batch, moved), strict=True)]
    assert np.abs(before[0].policy - before[1].policy).max() > 0.1
    outputs = []
    for agent, each in zip(agents, (batch, moved), strict=True):
        frames = each.env_outputs.observation
        agent.normalizer.update(agent.normalizer.summary(frames, tf.ones(4, bool))[tf.newaxis])
        outputs.append(unroll(agent, each))
    np.testing.assert_allclose(outputs[0].policy, outputs[1].policy, atol=1e-4)
    np.testing.assert_allclose(outputs[0].baseline, outputs[1].baseline, atol=1e-4)


def unroll(agent, batch):
    return agent.unroll(batch.agent_outputs.action, batch.env_outputs, batch.agent_state)[0]


def test_an_agent_normalizes_what_it_acts_on():
    agent = mlp_agent(normalizes=True)
    agent.normalizer.mean.assign([1.0, 2.0, 3.0, 4.0])
    agent.normalizer.variance.assign([1.0, 4.0, 9.0, 16.0])
    plain = mlp_agent()
    frame = np.random.default_rng(0).normal(5, 9, size=(6, 4)).astype(np.float32)
    normalized = np.clip((frame - [1, 2, 3, 4]) / [1, 2, 3, 4], -10, 10).astype(np.float32)
    outputs = []
    for each, seen in ((agent, frame), (plain, normalized)):
        reward = tf.ones(6)
        info = StepOutputInfo(reward, *2 * [tf.zeros(6, tf.int32)])
        env_output = StepOutput(reward, info, tf.zeros(6, tf.bool), {'frame': tf.constant(seen)})
        outputs.append(each.step(tf.zeros(6, tf.int32), env_output, each.initial_state(6))[0])
    np.testing.assert_allclose(outputs[0].policy, outputs[1].policy, atol=1e-5)
    np.testing.assert_allclose(outputs[0].baseline, outputs[1].baseline, atol=1e-5)


def test_other_agents_have_no_statistics():
    assert mlp_agent().normalizer is None
    agents = [Agent(AgentConfig('mlp', normalize_observations=on), VECTOR) for on in (False, True)]
    names = [{variable.name for variable in agent.variables} for agent in agents]
    assert {name.split('/')[-2] for name in names[1] - names[0]} == {'normalizer'}
    assert [len(agent.acting_variables) for agent in agents] == list(map(len, names))


def test_a_learner_counts_each_observation_once():
    """Not those that are replayed or reused, nor the last row, which comes again."""
    config = LearnerConfig.of(batch_size=3, unroll_length=5, replay_fraction=0.5)
    agent = mlp_agent(core='none', normalizes=True)
    learner = Learner(agent, config)
    seen = []
    for update in range(4):
        batch = batch_of(config, seed=update)
        is_replayed = np.arange(3) < update
        frames = batch.env_outputs.observation['frame'].numpy()
        seen.append(frames[:-1, ~is_replayed])
        # The second use of the batch comes before the first one of another.
        for is_fresh in (True, False):
            learner.step(batch, is_fresh, tf.constant(is_replayed))
            assert_statistics(agent.normalizer, flat(seen))
    assert agent.normalizer.count == 5 * (3 + 2 + 1)
    assert learner.agent_steps.numpy() == agent.normalizer.count.numpy()


def test_an_update_uses_the_statistics_of_those_who_acted():
    """Statistics change after the weights, so on-policy the policies are the same."""
    config = LearnerConfig.of(batch_size=3, unroll_length=5, learning_rate=0.0)
    agent = mlp_agent(core='none', normalizes=True)
    learner = Learner(agent, config)
    for seed in range(2):
        batch = batch_of(config, seed=seed)
        logits = unroll(agent, batch).policy
        # Row t + 1 holds the policy of row t.
        logits = tf.concat([logits[:1], logits[:-1]], 0)
        batch = batch._replace(agent_outputs=batch.agent_outputs._replace(policy=logits))
        metrics = learner.step(batch)
        entropy = -np.sum(tf.nn.softmax(logits[1:]) * tf.nn.log_softmax(logits[1:]))
        np.testing.assert_allclose(metrics['loss/entropy'], -entropy, rtol=1e-4)
        assert not np.allclose(unroll(agent, batch).policy[:-1], logits[1:], atol=0.01)


def test_a_skipped_update_leaves_the_statistics():
    config = LearnerConfig.of(batch_size=3, unroll_length=5)
    agent = mlp_agent(core='none', normalizes=True)
    learner = Learner(agent, config)
    batch = batch_of(config)
    learner.step(batch)
    before = [variable.numpy() for variable in agent.normalizer.variables]
    rewards = batch.env_outputs._replace(reward=batch.env_outputs.reward * np.nan)
    assert learner.step(batch._replace(env_outputs=rewards))['skipped']
    for variable, value in zip(agent.normalizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_the_target_network_keeps_its_statistics_with_its_weights():
    config = LearnerConfig.of(batch_size=3, unroll_length=5, loss='appo', target_update_steps=3)
    agent, target = (mlp_agent(core='none', normalizes=True) for _ in range(2))
    learner = Learner(agent, config, target_agent=target)
    frames = {'frame': np.float32([[3.0, -2.0, 0.5, 9.0]])}
    for update in range(7):
        if update % 3 == 0:
            expected = agent.normalizer(frames)['frame'].numpy()
        learner.step(batch_of(config, seed=update))
        np.testing.assert_array_equal(target.normalizer(frames)['frame'], expected)
    assert not np.array_equal(agent.normalizer(frames)['frame'], expected)
