"""Runs code that may use a GPU on a second device; a script for `second_device_test`.

    TF_XLA_FLAGS=--tf_xla_enable_xla_devices python second_device.py OUTPUT FOLDER

TensorFlow's XLA_CPU:0 stands in for a GPU: tensors move between it and the CPU, operations on its
variables must run on it, and it has none of our kernels. Operations without variables would run on
a GPU but stay on the CPU here, so they are looked up in the wheel's list of GPU kernels.

Writes a JSON object: name of a check -> its result.
"""

import collections
import functools
import json
import re
import sys
import traceback

import numpy as np
import tensorflow as tf
from replica import agents, create_learner, train
from tensorflow.python.framework import kernels

from configs import config
from dynamic_batching import batch_fn
from impala import training
from impala.acting.behaviour_policy import BehaviourPolicy, UnrollSource
from impala.config import LearnerConfig
from impala.evaluation import test_mode as evaluation
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.decoder import Decoder
from impala.trajectory import (
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

DEVICE = '/device:XLA_CPU:0'
SPEC = EnvironmentSpec(
    {
        'frame': ArraySpec((16, 16, 3), 'uint8'),
        'instruction': ArraySpec((4,), 'int32'),
        'vector': ArraySpec((3,), 'float32'),
    },
    5,
    4,
)
# Settings of network and learner; together they cover both losses, both optimizers and all options.
LEARNERS = {
    'vtrace': (
        {'torso': 'deep', 'compute_dtype': 'bfloat16', 'popart_levels': ('a', 'b'),
         'normalize_observations': True},
        {'momentum': 0.5, 'gradient_clip_norm': 40.0, 'replay_fraction': 0.5,
         'final_entropy_cost': 0.1},
    ),
    'appo': (
        {'torso': 'autoencoder', 'core': 'gru', 'contrast_gain': 3.0},
        {'loss': 'appo', 'optimizer': 'adam', 'target_update_steps': 2, 'kl_cost': 0.1,
         'normalize_advantages': True, 'gae_advantages': True},
    ),
}  # fmt: skip


def on_the_device(next_creator, **kwargs):
    """Creates a variable on the device, as if that were a GPU."""
    with tf.device(DEVICE):
        return next_creator(**kwargs)


def batched_function():
    """Calls a batched function of a variable in three ways, for two values of the variable."""
    weight = tf.Variable([[2.0]])
    assert DEVICE in weight.device

    @batch_fn
    def multiply(x):
        return x @ weight

    @batch_fn
    def multiply_in_a_graph(x):
        return x @ weight

    @tf.function
    def graph(x):
        return multiply_in_a_graph(x) + weight

    found = []
    for value in (2.0, 5.0):
        weight.assign([[value]])
        x = tf.constant([[3.0]])
        results = [multiply(x), graph(x)]
        with tf.device(DEVICE):
            results.append(multiply(x))
        found.append([result.numpy().item() for result in results])
    return found


def sparse_gradients():
    """Returns the largest difference from a learner on the CPU, of an agent with a lookup table."""
    agent, changes = agents()['embedding']
    learners = [create_learner(agent, changes, 4)]
    assert all(DEVICE in variable.device for variable in learners[0].variables)
    with tf.variable_creator_scope(on_the_cpu):
        learners.append(create_learner(agent, changes, 4))
    return max(
        float(np.max(np.abs(there.numpy() - here.numpy())))
        for (_, variables), (_, others) in zip(*map(train, learners), strict=True)
        for there, here in zip(variables, others, strict=True)
    )


def on_the_cpu(next_creator, **kwargs):
    """Creates a variable on the CPU, overriding `on_the_device`."""
    kwargs.pop('device', None)
    with tf.device('/cpu:0'):
        return next_creator(**kwargs)


def whole_run(folder):
    """Trains with local actors, resumes, and tests."""
    run = config(
        folder, level_name='levels:short,levels:long', core='lstm', popart=True,
        total_environment_frames=60,
    )  # fmt: skip
    batches, learners = set(), []
    step_in_parts = Learner.step_in_parts

    def noting_devices(learner, parts, *args, **kwargs):
        learners.append(learner)
        batches.update(tensor.device for tensor in tf.nest.flatten(parts))
        return step_in_parts(learner, parts, *args, **kwargs)

    Learner.devices = property(lambda learner: [DEVICE])
    Learner.step_in_parts = noting_devices
    training.train(run)
    training.train(run.replace(total_environment_frames=100))
    returns = evaluation.evaluate(run.replace(mode='test', test_num_episodes=2), print)
    return {
        'batches': sorted(batches),
        'variables': sorted({v.device for learner in learners for v in learner.variables}),
        'updates': int(learners[-1].updates),
        'returns': returns,
    }


def inference_device(folder):
    """Trains on the CPU with a policy that acts on the device.

    Neither instructions nor test mode: their loops pass lists of tensors, which this stand-in
    cannot pass on, from the serving loop to what it compiles. A GPU compiles nothing.
    """
    run = config(
        folder, level_name='levels:short', core='lstm', popart=True,
        inference_device='/xla_cpu:0',
    )  # fmt: skip
    policies, rows, learned = [], [], set()

    class Note(training.Hook):
        def after_update(self, update):
            learned.update(variable.device for variable in update.learner.variables)

    init, answer = BehaviourPolicy.__init__, UnrollSource.answer

    def noting_policy(policy, *args, **kwargs):
        init(policy, *args, **kwargs)
        policies.append(policy)

    def noting_rows(source, agent, version):
        step = agent.step

        def noting_step(*args):
            outputs, state = step(*args)
            rows.append(outputs.policy.device)
            return outputs, state

        agent.step = noting_step
        answer(source, agent, version)
        agent.step = step

    BehaviourPolicy.__init__, UnrollSource.answer = noting_policy, noting_rows
    try:
        training.train(run, hooks=[Note()])
    finally:
        BehaviourPolicy.__init__, UnrollSource.answer = init, answer
    return {
        'weights': sorted({v.device for each in policies for v in each._agent.variables}),
        'published': sorted({v.device for each in policies for v in each._published}),
        'versions': [int(each._version) for each in policies],
        'rows': sorted(set(rows)),
        'learner': sorted(learned),
    }


def learner(name):
    """Returns metrics of two updates, and the operations that lack GPU kernels."""
    network, changes = LEARNERS[name]

    def create_agent(**dtype):
        return Agent(AgentConfig(core_size=8, latent_size=6, **{**network, **dtype}), SPEC)

    settings = LearnerConfig.of(batch_size=2, unroll_length=5, **changes)
    agent = create_agent()
    target = create_agent() if settings.loss.target_update_steps else None
    decoder = None
    if network['torso'] == 'autoencoder':
        decoder = Decoder(6, SPEC.observation['frame'], tf.float32)
    learner = Learner(agent, settings, None, target, decoder)
    is_replayed = tf.constant([False, bool(settings.replay.replay_fraction)])
    batch = batch_of(agent, settings)
    updates = [learner.step(batch, is_replayed=is_replayed) for _ in range(2)]

    acting_agent = create_agent(compute_dtype='float32')
    source = UnrollSource(SPEC, acting_agent, [0, 1], 5, 1, 1, 5)
    behaviour = BehaviourPolicy(acting_agent, source)
    functions = [
        learner._step.get_concrete_function((batch, is_replayed), tf.constant(10, tf.int64)),
        behaviour._serve.get_concrete_function(),
        behaviour.publish.get_concrete_function(learner.weights, learner.version),
    ]
    if decoder is not None:
        frames = batch.env_outputs.observation['frame'][0]
        assert learner.reconstruct(frames).shape == frames.shape
        functions.append(learner.reconstruct.get_concrete_function(frames))
    source.batcher.close()
    missing, pinned = collections.Counter(), collections.Counter()
    for function in functions:
        for node in nodes(function.graph.as_graph_def()):
            if not has_gpu_kernel(node):
                on_purpose = re.search(r'device:CPU:', node.device, re.IGNORECASE)
                (pinned if on_purpose else missing)[node.op] += 1
    return {
        'updates': [{key: float(value) for key, value in update.items()} for update in updates],
        'missing': missing,
        'pinned': pinned,
    }


def batch_of(agent, settings):
    """A batch of random data."""
    rng = np.random.default_rng(0)
    size, rows = settings.batch_size, [settings.unroll_length + 1, settings.batch_size]

    def integers(high, dtype, *shape):
        return tf.constant(rng.integers(high, size=[*rows, *shape], dtype=dtype))

    def normal(*shape):
        return tf.constant(rng.normal(size=[*rows, *shape]).astype(np.float32))

    return ActorOutput(
        level_id=tf.constant([0, 1]),
        policy_version=tf.zeros([size], tf.int64),
        agent_state=agent.initial_state(size),
        env_outputs=StepOutput(
            normal(),
            StepOutputInfo(normal(), integers(9, np.int32), integers(9, np.int32)),
            tf.constant(rng.random(rows) < 0.2),
            {
                'frame': integers(256, np.uint8, *SPEC.observation['frame'].shape),
                'instruction': integers(1000, np.int32, *SPEC.observation['instruction'].shape),
                'vector': normal(*SPEC.observation['vector'].shape),
            },
        ),
        agent_outputs=AgentOutput(
            integers(SPEC.num_actions, np.int32), normal(SPEC.num_actions), normal()
        ),
    )


def nodes(graph_def):
    """All operations of a graph and of the functions, branches and loops in it."""
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def has_gpu_kernel(node):
    """Whether the wheel, which is built for GPUs, has a kernel for the operation's types."""

    def serves(kernel):
        for constraint in kernel.constraint:
            value, allowed = node.attr[constraint.name], constraint.allowed_values.list
            # Other constraints are strings, of which a GPU kernel supports only some values.
            types = [value.type] if value.WhichOneof('value') == 'type' else value.list.type
            if not set(types) <= set(allowed.type) or value.s not in (b'', *allowed.s):
                return False
        return kernel.device_type in ('GPU', 'DEFAULT')

    return any(map(serves, kernels.get_registered_kernels_for_op(node.op).kernel))


def result_of(check):
    """Returns the result of a check, or its error."""
    try:
        return {'result': check()}
    except Exception:
        return {'error': traceback.format_exc()}


def main(output, folder):
    """Runs all checks; a failing check does not stop the others."""
    checks = {
        'batched function': batched_function,
        'sparse gradients': sparse_gradients,
        **{name: functools.partial(learner, name) for name in LEARNERS},
        # Last, because it patches `Learner.devices` for good.
        'whole run': functools.partial(whole_run, folder),
    }
    found = {'inference device': result_of(functools.partial(inference_device, f'{folder}_apart'))}
    with tf.variable_creator_scope(on_the_device):
        for name, check in checks.items():
            found[name] = result_of(check)
    with open(output, 'w', encoding='utf-8') as file:
        json.dump(found, file)


if __name__ == '__main__':
    main(*sys.argv[1:])
