"""A torso of one's own: a small vision transformer.

Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929.

How to run it: docs/examples/own_torso.md.
"""

import sonnet as snt
import tensorflow as tf

PATCH_SIDE = 12
WIDTH = 64
NUM_HEADS = 4
NUM_BLOCKS = 2


class VisionTransformer(snt.Module):
    """Attends to the patches of a frame; its features are the mean over the patches."""

    def __init__(self, name=None):
        super().__init__(name)
        self._embed = snt.Conv2D(WIDTH, PATCH_SIDE, PATCH_SIDE, name='patches')
        self._position = None
        self._blocks = [Block(name=f'block_{i}') for i in range(NUM_BLOCKS)]
        self._norm = snt.LayerNorm(-1, create_scale=True, create_offset=True)

    def __call__(self, frames):
        """Returns features, f32 `[N, 64]`, of frames `[N, H, W, C]`, f32 from 0 to 1."""
        x = self._embed(frames)
        x = tf.reshape(x, [-1, x.shape[1] * x.shape[2], WIDTH])
        if self._position is None:
            # The first call is made while the network is built, with one frame.
            self._position = tf.Variable(tf.random.normal([x.shape[1], WIDTH], stddev=0.02))
        x += self._position
        for block in self._blocks:
            x = block(x)
        return tf.reduce_mean(self._norm(x), axis=1)


class Block(snt.Module):
    """Self-attention and an MLP, each after layer normalization and with a residual connection."""

    def __init__(self, name=None):
        super().__init__(name)
        self._norms = [snt.LayerNorm(-1, create_scale=True, create_offset=True) for _ in range(2)]
        self._qkv = snt.Linear(3 * WIDTH, name='qkv')
        self._out = snt.Linear(WIDTH, name='out')
        self._mlp = snt.nets.MLP([2 * WIDTH, WIDTH], activation=tf.nn.gelu)

    def __call__(self, x):
        """Returns `[N, P, 64]` for P patches `[N, P, 64]`."""
        num_patches, head_width = x.shape[1], WIDTH // NUM_HEADS
        qkv = snt.BatchApply(self._qkv)(self._norms[0](x))
        qkv = tf.reshape(qkv, [-1, num_patches, 3, NUM_HEADS, head_width])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        weights = tf.nn.softmax(tf.matmul(query, key, transpose_b=True) / head_width**0.5)
        attended = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])
        x += snt.BatchApply(self._out)(tf.reshape(attended, [-1, num_patches, WIDTH]))
        return x + snt.BatchApply(self._mlp)(self._norms[1](x))
