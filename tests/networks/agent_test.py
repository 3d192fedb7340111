"""Tests of the agent."""

import math

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from impala.networks.agent import (
    Agent,
    AgentConfig,
    num_encoders,
    other_observations,
    other_torso,
)
from impala.trajectory import ArraySpec, EnvironmentSpec, Part, StepOutput, StepOutputInfo

NUM_ACTIONS = 5
WORDS = 6


def make_spec(
    frame=(24, 28, 3), instruction=True, num_actions=NUM_ACTIONS, words=WORDS, others=None
):
    dtype = 'uint8' if len(frame) == 3 else 'float32'
    observation = {'frame': ArraySpec(frame, dtype), **(others or {})}
    if instruction:
        observation['instruction'] = ArraySpec((words,), 'int32')
    return EnvironmentSpec(observation, num_actions, 4)


def make_inputs(spec, *lead, seed=0):
    """Returns random previous actions and environment outputs; instructions of any length."""
    rng = np.random.default_rng(seed)
    frame = spec.observation['frame']
    values = rng.integers(0, 256, (*lead, *frame.shape))
    if frame.dtype == 'float32':
        values = rng.normal(size=values.shape)
    observation = {'frame': tf.constant(values.astype(frame.dtype))}
    if 'instruction' in spec.observation:
        words = spec.observation['instruction'].shape[0]
        length = rng.integers(0, words + 1, (*lead, 1))
        instruction = rng.integers(1, 1000, (*lead, words)) * (np.arange(words) < length)
        observation['instruction'] = tf.constant(instruction, tf.int32)
    for name, array in sorted(other_observations(spec).items()):
        values = rng.integers(0, 100, (*lead, *array.shape))
        observation[name] = tf.constant(values.astype(array.dtype))
    env_output = StepOutput(
        reward=tf.constant(rng.normal(size=lead), tf.float32),
        info=StepOutputInfo(tf.zeros(lead), *2 * [tf.zeros(lead, tf.int32)]),
        done=tf.constant(rng.random(lead) < 0.3),
        observation=observation,
    )
    return tf.constant(rng.integers(0, spec.num_actions, lead), tf.int32), env_output


def random_state(agent, batch_size):
    return tf.nest.map_structure(
        lambda spec: tf.random.stateless_normal([batch_size, *spec.shape], [5, 6]),
        agent.state_spec,
    )


def row(nest, t):
    return tf.nest.map_structure(lambda x: x[t], nest)


def assert_nests_close(actual, expected, rtol=1e-4, atol=1e-5):
    for mine, other in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)


# Espeholt et al. (2018), Figure 3, at DeepMind Lab's 72x96 pixels and 9 actions.
@pytest.mark.parametrize(('torso', 'millions'), [('shallow', 1.2), ('deep', 1.6)])
def test_number_of_parameters_matches_the_paper(torso, millions):
    agent = Agent(AgentConfig(torso=torso), make_spec((72, 96, 3), num_actions=9, words=32))
    count = sum(int(np.prod(v.shape)) for v in agent.trainable_variables)
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ('torso', 'frame', 'instruction'),
    [
        ('shallow', (84, 84, 4), False),
        ('deep', (56, 56, 3), True),
        ('mlp', (4,), False),
        ('autoencoder', (84, 84, 4), False),
        ('autoencoder', (21, 35, 3), True),
    ],
)
@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
def test_shapes_and_dtypes(torso, frame, instruction, core):
    spec = make_spec(frame, instruction)
    agent = Agent(AgentConfig(torso=torso, core=core), spec)
    t, b = 3, 2
    state = agent.initial_state(b)
    tf.nest.assert_same_structure(agent.state_spec, state)
    for array_spec, value in zip(
        tf.nest.flatten(agent.state_spec), tf.nest.flatten(state), strict=True
    ):
        assert (b, *array_spec.shape) == value.shape
        assert array_spec.dtype == value.dtype.name
        assert not np.any(value)
    for lead, function in (((b,), agent.step), ((t, b), agent.unroll)):
        output, new_state = function(*make_inputs(spec, *lead), state)
        tf.nest.assert_same_structure(state, new_state)
        assert output.action.shape == lead
        assert output.action.dtype == tf.int32
        assert output.policy.shape == (*lead, NUM_ACTIONS)
        assert output.policy.dtype == tf.float32
        assert output.baseline.shape == lead
        assert output.baseline.dtype == tf.float32
    assert len(tf.nest.flatten(agent.state_spec)) == {'none': 0, 'lstm': 2, 'gru': 1}[core]


