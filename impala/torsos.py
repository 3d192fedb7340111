"""The networks that turn an observation into features: Figure 3 of the paper, and a small MLP.

Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures", 2018. Letters: N rows (merged time and batch), H, W, C frame height, width and
channels.

Every torso is built for one frame spec and makes all its variables, always float32, when it is
constructed. It computes in `compute_dtype`, casting each variable once per call, and returns
float32. Weights and biases start as Sonnet's `Linear` and `Conv2D` start theirs.

Bytes are scaled to [0, 1] by scaling the first layer's weights at call time: that is the same
function, with one pass less over the frames, which are far larger than the weights.
"""

import math

import numpy as np
import sonnet as snt
import tensorflow as tf

from impala.trajectory import ArraySpec

TORSOS = ('deep', 'shallow', 'mlp')

_FEATURES = 256
_MLP_SIZES = (64, 64)
_DEEP_SECTIONS = (16, 32, 32)
_RESIDUAL_BLOCKS = 2


class Linear(snt.Module):
    """A linear layer with bias, computed in the dtype of its inputs."""

    def __init__(self, input_size: int, output_size: int, name: str | None = None):
        super().__init__(name)
        self.w = _weights([input_size, output_size])
        self.b = tf.Variable(tf.zeros([output_size]), name='b')

    def __call__(self, x: tf.Tensor, input_scale: float = 1.0) -> tf.Tensor:
        """Returns `input_scale * x @ w + b`, `[N, output_size]`, of `x` `[N, input_size]`."""
        w = _cast(self.w, x.dtype, input_scale)
        return tf.nn.bias_add(tf.matmul(x, w), _cast(self.b, x.dtype))


class Convolution(snt.Module):
    """A 2-D convolution with bias, computed in the dtype of its inputs.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      kernel: height and width of the kernel, a multiple of `stride`.
      stride: stride along height and width.
      padding: `'SAME'`, for stride 1 only, or `'VALID'`. With `'VALID'` the width of the input must
        be a multiple of `stride`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: str = 'SAME',
        name: str | None = None,
    ):
        super().__init__(name)
        self._stride = stride
        self._padding = padding
        self.w = _weights([kernel, kernel, in_channels, out_channels])
        self.b = tf.Variable(tf.zeros([out_channels]), name='b')

    def __call__(self, x: tf.Tensor, input_scale: float = 1.0) -> tf.Tensor:
        """Returns the convolution of `input_scale * x`, `[N, H', W', out_channels]`."""
        w = _cast(self.w, x.dtype, input_scale)
        s = self._stride
        if s > 1:
            # `s` neighbouring pixels of a row lie side by side in memory, so they are `s` times as
            # many channels for free, and the kernel's likewise. The convolution is then over few
            # wide pixels, which vector units like better than many with 4 channels.
            _, height, width, channels = x.shape
            x = tf.reshape(x, [-1, height, width // s, s * channels])
            kernel, _, _, out_channels = w.shape
            w = tf.reshape(w, [kernel, kernel // s, s * channels, out_channels])
        x = tf.nn.conv2d(x, w, [s, 1], self._padding)
        return tf.nn.bias_add(x, _cast(self.b, x.dtype))


class ShallowTorso(snt.Module):
    """The paper's shallow network: two convolutions and a linear layer (Figure 3, left).

    Convolutions are unpadded: with padding the network has 1.5M parameters instead of the paper's
    1.2M.

    Args:
      frame: uint8 `[H, W, C]`, at least 20x20.
      compute_dtype: `tf.float32` or `tf.bfloat16`.

    Raises:
      ValueError: the frame is too small or is no image.
    """

    def __init__(self, frame: ArraySpec, compute_dtype: tf.DType, name: str | None = None):
        super().__init__(name)
        height, width, channels = _image_shape(frame, 'shallow')
        if min(height, width) < 20:
            raise ValueError(
                f'The shallow torso needs frames of at least 20x20 pixels, got {height}x{width}; '
                'use the deep torso.'
            )
        self._dtype = compute_dtype
        # Pixels at the far edges that no output depends on are cut off before they cost anything.
        rows, columns = (((size - 8) // 4 + 1 - 4) // 2 + 1 for size in (height, width))
        self._used_height, self._used_width = (
            ((size - 1) * 2 + 3) * 4 + 8 for size in (rows, columns)
        )
        self._crop = (height, width) != (self._used_height, self._used_width)
        self._flat_size = rows * columns * 32
        self._conv_1 = Convolution(channels, 16, 8, 4, 'VALID', name='conv_1')
        self._conv_2 = Convolution(16, 32, 4, 2, 'VALID', name='conv_2')
        self._linear = Linear(self._flat_size, _FEATURES, name='linear')
        self.output_size = _FEATURES

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of frames, uint8 `[N, H, W, C]`."""
        if self._crop:
            frame = frame[:, : self._used_height, : self._used_width]
        x = tf.cast(frame, self._dtype)
        x = tf.nn.relu(self._conv_1(x, 1 / 255))
        x = tf.nn.relu(self._conv_2(x))
        x = tf.reshape(x, [-1, self._flat_size])
        x = tf.nn.relu(self._linear(x))
        return tf.cast(x, tf.float32)


