"""Writes a trained agent as a SavedModel, which acts without this project's code.

    python -m impala.tools.export runs/pong [--output=FOLDER] [--checkpoint=PATH]

Its signatures, for any batch size B:

* `initial_state(batch_size i32 [])` returns `state_0`, `state_1`, ..., f32 `[B, ...]`: two for an
  LSTM, one for a GRU; or, for an agent without memory, `no_state`, f32 `[B, 0]`.
* `step(prev_action i32 [B], reward f32 [B], done bool [B], frame [B, ...], state_0, ...)`, with
  `instruction i32 [B, 32]` if the environment has instructions, `action_mask bool [B, N]` if it
  masks actions, and any other observations by their names, returns `action` i32 `[B]`, sampled,
  `greedy_action` i32 `[B]`, `policy` f32 `[B, A]`, `baseline` f32 `[B]`, and the state after the
  step. An agent trained with `--popart` has no `baseline`, since its values belong to levels. Give
  `done=True` with the first observation of an episode. In names, `_` replaces what a name in Python
  cannot have, and follows a name that is taken.

Observations are those that the actors of the run see: with `--normalize_observations`, the model
normalizes them itself. The mask has True for each category that is allowed, at least one of each
component; the others are never chosen.

`policy` has the logits of discrete actions. Other actions are `[B, K]`, see
`impala.trajectory.ActionSpec`: i32, or f32 if some components are continuous. Then
`environment_action` and `environment_greedy_action` are what the environment takes, within its
bounds, while `prev_action` is `action`. A run with `--clip_actions` does not keep the bounds: they
are then equal to `action`, and you scale -1 and 1 to two bounds and clip to them. All have the
categories first, counted from 0, then the continuous values; `impala.environments.action_spaces`
makes an action of a Gymnasium space of them.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

from impala.environments import INSTRUCTION_LENGTH
from impala.runs.tensorflow_start import starting_tensorflow

with starting_tensorflow():
    import tensorflow as tf

from impala.config import ConfigError
from impala.networks.agent import Agent, AgentConfig
from impala.networks.build import create_agent
from impala.runs.checkpoint import Checkpointer, LogdirError
from impala.runs.output import outlive_readers
from impala.runs.run_settings import LATER_SETTINGS, popart_levels, stored_settings
from impala.trajectory import (
    ACTION_MASK,
    ActionSpec,
    ArraySpec,
    EnvironmentSpec,
    Part,
    StepOutput,
    StepOutputInfo,
)

FOLDER = 'saved_model'


class _Exported(tf.Module):
    def __init__(self, agent: Agent):
        super().__init__()
        # The checkpoint has the agent under this name.
        self.agent = agent


def spec_of_run(logdir: str) -> tuple[AgentConfig, EnvironmentSpec]:
    """Returns the shape of a run's network and the spec of its environment.

    Raises:
      LogdirError: there is no run there.
    """
    settings = stored_settings(logdir)
    if settings is None:
        raise LogdirError(f'{logdir} is not the folder of a training run: it has no network.json.')
    settings = LATER_SETTINGS | settings

    def value(name: str, kind: type) -> Any:
        if name not in settings:
            raise LogdirError(f'The network.json in {logdir} is damaged: it has no {name!r}.')
        setting = settings[name]
        if type(setting) is not kind:
            raise LogdirError(f'The network.json in {logdir} is damaged: {name!r} is {setting!r}.')
        return setting

    shape = tuple(value('frame_shape', list))
    if not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise LogdirError(f'The network.json in {logdir} is damaged: frames cannot be {shape}.')
    observation = {'frame': ArraySpec(shape, value('frame_dtype', str))}
    if value('has_instructions', bool):
        observation['instruction'] = ArraySpec((INSTRUCTION_LENGTH,), 'int32')
    for name, array in value('other_observations', dict).items():
        match array:
            case [[*sizes], str(dtype)] if all(type(size) is int and size > 0 for size in sizes):
                observation[name] = ArraySpec(tuple(sizes), dtype)
            case _:
                raise LogdirError(
                    f'The network.json in {logdir} is damaged: {name!r} of '
                    f"'other_observations' is {array!r}."
                )
    try:
        for name, parts in value('parts', dict).items():
            described = tuple(Part(str(kind), tuple(map(int, sizes))) for kind, sizes in parts)
            observation[name] = dataclasses.replace(observation[name], parts=described)
    except (LookupError, TypeError, ValueError) as error:
        raise LogdirError(
            f"The network.json in {logdir} is damaged: 'parts' is {settings['parts']!r}."
        ) from error
    network = AgentConfig(
        torso=value('torso', str),
        core=value('core', str),
        core_size=value('core_size', int),
        popart_levels=popart_levels(settings),
        latent_size=value('latent_size', int),
        normalize_observations=value('normalize_observations', bool),
        contrast_gain=value('contrast_gain', float),
    )
    try:
        action = ActionSpec.from_json(settings.get('actions'))
    except (LookupError, TypeError, ValueError) as error:
        raise LogdirError(
            f"The network.json in {logdir} is damaged: 'actions' is {settings.get('actions')!r}."
        ) from error
    if value('has_action_mask', bool):
        observation[ACTION_MASK] = ArraySpec((action.num_logits,), 'bool')
    return network, EnvironmentSpec(observation, action, 1)


def arguments_of(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Returns name -> name of the argument of each observation.

    Args:
      names: of the observations.
      taken: names of other arguments.
    """
    arguments: dict[str, str] = {}
    for name in names:
        argument = re.sub(r'\W|^(?=\d)', '_', name, flags=re.ASCII)
        while argument in taken or argument in arguments.values():
            argument += '_'
        arguments[name] = argument
    return arguments


