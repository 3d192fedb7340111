"""The decoder of `--torso=autoencoder`, which reconstructs a frame from its latent.

Only the learner has a decoder; the agent, whose torso is the encoder, acts without it. The loss of
both is `losses.autoencoder_loss`. The idea of an auto-encoder inside the policy is from
"Accelerating Distributed Deep Reinforcement Learning", RLDM 2019. Letters: N rows, H, W, C frame
height, width and channels, L latent size.
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
      latent_size: L, numbers that a frame is reconstructed from.
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
        """Returns frames, f32 `[N, H, W, C]`, pixels in about [0, 1], of latents, f32 `[N, L]`."""
        x = self._linear(tf.cast(latent, self._dtype))
        x = tf.reshape(x, [-1, *self._first_shape])
        for layer in self._layers:
            x = layer(tf.nn.relu(x))
        return tf.cast(x, tf.float32)


def picture(frames: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Returns a picture of frames in a row, each above its reconstruction.

    Args:
      frames: uint8 `[N, H, W, C]`; if they are neither grey nor RGB, but stacks for instance, the
        last channel is shown.
      reconstructions: f32 `[N, H, W, C]`, pixels from 0 to 1; values beyond are clipped.

    Returns:
      uint8 `[2 H, N W, 1 or 3]`.
    """
    pixels = np.round(255 * np.clip(reconstructions, 0, 1)).astype(np.uint8)
    rows = [np.concatenate([*images], axis=1) for images in (frames, pixels)]
    both = np.concatenate(rows, axis=0)
    return both if both.shape[-1] in (1, 3) else both[..., -1:]