@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
def test_unroll_equals_single_steps(core):
    spec = make_spec()
    agent = Agent(AgentConfig(torso='shallow', core=core), spec)
    t, b = 5, 3
    prev_actions, env_outputs = make_inputs(spec, t, b)
    state = random_state(agent, b)
    outputs, last = tf.function(agent.unroll)(prev_actions, env_outputs, state)
    for i in range(t):
        output, state = agent.step(prev_actions[i], row(env_outputs, i), state)
        np.testing.assert_allclose(outputs.policy[i], output.policy, atol=1e-5)
        np.testing.assert_allclose(outputs.baseline[i], output.baseline, atol=1e-5)
    assert_nests_close(last, state)


@pytest.mark.parametrize('unrolled', [False, True])
def test_state_is_reset_where_done_and_kept_elsewhere(unrolled):
    spec = make_spec()
    agent = Agent(AgentConfig(torso='shallow'), spec)
    lead = (1, 2) if unrolled else (2,)
    function = agent.unroll if unrolled else agent.step
    prev_action, env_output = make_inputs(spec, *lead)

    def run(done, state):
        row = env_output._replace(done=tf.constant(np.reshape(done, lead)))
        output, new_state = function(prev_action, row, state)
        return tf.reshape(output.policy, [2, -1]), new_state

    state = random_state(agent, 2)
    logits, new_state = run([True, False], state)
    fresh_logits, fresh_state = run([False, False], agent.initial_state(2))
    kept_logits, kept_state = run([False, False], state)
    assert np.abs(fresh_logits - kept_logits).min(axis=1).max() > 1e-4
    np.testing.assert_allclose(logits, [fresh_logits[0], kept_logits[1]], atol=1e-6)
    for mine, fresh, kept in zip(new_state, fresh_state, kept_state, strict=True):
        np.testing.assert_allclose(mine, [fresh[0], kept[1]], atol=1e-6)


