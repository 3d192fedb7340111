"""The networks that turn an observation into features: Figure 3 of the paper, and others.

Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures", 2018. Letters: N rows (merged time and batch), H, W, C frame height, width and
channels.

Every torso is built for one frame spec and makes all its variables, always float32, when it is
constructed. It computes in `compute_dtype`, casting each variable once per call, and returns
float32. Weights and biases start as Sonnet's `Linear` and `Conv2D` start theirs.

Bytes are scaled to [0, 1] by scaling the first layer's weights at call time. This computes the same
function and saves a pass over the frames, which are far larger than the weights.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import sonnet as snt
import tensorflow as tf

from impala.config import TORSOS, NetworkConfig
from impala.networks.frame_mean import FrameMean
from impala.networks.own_module import OwnModule
from impala.trajectory import ArraySpec, Part
from impala.user_code import is_own, place_of

LATENT_SIZE = NetworkConfig.latent_size

# Channels, kernel and stride of the encoder's convolutions; the decoder mirrors them.
ENCODER_LAYERS = ((16, 4, 4), (16, 4, 2), (32, 4, 2))

# Torsos that begin with a convolution.
CONVOLUTIONAL = ('shallow', 'deep', 'nature', 'autoencoder')

# Of images: bytes, and floats from 0 to 1.
PIXEL_DTYPES = ('uint8', 'float32')

# Numbers that a category is embedded as.
EMBEDDING_SIZE = 20
# An observation of more categorical components is served by an MLP: with as many embeddings, most
# of the features would be theirs.
MAX_EMBEDDINGS = 16
# Vectors of more parts are served by one MLP: each encoder takes some operations per step, however
# few numbers it encodes.
MAX_PARTS = 64

_FEATURES = 256
# Channels, kernel and stride of the convolutions, and the size of the linear layer.
_UNPADDED = {
    'shallow': (((16, 8, 4), (32, 4, 2)), _FEATURES),
    'nature': (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
}
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
      padding: `'SAME'` or `'VALID'`. With `'VALID'` the width of the input must be a multiple of
        `stride`.
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
        y = self._convolve(x, _cast(self.w, x.dtype, input_scale))
        return tf.nn.bias_add(y, _cast(self.b, x.dtype))

    def _convolve(self, x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        s = self._stride
        if s > 1 and self._padding == 'VALID':
            # `s` neighbouring pixels of a row are adjacent in memory. So they can be read as one
            # pixel with `s` times as many channels, and the kernel's pixels likewise, without a
            # copy. Vector units are faster on few wide pixels than on many with 4 channels.
            _, height, width, channels = x.shape
            x = tf.reshape(x, [-1, height, width // s, s * channels])
            kernel, _, _, out_channels = w.shape
            w = tf.reshape(w, [kernel, kernel // s, s * channels, out_channels])
            return tf.nn.conv2d(x, w, [s, 1], 'VALID')
        return tf.nn.conv2d(x, w, s, self._padding)


class Contrast(NamedTuple):
    """What a `ContrastConvolution` makes of stacked frames.

    Attributes:
      gain: g, positive.
      frame_mean: the mean of all frames so far.
    """

    gain: float
    frame_mean: FrameMean


class ContrastConvolution(Convolution):
    """A convolution of the motion and the contrast of stacked frames.

    Of the frames x_1, ..., x_C, the newest last, and their mean m over all that was learned from,
    it convolves g (x_2 - x_1), ..., g (x_C - x_{C-1}) and g (x_C - m). The background, and all else
    that successive frames share, are most of a frame and tell the agent little. In a `Convolution`
    of the frames, they are most of what the weights respond to at first, and of their gradients.

    Differences are folded into the weights, and the mean is convolved once per call, so the frames
    stay as they are.

    Args:
      contrast: gain and mean.
      *args: of `Convolution`, as are the keyword arguments.
    """

    def __init__(self, contrast: Contrast, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gain = contrast.gain
        self._frame_mean = contrast.frame_mean

    def __call__(self, x: tf.Tensor, input_scale: float = 1.0) -> tf.Tensor:
        """Returns the convolution of `input_scale * x`, `[N, H', W', out_channels]`."""
        w = self._gain * input_scale * self.w
        newest = w[:, :, -1:]
        # Each frame but the first is in its difference from the one before, each but the last in
        # that of the next one, negative.
        differences = tf.pad(w[:, :, :-1], [[0, 0], [0, 0], [1, 0], [0, 0]])
        of_frames = differences + tf.concat([-w[:, :, :-1], newest], 2)
        _, height, width, _ = x.shape
        mean = tf.cast(self._frame_mean.mean, tf.float32)
        mean = mean[tf.newaxis, :height, :width, tf.newaxis]
        shift = self.b - tf.nn.conv2d(mean, newest, self._stride, self._padding)
        return self._convolve(x, _cast(of_frames, x.dtype)) + _cast(shift, x.dtype)


def _first_convolution(contrast: Contrast | None, *args: Any, **kwargs: Any) -> Convolution:
    if contrast is None:
        return Convolution(*args, **kwargs)
    return ContrastConvolution(contrast, *args, **kwargs)


class TransposedConvolution(snt.Module):
    """The transpose of a zero-padded `Convolution`, with bias.

    Computed as a convolution whose outputs are blocks of stride x stride pixels. On CPUs this is
    many times as fast as TensorFlow's transposed convolution.

    Args:
      in_channels: channels of the input.
      out_channels: channels of the output.
      kernel: height and width of the kernel, a multiple of `stride`.
      stride: stride along height and width of the output.
      output_size: height and width of the output; the input has them divided by `stride`, rounded
        up.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        output_size: tuple[int, int],
        name: str | None = None,
    ):
        super().__init__(name)
        self._stride = stride
        self._output_size = output_size
        # A block is computed from this many inputs along height and width.
        self._reach = kernel // stride
        fan_in = self._reach**2 * in_channels
        self.w = _weights([kernel, kernel, out_channels, in_channels], fan_in)
        self.b = tf.Variable(tf.zeros([out_channels]), name='b')

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the transposed convolution, `[N, *output_size, out_channels]`."""
        s, reach = self._stride, self._reach
        _, _, out_channels, in_channels = self.w.shape
        # An input adds pixel s * i + p of the kernel to pixel p of the block i blocks further on.
        # So a block takes it from the input i blocks back.
        w = tf.reshape(self.w, [reach, s, reach, s, out_channels, in_channels])
        w = tf.reverse(tf.transpose(w, [0, 2, 5, 1, 3, 4]), axis=[0, 1])
        w = tf.reshape(w, [reach, reach, in_channels, s * s * out_channels])
        around = [[0, 0], [reach - 1, reach - 1], [reach - 1, reach - 1], [0, 0]]
        # Padded here: if the convolution pads, its gradient takes many times as long.
        x = tf.nn.conv2d(tf.pad(x, around), _cast(w, x.dtype), 1, 'VALID')
        x = tf.nn.bias_add(x, tf.tile(_cast(self.b, x.dtype), [s * s]))
        x = tf.nn.depth_to_space(x, s) if s > 1 else x
        # Rows and columns that correspond to the padding of the convolution.
        height, width = self._output_size
        top, left = (
            max((-(-size // s) - 1) * s + reach * s - size, 0) // 2 for size in (height, width)
        )
        if x.shape[1:3] == [height, width]:
            return x
        # A Python slice has a gradient that takes longer than the convolution's.
        return tf.slice(x, [0, top, left, 0], [-1, height, width, out_channels])


class UnpaddedTorso(snt.Module):
    """Convolutions without padding and a linear layer: the shallow network and DQN's.

    Shallow is the paper's (Figure 3, left); with padding it has 1.5M parameters instead of the
    paper's 1.2M. That of Mnih et al. 2015 (Nature 518, "Model architecture") has one more
    convolution, and layers twice as wide.

    Args:
      name: `'shallow'` or `'nature'`.
      frame: uint8 or float32 `[H, W, C]`, at least 20x20 or 36x36.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
      contrast: of the first convolution; None: it is a `Convolution`.

    Raises:
      ValueError: the frame is too small or is not an image.
    """

    def __init__(
        self,
        name: str,
        frame: ArraySpec,
        compute_dtype: tf.DType,
        contrast: Contrast | None = None,
    ):
        super().__init__(f'{name}_torso')
        *size, channels = _image_shape(frame, name)
        self._scale = _pixel_scale(frame)
        layers, features = _UNPADDED[name]
        smallest = smallest_side(name)
        if min(size) < smallest:
            raise ValueError(
                f'The {name} torso needs frames of at least {smallest}x{smallest} pixels, got '
                f'{size[0]}x{size[1]}; use the deep torso.'
            )
        self._dtype = compute_dtype
        convolutions = []
        outputs = list(size)
        for layer, (out_channels, kernel, stride) in enumerate(layers, 1):
            convolution = _first_convolution(
                contrast, channels, out_channels, kernel, stride, 'VALID', name=f'conv_{layer}'
            )
            contrast = None
            # Checkpoints identify the layers by the names of these attributes.
            setattr(self, f'_conv_{layer}', convolution)
            convolutions.append(convolution)
            outputs = [(pixels - kernel) // stride + 1 for pixels in outputs]
            channels = out_channels
        self._convolutions = convolutions
        # Pixels at the bottom and right edges that no output depends on are cut off first.
        self._used = [_input_size(pixels, layers) for pixels in outputs]
        self._crop = size != self._used
        self._flat_size = math.prod(outputs) * channels
        self._linear = Linear(self._flat_size, features, name='linear')
        self.output_size = features

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of frames `[N, H, W, C]`."""
        if self._crop:
            height, width = self._used
            frame = frame[:, :height, :width]
        x, scale = tf.cast(frame, self._dtype), self._scale
        for convolution in self._convolutions:
            x = tf.nn.relu(convolution(x, scale))
            scale = 1.0
        x = tf.reshape(x, [-1, self._flat_size])
        x = tf.nn.relu(self._linear(x))
        return tf.cast(x, tf.float32)