def export(logdir: str, output: str, checkpoint: str | None = None) -> str:
    """Writes the SavedModel of a run.

    Args:
      logdir: of the run.
      output: folder to write; a SavedModel in it is replaced.
      checkpoint: path without file extension; None for the newest.

    Returns:
      The path of the checkpoint that was exported.

    Raises:
      LogdirError: there is no such run or checkpoint, or the folder cannot be written.
    """
    network, spec = spec_of_run(logdir)
    agent, action = create_agent(network, spec), spec.action
    exported = _Exported(agent)
    checkpointer = Checkpointer(logdir, exported)
    if not checkpointer.restore(checkpoint):
        raise LogdirError(f'There is no checkpoint in {logdir}.')
    states = tf.nest.flatten(agent.state_spec)
    state_names = [f'state_{index}' for index in range(len(states))]

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([], tf.int32, 'batch_size')])
    def initial_state(batch_size: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.nest.flatten(agent.initial_state(batch_size))
        if not values:
            return {'no_state': tf.zeros([batch_size, 0])}
        return dict(zip(state_names, values, strict=True))

    signature = {
        'prev_action': tf.TensorSpec([None, *action.array.shape], action.array.dtype),
        'reward': tf.TensorSpec([None], tf.float32),
        'done': tf.TensorSpec([None], tf.bool),
    }
    arguments = arguments_of(spec.observation, {*signature, *state_names})
    for name, array in spec.observation.items():
        signature[arguments[name]] = tf.TensorSpec([None, *array.shape], array.dtype)
    for name, array in zip(state_names, states, strict=True):
        signature[name] = tf.TensorSpec([None, *array.shape], array.dtype)

    @tf.function(autograph=False)
    def step(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        # The network uses the last reward, but not the return and length of the episode.
        nothing = tf.zeros_like(inputs['reward'])
        output, state = agent.step(
            inputs['prev_action'],
            StepOutput(
                reward=inputs['reward'],
                info=StepOutputInfo(nothing, *2 * [tf.cast(nothing, tf.int32)]),
                done=inputs['done'],
                observation={name: inputs[argument] for name, argument in arguments.items()},
            ),
            tf.nest.pack_sequence_as(agent.state_spec, [inputs[name] for name in state_names]),
        )
        outputs = {
            'action': output.action,
            'greedy_action': agent.actions.mode(output.policy),
            'policy': output.policy,
            **dict(zip(state_names, tf.nest.flatten(state), strict=True)),
        }
        if action.bounds:
            for name in ('action', 'greedy_action'):
                played = agent.actions.to_environment(outputs[name])
                outputs[f'environment_{name}'] = played
        if agent.popart is None:
            outputs['baseline'] = output.baseline
        return outputs

    signatures = {
        'initial_state': initial_state,
        'step': step.get_concrete_function(
            **{name: tf.TensorSpec(s.shape, s.dtype, name) for name, s in signature.items()}
        ),
    }
    try:
        tf.saved_model.save(exported, output, signatures=signatures)
    except (OSError, tf.errors.OpError) as error:
        raise LogdirError(f'Cannot write {output}: {error}.') from error
    return str(checkpointer.latest)


def main(argv: list[str]) -> int:
    """Exports what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m impala.tools.export', description='Writes a trained agent as a SavedModel.'
    )
    parser.add_argument('logdir', help='folder of a training run')
    # In `--output=~/folder` a shell leaves the ~ to us.
    path = os.path.expanduser
    parser.add_argument('--output', type=path, help=f'folder to write; LOGDIR/{FOLDER} by default')
    parser.add_argument('--checkpoint', type=path, help='a checkpoint other than the newest')
    arguments = parser.parse_args(argv)
    output = arguments.output or os.path.join(arguments.logdir, FOLDER)
    checkpoint = arguments.checkpoint and arguments.checkpoint.removesuffix('.index')
    try:
        exported = export(arguments.logdir, output, checkpoint)
    except (LogdirError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f'Written {exported} to {output}')
    return 0


if __name__ == '__main__':
    outlive_readers()
    sys.exit(main(sys.argv[1:]))