@pytest.mark.parametrize('what', ['reward', 'frame'])
@pytest.mark.parametrize('unrolled', [False, True])
def test_nan_is_forgotten_at_the_end_of_the_episode(unrolled, what):
    spec = make_spec((4,), instruction=False)
    agent = Agent(AgentConfig(torso='mlp'), spec)
    t, b = 3, 2
    actions, env_outputs = make_inputs(spec, t, b)
    env_outputs = env_outputs._replace(
        done=tf.constant([[True, True], [False, False], [True, False]])
    )
    # In the first environment, one row before its episode ends.
    where = [[1, 0]]
    if what == 'reward':
        reward = tf.tensor_scatter_nd_update(env_outputs.reward, where, [np.nan])
        broken = env_outputs._replace(reward=reward)
    else:
        frame = env_outputs.observation['frame']
        frame = tf.tensor_scatter_nd_update(frame, where, [[np.nan] * 4])
        broken = env_outputs._replace(observation={'frame': frame})

    def run(env_outputs):
        state = agent.initial_state(b)
        if unrolled:
            outputs, state = agent.unroll(actions, env_outputs, state)
            return outputs.policy.numpy(), state
        logits = []
        for i in range(t):
            output, state = agent.step(actions[i], row(env_outputs, i), state)
            logits.append(output.policy.numpy())
        return np.stack(logits), state

    logits, state = run(broken)
    expected, expected_state = run(env_outputs)
    assert np.isnan(logits[1, 0]).all()
    logits[1, 0] = expected[1, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert_nests_close(state, expected_state)


def test_sampled_actions_follow_the_policy():
    spec = make_spec((4,), instruction=False, num_actions=3)
    agent = Agent(AgentConfig(torso='mlp', core='none'), spec)
    rows = 20000
    prev_action, env_output = make_inputs(spec, 1)
    same = tf.nest.map_structure(lambda x: tf.repeat(x, rows, axis=0), (prev_action, env_output))
    # Makes the policy far from uniform.
    policy_bias = next(v for v in agent.trainable_variables if v.name == 'agent/policy/b:0')
    policy_bias.assign([0.0, 1.0, -1.0])
    tf.random.set_seed(1)
    output, _ = agent.step(*same, ())
    logits = output.policy[0].numpy().astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    frequency = np.bincount(output.action, minlength=3) / rows
    np.testing.assert_allclose(frequency, expected, atol=0.015)


def test_broken_weights_still_give_valid_actions():
    spec = make_spec((4,), instruction=False, num_actions=3)
    agent = Agent(AgentConfig(torso='mlp', core='none'), spec)
    for variable in agent.trainable_variables:
        variable.assign(tf.fill(variable.shape, np.nan))
    output, _ = agent.step(*make_inputs(spec, 8), ())
    assert set(output.action.numpy()) <= {0, 1, 2}
    assert np.isnan(output.policy).all()


def test_sampling_repeats_with_the_same_seed_and_differs_between_calls():
    spec = make_spec((4,), instruction=False)
    agent = Agent(AgentConfig(torso='mlp', core='none'), spec)
    inputs = make_inputs(spec, 64)

    def two_draws():
        tf.random.set_seed(7)
        step = tf.function(agent.step)
        return [step(*inputs, ())[0].action.numpy() for _ in range(2)]

    first, again = two_draws(), two_draws()
    np.testing.assert_array_equal(first, again)
    assert np.any(first[0] != first[1])


def logits_of(agent, prev_action, env_output):
    state = agent.initial_state(prev_action.shape[0])
    return agent.step(prev_action, env_output, state)[0].policy.numpy()


def test_last_reward_is_clipped():
    spec = make_spec((4,), instruction=False)
    agent = Agent(AgentConfig(torso='mlp'), spec)
    prev_action, env_output = make_inputs(spec, 1)

    def logits(reward):
        return logits_of(agent, prev_action, env_output._replace(reward=tf.constant([reward])))

    np.testing.assert_array_equal(logits(1.0), logits(100.0))
    np.testing.assert_array_equal(logits(-1.0), logits(-100.0))
    distinct = [logits(r) for r in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    for low, high in zip(distinct[:-1], distinct[1:], strict=True):
        assert np.abs(low - high).max() > 1e-5


def test_last_action_enters_one_hot():
    spec = make_spec((4,), instruction=False)
    agent = Agent(AgentConfig(torso='mlp', core='none'), spec)
    _, env_output = make_inputs(spec, 1)
    # Without a core the heads are linear in their inputs, so an action adds its row of weights.
    weights = next(v for v in agent.trainable_variables if v.name == 'agent/policy/w:0').numpy()
    logits = [logits_of(agent, tf.constant([a], tf.int32), env_output)[0] for a in range(5)]
    action_rows = weights[-NUM_ACTIONS:]
    for a in range(1, NUM_ACTIONS):
        expected = action_rows[a] - action_rows[0]
        np.testing.assert_allclose(logits[a] - logits[0], expected, atol=1e-5)


def instruction_encoding(agent, instruction):
    """Returns the encoding of instructions and the gradient of its weighted sum."""
    encoder = next(m for m in agent.submodules if m.name == 'instruction_encoder')

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)])
    def encode(instruction):
        with tf.GradientTape() as tape:
            encoding = encoder(instruction)
            loss = weighted_sum(encoding)
        return encoding, tape.gradient(loss, encoder.trainable_variables)

    return encode(tf.constant(instruction, tf.int32))


def weighted_sum(encoding):
    rows = tf.range(1.0, tf.cast(tf.shape(encoding)[0], tf.float32) + 1)
    return tf.reduce_sum(encoding * rows[:, tf.newaxis])


