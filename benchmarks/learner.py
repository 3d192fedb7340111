"""What the train step costs beyond the network's own forward and backward pass.

For the shallow (84x84x4, T=20, B=32, no LSTM) and the deep network (72x96x3, T=100, B=4, LSTM),
each with its torso in float32 and bfloat16, these take turns in one process:

  step  `Learner.step`: forward, V-trace, loss, backward, norm, RMSProp, metrics.
  bare  forward and backward pass of the same agent and batch, from a weighted sum of its outputs.
  loss  all that step does beyond bare: V-trace, loss and its gradient with respect to the agent's
        outputs, norm, RMSProp, metrics, on the agent's real outputs and gradients. It follows a
        whole pass, so that the caches are cold, as in step. The time to call an empty function with
        the same arguments is subtracted, since step is only one call.

Efficiency is the median of bare / step over the rounds, the share of V-trace, loss and optimizer
that of loss / step. Rows are agent steps, T * B per step.

    python -m benchmarks.learner --seconds=120
"""

import argparse
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
from impala.learning.losses import LossInputs, vtrace_loss
from impala.networks.agent import Agent, AgentConfig
from impala.trajectory import (
    ActionSpec,
    ActorOutput,
    AgentOutput,
    ArraySpec,
    EnvironmentSpec,
    StepOutput,
    StepOutputInfo,
)

_SETTINGS: dict[str, dict[str, Any]] = {
    'shallow': {'frame': (84, 84, 4), 'unroll_length': 20, 'batch_size': 32, 'num_actions': 6},
    'deep': {'frame': (72, 96, 3), 'unroll_length': 100, 'batch_size': 4, 'num_actions': 9},
}


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--seconds', type=float, default=120.0, help='of measurement, over all settings together'
    )
    args = parser.parse_args()
    load = os.getloadavg()[0]
    table, result = [], {}
    for torso, setting in _SETTINGS.items():
        for dtype in ('float32', 'bfloat16'):
            stages.begin(f'{torso} in {dtype}')
            times = _measure(torso, dtype, args.seconds / (2 * len(_SETTINGS)))
            step, bare, loss = np.median(times, axis=0)
            efficiency = float(np.median(times[:, 1] / times[:, 0]))
            share = float(np.median(times[:, 2] / times[:, 0]))
            rows = setting['unroll_length'] * setting['batch_size']
            table.append(
                [torso, dtype, f'{1e3 * step:.2f}', f'{1e3 * bare:.2f}', f'{1e3 * loss:.2f}']
                + [f'{rows / step:,.0f}', f'{rows / bare:,.0f}']
                + [f'{efficiency:.1%}', f'{share:.1%}', len(times)]
            )
            name = torso if dtype == 'float32' else f'{torso}_{dtype}'
            result[f'efficiency_{name}'] = round(efficiency, 4)
            result[f'loss_share_{name}'] = round(share, 4)
            result[f'rows_per_second_{name}'] = round(rows / step)
    devices = ', '.join(d.device_type for d in tf.config.list_physical_devices())
    print(
        f'{machine.describe()}, TensorFlow {tf.__version__} on {devices}, '
        f'load before the run {load:.1f}'
    )
    print(f'`python -m benchmarks.learner {" ".join(sys.argv[1:])}`')
    headers = ['network', 'torso in', 'step ms', 'bare ms', 'loss ms', 'rows/s', 'bare rows/s']
    headers += ['efficiency', 'loss share', 'rounds']
    print(tabulate.tabulate(table, headers, 'github', disable_numparse=True))
    print(json.dumps(result))


