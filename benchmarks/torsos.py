"""Cost of acting with each torso: weights, multiply-adds and time per observation.

    python -m benchmarks.torsos --seconds=60

For the frames of Atari (84x84x4, 6 actions, no LSTM) and DeepMind Lab (72x96x3, 9 actions, LSTM of
256) the agent's `step`, as actors call it, is measured with the shallow, the deep and the
auto-encoder's torso. They take turns, and the shortest of many times counts: other work on the
machine only adds to it. Multiply-adds are half of what TensorFlow's profiler counts as floating
point operations of convolutions and matrix products; ReLUs and the LSTM's gates are
not counted. `bytes published` is what goes to an actor job with each update.

The second table is of the learner: its whole step on a batch of Atari's, where the auto-encoder
also has its decoder.
"""

import argparse
import datetime
import json
import os
import sys
import time
from typing import Any

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine, stages
from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import tensorflow as tf

from impala.config import LearnerConfig
from impala.learning.learner import Learner
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import create_decoder
from impala.trajectory import (
    ActionSpec,
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

_GAMES: dict[str, dict[str, Any]] = {
    'Atari': {'frame': (84, 84, 4), 'num_actions': 6, 'core': 'none'},
    'DeepMind Lab': {'frame': (72, 96, 3), 'num_actions': 9, 'core': 'lstm'},
}
_TORSOS = ('shallow', 'deep', 'autoencoder')
_BATCH_SIZES = (1, 12, 32)


def main() -> None:
    """Prints two tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=60.0, help='of measurement in all')
    parser.add_argument('--latent_size', type=int, default=64)
    parser.add_argument('--threads', type=int, default=1, help='that share an operation')
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    # Each torso, batch size and dtype intentionally has its own graph.
    tf.get_logger().setLevel('ERROR')
    load = os.getloadavg()[0]
    part = args.seconds / (len(_GAMES) + 2)
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for game, setting in _GAMES.items():
        agents = {
            torso: Agent(
                AgentConfig(torso, setting['core'], latent_size=args.latent_size),
                _spec(setting),
            )
            for torso in _TORSOS
        }
        stages.begin(f'{game}: acting')
        times = _times_of_acting(agents, _spec(setting), part)
        for torso, agent in agents.items():
            weights = sum(int(np.prod(v.shape)) for v in agent.trainable_variables)
            count = multiply_adds(agent, _spec(setting))
            micros = [f'{1e6 * times[torso, size] / size:,.0f}' for size in _BATCH_SIZES]
            rows.append([game, torso, f'{weights:,}', f'{4 * weights:,}', f'{count:,}', *micros])
            result[f'{game}/{torso}'] = {
                'multiply_adds': count,
                'microseconds': {
                    size: round(1e6 * times[torso, size] / size, 1) for size in _BATCH_SIZES
                },
            }
    print(
        f'{machine.describe()}, TensorFlow {tf.__version__}, load before the run {load:.1f}, '
        f'{datetime.date.today()}'
    )
    print(f'`python -m benchmarks.torsos {" ".join(sys.argv[1:])}`\n')
    headers = ['frames of', 'torso', 'weights', 'bytes published', 'multiply-adds']
    headers += [f'us each, {size} at once' for size in _BATCH_SIZES]
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True), end='\n\n')
    rows = []
    for dtype in ('float32', 'bfloat16'):
        stages.begin(f'learning in {dtype}')
        for torso, seconds in _times_of_learning(dtype, args.latent_size, part).items():
            rows.append([torso, dtype, f'{1e3 * seconds:.1f}'])
            result[f'learner/{torso}/{dtype}'] = round(1e3 * seconds, 2)
    headers = ['torso', 'torso in', 'ms per step of 4 unrolls of 20']
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    print(json.dumps(result))


def multiply_adds(agent: Agent, spec: EnvironmentSpec) -> int:
    """Returns the multiply-adds of convolutions and matrix products for one observation."""
    step = tf.function(agent.step).get_concrete_function(*_inputs(agent, spec, 1))
    options = tf.compat.v1.profiler.ProfileOptionBuilder(
        tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    )
    options = options.with_empty_output().build()
    options['account_type_regexes'] = ['Conv2D', 'MatMul']
    options['select'] = ['float_ops']
    profile = tf.compat.v1.profiler.profile(step.graph, cmd='op', options=options)
    return (
        sum(
            child.total_float_ops - (child.children[0].total_float_ops if child.children else 0)
            for child in _nodes(profile)
            if child.name in ('Conv2D', 'MatMul')
        )
        // 2
    )


def _nodes(node: Any) -> list[Any]:
    return [node, *(each for child in node.children for each in _nodes(child))]


def _times_of_acting(
    agents: dict[str, Agent], spec: EnvironmentSpec, seconds: float
) -> dict[tuple[str, int], float]:
    """Returns the shortest seconds of a step for each torso and batch size."""
    calls = {}
    for torso, agent in agents.items():
        step = tf.function(agent.step)
        for size in _BATCH_SIZES:
            inputs = _inputs(agent, spec, size)
            calls[torso, size] = lambda step=step, inputs=inputs: step(*inputs)
    return _least_times(calls, seconds)


def _times_of_learning(dtype: str, latent_size: int, seconds: float) -> dict[str, float]:
    """Returns the shortest seconds of the learner's step with each torso."""
    setting = _GAMES['Atari']
    spec = _spec(setting)
    config = LearnerConfig.of(unroll_length=20, batch_size=4)
    calls = {}
    for torso in _TORSOS:
        network = AgentConfig(torso, setting['core'], 256, dtype, latent_size=latent_size)
        agent = Agent(network, spec)
        learner = Learner(agent, config, decoder=create_decoder(network, spec))
        batch = _batch(agent, spec, config)
        calls[torso] = lambda learner=learner, batch=batch: learner.step(batch)
    return _least_times(calls, seconds)


def _least_times(calls: dict[Any, Any], seconds: float) -> dict[Any, float]:
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float('inf'))
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for key, call in calls.items():
            # Twice, since the caches are cold the first time.
            for _ in range(2):
                start = time.perf_counter()
                call()
                # An accelerator only queues what it is given.
                tf.test.experimental.sync_devices()
                least[key] = min(least[key], time.perf_counter() - start)
    return least