def sonnet_instruction_encoding(agent, sentences):
    """Returns the same from an `snt.LSTM` with the agent's weights, word by word."""
    encoder = next(m for m in agent.submodules if m.name == 'instruction_encoder')
    variables = {v.name.split('instruction_encoder/')[-1]: v for v in encoder.trainable_variables}
    core = snt.LSTM(64)
    core(tf.zeros([1, 20]), core.initial_state(1))
    core.input_to_hidden.assign(variables['lstm/w_i:0'])
    core.hidden_to_hidden.assign(variables['lstm/w_h:0'])
    core.b.assign(variables['lstm/b:0'])
    embeddings = variables['embed/embeddings:0']
    # In the order of the agent's variables.
    sources = [embeddings, core.b, core.hidden_to_hidden, core.input_to_hidden]
    with tf.GradientTape() as tape:
        outputs = []
        for words in sentences:
            state = core.initial_state(1)
            output = state.hidden
            for word in words:
                output, state = core(embeddings[word][tf.newaxis], state)
            outputs.append(output[0])
        encoding = tf.stack(outputs)
        loss = weighted_sum(encoding)
    return encoding, [tf.convert_to_tensor(g) for g in tape.gradient(loss, sources)]


def test_instruction_is_encoded_up_to_its_last_word():
    agent = Agent(AgentConfig(torso='shallow'), make_spec())
    sentences = [[3, 999, 1], [], [7], [5, 4, 3, 2, 1, 6], [7], [3, 999]]
    padded = [words + [0] * (WORDS - len(words)) for words in sentences]
    actual = instruction_encoding(agent, padded)
    assert_nests_close(actual, sonnet_instruction_encoding(agent, sentences))
    longer = [words + [0] * (2 * WORDS - len(words)) for words in sentences]
    assert_nests_close(instruction_encoding(agent, longer), actual)


def test_the_empty_instruction_is_zeros():
    agent = Agent(AgentConfig(torso='shallow'), make_spec())
    encoding, _ = instruction_encoding(agent, np.zeros([3, WORDS]))
    np.testing.assert_array_equal(encoding, np.zeros([3, 64]))


def test_instructions_change_the_policy():
    spec = make_spec()
    agent = Agent(AgentConfig(torso='shallow'), spec)
    prev_action, env_output = make_inputs(spec, 1)

    def logits(words):
        observation = dict(env_output.observation, instruction=tf.constant([words], tf.int32))
        return logits_of(agent, prev_action, env_output._replace(observation=observation))

    assert np.abs(logits([1, 2, 0, 0, 0, 0]) - logits([1, 3, 0, 0, 0, 0])).max() > 1e-5


@pytest.mark.parametrize('torso', ['shallow', 'deep'])
def test_bfloat16_is_close_to_float32(torso):
    spec = make_spec()
    narrow = Agent(AgentConfig(torso=torso, compute_dtype='bfloat16'), spec)
    wide = Agent(AgentConfig(torso=torso), spec)
    for mine, other in zip(narrow.trainable_variables, wide.trainable_variables, strict=True):
        assert mine.dtype == tf.float32
        mine.assign(other)
    inputs = make_inputs(spec, 4, 3)
    output, state = narrow.unroll(*inputs, narrow.initial_state(3))
    expected, _ = wide.unroll(*inputs, wide.initial_state(3))
    assert output.policy.dtype == output.baseline.dtype == tf.float32
    assert {s.dtype for s in state} == {tf.float32}
    difference = output.policy - expected.policy
    assert 1e-6 < np.linalg.norm(difference) / np.linalg.norm(expected.policy) < 0.03


@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
@pytest.mark.parametrize('torso', ['shallow', 'deep', 'nature', 'mlp', 'autoencoder'])
def test_gradient_reaches_every_variable(torso, core):
    spec = make_spec((4,) if torso == 'mlp' else (36, 44, 3))
    agent = Agent(AgentConfig(torso=torso, core=core), spec)
    prev_actions, env_outputs = make_inputs(spec, 4, 3)

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            output, _ = agent.unroll(prev_actions, env_outputs, agent.initial_state(3))
            loss = tf.reduce_sum(tf.sin(output.policy)) + tf.reduce_sum(output.baseline**2)
        return tape.gradient(loss, agent.trainable_variables)

    for variable, gradient in zip(agent.trainable_variables, gradients(), strict=True):
        assert isinstance(gradient, tf.Tensor), variable.name
        assert np.any(gradient), variable.name


