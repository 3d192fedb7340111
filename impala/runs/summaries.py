"""Writes a run's metrics and pictures for TensorBoard."""

import contextlib
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

_RETRY_SECS = 300.0


class Summaries:
    """Writes scalars and pictures for TensorBoard, which does not have to be installed."""

    def __init__(self, folder: str):
        """Creates no file until the first `write`."""
        self._folder = folder
        self._writer: tf.summary.SummaryWriter | None = None
        self._not_before = -math.inf

    def write(
        self,
        agent_steps: int,
        scalars: Mapping[str, float],
        pictures: Mapping[str, tuple[int, int, bytes]],
    ) -> None:
        """Writes the numbers of a line, or nothing if the disk is full.

        Args:
          agent_steps: of the run so far.
          scalars: name -> value; must include `wall_seconds`.
          pictures: name -> width, height and PNG.
        """
        # tf.summary.scalar and tf.summary.image require TensorBoard, which training should not
        # need; these are the same records.
        of_scalars = _metadata('scalars', 'DATA_CLASS_SCALAR')
        of_images = _metadata('images', 'DATA_CLASS_BLOB_SEQUENCE')
        try:
            if self._writer is None:
                if scalars['wall_seconds'] < self._not_before:
                    return
                self._writer = tf.summary.create_file_writer(self._folder)
            # TensorFlow caches a tensor for each Python number forever, but not for NumPy numbers.
            step = tf.constant(np.int64(agent_steps))
            with self._writer.as_default(step), tf.device('/cpu:0'):
                for name, value in scalars.items():
                    tf.summary.write(name, tf.constant(np.float32(value)), metadata=of_scalars)
                for name, (width, height, png) in pictures.items():
                    image = tf.constant([str(width).encode(), str(height).encode(), png])
                    tf.summary.write(name, image, metadata=of_images)
            self._writer.flush()
        except (OSError, tf.errors.OpError):
            # The same numbers are in metrics.jsonl. The last record may be incomplete, so the next
            # attempt starts a new file, but not at every line while the disk is full.
            self._writer = None
            self._not_before = scalars['wall_seconds'] + _RETRY_SECS

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with contextlib.suppress(tf.errors.OpError):
                self._writer.close()


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG of pixels uint8 `[H, W, C]`, C is 1 for grey or 3 for RGB."""
    with tf.device('/cpu:0'):
        return tf.io.encode_png(pixels).numpy()


def _metadata(plugin: str, data_class: str) -> tf.compat.v1.SummaryMetadata:
    """Returns the metadata from which TensorBoard knows how to show a record."""
    metadata = tf.compat.v1.SummaryMetadata
    return metadata(plugin_data=metadata.PluginData(plugin_name=plugin), data_class=data_class)
