import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from configs import config
from impala import training
from impala.networks.agent import Agent, AgentConfig
from impala.tools import export
from impala.trajectory import ArraySpec, EnvironmentSpec, Part, StepOutput, StepOutputInfo

# A program that knows only TensorFlow. It runs each of some models on inputs, a row for each step,
# which it reads as JSON from stdin.
STRANGER = """
import json, os, sys
import numpy as np, tensorflow as tf
assert not [path for path in sys.path if os.path.exists(os.path.join(path, 'vtrace.py'))]
rows_of_inputs = json.load(sys.stdin)
for path in sys.argv[1:]:
    model = tf.saved_model.load(path)
    step = model.signatures['step']
    state = model.signatures['initial_state'](batch_size=tf.constant(2))
    state = {name: value for name, value in state.items() if name != 'no_state'}
    specs = step.structured_input_signature[1]
    rows = []
    for inputs in rows_of_inputs:
        tensors = {name: tf.constant(value, specs[name].dtype) for name, value in inputs.items()}
        outputs = step(**tensors, **state)
        state = {name: outputs[name] for name in state}
        rows.append({name: value.numpy().tolist() for name, value in outputs.items()})
    print(json.dumps(rows))
"""
# The core of each exported agent, and whether it has PopArt.
EXPORTED = [('lstm', False), ('none', False), ('own_cores:Stack', True)]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Rows of inputs, and for each of `EXPORTED` the folder of its run and its rows of outputs."""
    folder = tmp_path_factory.mktemp('exported')
    for number, (core, popart) in enumerate(EXPORTED):
        logdir = folder / str(number)
        training.train(config(logdir, core=core, popart=popart, total_environment_frames=20))
        assert export.main([str(logdir), f'--output={logdir}/model']) == 0
    random = np.random.default_rng(1)
    inputs = [
        {
            'prev_action': random.integers(2, size=2).tolist(),
            'reward': random.normal(size=2).tolist(),
            'done': [step == 0, step == 2],
            'frame': random.normal(size=(2, 2)).tolist(),
        }
        for step in range(4)
    ]
    result = subprocess.run(
        [sys.executable, '-I', '-c', STRANGER, *(f'{folder}/{i}/model' for i in range(3))],
        input=json.dumps(inputs),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    outputs = map(json.loads, result.stdout.splitlines())
    return inputs, {
        pair: (folder / str(number), rows)
        for number, (pair, rows) in enumerate(zip(EXPORTED, outputs, strict=True))
    }


@pytest.mark.parametrize(('core', 'popart'), EXPORTED)
def test_the_exported_model_acts_like_the_agent(exported, core, popart):
    inputs, logdir, rows = exported[0], *exported[1][core, popart]
    network, spec = export.spec_of_run(str(logdir))
    assert network.core == core
    agent = Agent(network, spec)
    restored = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=agent))
    restored.restore(str(logdir / 'checkpoints' / 'ckpt-1')).expect_partial()
    state = agent.initial_state(2)
    for row, values in zip(rows, inputs, strict=True):
        reward = tf.constant(values['reward'])
        env_output = StepOutput(
            reward,
            StepOutputInfo(reward, *2 * [tf.zeros(2, tf.int32)]),
            tf.constant(values['done']),
            {'frame': tf.constant(values['frame'])},
        )
        expected, state = agent.step(tf.constant(values['prev_action']), env_output, state)
        np.testing.assert_allclose(row['policy'], expected.policy, atol=1e-5)
        if popart:
            assert 'baseline' not in row
        else:
            np.testing.assert_allclose(row['baseline'], expected.baseline, atol=1e-5)
        assert row['greedy_action'] == np.argmax(expected.policy, 1).tolist()
        assert set(row['action']) <= {0, 1}


def test_an_autoencoder_is_exported_without_its_decoder(tmp_path, monkeypatch):
    logdir = tmp_path / 'run'
    run = config(logdir, level_name='levels:picture', torso='autoencoder', latent_size=5)
    training.train(run)
    monkeypatch.setenv('HOME', str(tmp_path))
    options = ['--output=~/model', '--checkpoint=~/run/checkpoints/ckpt-1']
    assert export.main([str(logdir), *options]) == 0
    saved = tf.train.load_checkpoint(str(tmp_path / 'model' / 'variables' / 'variables'))
    weights = {k: v for k, v in saved.get_variable_to_shape_map().items() if 'VARIABLE_VALUE' in k}
    network, spec = export.spec_of_run(str(logdir))
    agent = Agent(network, spec)
    assert sorted(map(tuple, weights.values())) == sorted(tuple(v.shape) for v in agent.variables)
    step = tf.saved_model.load(str(tmp_path / 'model')).signatures['step']
    kinds = [op.type for op in step.graph.get_operations()]
    for function in step.graph.as_graph_def().library.function:
        kinds += [node.op for node in function.node_def]
    assert kinds.count('Conv2D') == 3
    assert 'DepthToSpace' not in kinds


@pytest.mark.parametrize(
    ('level', 'shape', 'dtype'),
    [('levels:float_picture', (4, 5, 3), 'float32'), ('levels:byte_vector', (3,), 'uint8')],
)
def test_observations_keep_their_type(tmp_path, level, shape, dtype):
    """The network scales bytes but not floats."""
    logdir = tmp_path / 'run'
    run = config(logdir, level_name=level, torso='mlp', core='none')
    training.train(run)
    assert export.main([str(logdir), f'--output={tmp_path / "model"}']) == 0
    agent = Agent(
        AgentConfig(torso='mlp', core='none'),
        EnvironmentSpec({'frame': ArraySpec(shape, dtype)}, 2, 1),
    )
    restored = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=agent))
    restored.restore(str(logdir / 'checkpoints' / 'ckpt-1')).expect_partial()
    inputs = {
        'prev_action': tf.constant([0]),
        'reward': tf.constant([0.0]),
        'done': tf.constant([True]),
        'frame': tf.cast(tf.fill((1, *shape), 200), dtype),
    }
    info = StepOutputInfo(tf.zeros(1), *2 * [tf.zeros(1, tf.int32)])
    env_output = StepOutput(inputs['reward'], info, inputs['done'], {'frame': inputs['frame']})
    expected, _ = agent.step(inputs['prev_action'], env_output, ())
    step = tf.saved_model.load(str(tmp_path / 'model')).signatures['step']
    np.testing.assert_allclose(step(**inputs)['baseline'], expected.baseline, rtol=1e-5)


def test_all_observations_are_inputs_of_the_exported_model(tmp_path):
    logdir = tmp_path / 'run'
    run = config(
        logdir, level_name='space_levels:mixed', torso='shallow', core='none',
        width=40, height=36, total_environment_frames=40,
    )  # fmt: skip
    training.train(run)
    assert export.main([str(logdir), f'--output={tmp_path / "model"}']) == 0
    network, spec = export.spec_of_run(str(logdir))
    assert spec.observation == {
        'frame': ArraySpec((36, 40, 3), 'uint8'),
        'instruction': ArraySpec((32,), 'int32'),
        'camera': ArraySpec((36, 40, 4), 'float32'),
        'depth': ArraySpec((36, 40, 1), 'uint8'),
        'vector': ArraySpec(
            (9,),
            'float32',
            parts=(Part('categories', (3,)), Part('bits', (2,)), Part('numbers', (4,))),
        ),
    }
    agent = Agent(network, spec)
    restored = tf.train.Checkpoint(learner=tf.train.Checkpoint(agent=agent))
    restored.restore(str(logdir / 'checkpoints' / 'ckpt-1')).expect_partial()
    random = np.random.default_rng(1)
    observation = {
        name: tf.constant((100 * random.random((2, *array.shape))).astype(array.dtype))
        for name, array in spec.observation.items()
    }
    action, reward = tf.zeros((2, *spec.action.array.shape)), tf.zeros(2)
    done = tf.constant([True, False])
    env_output = StepOutput(
        reward, StepOutputInfo(reward, *2 * [tf.zeros(2, tf.int32)]), done, observation
    )
    expected, _ = agent.step(action, env_output, ())
    step = tf.saved_model.load(str(tmp_path / 'model')).signatures['step']
    inputs = {'prev_action': action, 'reward': reward, 'done': done, **observation}
    np.testing.assert_allclose(step(**inputs)['policy'], expected.policy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('level', ['masked', 'masked_components'])
def test_masked_actions_are_impossible_in_the_exported_model(tmp_path, level):
    logdir = tmp_path / 'run'
    run = config(
        logdir, level_name=f'space_levels:{level}', info_action_mask=True,
        total_environment_frames=20,
    )  # fmt: skip
    training.train(run)
    assert export.main([str(logdir), f'--output={tmp_path / "model"}']) == 0
    _, spec = export.spec_of_run(str(logdir))
    sizes = spec.action.categories
    assert spec.observation['action_mask'] == ArraySpec((sum(sizes),), 'bool')
    step = tf.saved_model.load(str(tmp_path / 'model')).signatures['step']
    random, rows = np.random.default_rng(1), 2000
    # Of each component, some categories are allowed, and one at least.
    masks = [random.random((rows, size)) < 0.4 for size in sizes]
    for mask in masks:
        mask[range(rows), random.integers(mask.shape[1], size=rows)] = True
    inputs = {
        'prev_action': tf.zeros((rows, *spec.action.array.shape), tf.int32),
        'reward': tf.zeros(rows),
        'done': tf.ones(rows, tf.bool),
        'frame': tf.constant(
            random.normal(size=(rows, *spec.observation['frame'].shape)), tf.float32
        ),
    }
    outputs = step(**inputs, action_mask=tf.constant(np.concatenate(masks, 1)))
    free = step(**inputs, action_mask=tf.ones((rows, sum(sizes)), tf.bool))
    for name in ('action', 'greedy_action'):
        chosen = outputs[name].numpy().reshape(rows, -1)
        others = free[name].numpy().reshape(rows, -1)
        for mask, component, other in zip(masks, chosen.T, others.T, strict=True):
            assert mask[range(rows), component].all()
            assert not mask[range(rows), other].all()
            if name == 'action':
                # Nearly uniform before training, so each category comes where it is allowed.
                assert set(component) == set(range(mask.shape[1]))
    allowed = np.concatenate(masks, 1)
    np.testing.assert_array_equal(
        outputs['policy'].numpy()[allowed], free['policy'].numpy()[allowed]
    )
    assert (outputs['policy'].numpy()[~allowed] < -1e8).all()


def test_observations_have_arguments_of_their_own():
    names = ['frame', 'a/b', 'a_b', 'a.b', 'reward', '0', 'b/0', 'grün']
    assert export.arguments_of(names, {'reward', 'done'}) == {
        'frame': 'frame',
        'a/b': 'a_b',
        'a_b': 'a_b_',
        'a.b': 'a_b__',
        'reward': 'reward_',
        '0': '_0',
        'b/0': 'b_0',
        'grün': 'gr_n',
    }


def test_export_prints_only_what_was_written(tmp_path):
    logdir = tmp_path / 'run'
    training.train(config(logdir, total_environment_frames=20))
    environment = os.environ.copy()
    environment.pop('TF_CPP_MIN_LOG_LEVEL', None)
    result = subprocess.run(
        [sys.executable, '-m', 'impala.tools.export', str(logdir)],
        env=environment | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f'Written {logdir}/checkpoints/ckpt-1 to {logdir}/saved_model\n'
    # A start on a busy machine may be slow.
    assert result.stderr.replace('Starting: TensorFlow is loaded\n', '') == ''


def test_failed_exports_give_one_sentence(tmp_path, capsys):
    assert export.main([str(tmp_path)]) == 2
    assert 'is not the folder of a training run' in capsys.readouterr().err
    settings = {
        'torso': 'mlp',
        'core': 'none',
        'core_size': 256,
        'popart_levels': [],
        'latent_size': 64,
        'normalize_observations': False,
        'actions': 2,
        'frame_shape': [2],
        'frame_dtype': 'float32',
        'has_instructions': False,
        'has_action_mask': False,
        'other_observations': {},
        'parts': {},
    }
    (tmp_path / 'network.json').write_text(json.dumps(settings))
    assert export.main([str(tmp_path)]) == 2
    assert 'There is no checkpoint in' in capsys.readouterr().err
    for change, sentence in (
        ({'torso': 3}, "'torso' is 3."),
        ({'core_size': 'no'}, "'core_size' is 'no'."),
        ({'actions': True}, "'actions' is True."),
        ({'actions': -2}, "'actions' is -2."),
        ({'actions': {'categories': [2]}}, "'actions' is {'categories': [2]}."),
        ({'has_instructions': 0}, "'has_instructions' is 0."),
        ({'has_action_mask': 'no'}, "'has_action_mask' is 'no'."),
        ({'frame_shape': 4}, "'frame_shape' is 4."),
        ({'frame_shape': [4, 'x']}, "frames cannot be (4, 'x')."),
        ({'frame_shape': [4, 0]}, 'frames cannot be (4, 0).'),
        ({'frame_shape': [2**31]}, 'frames cannot be (2147483648,).'),
        ({'popart_levels': 3}, 'is 3.'),
        ({'normalize_observations': 1}, "'normalize_observations' is 1."),
        ({'contrast_gain': 'no'}, "'contrast_gain' is 'no'."),
        ({'parts': 3}, "'parts' is 3."),
        ({'parts': {'frame': 3}}, "'parts' is {'frame': 3}."),
        ({'parts': {'vector': []}}, "'parts' is {'vector': []}."),
        ({'parts': {'frame': [['bits', [1]]]}}, "'parts' is {'frame': [['bits', [1]]]}."),
        ({'parts': {'frame': [['bats', [2]]]}}, "'parts' is {'frame': [['bats', [2]]]}."),
        ({'parts': {'frame': [['bits', [1, 1]]]}}, "'parts' is {'frame': [['bits', [1, 1]]]}."),
        ({'other_observations': []}, "'other_observations' is []."),
        ({'other_observations': {'a': 3}}, "'a' of 'other_observations' is 3."),
        (
            {'other_observations': {'a': [[3, 0], 'uint8']}},
            "'a' of 'other_observations' is [[3, 0], 'uint8'].",
        ),
    ):
        (tmp_path / 'network.json').write_text(json.dumps(settings | change))
        assert export.main([str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert 'damaged: ' in error and error.endswith(f'{sentence}\n'), error
    (tmp_path / 'network.json').write_text(json.dumps(settings | {'core': 'no_such_module:Core'}))
    assert export.main([str(tmp_path)]) == 2
    assert "module 'no_such_module' cannot be found.\n" in capsys.readouterr().err