@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
def test_unroll_accepts_features_encoded_in_advance(core):
    spec = make_spec((21, 35, 3))
    agent = Agent(AgentConfig(torso='autoencoder', core=core, latent_size=6), spec)
    prev_actions, env_outputs = make_inputs(spec, 4, 3)
    state = random_state(agent, 3)
    expected = agent.unroll(prev_actions, env_outputs, state)
    features = agent.encode(tf.reshape(env_outputs.observation['frame'], [12, 21, 35, 3]))
    assert features.shape == (12, 6)
    assert_nests_close(agent.unroll(prev_actions, env_outputs, state, features), expected)
    # Frames enter only through the features.
    moved = agent.unroll(prev_actions, env_outputs, state, features + 1.0)
    assert np.all(np.abs(moved[0].policy - expected[0].policy).max(-1) > 1e-4)
    black = {**env_outputs.observation, 'frame': env_outputs.observation['frame'] * 0}
    unseen = env_outputs._replace(observation=black)
    assert_nests_close(agent.unroll(prev_actions, unseen, state, features), expected)


def test_acting_with_an_autoencoder_needs_no_decoder():
    spec = make_spec((84, 84, 4), instruction=False)
    agent = Agent(AgentConfig(torso='autoencoder'), spec)
    step = tf.function(agent.step).get_concrete_function(
        *make_inputs(spec, 3), agent.initial_state(3)
    )
    kinds = [op.type for op in step.graph.get_operations()]
    assert kinds.count('Conv2D') == 3
    assert 'DepthToSpace' not in kinds
    # No frames are reconstructed: the largest output is the first convolution's.
    outputs = [
        math.prod(op.outputs[0].shape)
        for op in step.graph.get_operations()
        if op.type in ('Conv2D', 'MatMul')
    ]
    assert max(outputs) == 3 * 21 * 21 * 16
    assert not [v.name for v in agent.variables if 'decoder' in v.name]


@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
def test_one_graph_serves_every_batch_size(core):
    spec = make_spec()
    agent = Agent(AgentConfig(torso='shallow', core=core), spec)
    t = 3

    def any_batch(lead):
        example = (*make_inputs(spec, *[1] * (lead + 1)), agent.initial_state(1))
        return tf.nest.map_structure(
            lambda x: tf.TensorSpec([None, None][1 - lead :] + x.shape[lead + 1 :], x.dtype),
            example[:2],
        ) + (tf.nest.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]]), example[2]),)

    step = tf.function(agent.step, input_signature=any_batch(0))
    unroll = tf.function(agent.unroll, input_signature=any_batch(1))
    for b in (1, 4):
        inputs = make_inputs(spec, t, b, seed=b)
        state = random_state(agent, b)
        output, _ = unroll(*inputs, state)
        assert output.policy.shape == (t, b, NUM_ACTIONS)
        first, _ = step(*row(inputs, 0), state)
        np.testing.assert_allclose(first.baseline, output.baseline[0], atol=1e-5)


def test_an_unknown_compute_dtype_is_refused():
    with pytest.raises(ValueError, match="Unknown compute_dtype 'float16'.*float32, bfloat16"):
        Agent(AgentConfig(compute_dtype='float16'), make_spec())


@pytest.mark.parametrize('torso', ['shallow', 'deep', 'nature', 'autoencoder'])
def test_orthogonal_weights(torso):
    config = AgentConfig(torso=torso, core='lstm')
    agent = Agent(config, make_spec((36, 36, 3)))
    before = [variable.numpy() for variable in agent.trainable_variables]
    agent.initialize_orthogonally()
    changed = 0
    for variable, value in zip(agent.trainable_variables, before, strict=True):
        if np.array_equal(variable, value):
            continue
        changed += 1
        gain = {NUM_ACTIONS: 0.01, 1: 1.0}.get(variable.shape[-1], np.sqrt(2))
        # Rows or columns, whichever are fewer, are orthogonal, and their length is the gain.
        matrix = np.reshape(variable, [-1, variable.shape[-1]]).astype(np.float64)
        products = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        np.testing.assert_allclose(products, gain**2 * np.eye(len(products)), atol=1e-5)
    num_layers = {'shallow': 3, 'deep': 16, 'nature': 4, 'autoencoder': 4}[torso]
    assert changed == num_layers + 2