class DeepTorso(snt.Module):
    """The paper's deep residual network with 15 convolutions (Figure 3, right).

    Three sections of a convolution, a max pool that halves the frame, and two residual blocks; all
    zero-padded, so frames may have any size.

    Args:
      frame: uint8 `[H, W, C]`, or float32 from 0 to 1.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
      contrast: of the first convolution; None: it is a `Convolution`.

    Raises:
      ValueError: the frame is not an image.
    """

    def __init__(
        self,
        frame: ArraySpec,
        compute_dtype: tf.DType,
        contrast: Contrast | None = None,
        name: str | None = None,
    ):
        super().__init__(name)
        height, width, channels = _image_shape(frame, 'deep')
        self._scale = _pixel_scale(frame)
        self._dtype = compute_dtype
        self._sections = []
        for section, out_channels in enumerate(_DEEP_SECTIONS):
            downscale = _first_convolution(
                contrast, channels, out_channels, 3, name=f'section_{section}'
            )
            contrast = None
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
        """Returns features, f32 `[N, output_size]`, of frames `[N, H, W, C]`."""
        x, scale = tf.cast(frame, self._dtype), self._scale
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
    """Two linear layers of 64 units for observations that are vectors.

    Args:
      frame: any shape, float32, or uint8 that is scaled to [0, 1].
      compute_dtype: `tf.float32` or `tf.bfloat16`.
    """

    def __init__(self, frame: ArraySpec, compute_dtype: tf.DType, name: str | None = None):
        super().__init__(name)
        self._dtype = compute_dtype
        self._scale = _pixel_scale(frame)
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


