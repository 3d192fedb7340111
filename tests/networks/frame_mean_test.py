import numpy as np
import pytest
import tensorflow as tf
from agents import batch_of_images, encoder_agent
from command_line import WarmRun, metrics
from ports import free_ports

from configs import config
from impala import training
from impala.config import LearnerConfig
from impala.evaluation import evaluate
from impala.learning.learner import Learner
from impala.networks.agent import Agent
from impala.networks.frame_mean import FrameMean
from impala.tools import export
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
    settings = LearnerConfig.of(batch_size=3, unroll_length=5, replay_fraction=0.5)
    agent = encoder_agent('none', contrast_gain=5.0)
    learner = Learner(agent, settings)
    seen = []
    for update in range(3):
        batch = batch_of_images(settings, seed=update)
        is_replayed = np.arange(3) < update
        seen.append(newest(batch)[:, ~is_replayed].reshape(-1, 9, 14))
        for is_fresh in (True, False):
            learner.step(batch, is_fresh, tf.constant(is_replayed))
            assert_mean(agent.frame_mean, np.concatenate(seen))
    assert learner.agent_steps.numpy() == agent.frame_mean.count.numpy() == 5 * (3 + 2 + 1)


def test_a_skipped_update_leaves_the_mean():
    settings = LearnerConfig.of(batch_size=3, unroll_length=5)
    agent = encoder_agent('none', contrast_gain=5.0)
    learner = Learner(agent, settings)
    batch = batch_of_images(settings)
    learner.step(batch)
    before = agent.frame_mean.mean.numpy()
    rewards = batch.env_outputs._replace(reward=batch.env_outputs.reward * np.nan)
    other = batch_of_images(settings, seed=1).env_outputs.observation
    rewards = rewards._replace(observation=other)
    assert learner.step(batch._replace(env_outputs=rewards))['skipped']
    np.testing.assert_array_equal(agent.frame_mean.mean, before)
    assert agent.frame_mean.count == 15


def test_the_target_network_keeps_its_mean_with_its_weights():
    settings = LearnerConfig.of(batch_size=3, unroll_length=5, loss='appo', target_update_steps=3)
    agent, target = (encoder_agent('none', contrast_gain=5.0) for _ in range(2))
    learner = Learner(agent, settings, target_agent=target)
    for update in range(5):
        if update % 3 == 0:
            expected = agent.frame_mean.mean.numpy()
        learner.step(batch_of_images(settings, seed=update))
        np.testing.assert_array_equal(target.frame_mean.mean, expected)
    assert not np.array_equal(agent.frame_mean.mean, expected)


def test_a_run_is_tested_and_exported_with_its_mean(tmp_path):
    run = config(
        tmp_path, level_name='ALE/Pong-v5', torso='shallow', contrast_gain=5,
        unroll_length=20, total_environment_frames=800,
    )  # fmt: skip
    training.train(run)
    test = run.replace(mode='test', test_num_episodes=1, test_max_frames=100)
    assert [len(returns) for returns in evaluate(test).values()] == [1]
    export.export(run.run.logdir, str(tmp_path / 'model'))
    step = tf.saved_model.load(str(tmp_path / 'model')).signatures['step']
    network, spec = export.spec_of_run(run.run.logdir)
    assert network.contrast_gain == 5.0
    agent = Agent(network, spec)
    checkpoint = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=agent))
    checkpoint.restore(tf.train.latest_checkpoint(str(tmp_path / 'checkpoints'))).expect_partial()
    # The field, which only ball and paddles cross.
    assert np.median(agent.frame_mean.mean) == pytest.approx(87, abs=1)
    frames = np.random.default_rng(0).integers(256, size=(5, 84, 84, 4), dtype=np.uint8)
    inputs = {'prev_action': tf.zeros(5, tf.int32), 'reward': tf.zeros(5)}
    outputs = step(**inputs, done=tf.ones(5, tf.bool), frame=tf.constant(frames))
    info = StepOutputInfo(tf.zeros(5), *2 * [tf.zeros(5, tf.int32)])
    env_output = StepOutput(tf.zeros(5), info, tf.ones(5, tf.bool), {'frame': tf.constant(frames)})
    expected, _ = agent.step(inputs['prev_action'], env_output, ())
    np.testing.assert_allclose(outputs['baseline'], expected.baseline, atol=1e-4)


def test_the_mean_travels_to_actor_jobs(tmp_path):
    """Nothing is learned but the mean, so a job that acts with it has the learner's policy."""
    (port,) = free_ports(1)
    address = f'--learner_address=localhost:{port}'
    logdir = tmp_path / 'run'
    learner = (
        '--task=0', '--trusted_network', '--level_name=ALE/Pong-v5', '--contrast_gain=100',
        '--loss=appo', '--learning_rate=0', '--unroll_length=10', '--batch_size=4',
        '--log_secs=0', '--total_environment_frames=16000',
    )  # fmt: skip
    actor = ('--job_name=actor', '--task=0', '--envs_per_actor=4', '--envs_per_process=4')
    with (
        WarmRun(tmp_path / 'a', f'--logdir={logdir}', address, *learner) as first,
        WarmRun(tmp_path / 'b', address, '--bfloat16_weights', *actor) as job,
    ):
        assert first.wait() == 0, first.stderr
        assert job.wait() == 0, job.stderr
    divergences = [line['loss/kl'] for line in metrics(logdir)]
    assert divergences[-1] < 0.05 * max(divergences)


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