def _measure(torso: str, dtype: str, seconds: float) -> np.ndarray:
    """Returns seconds of step, bare and loss, `[rounds, 3]`, after `seconds` of rounds."""
    setting = _SETTINGS[torso]
    spec = EnvironmentSpec(
        {'frame': ArraySpec(setting['frame'], 'uint8')},
        action=ActionSpec.discrete(setting['num_actions']),
        num_action_repeats=4,
    )
    agent = Agent(
        AgentConfig(torso=torso, core='lstm' if torso == 'deep' else 'none', compute_dtype=dtype),
        spec,
    )
    config = LearnerConfig.of(
        unroll_length=setting['unroll_length'], batch_size=setting['batch_size']
    )
    learner = Learner(agent, config)
    batch = _batch(agent, spec, config)
    parameters = agent.trainable_variables
    rng = np.random.default_rng(0)
    rows = (config.unroll_length + 1, config.batch_size)
    weights = (
        tf.constant(rng.normal(size=(*rows, spec.num_actions)), tf.float32),
        tf.constant(rng.normal(size=rows), tf.float32),
    )

    @tf.function
    def bare(batch, weights):
        with tf.GradientTape() as tape:
            outputs, _ = agent.unroll(
                batch.agent_outputs.action, batch.env_outputs, batch.agent_state
            )
            total = tf.reduce_sum(outputs.policy * weights[0])
            total += tf.reduce_sum(outputs.baseline * weights[1])
        return tape.gradient(total, parameters)

    # Its own learner: the weights of the other one should move as in training.
    idle = Learner(
        Agent(AgentConfig(torso=torso, core='lstm' if torso == 'deep' else 'none'), spec), config
    )

    @tf.function
    def loss(batch, outputs, gradients):
        with tf.GradientTape() as tape:
            tape.watch([outputs.policy, outputs.baseline])
            inputs = LossInputs(idle.agent.actions, batch.agent_outputs, outputs, batch.env_outputs)
            total, parts, _ = vtrace_loss(inputs, config.loss)
        outputs_gradients = tape.gradient(total, [outputs.policy, outputs.baseline])
        parameters = idle.agent.trainable_variables
        rate = idle._schedules()['learning_rate']
        metrics = idle._update(total, gradients, parameters, rate, None)
        return outputs_gradients, parts, metrics

    @tf.function
    def empty(batch, outputs, gradients):
        return tf.identity(outputs.baseline)

    outputs, _ = tf.function(agent.unroll)(
        batch.agent_outputs.action, batch.env_outputs, batch.agent_state
    )
    outputs = outputs._replace(action=batch.agent_outputs.action)
    times: list[tuple[float, float, float]] = []

    def timed(function, *args):
        start = time.perf_counter()
        returned = function(*args)
        # An accelerator only queues what it is given.
        tf.test.experimental.sync_devices()
        return time.perf_counter() - start, returned

    deadline = None
    while deadline is None or time.perf_counter() < deadline:
        # `bare` and `step` take turns at going first: after `loss`, which updates another network,
        # the caches are cold.
        if len(times) % 2:
            bare_seconds, gradients = timed(bare, batch, weights)
        step_seconds, _ = timed(learner.step, batch)
        if not len(times) % 2:
            bare_seconds, gradients = timed(bare, batch, weights)
        loss_seconds, _ = timed(loss, batch, outputs, gradients)
        call_seconds, _ = timed(empty, batch, outputs, gradients)
        times.append((step_seconds, bare_seconds, loss_seconds - call_seconds))
        if len(times) == 3 and deadline is None:
            deadline = time.perf_counter() + seconds
            times.clear()
    return np.asarray(times)


def _batch(agent: Agent, spec: EnvironmentSpec, config: LearnerConfig) -> ActorOutput:
    """Returns random unrolls; an episode lasts 100 steps on average."""
    rng = np.random.default_rng(1)
    rows = (config.unroll_length + 1, config.batch_size)
    frame = spec.observation['frame']
    batch = ActorOutput(
        level_id=np.zeros(config.batch_size, np.int32),
        policy_version=np.zeros(config.batch_size, np.int64),
        agent_state=agent.initial_state(config.batch_size),
        env_outputs=StepOutput(
            reward=rng.normal(size=rows).astype(np.float32),
            info=StepOutputInfo(np.zeros(rows, np.float32), *2 * [np.zeros(rows, np.int32)]),
            done=rng.random(rows) < 0.01,
            observation={'frame': rng.integers(256, size=(*rows, *frame.shape), dtype=np.uint8)},
        ),
        agent_outputs=AgentOutput(
            action=rng.integers(spec.num_actions, size=rows, dtype=np.int32),
            policy=rng.normal(size=(*rows, spec.num_actions)).astype(np.float32),
            baseline=rng.normal(size=rows).astype(np.float32),
        ),
    )
    return tf.nest.map_structure(tf.convert_to_tensor, batch)


if __name__ == '__main__':
    main()