class DeepTorso(snt.Module):
    """The paper's deep residual network with 15 convolutions (Figure 3, right).

    Three sections of a convolution, a max pool that halves the frame, and two residual blocks; all
    zero-padded, so frames of any size will do.

    Args:
      frame: uint8 `[H, W, C]`.
      compute_dtype: `tf.float32` or `tf.bfloat16`.

    Raises:
      ValueError: the frame is no image.
    """

    def __init__(self, frame: ArraySpec, compute_dtype: tf.DType, name: str | None = None):
        super().__init__(name)
        height, width, channels = _image_shape(frame, 'deep')
        self._dtype = compute_dtype
        self._sections = []
        for section, out_channels in enumerate(_DEEP_SECTIONS):
            downscale = Convolution(channels, out_channels, 3, name=f'section_{section}')
            blocks = [
                [
                    Convolution(out_channels, out_channels, 3, name=f'block_{section}_{block}_{i}')
                    for i in range(2)
                ]
                for block in range(_RESIDUAL_BLOCKS)
            ]
            self._sections.append((downscale, blocks))
            channels = out_channels
            height, width = -(-height // 2), -(-width // 2)
        self._flat_size = height * width * channels
        self._linear = Linear(self._flat_size, _FEATURES, name='linear')
        self.output_size = _FEATURES

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of frames, uint8 `[N, H, W, C]`."""
        x = tf.cast(frame, self._dtype)
        scale = 1 / 255
        for downscale, blocks in self._sections:
            x = downscale(x, scale)
            scale = 1.0
            x = tf.nn.max_pool2d(x, 3, 2, 'SAME')
            for conv_1, conv_2 in blocks:
                x += conv_2(tf.nn.relu(conv_1(tf.nn.relu(x))))
        x = tf.reshape(tf.nn.relu(x), [-1, self._flat_size])
        x = tf.nn.relu(self._linear(x))
        return tf.cast(x, tf.float32)


class MLPTorso(snt.Module):
    """Two linear layers of 64 for observations that are vectors.

    Args:
      frame: any shape, float32, or uint8 that is scaled to [0, 1].
      compute_dtype: `tf.float32` or `tf.bfloat16`.
    """

    def __init__(self, frame: ArraySpec, compute_dtype: tf.DType, name: str | None = None):
        super().__init__(name)
        self._dtype = compute_dtype
        self._scale = 1 / 255 if frame.dtype == 'uint8' else 1.0
        self._flat_size = math.prod(frame.shape)
        sizes = (self._flat_size, *_MLP_SIZES)
        self._layers = [
            Linear(inputs, outputs, name=f'linear_{i}')
            for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        ]
        self.output_size = sizes[-1]

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of frames `[N, ...]`."""
        x = tf.reshape(tf.cast(frame, self._dtype), [-1, self._flat_size])
        scale = self._scale
        for layer in self._layers:
            x = tf.nn.relu(layer(x, scale))
            scale = 1.0
        return tf.cast(x, tf.float32)


def create_torso(name: str, frame: ArraySpec, compute_dtype: tf.DType) -> snt.Module:
    """Returns the torso called `name`, one of `TORSOS`, for frames of that spec.

    Raises:
      ValueError: there is no such torso, or it cannot serve such frames.
    """
    if name == 'shallow':
        return ShallowTorso(frame, compute_dtype)
    if name == 'deep':
        return DeepTorso(frame, compute_dtype)
    if name == 'mlp':
        return MLPTorso(frame, compute_dtype)
    raise ValueError(f'Unknown torso {name!r}; choose one of {", ".join(TORSOS)}.')


def _image_shape(frame: ArraySpec, torso: str) -> tuple[int, int, int]:
    if len(frame.shape) != 3 or frame.dtype != 'uint8':
        raise ValueError(
            f'The {torso} torso needs uint8 frames [height, width, channels], got {frame.dtype} '
            f'{list(frame.shape)}; use the mlp torso.'
        )
    height, width, channels = frame.shape
    return height, width, channels


def _weights(shape: list[int]) -> tf.Variable:
    """Weights of a layer whose last dimension is its output, as Sonnet initialises them."""
    stddev = 1 / np.sqrt(math.prod(shape[:-1]))
    return tf.Variable(snt.initializers.TruncatedNormal(stddev=stddev)(shape, tf.float32), name='w')


def _cast(variable: tf.Variable, dtype: tf.DType, scale: float = 1.0) -> tf.Tensor:
    # Scaled in float32, before the rounding to a shorter type.
    return tf.cast(variable * scale if scale != 1.0 else variable, dtype)
