"""Tests of impala/networks/decoder.py against Sonnet's layers and the definition of a transpose."""

import math

import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

from impala.networks import torsos
from impala.networks.decoder import Decoder, picture
from impala.trajectory import ArraySpec

SHAPES = [(84, 84, 4), (72, 96, 3), (21, 35, 3), (7, 5, 1), (1, 1, 3)]
LATENT_SIZE = 10


class SonnetDecoder(snt.Module):
    """The decoder in Sonnet's layers; its sizes mirror those of the encoder."""

    def __init__(self, shape):
        super().__init__()
        height, width, channels = shape
        quarter = [math.ceil(size / 4) for size in (height, width)]
        eighth = [math.ceil(size / 8) for size in (height, width)]
        self.smallest = [math.ceil(size / 16) for size in (height, width)]
        self.layers = [
            snt.Linear(self.smallest[0] * self.smallest[1] * 32),
            snt.Conv2DTranspose(16, 4, output_shape=eighth, stride=2),
            snt.Conv2DTranspose(16, 4, output_shape=quarter, stride=2),
            snt.Conv2DTranspose(channels, 4, output_shape=[height, width], stride=4),
        ]

    def __call__(self, x):
        x = tf.reshape(self.layers[0](x), [-1, *self.smallest, 32])
        for layer in self.layers[1:]:
            x = layer(tf.nn.relu(x))
        return x


def decoder(shape, compute_dtype=tf.float32):
    return Decoder(LATENT_SIZE, ArraySpec(shape, 'uint8'), compute_dtype)


def latents(rows=3):
    return tf.random.stateless_normal([rows, LATENT_SIZE], [1, 2])


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_the_same_network_of_sonnet_layers(shape):
    own, reference = decoder(shape), SonnetDecoder(shape)
    reference(latents())
    # Layer 0 is next to the frame, as in the encoder.
    layers = {module.name: module for module in own.submodules}
    order = ('linear', 'conv_2', 'conv_1', 'conv_0')
    for layer, other in zip((layers[name] for name in order), reference.layers, strict=True):
        layer.b.assign(tf.random.stateless_uniform(layer.b.shape, [3, 4], -0.1, 0.1))
        other.w.assign(layer.w)
        other.b.assign(layer.b)
    output = tf.function(own)(latents())
    assert output.shape == (3, *shape)
    assert output.dtype == tf.float32
    np.testing.assert_allclose(output, reference(latents()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('height', 'width'), [(84, 84), (21, 35), (5, 3), (1, 1)])
@pytest.mark.parametrize('stride', [2, 4])
def test_a_transposed_convolution_is_the_transpose_of_a_convolution(height, width, stride):
    convolution = torsos.Convolution(3, 5, 4, stride)
    x = tf.random.stateless_normal([2, height, width, 3], [1, 2])
    convolved = convolution(x)
    transposed = torsos.TransposedConvolution(5, 3, 4, stride, (height, width))
    transposed.w.assign(convolution.w)
    y = tf.random.stateless_normal(convolved.shape, [3, 4])
    assert transposed(y).shape == x.shape
    # <Ax, y> = <x, A'y>
    np.testing.assert_allclose(
        np.vdot(convolved, y), np.vdot(x, transposed(y)), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize('shape', SHAPES[:3])
def test_bfloat16_is_close_to_float32_with_float32_variables(shape):
    wide, narrow = decoder(shape), decoder(shape, tf.bfloat16)
    for variable, other in zip(narrow.trainable_variables, wide.trainable_variables, strict=True):
        assert variable.dtype == tf.float32
        variable.assign(other)
    expected, output = wide(latents()), narrow(latents())
    assert output.dtype == tf.float32
    # Equality would mean that nothing was computed in bfloat16.
    assert 1e-5 < np.linalg.norm(output - expected) / np.linalg.norm(expected) < 0.03


def test_a_new_decoder_makes_pixels_of_moderate_size():
    values = decoder((84, 84, 4))(latents(20)).numpy()
    # Layers preserve the variance, except for what the ReLUs remove.
    assert 0.05 < values.std() < 1


def test_frames_are_shown_above_their_reconstructions():
    frames = np.array([[[[10, 20, 30]]], [[[40, 50, 60]]]], np.uint8)
    made = np.array([[[[0.0, 0.5, 1.0]]], [[[-0.3, 1.7, 0.1]]]], np.float32)
    expected = [[[10, 20, 30], [40, 50, 60]], [[0, 128, 255], [0, 255, 26]]]
    shown = picture(frames, made)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, expected)


def test_the_newest_frame_of_a_stack_is_shown():
    frames = np.arange(2 * 3 * 5 * 4, dtype=np.uint8).reshape(2, 3, 5, 4)
    shown = picture(frames, frames / np.float32(255))
    assert shown.shape == (6, 10, 1)
    for rows in (slice(0, 3), slice(3, 6)):
        np.testing.assert_array_equal(shown[rows, :5, 0], frames[0, ..., 3])
        np.testing.assert_array_equal(shown[rows, 5:, 0], frames[1, ..., 3])
