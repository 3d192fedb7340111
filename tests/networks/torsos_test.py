"""Tests of the torsos against the same networks written with Sonnet's own layers."""

import math

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from impala.networks import torsos
from impala.networks.frame_mean import FrameMean
from impala.trajectory import ArraySpec, Part


class SonnetShallow(snt.Module):
    """The paper's shallow network in Sonnet's layers, on floats in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = [
            snt.Conv2D(16, 8, 4, padding='VALID'),
            snt.Conv2D(32, 4, 2, padding='VALID'),
            snt.Linear(256),
        ]

    def __call__(self, x):
        conv_1, conv_2, linear = self.layers
        x = tf.nn.relu(conv_2(tf.nn.relu(conv_1(x))))
        return tf.nn.relu(linear(snt.Flatten()(x)))


class SonnetNature(snt.Module):
    """DQN's network in Sonnet's layers, on floats in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = [
            snt.Conv2D(32, 8, 4, padding='VALID'),
            snt.Conv2D(64, 4, 2, padding='VALID'),
            snt.Conv2D(64, 3, 1, padding='VALID'),
            snt.Linear(512),
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = tf.nn.relu(layer(x))
        return tf.nn.relu(self.layers[-1](snt.Flatten()(x)))


class SonnetDeep(snt.Module):
    """The paper's deep network in Sonnet's layers, on floats in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = [snt.Conv2D(c, 3) for c in (16, 32, 32) for _ in range(5)]
        self.layers.append(snt.Linear(256))

    def __call__(self, x):
        for section in range(3):
            first, *residual = self.layers[5 * section : 5 * section + 5]
            x = tf.nn.max_pool2d(first(x), 3, 2, 'SAME')
            for block in range(2):
                y = residual[2 * block](tf.nn.relu(x))
                x += residual[2 * block + 1](tf.nn.relu(y))
        return tf.nn.relu(self.layers[-1](snt.Flatten()(tf.nn.relu(x))))


class SonnetEncoder(snt.Module):
    """The encoder in Sonnet's layers, on floats in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = [snt.Conv2D(16, 4, 4), snt.Conv2D(16, 4, 2), snt.Conv2D(32, 4, 2)]
        self.layers.append(snt.Linear(64))

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = tf.nn.relu(layer(x))
        return tf.nn.relu(self.layers[-1](snt.Flatten()(x)))


class SonnetMLP(snt.Module):
    """Two linear layers of 64."""

    def __init__(self):
        super().__init__()
        self.layers = [snt.Linear(64), snt.Linear(64)]

    def __call__(self, x):
        for layer in self.layers:
            x = tf.nn.relu(layer(x))
        return x


REFERENCES = {
    'shallow': SonnetShallow,
    'nature': SonnetNature,
    'deep': SonnetDeep,
    'mlp': SonnetMLP,
    'autoencoder': SonnetEncoder,
}


def random_frames(shape, rows=3, dtype='uint8'):
    rng = np.random.default_rng(1)
    if dtype == 'uint8':
        return tf.constant(rng.integers(0, 256, (rows, *shape), dtype=np.uint8))
    return tf.constant(rng.normal(size=(rows, *shape)).astype(np.float32))


def torso_and_reference(name, shape, dtype='uint8', compute_dtype=tf.float32):
    """Returns a torso with random biases and Sonnet's version of it with the same weights."""
    tf.random.set_seed(1)
    torso = torsos.create_torso(name, ArraySpec(shape, dtype), compute_dtype)
    reference_dtype = tf.float64 if compute_dtype == tf.float64 else tf.float32
    reference = REFERENCES[name]()
    reference(tf.zeros([1, *shape], reference_dtype))
    # Variables of equal shape occur in the same order in both, by name and by construction.
    own = [v for layer in own_layers(torso) for v in (layer.w, layer.b)]
    theirs = [v for layer in reference.layers for v in (layer.w, layer.b)]
    assert [v.shape for v in own] == [v.shape for v in theirs]
    for mine, other in zip(own, theirs, strict=True):
        if mine.shape.rank == 1:
            mine.assign(tf.random.stateless_uniform(mine.shape, [1, 2], -0.1, 0.1))
        other.assign(tf.cast(mine, other.dtype))
    return torso, reference, own, theirs


def own_layers(torso):
    layers = [m for m in torso.submodules if isinstance(m, torsos.Convolution | torsos.Linear)]
    # Torsos apply layers in the order of their names, except for a section's first convolution.
    order = {'section': 0, 'block': 1}

    def key(layer):
        words = layer.name.split('_')
        if words[0] in order:
            return ('a', words[1], order[words[0]], *words[2:])
        return ('conv' if words[0] == 'conv' else 'linear', *words[1:])

    return sorted(layers, key=key)


CASES = [
    ('shallow', (84, 84, 4), 'uint8'),
    ('shallow', (72, 96, 3), 'uint8'),
    ('shallow', (56, 56, 3), 'uint8'),
    ('shallow', (37, 50, 1), 'uint8'),
    ('shallow', (20, 20, 3), 'uint8'),
    ('nature', (84, 84, 4), 'uint8'),
    ('nature', (72, 99, 3), 'uint8'),
    ('nature', (36, 36, 1), 'uint8'),
    ('deep', (72, 96, 3), 'uint8'),
    ('deep', (56, 56, 3), 'uint8'),
    ('deep', (7, 5, 3), 'uint8'),
    ('autoencoder', (84, 84, 4), 'uint8'),
    ('autoencoder', (72, 96, 3), 'uint8'),
    ('autoencoder', (21, 35, 3), 'uint8'),
    ('autoencoder', (1, 1, 1), 'uint8'),
    ('mlp', (4,), 'float32'),
    ('mlp', (16,), 'uint8'),
]


@pytest.mark.parametrize(('name', 'shape', 'dtype'), CASES)
@pytest.mark.parametrize('compute_dtype', [tf.float32, tf.float64])
def test_equals_the_same_network_of_sonnet_layers(name, shape, dtype, compute_dtype):
    torso, reference, own, theirs = torso_and_reference(name, shape, dtype, compute_dtype)
    frames = random_frames(shape, dtype=dtype)
    scaled = tf.cast(frames, compute_dtype) / (255 if dtype == 'uint8' else 1)

    @tf.function
    def features_and_gradients(network, inputs, variables):
        with tf.GradientTape() as tape:
            features = network(inputs)
            loss = tf.reduce_sum(tf.sin(features))
        return features, tape.gradient(loss, variables)

    features, gradients = features_and_gradients(torso, frames, own)
    expected, expected_gradients = features_and_gradients(reference, scaled, theirs)
    assert features.dtype == tf.float32
    assert features.shape == (3, torso.output_size)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        scale = np.abs(expected_gradient).max()
        assert scale > 0
        # In float32, close calls of max pools and ReLUs reroute single gradients.
        close = 1e-4 if compute_dtype == tf.float64 else 1e-2
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=close * scale)


