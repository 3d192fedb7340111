"""Tests of impala/learning/memory_needs.py, against real allocations and by hand."""

import contextlib
import dataclasses
import math
import os
import re
import resource

import pytest
import tensorflow as tf

from configs import IMAGE, STACK, VECTOR, config
from impala import config as run_config
from impala import memory
from impala.acting.behaviour_policy import UnrollSource
from impala.acting.local_actors import LocalActors
from impala.learning import memory_needs
from impala.networks import build
from impala.networks.agent import Agent
from impala.trajectory import ArraySpec


def network_of(run, spec):
    return build.choose_network(run, ('levels:short',), spec)


def test_unrolls_are_counted_as_the_batcher_allocates_them(tmp_path):
    run = config(
        tmp_path, num_actors=3, envs_per_process=1, queue_capacity=4, torso='deep', core='lstm'
    )
    network = network_of(run, IMAGE)
    unrolls, processes = memory_needs.of_actors(run, IMAGE, network)
    source = UnrollSource(IMAGE, Agent(network, IMAGE), [0, 0, 0], run.learner.unroll_length,
                          run.actors.queue_capacity, 1, 1.0)  # fmt: skip
    made = os.fstat(source.batcher.fd).st_size
    source.batcher.close()
    # Outputs and states are allocated separately.
    own = (run.learner.unroll_length + 1) * 4 * (2 + IMAGE.num_actions) + 2 * 256 * 4 + 12
    assert unrolls.nbytes == pytest.approx(made + 7 * own, rel=0.01)
    assert list(unrolls.flags.items())[0] == ('queue_capacity', 4)
    assert processes.nbytes == 3 * memory.ACTOR_PROCESS_BYTES
    shared = run.replace(envs_per_process=2)
    _, processes = memory_needs.of_actors(shared, IMAGE, network, 'envs_per_actor')
    assert processes.nbytes == 2 * memory.ACTOR_PROCESS_BYTES
    assert processes.flags == {'envs_per_actor': 3, 'envs_per_process': 2}


def test_a_learner_needs_memory_for_batches_weights_and_replay(tmp_path):
    run = config(
        tmp_path,
        loaders=2,
        batch_size=4,
        unroll_length=9,
        sample_reuse=2,
        reuse_buffer=3,
        replay_fraction=0.5,
        replay_capacity=100,
    )
    network = network_of(run, STACK)
    batches, weights, replay = memory_needs.of_learner(run, STACK, network)
    pixels = math.prod(STACK.observation['frame'].shape)
    # Three batches are held and two are being assembled.
    assert batches.nbytes == pytest.approx(5 * 4 * 10 * pixels, rel=0.01)
    assert batches.flags == {
        'batch_size': 4, 'unroll_length': 9, 'reuse_buffer': 3, 'loaders': 2,
    }  # fmt: skip
    # One batch is held and one is being assembled, also by default.
    for loaders in (0, 1):
        single = run.replace(reuse_buffer=1, loaders=loaders)
        batches, *_ = memory_needs.of_learner(single, STACK, network)
        assert batches.nbytes == pytest.approx(2 * 4 * 10 * pixels, rel=0.01)
    # One frame of each stack of 4 is kept, and three more per unroll.
    assert replay.nbytes == pytest.approx(100 * 13 * pixels / 4, rel=0.01)
    agent = Agent(network, STACK)
    made = 4 * sum(int(tf.size(weight)) for weight in agent.trainable_variables)
    assert 0.9 * 5 * made < weights.nbytes < 5 * made


@pytest.mark.parametrize('torso', run_config.TORSOS)
@pytest.mark.parametrize('size', [(84, 84), (36, 101)])
def test_nearly_all_weights_are_in_the_linear_layer(tmp_path, torso, size):
    frame = ArraySpec((*size, 3), 'uint8')
    spec = dataclasses.replace(IMAGE, observation={'frame': frame})
    size = {'latent_size': 256} if torso == 'autoencoder' else {}
    run = config(tmp_path, torso=torso, core='none', **size)
    network = network_of(run, spec)
    made = [weight.shape for weight in Agent(network, spec).trainable_variables]
    largest = max(math.prod(shape) for shape in made)
    _, weights = memory_needs.of_learner(run, spec, network)
    assert weights.nbytes == 5 * 4 * largest


