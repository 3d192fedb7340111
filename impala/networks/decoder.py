"""The decoder of `--torso=autoencoder`: from a latent back to the frame, for training alone.

The learner has one beside the agent, whose torso is the encoder: who acts has no decoder, nor its
weights. The loss of both is `losses.autoencoder_loss`. An auto-encoder inside the policy's graph is
of "Accelerating Distributed Deep Reinforcement Learning", RLDM 2019. Letters: N rows, H, W, C frame
height, width and channels.
"""

import numpy as np
import sonnet as snt
import tensorflow as tf

from impala.networks import torsos
from impala.trajectory import ArraySpec


class Decoder(snt.Module):
    """The layers of `torsos.EncoderTorso` in reverse: a linear one, transposed convolutions.

    All variables exist once it is constructed. The last layer is linear: pixels may leave [0, 1].

    Args:
      latent_size: L, numbers that a frame is made from.
      frame: uint8 `[H, W, C]`.
      compute_dtype: `tf.float32` or `tf.bfloat16`.
    """

    def __init__(
        self,
        latent_size: int,
        frame: ArraySpec,
        compute_dtype: tf.DType,
        name: str = 'decoder',
    ):
        super().__init__(name)
        self._dtype = compute_dtype
        height, width, frame_channels = frame.shape
        sizes = torsos.encoded_sizes(height, width)
        channels = [frame_channels, *(layer[0] for layer in torsos.ENCODER_LAYERS)]
        self._first_shape = (*sizes[-1], channels[-1])
        self._linear = torsos.Linear(latent_size, int(np.prod(self._first_shape)), name='linear')
        self._layers = [
            torsos.TransposedConvolution(
                channels[layer + 1], channels[layer], kernel, stride, sizes[layer], f'conv_{layer}'
            )
            for layer, (_, kernel, stride) in reversed([*enumerate(torsos.ENCODER_LAYERS)])
        ]

    def __call__(self, latent: tf.Tensor) -> tf.Tensor:
        """Returns frames, f32 `[N, H, W, C]` with pixels about [0, 1], of latents f32 `[N, L]`."""
        x = self._linear(tf.cast(latent, self._dtype))
        x = tf.reshape(x, [-1, *self._first_shape])
        for layer in self._layers:
            x = layer(tf.nn.relu(x))
        return tf.cast(x, tf.float32)


def picture(frames: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Returns a picture that has each frame above what the decoder makes of it, side by side.

    Args:
      frames: uint8 `[N, H, W, C]`; of frames that are neither grey nor RGB, as stacks are, the last
        channel is shown.
      reconstructions: f32 `[N, H, W, C]`, pixels from 0 to 1; what lies beyond is cut off.

    Returns:
      uint8 `[2 H, N W, 1 or 3]`.
    """
    pixels = np.round(255 * np.clip(reconstructions, 0, 1)).astype(np.uint8)
    rows = [np.concatenate([*images], axis=1) for images in (frames, pixels)]
    both = np.concatenate(rows, axis=0)
    return both if both.shape[-1] in (1, 3) else both[..., -1:]