class Embedding(snt.Module):
    """An embedding of each component of a Discrete or MultiDiscrete space.

    Args:
      sizes: number of categories of each component.
    """

    def __init__(self, sizes: tuple[int, ...], name: str | None = None):
        super().__init__(name)
        self._sizes = sizes
        initialize = snt.initializers.TruncatedNormal()
        self._tables = [
            tf.Variable(initialize([size, EMBEDDING_SIZE], tf.float32), name=f'table_{i}')
            for i, size in enumerate(sizes)
        ]
        self.output_size = len(sizes) * EMBEDDING_SIZE

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the embeddings, one after the other, f32 `[N, output_size]`.

        Args:
          x: f32 `[N, sum(sizes)]`, one-hot for each component.
        """
        # The product has a dense gradient, unlike a lookup.
        components = zip(tf.split(x, self._sizes, -1), self._tables, strict=True)
        return tf.concat([tf.matmul(one_hot, table) for one_hot, table in components], -1)


class PartsTorso(snt.Module):
    """An encoder of its own for each part of a vector; features are concatenated.

    A part of at most `MAX_EMBEDDINGS` categorical components has embeddings, all others have an
    `MLPTorso`, whose first layer adds up an embedding of each category.

    Args:
      vector: float32 `[D]`, with parts.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
    """

    def __init__(self, vector: ArraySpec, compute_dtype: tf.DType, name: str | None = None):
        super().__init__(name)
        self._sizes = [part.size for part in vector.parts]
        self._encoders: list[snt.Module] = []
        for i, part in enumerate(vector.parts):
            if _is_embedded(part):
                self._encoders.append(Embedding(part.sizes, name=f'embedding_{i}'))
            else:
                array = ArraySpec((part.size,), 'float32')
                self._encoders.append(MLPTorso(array, compute_dtype, name=f'mlp_{i}'))
        self.output_size = sum(encoder.output_size for encoder in self._encoders)

    def __call__(self, vector: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of vectors f32 `[N, D]`."""
        parts = zip(self._encoders, tf.split(vector, self._sizes, -1), strict=True)
        return tf.concat([encoder(part) for encoder, part in parts], -1)


