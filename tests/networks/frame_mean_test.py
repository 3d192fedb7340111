import numpy as np
import tensorflow as tf
from agents import batch_of_images, encoder_agent

from impala.config import LearnerConfig
from impala.learning.learner import Learner
from impala.networks.frame_mean import FrameMean
from impala.trajectory import ArraySpec, StepOutput, StepOutputInfo


def newest(batch):
    """Returns the newest frames of all rows but the last, f64 `[T, B, H, W]`."""
    return np.float64(batch.env_outputs.observation['frame'][:-1, ..., -1])


def assert_mean(frame_mean, frames):
    """Compares with NumPy's mean of frames `[N, H, W]`."""
    assert frame_mean.count == len(frames)
    np.testing.assert_allclose(frame_mean.mean, frames.mean(0), rtol=1e-5)


def test_the_mean_is_that_of_all_newest_frames():
    rng = np.random.default_rng(0)
    frame_mean = FrameMean(ArraySpec((4, 5, 3), 'uint8'))
    seen = []
    for update in range(5):
        summaries = []
        for _ in range(2):
            frames = rng.integers(256, size=(2 + update, 3, 4, 5, 3), dtype=np.uint8)
            is_counted = np.array([True, update % 2 == 0, False])
            seen.append(frames[:, is_counted, ..., -1].reshape(-1, 4, 5))
            summaries.append(frame_mean.summary(tf.constant(frames), tf.constant(is_counted)))
        frame_mean.update(tf.stack(summaries))
        assert_mean(frame_mean, np.concatenate(seen))


def test_no_frames_leave_the_mean():
    frame_mean = FrameMean(ArraySpec((4, 5, 3), 'uint8'))
    frames = tf.constant(np.full((2, 1, 4, 5, 3), 7, np.uint8))
    nothing = [frame_mean.no_summary(), frame_mean.summary(frames, tf.constant([False]))]
    np.testing.assert_array_equal(*nothing)
    frame_mean.update(tf.stack(nothing))
    np.testing.assert_array_equal(frame_mean.mean, np.zeros((4, 5)))
    frame_mean.update(frame_mean.summary(frames, tf.constant([True]))[tf.newaxis])
    frame_mean.update(tf.stack(nothing))
    np.testing.assert_array_equal(frame_mean.mean, np.full((4, 5), 7))
    assert frame_mean.count == 2


def test_a_learner_counts_each_frame_once():
    """Not those that are replayed or reused, nor the last row, which comes again."""
    config = LearnerConfig.of(batch_size=3, unroll_length=5, replay_fraction=0.5)
    agent = encoder_agent('none', contrast_gain=5.0)
    learner = Learner(agent, config)
    seen = []
    for update in range(3):
        batch = batch_of_images(config, seed=update)
        is_replayed = np.arange(3) < update
        seen.append(newest(batch)[:, ~is_replayed].reshape(-1, 9, 14))
        for is_fresh in (True, False):
            learner.step(batch, is_fresh, tf.constant(is_replayed))
            assert_mean(agent.frame_mean, np.concatenate(seen))
    assert learner.agent_steps.numpy() == agent.frame_mean.count.numpy() == 5 * (3 + 2 + 1)


def test_a_skipped_update_leaves_the_mean():
    config = LearnerConfig.of(batch_size=3, unroll_length=5)
    agent = encoder_agent('none', contrast_gain=5.0)
    learner = Learner(agent, config)
    batch = batch_of_images(config)
    learner.step(batch)
    before = agent.frame_mean.mean.numpy()
    rewards = batch.env_outputs._replace(reward=batch.env_outputs.reward * np.nan)
    other = batch_of_images(config, seed=1).env_outputs.observation
    rewards = rewards._replace(observation=other)
    assert learner.step(batch._replace(env_outputs=rewards))['skipped']
    np.testing.assert_array_equal(agent.frame_mean.mean, before)
    assert agent.frame_mean.count == 15


def test_an_agent_does_not_see_the_background():
    """Games that differ only in a picture behind all frames are the same to it."""
    rng = np.random.default_rng(0)
    agent = encoder_agent('none', contrast_gain=5.0)
    frames = rng.integers(100, size=(6, 9, 14, 3), dtype=np.uint8)
    background = rng.integers(155, size=(9, 14, 1), dtype=np.uint8)
    outputs = []
    for seen in (frames, frames + background):
        rows = tf.constant(seen[:, np.newaxis])
        agent.frame_mean.count.assign(0)
        agent.frame_mean.update(agent.frame_mean.summary(rows, tf.constant([True]))[tf.newaxis])
        reward = tf.ones(6)
        info = StepOutputInfo(reward, *2 * [tf.zeros(6, tf.int32)])
        env_output = StepOutput(reward, info, tf.zeros(6, tf.bool), {'frame': tf.constant(seen)})
        outputs.append(agent.step(tf.zeros(6, tf.int32), env_output, agent.initial_state(6))[0])
    assert np.ptp(outputs[0].policy, axis=0).max() > 0.01
    np.testing.assert_allclose(outputs[0].policy, outputs[1].policy, atol=1e-4)
    np.testing.assert_allclose(outputs[0].baseline, outputs[1].baseline, atol=1e-4)


def test_other_agents_have_no_mean():
    assert encoder_agent('none').frame_mean is None
    agents = [encoder_agent('none', contrast_gain=gain) for gain in (0.0, 5.0)]
    names = [{variable.name for variable in agent.variables} for agent in agents]
    assert {name.split('/')[-2] for name in names[1] - names[0]} == {'frame_mean'}
    assert [len(agent.acting_variables) for agent in agents] == list(map(len, names))