def _spec(setting: dict[str, Any]) -> EnvironmentSpec:
    observation = {'frame': ArraySpec(setting['frame'], 'uint8')}
    return EnvironmentSpec(observation, ActionSpec.discrete(setting['num_actions']), 4)


def _env_outputs(spec: EnvironmentSpec, *lead: int) -> StepOutput:
    rng = np.random.default_rng(1)
    frames = rng.integers(256, size=(*lead, *spec.observation['frame'].shape), dtype=np.uint8)
    return StepOutput(
        reward=tf.constant(rng.normal(size=lead), tf.float32),
        info=StepOutputInfo(tf.zeros(lead), *2 * [tf.zeros(lead, tf.int32)]),
        done=tf.zeros(lead, tf.bool),
        observation={'frame': tf.constant(frames)},
    )


def _inputs(agent: Agent, spec: EnvironmentSpec, size: int) -> tuple[tf.Tensor, StepOutput, Any]:
    return tf.zeros([size], tf.int32), _env_outputs(spec, size), agent.initial_state(size)


def _batch(agent: Agent, spec: EnvironmentSpec, config: LearnerConfig) -> ActorOutput:
    rows = (config.unroll_length + 1, config.batch_size)
    return ActorOutput(
        level_id=tf.zeros(config.batch_size, tf.int32),
        policy_version=tf.zeros(config.batch_size, tf.int64),
        agent_state=agent.initial_state(config.batch_size),
        env_outputs=_env_outputs(spec, *rows),
        agent_outputs=AgentOutput(
            tf.zeros(rows, tf.int32), tf.zeros([*rows, spec.num_actions]), tf.zeros(rows)
        ),
    )


if __name__ == '__main__':
    main()