@pytest.mark.parametrize('core', ['lstm', 'gru'])
def test_a_core_needs_weights_and_a_state_with_every_unroll(tmp_path, core):
    run = config(tmp_path, core=core, core_size=600)
    network = network_of(run, IMAGE)
    agent = Agent(network, IMAGE)
    made = 4 * sum(math.prod(v.shape) for v in agent.trainable_variables if '/core/' in v.name)
    (need,) = [
        need
        for need in memory_needs.of_learner(run, IMAGE, network)
        if need.what == 'weights of the core'
    ]
    assert 0.9 * 5 * made < need.nbytes < 5 * made
    # A size that fits according to the sentence does fit.
    text = memory.shortage([need], need.nbytes // 3)
    fits = int(re.search(r'--core_size=600\); --core_size=(\d+) would do', text)[1])
    smaller = dataclasses.replace(network, core_size=fits)
    *_, need_of_smaller = memory_needs.of_learner(run, IMAGE, smaller)
    assert need_of_smaller.nbytes <= need.nbytes // 3
    unrolls, _ = memory_needs.of_actors(run, IMAGE, network)
    stateless, _ = memory_needs.of_actors(run, IMAGE, dataclasses.replace(network, core='none'))
    state = 4 * sum(math.prod(array.shape) for array in tf.nest.flatten(agent.state_spec))
    assert unrolls.nbytes - stateless.nbytes == 3 * state


def test_too_large_networks_are_refused_before_they_are_built(tmp_path):
    frame = ArraySpec((4096, 4096, 4), 'uint8')
    spec = dataclasses.replace(STACK, observation={'frame': frame})
    run = config(tmp_path, torso='shallow', width=4096, height=4096)
    needs = memory_needs.of_learner(run, spec, network_of(run, spec))
    huge = [need for need in needs if need.what == 'weights of the network']
    # 32 channels of 510 x 510, 256 outputs, of 4 bytes, 5 times.
    assert huge[0].nbytes == 32 * 510 * 510 * 256 * 4 * 5
    with pytest.raises(run_config.ConfigError, match='--width=4096, --height=4096'):
        memory_needs.check([dataclasses.replace(huge[0], nbytes=10**15)])
    memory_needs.check([dataclasses.replace(huge[0], nbytes=10**6)])


def test_torsos_that_do_not_fit_the_frames_are_refused(tmp_path):
    run = config(tmp_path, torso='autoencoder')
    with pytest.raises(run_config.ConfigError, match='autoencoder torso needs uint8 frames'):
        memory_needs.of_learner(run, VECTOR, network_of(run, VECTOR))


@pytest.mark.parametrize('torso', ['shallow', 'mlp'])
def test_other_observations_need_weights_too(tmp_path, torso):
    run = config(tmp_path, torso=torso, core='none')
    image, vector = ArraySpec((84, 84, 2), 'float32'), ArraySpec((9000,), 'float32')
    observation = IMAGE.observation | {'vector': vector, 'depth': image}
    spec = dataclasses.replace(IMAGE, observation=observation)
    network = network_of(run, spec)
    made = 4 * sum(math.prod(weight.shape) for weight in Agent(network, spec).trainable_variables)
    _, weights = memory_needs.of_learner(run, spec, network)
    assert 0.9 * 5 * made < weights.nbytes < 5 * made


@contextlib.contextmanager
def little_memory(nbytes):
    """Limits what this process may still allocate; shared memory does not count."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with open('/proc/self/status') as file:
        used = 1024 * int(re.search(r'VmData:\s+(\d+)', file.read())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize(('queue_capacity', 'unroll_length'), [(10**6, 10**5), (10**6, 1000)])
def test_unrolls_that_cannot_be_allocated_are_refused(tmp_path, queue_capacity, unroll_length):
    """If the estimate was wrong: beyond the address space, and beyond the limit."""
    run = config(tmp_path, queue_capacity=queue_capacity, unroll_length=unroll_length)
    network = network_of(run, VECTOR)
    agent = Agent(network, VECTOR)
    sentence = f'no memory .* --queue_capacity={queue_capacity}'
    with little_memory(10**9), pytest.raises(run_config.ConfigError, match=sentence):
        LocalActors(run, ('levels:short',), VECTOR, agent, None, print)