@pytest.mark.parametrize('name', ['shallow', 'deep', 'nature', 'autoencoder'])
def test_bfloat16_is_close_to_float32_with_float32_variables(name):
    shape = (56, 56, 3)
    torso, reference, own, theirs = torso_and_reference(name, shape, compute_dtype=tf.bfloat16)
    assert {v.dtype for v in own} == {tf.float32}
    frames = random_frames(shape, rows=8)
    with tf.GradientTape(persistent=True) as tape:
        features = torso(frames)
        expected = reference(tf.cast(frames, tf.float32) / 255)
        loss, expected_loss = tf.reduce_sum(features**2), tf.reduce_sum(expected**2)
    assert features.dtype == tf.float32
    # Equality would mean that nothing was computed in bfloat16.
    error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03
    gradients = tape.gradient(loss, own)
    expected_gradients = tape.gradient(expected_loss, theirs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == tf.float32
        cosine = np.vdot(gradient, expected_gradient) / (
            np.linalg.norm(gradient) * np.linalg.norm(expected_gradient)
        )
        # Rounding flips close calls of max pools and ReLUs, which reroutes single gradients.
        assert cosine > 0.9


def test_initial_weights_are_distributed_like_sonnets():
    torso = torsos.create_torso('deep', ArraySpec((24, 24, 3), 'uint8'), tf.float32)
    for layer in own_layers(torso):
        fan_in = math.prod(layer.w.shape[:-1])
        # Truncation at two deviations reduces the deviation of a normal distribution to 0.88.
        assert np.std(layer.w) == pytest.approx(0.88 / math.sqrt(fan_in), rel=0.15)
        assert np.abs(layer.w).max() <= 2 / math.sqrt(fan_in)
        assert not np.any(layer.b)


@pytest.mark.parametrize(
    ('name', 'convolutions'), [('shallow', 2), ('nature', 3), ('deep', 15), ('autoencoder', 3)]
)
def test_no_gradient_of_the_frames_is_computed(name, convolutions):
    shape = (36, 36, 3)
    torso = torsos.create_torso(name, ArraySpec(shape, 'uint8'), tf.float32)

    @tf.function
    def gradients(frames):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(torso(frames))
        return tape.gradient(loss, torso.trainable_variables)

    graph = gradients.get_concrete_function(tf.TensorSpec([None, *shape], tf.uint8)).graph
    needed = {op.name for op in reachable(graph.outputs)}
    kinds = [op.type for op in graph.get_operations() if op.name in needed]
    assert kinds.count('Conv2D') == convolutions
    assert kinds.count('Conv2DBackpropFilter') == convolutions
    assert kinds.count('Conv2DBackpropInput') == convolutions - 1


def reachable(outputs):
    """Returns the operations that `outputs` depend on: what is left of a graph after pruning."""
    todo, seen = [t.op for t in outputs], set()
    while todo:
        op = todo.pop()
        if op not in seen:
            seen.add(op)
            todo += [t.op for t in op.inputs] + list(op.control_inputs)
    return seen


@pytest.mark.parametrize('name', ['shallow', 'deep', 'nature', 'autoencoder'])
def test_frames_that_are_not_images_are_refused(name):
    dtypes = 'uint8' if name == 'autoencoder' else 'uint8 or float32'
    pattern = rf'{name} torso needs {dtypes} frames .* float32 \[4\]; use the mlp torso'
    with pytest.raises(ValueError, match=pattern):
        torsos.create_torso(name, ArraySpec((4,), 'float32'), tf.float32)
    with pytest.raises(ValueError, match=r'int32 \[40, 40, 3\]; use the mlp torso'):
        torsos.create_torso(name, ArraySpec((40, 40, 3), 'int32'), tf.float32)


@pytest.mark.parametrize('name', ['shallow', 'deep', 'nature', 'mlp'])
@pytest.mark.parametrize('compute_dtype', [tf.float32, tf.bfloat16])
def test_floats_from_0_to_1_are_seen_like_the_same_bytes(name, compute_dtype):
    shape = (37, 41, 3)
    torso = torsos.create_torso(name, ArraySpec(shape, 'uint8'), compute_dtype)
    of_floats = torsos.create_torso(name, ArraySpec(shape, 'float32'), compute_dtype)
    for mine, other in zip(of_floats.variables, torso.variables, strict=True):
        mine.assign(other)
    frames = random_frames(shape)
    tolerance = 1e-5 if compute_dtype == tf.float32 else 0.03
    np.testing.assert_allclose(
        of_floats(tf.cast(frames, tf.float32) / 255), torso(frames), tolerance, tolerance
    )
    sizes = [torsos.linear_sizes(name, ArraySpec(shape, each)) for each in ('uint8', 'float32')]
    assert sizes[0] == sizes[1]


def test_unknown_torsos_are_refused():
    frame = ArraySpec((40, 40, 3), 'uint8')
    for read in (
        lambda: torsos.create_torso('depe', frame, tf.float32),
        lambda: torsos.linear_sizes('depe', frame),
    ):
        with pytest.raises(ValueError, match="^Unknown torso 'depe'; choose one of shallow, deep,"):
            read()


def vector_of(*parts):
    size = sum(part.size for part in parts)
    return ArraySpec((size,), 'float32', parts=tuple(parts))


NUMBERS, CHOICE = Part('numbers', (3,)), Part('categories', (4,))
CHOICES, BITS = Part('categories', (2, 5)), Part('bits', (6,))


def test_each_part_of_a_vector_has_its_own_encoder():
    torso = torsos.create_torso('mlp', vector_of(NUMBERS, CHOICE, CHOICES, BITS), tf.float32)
    rng = np.random.default_rng(0)
    numbers, bits = rng.normal(size=(7, 3)), rng.integers(2, size=(7, 6))
    choice, first, second = (rng.integers(size, size=7) for size in (4, 2, 5))
    x = np.concatenate([numbers, np.eye(4)[choice], np.eye(2)[first], np.eye(5)[second], bits], 1)
    weights = [variable.numpy() for variable in torso.trainable_variables]
    mlps = [(3, 64), (6, 64), *2 * [(64, 64)], *4 * [(64,)]]
    assert sorted(each.shape for each in weights) == sorted([*mlps, (2, 20), (4, 20), (5, 20)])
    tables = {len(table): table for table in weights if table.shape[1:] == (20,)}

    def mlp(inputs, encoder):
        for layer in torsos.layers(encoder):
            inputs = np.maximum(inputs @ layer.w.numpy() + layer.b.numpy(), 0)
        return inputs

    first_mlp, second_mlp = (m for m in torso.submodules if isinstance(m, torsos.MLPTorso))
    expected = [
        mlp(numbers, first_mlp), tables[4][choice], tables[2][first], tables[5][second],
        mlp(bits, second_mlp),
    ]  # fmt: skip
    features = torso(tf.constant(x, tf.float32))
    np.testing.assert_allclose(features, np.concatenate(expected, 1), rtol=1e-5, atol=1e-5)
    assert torso.output_size == features.shape[1] == 64 + 20 + 40 + 64


@pytest.mark.parametrize('parts', [(), (CHOICE,), (Part('categories', (2, 2)),)])
def test_a_vector_of_one_part_has_an_mlp(parts):
    spec = ArraySpec((4,), 'float32', parts=parts)
    torso = torsos.create_torso('mlp', spec, tf.float32)
    assert isinstance(torso, torsos.MLPTorso) and torso.output_size == 64


def test_many_components_and_many_parts_have_an_mlp():
    many = Part('categories', (2,) * (torsos.MAX_EMBEDDINGS + 1))
    torso = torsos.create_torso('mlp', vector_of(many, BITS), tf.float32)
    assert torso.output_size == 2 * 64
    fewer = Part('categories', (2,) * torsos.MAX_EMBEDDINGS)
    torso = torsos.create_torso('mlp', vector_of(fewer, BITS), tf.float32)
    assert torso.output_size == 20 * torsos.MAX_EMBEDDINGS + 64
    for number, expected in ((torsos.MAX_PARTS, 64 * torsos.MAX_PARTS), (torsos.MAX_PARTS + 1, 64)):
        spec = vector_of(*[Part('numbers', (1,))] * number)
        assert torsos.create_torso('mlp', spec, tf.float32).output_size == expected


@pytest.mark.parametrize('compute_dtype', [tf.float32, tf.bfloat16])
def test_parts_are_encoded_in_the_compute_dtype(compute_dtype):
    tf.random.set_seed(0)
    spec = vector_of(NUMBERS, CHOICE)
    torso = torsos.create_torso('mlp', spec, compute_dtype)
    plain = torsos.create_torso('mlp', spec, tf.float32)
    for mine, other in zip(plain.variables, torso.variables, strict=True):
        mine.assign(other)
    x = tf.constant([[0.5, -1.0, 2.0, 0.0, 0.0, 1.0, 0.0]])
    features = torso(x)
    assert features.dtype == tf.float32
    np.testing.assert_allclose(features, plain(x), rtol=0.03, atol=0.03)


def test_float_images_have_no_autoencoder():
    pattern = r'autoencoder torso needs uint8 frames .*float32 \[40, 40, 3\]; use the shallow torso'
    with pytest.raises(ValueError, match=pattern):
        torsos.create_torso('autoencoder', ArraySpec((40, 40, 3), 'float32'), tf.float32)


@pytest.mark.parametrize('latent_size', [1, 7])
def test_the_latent_has_the_given_size(latent_size):
    frame = ArraySpec((20, 20, 3), 'uint8')
    torso = torsos.create_torso('autoencoder', frame, tf.float32, latent_size)
    assert torso.output_size == latent_size
    assert torso(random_frames(frame.shape)).shape == (3, latent_size)


def multiply_adds(torso, shape):
    """Counts multiply-adds per frame, from the shapes in TensorFlow's graph."""
    graph = tf.function(torso).get_concrete_function(tf.TensorSpec([1, *shape], tf.uint8)).graph
    count = 0
    for op in graph.get_operations():
        if op.type in ('Conv2D', 'MatMul'):
            output, weights = op.outputs[0].shape, op.inputs[1].shape
            count += math.prod(output) * math.prod(weights[:-1])
    return count


@pytest.mark.parametrize('shape', [(84, 84, 4), (72, 96, 3)])
def test_the_encoder_costs_less_than_half_of_the_shallow_network(shape):
    count = {
        name: multiply_adds(torsos.create_torso(name, ArraySpec(shape, 'uint8'), tf.float32), shape)
        for name in ('shallow', 'autoencoder')
    }
    if shape == (84, 84, 4):
        assert count['shallow'] == (
            20 * 20 * 16 * 8 * 8 * 4 + 9 * 9 * 32 * 4 * 4 * 16 + 9 * 9 * 32 * 256
        )
        assert count['autoencoder'] == (
            21 * 21 * 16 * 4 * 4 * 4
            + 11 * 11 * 16 * 4 * 4 * 16
            + 6 * 6 * 32 * 4 * 4 * 16
            + 6 * 6 * 32 * 64
        )
    assert count['autoencoder'] < 0.5 * count['shallow']


@pytest.mark.parametrize(('name', 'pixels'), [('shallow', 20), ('nature', 36)])
def test_too_small_frames_are_refused(name, pixels):
    pattern = f'{name} torso .* at least {pixels}x{pixels} pixels, got {pixels}x{pixels - 1}'
    with pytest.raises(ValueError, match=pattern):
        torsos.create_torso(name, ArraySpec((pixels, pixels - 1, 3), 'uint8'), tf.float32)


@pytest.mark.parametrize('name', ['shallow', 'nature', 'deep', 'autoencoder'])
def test_the_smallest_side_is_what_a_torso_takes(name):
    side = torsos.smallest_side(name)
    frame = ArraySpec((side, side, 1), 'uint8')
    assert torsos.create_torso(name, frame, tf.float32)(random_frames(frame.shape)).shape[0] == 3
    assert side == {'shallow': 20, 'nature': 36}.get(name, 1)


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('padding', ['VALID', 'SAME'])
def test_a_contrast_convolution_sees_motion_and_contrast(channels, padding):
    gain, shape = 5.0, (8, 12, channels)
    frame_mean = FrameMean(ArraySpec(shape, 'uint8'))
    mean = np.random.default_rng(1).random(shape[:2]).astype(np.float32)
    frame_mean.mean.assign(mean)
    contrast = torsos.Contrast(gain, frame_mean)
    convolution = torsos.ContrastConvolution(contrast, channels, 3, 4, 2, padding)
    convolution.b.assign([1.0, 2.0, 3.0])
    frames = random_frames(shape).numpy().astype(np.float32) / 255
    seen = gain * np.concatenate(
        [np.diff(frames, axis=-1), frames[..., -1:] - mean[..., np.newaxis]], -1
    )
    plain = snt.Conv2D(3, 4, 2, padding=padding)
    plain(seen)
    plain.w.assign(convolution.w)
    plain.b.assign(convolution.b)
    np.testing.assert_allclose(convolution(frames), plain(seen), rtol=1e-4, atol=1e-4)
    frame_mean.mean.assign(2 * mean)
    np.testing.assert_allclose(convolution(2 * frames, 0.5), plain(seen), rtol=1e-4, atol=1e-4)


def test_contrast_in_bfloat16_is_close_to_float32():
    frame = ArraySpec((84, 84, 4), 'uint8')
    frame_mean = FrameMean(frame)
    frames = random_frames(frame.shape, rows=8)
    frame_mean.mean.assign(tf.reduce_mean(tf.cast(frames[..., -1], tf.float64), 0))
    contrast = torsos.Contrast(5.0, frame_mean)
    torso, other = (
        torsos.create_torso('shallow', frame, dtype, contrast=contrast)
        for dtype in (tf.bfloat16, tf.float32)
    )
    for ours, theirs in zip(torso.trainable_variables, other.trainable_variables, strict=True):
        theirs.assign(ours)
    features, expected = torso(frames), other(frames)
    assert 1e-5 < np.linalg.norm(features - expected) / np.linalg.norm(expected) < 0.03


def test_torsos_without_convolutions_have_no_contrast():
    frame = ArraySpec((84, 84, 4), 'uint8')
    contrast = torsos.Contrast(5.0, FrameMean(frame))
    for name in ('mlp', 'own_parts:Flat'):
        with pytest.raises(ValueError, match=f'The torso {name} has no contrast gain'):
            torsos.create_torso(name, frame, tf.float32, contrast=contrast)


@pytest.mark.parametrize('name', torsos.CONVOLUTIONAL)
def test_contrast_is_that_of_the_first_convolution(name):
    """The others see what they would see in a torso of what the first one convolves."""
    frame = ArraySpec((52, 49, 4), 'uint8')
    frame_mean = FrameMean(frame)
    contrast = torsos.Contrast(3.0, frame_mean)
    torso = torsos.create_torso(name, frame, tf.float32, contrast=contrast)
    plain = torsos.create_torso(name, frame, tf.float32)
    for ours, theirs in zip(torso.trainable_variables, plain.variables, strict=True):
        theirs.assign(ours)
    frames = random_frames(frame.shape).numpy().astype(np.float32)
    mean = frames[..., -1:].mean(0, keepdims=True)
    frame_mean.mean.assign(mean[0, ..., 0])
    seen = 3 * np.concatenate([np.diff(frames, axis=-1), frames[..., -1:] - mean], -1)
    with tf.GradientTape(persistent=True) as tape:
        features, expected = torso(frames), plain(seen)
        losses = tf.reduce_sum(tf.sin(features)), tf.reduce_sum(tf.sin(expected))
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)
    for gradient, expected_gradient in zip(
        tape.gradient(losses[0], torso.trainable_variables),
        tape.gradient(losses[1], plain.trainable_variables),
        strict=True,
    ):
        cosine = np.vdot(gradient, expected_gradient) / (
            np.linalg.norm(gradient) * np.linalg.norm(expected_gradient)
        )
        # Close calls of max pools and ReLUs reroute single gradients.
        assert cosine > 0.999