class EncoderTorso(snt.Module):
    """Three convolutions and a linear layer: the encoder of an auto-encoder.

    Policy, baseline and core see a frame as `latent_size` numbers only. In training,
    `impala.networks.decoder` reconstructs the frame from them. Convolutions are zero-padded, so
    frames may have any size.

    Args:
      frame: uint8 `[H, W, C]`.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
      latent_size: features.
      contrast: of the first convolution; None: it is a `Convolution`.

    Raises:
      ValueError: the frame is not an image.
    """

    def __init__(
        self,
        frame: ArraySpec,
        compute_dtype: tf.DType,
        latent_size: int = LATENT_SIZE,
        contrast: Contrast | None = None,
        name: str | None = None,
    ):
        super().__init__(name)
        height, width, channels = _image_shape(frame, 'autoencoder')
        self._scale = _pixel_scale(frame)
        self._dtype = compute_dtype
        self._convolutions = []
        for layer, (out_channels, kernel, stride) in enumerate(ENCODER_LAYERS):
            self._convolutions.append(
                _first_convolution(
                    contrast, channels, out_channels, kernel, stride, name=f'conv_{layer}'
                )
            )
            contrast = None
            channels = out_channels
        height, width = encoded_sizes(height, width)[-1]
        self._flat_size = height * width * channels
        self._linear = Linear(self._flat_size, latent_size, name='linear')
        self.output_size = latent_size

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns latents, f32 `[N, output_size]`, of frames `[N, H, W, C]`."""
        x, scale = tf.cast(frame, self._dtype), self._scale
        for convolution in self._convolutions:
            x = tf.nn.relu(convolution(x, scale))
            scale = 1.0
        x = tf.nn.relu(self._linear(tf.reshape(x, [-1, self._flat_size])))
        return tf.cast(x, tf.float32)


class Torso(Protocol):
    """What `--torso=my_module:MyTorso` must make; variables have to be in a Sonnet module."""

    def __call__(self, observations: tf.Tensor) -> tf.Tensor:
        """Encodes observations of one kind. In a graph, N is unknown.

        Args:
          observations: f32 `[N, ...]`, time and batch merged; pixels from 0 to 1.

        Returns:
          Features, f32 `[N, F]`, with the same F for every N.
        """


class OwnTorso(snt.Module):
    """The user's own torso: `my_module:MyTorso`, see `Torso`.

    The first call may make its variables, as it does in Sonnet's layers.

    Args:
      name: `my_module:MyTorso`.
      frame: uint8 or float32, of any shape.

    Raises:
      ValueError: it cannot be imported or called with such observations, or returns something else.
    """

    def __init__(self, name: str, frame: ArraySpec):
        super().__init__('own_torso')
        self._scale = _pixel_scale(frame)
        own = OwnModule(f'--torso={name}')
        self._torso: Torso = own.make()
        features = own.call(
            lambda: self(tf.zeros([1, *frame.shape], frame.dtype)),
            f'observations of {frame.dtype} {list(frame.shape)}',
        )
        shape = getattr(features, 'shape', None)
        if shape is None or len(shape) != 2 or shape[0] != 1:
            raise ValueError(
                f'{own.flag} returns {"no tensor" if shape is None else list(shape)} for one '
                f'observation, and it must return features [1, F]{place_of(type(self._torso))}.'
            )
        own.check_variables(snt.allow_empty_variables(self).variables)
        own.trace(self, tf.TensorSpec([None, *frame.shape], frame.dtype))
        self.output_size = int(shape[1])

    def __call__(self, frame: tf.Tensor) -> tf.Tensor:
        """Returns features, f32 `[N, output_size]`, of frames `[N, ...]`."""
        x = tf.cast(frame, tf.float32)
        return self._torso(x * self._scale if self._scale != 1.0 else x)


def encoded_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Returns height and width of a frame before and after each convolution of the encoder."""
    sizes = [(height, width)]
    for _, _, stride in ENCODER_LAYERS:
        height, width = -(-height // stride), -(-width // stride)
        sizes.append((height, width))
    return sizes


def create_torso(
    name: str,
    frame: ArraySpec,
    compute_dtype: tf.DType,
    latent_size: int = LATENT_SIZE,
    contrast: Contrast | None = None,
) -> snt.Module:
    """Returns the torso called `name`, one of `TORSOS`, for frames of that spec.

    Args:
      name: of the torso, or `my_module:MyTorso`, see `OwnTorso`.
      frame: `[H, W, C]`, or a vector.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
      latent_size: number of features of the encoder; other torsos have fixed ones.
      contrast: of the first convolution, for frames whose channels are a stack; None: it sees the
        frames. Torsos of `CONVOLUTIONAL` use it.

    Raises:
      ValueError: there is no such torso, or it cannot serve such frames, or has no contrast.
    """
    if contrast is not None and name not in CONVOLUTIONAL:
        raise ValueError(f'The torso {name} has no contrast gain.')
    if name in _UNPADDED:
        return UnpaddedTorso(name, frame, compute_dtype, contrast)
    if name == 'deep':
        return DeepTorso(frame, compute_dtype, contrast)
    if name == 'mlp':
        if num_encoders(frame) > 1:
            return PartsTorso(frame, compute_dtype)
        return MLPTorso(frame, compute_dtype)
    if name == 'autoencoder':
        return EncoderTorso(frame, compute_dtype, latent_size, contrast)
    if is_own(name):
        return OwnTorso(name, frame)
    raise _unknown(name)


def num_encoders(vector: ArraySpec) -> int:
    """Returns the number of encoders of an observation that an MLP would serve.

    A vector of several parts has one for each part, unless there are more than `MAX_PARTS`.
    """
    return len(vector.parts) if 1 < len(vector.parts) <= MAX_PARTS else 1


def linear_sizes(name: str, frame: ArraySpec, latent_size: int = LATENT_SIZE) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of the linear layer, which has most weights.

    No variable is made, so frames may be of any size. The user's own torsos are unknown: 0, 0.

    Args:
      name: of the torso.
      frame: see `create_torso`.
      latent_size: see `create_torso`.

    Raises:
      ValueError: there is no such torso, or it cannot serve such frames.
    """
    if is_own(name):
        return 0, 0
    if name == 'mlp':
        is_embedded = num_encoders(frame) > 1 and any(map(_is_embedded, frame.parts))
        # Of vectors with several parts, the encoder with the fewest outputs stands for all.
        return math.prod(frame.shape), EMBEDDING_SIZE if is_embedded else _MLP_SIZES[0]
    height, width, _ = _image_shape(frame, name)
    size = [height, width]
    if name in _UNPADDED:
        layers, features = _UNPADDED[name]
        channels = layers[-1][0]
        for _, kernel, stride in layers:
            size = [max(0, (pixels - kernel) // stride + 1) for pixels in size]
    elif name == 'autoencoder':
        size, features = [*encoded_sizes(height, width)[-1]], latent_size
        channels = ENCODER_LAYERS[-1][0]
    elif name == 'deep':
        features, channels = _FEATURES, _DEEP_SECTIONS[-1]
        for _ in _DEEP_SECTIONS:
            size = [-(-pixels // 2) for pixels in size]
    else:
        raise _unknown(name)
    return math.prod(size) * channels, features


def _unknown(name: str) -> ValueError:
    return ValueError(f'Unknown torso {name!r}; choose one of {", ".join(TORSOS)}.')


def smallest_side(name: str) -> int:
    """Returns the least height and width of the frames of a torso for images, in pixels."""
    return _input_size(1, _UNPADDED[name][0]) if name in _UNPADDED else 1


def layers(torso: snt.Module) -> list[Linear | Convolution]:
    """Returns the layers of a torso."""
    return [module for module in torso.submodules if isinstance(module, (Linear, Convolution))]


def _is_embedded(part: Part) -> bool:
    return part.kind == 'categories' and len(part.sizes) <= MAX_EMBEDDINGS


def _input_size(output_size: int, layers: Sequence[tuple[int, int, int]]) -> int:
    """Returns the height or width from which unpadded convolutions make `output_size`."""
    for _, kernel, stride in reversed(layers):
        output_size = (output_size - 1) * stride + kernel
    return output_size


def _image_shape(frame: ArraySpec, torso: str) -> tuple[int, int, int]:
    # The decoder reconstructs bytes.
    dtypes = ('uint8',) if torso == 'autoencoder' else PIXEL_DTYPES
    if len(frame.shape) != 3 or frame.dtype not in dtypes:
        other = 'shallow' if len(frame.shape) == 3 and frame.dtype == 'float32' else 'mlp'
        raise ValueError(
            f'The {torso} torso needs {" or ".join(dtypes)} frames [height, width, channels], got '
            f'{frame.dtype} {list(frame.shape)}; use the {other} torso.'
        )
    height, width, channels = frame.shape
    return height, width, channels


def _pixel_scale(frame: ArraySpec) -> float:
    """Returns the factor that brings pixels to [0, 1]."""
    return 1 / 255 if frame.dtype == 'uint8' else 1.0


def _weights(shape: list[int], fan_in: int | None = None) -> tf.Variable:
    """Returns weights, initialized as Sonnet does.

    Args:
      shape: of the weights.
      fan_in: inputs of each output; None if the last dimension is that of the outputs.
    """
    stddev = 1 / np.sqrt(math.prod(shape[:-1]) if fan_in is None else fan_in)
    return tf.Variable(snt.initializers.TruncatedNormal(stddev=stddev)(shape, tf.float32), name='w')


def _cast(variable: tf.Variable, dtype: tf.DType, scale: float = 1.0) -> tf.Tensor:
    # Scaled in float32, before rounding to a shorter type.
    return tf.cast(variable * scale if scale != 1.0 else variable, dtype)