def test_orthogonal_weights_make_the_initial_policy_uniform():
    agent = Agent(AgentConfig(torso='shallow', core='none'), make_spec((36, 36, 3)))
    agent.initialize_orthogonally()
    action, env_output = make_inputs(make_spec((36, 36, 3)), 8)
    output, _ = agent.step(action, env_output, ())
    np.testing.assert_allclose(tf.nn.softmax(output.policy), 1 / NUM_ACTIONS, rtol=0.1)


def test_orthogonal_weights_leave_popart_unchanged():
    config = AgentConfig(torso='mlp', core='none', popart_levels=('a', 'b'))
    agent = Agent(config, make_spec((4,), instruction=False))
    heads = [variable.numpy() for variable in agent.popart.trainable_variables]
    agent.initialize_orthogonally()
    for before, variable in zip(heads, agent.popart.trainable_variables, strict=True):
        np.testing.assert_array_equal(variable, before)


OTHERS = {
    'vector': ArraySpec((5,), 'float32'),
    'a/map': ArraySpec((24, 28, 2), 'float32'),
    'small': ArraySpec((7, 7, 3), 'uint8'),
    'counts': ArraySpec((2, 2), 'int64'),
    'flag': ArraySpec((), 'bool'),
}


@pytest.mark.parametrize(
    ('torso', 'core'),
    [('shallow', 'none'), ('deep', 'lstm'), ('mlp', 'gru'), ('autoencoder', 'none')],
)
def test_every_observation_is_an_input_of_policy_and_baseline(torso, core):
    spec = make_spec(others=OTHERS)
    agent = Agent(AgentConfig(torso=torso, core=core), spec)
    (action, env_output), state = make_inputs(spec, 4), agent.initial_state(4)
    output, _ = agent.step(action, env_output, state)
    for name, value in env_output.observation.items():
        changed = tf.logical_not(value) if value.dtype == tf.bool else tf.zeros_like(value)
        observation = env_output.observation | {name: changed}
        other, _ = agent.step(action, env_output._replace(observation=observation), state)
        assert np.abs(other.policy - output.policy).max() > 1e-6, name
        assert np.abs(other.baseline - output.baseline).max() > 1e-6, name


@pytest.mark.parametrize('core', ['none', 'lstm', 'gru'])
def test_unroll_equals_single_steps_with_other_observations(core):
    spec = make_spec(others=OTHERS)
    agent = Agent(AgentConfig(torso='shallow', core=core), spec)
    actions, env_outputs = make_inputs(spec, 3, 2)
    state = agent.initial_state(2)
    unrolled, last = agent.unroll(actions, env_outputs, state)
    for t in range(3):
        output, state = agent.step(actions[t], row(env_outputs, t), state)
        assert_nests_close(output[1:], row(unrolled, t)[1:])
    assert_nests_close(state, last)


def test_the_network_does_not_depend_on_the_order_of_the_spec(tmp_path):
    """The file that describes a run's network is sorted."""
    specs = [make_spec(others=dict(order)) for order in (OTHERS.items(), sorted(OTHERS.items()))]
    assert list(specs[0].observation) != list(specs[1].observation)
    agents = [Agent(AgentConfig(torso='shallow'), spec) for spec in specs]
    path = tf.train.Checkpoint(agents[0]).write(str(tmp_path / 'agent'))
    tf.train.Checkpoint(agents[1]).read(path).assert_consumed()
    inputs = make_inputs(specs[0], 2)
    outputs = [agent.step(*inputs, agent.initial_state(2)) for agent in agents]
    assert_nests_close(outputs[0][0][1:], outputs[1][0][1:])