def test_older_checkpoints_of_shallow_torsos_still_fit(tmp_path):
    torso = torsos.create_torso('shallow', ArraySpec((84, 84, 4), 'uint8'), tf.float32)
    before = tf.train.Checkpoint()
    for number, layer in enumerate(own_layers(torso)):
        name = ('_conv_1', '_conv_2', '_linear')[number]
        weights = tf.Variable(tf.fill(layer.w.shape, float(number)))
        setattr(before, name, tf.train.Checkpoint(w=weights, b=tf.Variable(layer.b)))
    path = before.write(str(tmp_path / 'before'))
    tf.train.Checkpoint(torso).read(path).assert_existing_objects_matched()
    assert [np.unique(layer.w).tolist() for layer in own_layers(torso)] == [[0], [1], [2]]


def test_an_unknown_torso_is_refused():
    with pytest.raises(ValueError, match="Unknown torso 'wide'.*shallow, deep, nature, mlp"):
        torsos.create_torso('wide', ArraySpec((4,), 'float32'), tf.float32)


def keras_torso():
    return tf.keras.layers.Dense(3)


class Transposed(snt.Module):
    def __call__(self, observations):
        return tf.transpose(observations)


def torso_of_a_known_batch():
    return lambda observations: tf.reshape(observations, [int(observations.shape[0]), 5])


@pytest.mark.parametrize(
    ('name', 'sentence'),
    [
        ('keras_torso', r"has the variable '.*kernel.*' outside of Sonnet modules, so it would be"),
        (
            'Transposed',
            r'returns \[5, 1\] for one observation, and .* \(torsos_test.py, line \d+\)',
        ),
        (
            'torso_of_a_known_batch',
            r'fails with batches of unknown size in a graph: TypeError: .* \(torsos_test.py, line ',
        ),
    ],
)
def test_mistakes_in_own_torsos_are_one_sentence(name, sentence):
    name = f'{__name__}:{name}'
    with pytest.raises(ValueError, match=f'^--torso={name} {sentence}') as caught:
        torsos.create_torso(name, ArraySpec((5,), 'float32'), tf.float32)
    assert '\n' not in str(caught.value)