@pytest.mark.parametrize(
    ('torso', 'shape', 'dtype', 'expected'),
    [
        ('shallow', (20, 30, 3), 'uint8', 'shallow'),
        ('shallow', (19, 30, 3), 'uint8', 'mlp'),
        ('nature', (36, 36, 3), 'float32', 'nature'),
        ('nature', (35, 36, 3), 'float32', 'mlp'),
        ('deep', (7, 7, 3), 'uint8', 'deep'),
        ('autoencoder', (40, 40, 3), 'uint8', 'shallow'),
        ('mlp', (40, 40, 3), 'float32', 'shallow'),
        ('mlp', (7, 7, 3), 'uint8', 'mlp'),
        ('deep', (40, 40, 3), 'int32', 'mlp'),
        ('deep', (40, 40), 'uint8', 'mlp'),
        ('deep', (), 'bool', 'mlp'),
    ],
)
def test_images_have_the_torso_of_the_frame_and_all_else_an_mlp(torso, shape, dtype, expected):
    assert other_torso(torso, ArraySpec(shape, dtype)) == expected


def test_encoders_of_other_observations_are_initialized_orthogonally():
    others = {'vector': ArraySpec((64,), 'float32')}
    agent = Agent(AgentConfig(torso='mlp', core='none'), make_spec((64,), False, others=others))
    agent.initialize_orthogonally()
    square = [v.numpy() for v in agent.trainable_variables if v.shape == (64, 64)]
    assert len(square) == 4
    # The two features of 64 numbers, the last reward and the last action are joined.
    (joint,) = [v.numpy() for v in agent.trainable_variables if v.shape == (134, 256)]
    np.testing.assert_allclose(joint @ joint.T, 2 * np.eye(134), atol=1e-4)
    for weights in square:
        np.testing.assert_allclose(weights @ weights.T, 2 * np.eye(64), atol=1e-4)


TWO_PARTS = (Part('numbers', (2,)), Part('categories', (3,)))


@pytest.mark.parametrize(
    ('spec', 'number'),
    [
        (make_spec((5,), instruction=False), 1),
        (make_spec((20, 20, 1), instruction=False), 1),
        (make_spec((5,)), 2),
        (make_spec((20, 20, 1)), 2),
        (make_spec((5,), instruction=False, others={'vector': ArraySpec((3,), 'float32')}), 2),
        (
            EnvironmentSpec({'frame': ArraySpec((5,), 'float32', parts=TWO_PARTS)}, NUM_ACTIONS, 1),
            2,
        ),
        (
            make_spec((20, 20, 1), others={'vector': ArraySpec((5,), 'float32', parts=TWO_PARTS)}),
            4,
        ),
    ],
)
def test_several_encoders_are_joined_by_the_core_or_a_layer(spec, number):
    torso = 'mlp' if len(spec.observation['frame'].shape) == 1 else 'shallow'
    assert num_encoders(torso, spec) == number
    without, with_core = (Agent(AgentConfig(torso, core), spec) for core in ('none', 'lstm'))
    is_joined = [any('joint' in v.name for v in each.variables) for each in (without, with_core)]
    assert is_joined == [number > 1, False]
    # Policy and baseline see its 256 units, or the concatenated features.
    assert (without._policy.w.shape[0] == 256) == (number > 1)


@pytest.mark.parametrize('popart_levels', [(), ('a', 'b')])
def test_acting_variables_are_all_that_the_policy_depends_on(popart_levels):
    """Those included that a core of one's own has without training them."""
    spec = make_spec((4,), instruction=False)
    config = AgentConfig('mlp', core='own_cores:Fixed', popart_levels=popart_levels)
    learning, acting = Agent(config, spec), Agent(config, spec)
    prev_action, env_output = make_inputs(spec, 6)

    def policy(agent):
        return agent.step(prev_action, env_output, ())[0].policy

    assert not np.allclose(policy(acting), policy(learning))
    for mine, published in zip(acting.acting_variables, learning.acting_variables, strict=True):
        mine.assign(published)
    np.testing.assert_allclose(policy(acting), policy(learning), rtol=1e-5, atol=1e-6)
    # The features, and none of PopArt's statistics.
    assert len(acting.acting_variables) == len(acting.trainable_variables) + 1
