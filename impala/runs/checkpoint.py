"""Saves and restores the checkpoints in a run's `--logdir`.

All errors are `LogdirError`s, whose text is one sentence for the user.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable, Mapping

import tensorflow as tf

from impala.runs.files import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_PREFIX,
    LogdirError,
    checkpoint_number,
    checkpoint_paths,
)
from impala.runs.progress import report_to_stderr


class NoIntactCheckpointError(LogdirError):
    """All checkpoints, or the requested one, are damaged or incomplete."""


class Checkpointer:
    """Saves and restores a learner under `<logdir>/checkpoints`.

    A checkpoint holds all variables of the learner (weights, optimizer, counters of updates and
    agent steps), the seconds spent training, and what hooks add. Checkpoints are found by their
    files, not by TensorFlow's state file: a run with a lost or damaged state file still resumes.
    """

    def __init__(
        self,
        logdir: str,
        learner: tf.Module,
        save_secs: float = 600.0,
        max_to_keep: int = 3,
        report: Callable[[str], None] = report_to_stderr,
        extras: Mapping[str, tf.Module] | None = None,
    ):
        """Writes nothing yet.

        Args:
          logdir: the log directory.
          learner: is saved; its variables exist already. To restore only the agent, pass a module
            that has the agent as the learner's attribute.
          save_secs: seconds of training between checkpoints of `maybe_save`.
          max_to_keep: number of checkpoints kept; at least 2, so that one is left to fall back to.
          report: takes a line about each problem that does not end the run.
          extras: name -> module that is saved, too. Variables that a checkpoint lacks keep their
            values when it is restored.

        Raises:
          LogdirError: TensorFlow cannot restore from a directory of this name.
        """
        if max_to_keep < 2:
            raise ValueError(f'max_to_keep must be at least 2, not {max_to_keep}.')
        if re.search(r'[][*?\\]', logdir):
            # TensorFlow would save there, but treats the path as a pattern when it restores.
            raise LogdirError(
                f'{logdir} cannot be a log directory: none of *, ?, [, ] and \\ may be in it.'
            )
        self._logdir = logdir
        self._folder = os.path.join(logdir, CHECKPOINT_FOLDER)
        self._save_secs = save_secs
        self._max_to_keep = max_to_keep
        self._report = report
        with tf.device('/cpu:0'):
            self._wall_seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        required = {'learner': learner, 'wall_seconds': self._wall_seconds}
        self._checkpoint = self._saved = tf.train.Checkpoint(**required)
        # The first access makes it; without it TensorFlow warns when it restores.
        self._save_counter = self._checkpoint.save_counter
        self._extras: tf.train.Checkpoint | None = None
        if extras:
            self._extras = tf.train.Checkpoint(extras=dict(extras))
            self._saved = tf.train.Checkpoint(**required, extras=dict(extras))
            self._save_counter = self._saved.save_counter
        self._manager: tf.train.CheckpointManager | None = None
        self._last_attempt = 0.0
        self._latest: str | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds of training at the checkpoint saved or restored last; 0 if there is none."""
        return float(self._wall_seconds.numpy())

    @property
    def latest(self) -> str | None:
        """Path of the checkpoint saved or restored last, without file extension."""
        return self._latest

    def restore(self, path: str | None = None) -> bool:
        """Restores the newest intact checkpoint, or a given one.

        Damaged newer checkpoints are reported and skipped. This costs some minutes of training, but
        an error would stop a run that restarts unattended. Another process may write and remove
        checkpoints during the call.

        Args:
          path: of the checkpoint, without file extension; None for the newest.

        Returns:
          Whether there was a checkpoint.

        Raises:
          NoIntactCheckpointError: all checkpoints are damaged, or the given one is damaged or
            missing.
          LogdirError: the checkpoint does not fit the learner.
        """
        if path is not None:
            self._restore_given(path)
            return True
        while True:
            paths = checkpoint_paths(self._logdir)
            try:
                return self._restore_newest(paths)
            except LogdirError:
                if checkpoint_paths(self._logdir) == paths:
                    raise

    def _restore_given(self, path: str) -> None:
        fault = _fault(path)
        if not fault:
            try:
                self._read(path)
                return
            except LogdirError:
                # Another process may have removed it during the read.
                fault = _fault(path)
                if not fault:
                    raise
        raise NoIntactCheckpointError(f'The checkpoint {path} cannot be used: {fault}.')

    def _restore_newest(self, paths: list[str]) -> bool:
        damaged = []
        for path in reversed(paths):
            fault = _fault(path)
            if fault:
                damaged.append(f'{path} ({fault})')
                continue
            if damaged:
                self._report(
                    f'WARNING: damaged checkpoint {", ".join(damaged)}: resuming from the newest '
                    f'intact one, {path}.'
                )
            self._read(path)
            return True
        if damaged:
            raise NoIntactCheckpointError(
                f'No checkpoint in {self._folder} is intact: {", ".join(damaged)}; put an intact '
                'copy there, or remove the folder to start the training anew.'
            )
        return False

    def maybe_save(self, wall_seconds: float) -> bool:
        """Saves if `save_secs` of training have passed since the last attempt.

        A failure is reported; the next attempt follows after another `save_secs`.

        Args:
          wall_seconds: seconds of training so far, over all resumptions.

        Returns:
          Whether a checkpoint was written.
        """
        if wall_seconds - self._last_attempt < self._save_secs:
            return False
        try:
            self.save(wall_seconds)
        except LogdirError as error:
            self._report(
                f'WARNING: {error} Training continues; next attempt in {self._save_secs:.0f} s.'
            )
            return False
        return True

    def save(self, wall_seconds: float) -> str:
        """Saves now.

        Args:
          wall_seconds: seconds of training so far, over all resumptions.

        Returns:
          The path of the checkpoint, without file extension.

        Raises:
          LogdirError: it cannot be written; earlier checkpoints are untouched and no part of the
            new one remains.
        """
        self._last_attempt = wall_seconds
        before = checkpoint_paths(self._logdir)
        number = checkpoint_number(before[-1]) if before else 0
        path = os.path.join(self._folder, f'{CHECKPOINT_PREFIX}-{number + 1}')
        self._wall_seconds.assign(wall_seconds)
        try:
            if self._manager is None:
                self._manager = self._create_manager(before)
            # A failed attempt has already increased the counter.
            self._save_counter.assign(number)
            self._manager.save()
        except (OSError, tf.errors.OpError) as error:
            # TensorFlow writes its state file last; if only this failed, the checkpoint is intact.
            if _fault(path):
                _remove_checkpoint(path)
                raise LogdirError(
                    f'Cannot save a checkpoint in {self._folder}: {_reason(error)}; '
                    + (f'the previous one is {before[-1]}.' if before else 'there is none yet.')
                ) from error
        self._latest = path
        return path

    def _create_manager(self, paths: list[str]) -> tf.train.CheckpointManager:
        os.makedirs(self._folder, exist_ok=True)
        for leftover in glob.glob(f'{glob.escape(self._folder)}/{CHECKPOINT_PREFIX}-*_temp'):
            shutil.rmtree(leftover, ignore_errors=True)
        if paths:
            # The manager deletes only checkpoints that the state file lists as newer than the last
            # one preserved forever. That file may be lost or damaged, so write it anew.
            tf.compat.v1.train.update_checkpoint_state(
                self._folder,
                paths[-1],
                list(paths),
                all_model_checkpoint_timestamps=[1.0] * len(paths),
                last_preserved_timestamp=0.0,
            )
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self._folder, 'checkpoint'))
        return tf.train.CheckpointManager(
            self._saved, self._folder, self._max_to_keep, checkpoint_name=CHECKPOINT_PREFIX
        )

    def _read(self, path: str) -> None:
        try:
            status = self._checkpoint.restore(path).expect_partial()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise LogdirError(
                f'The checkpoint {path} does not fit the network of this run '
                f'({_first_line(error)}): use the flags it was trained with, or another --logdir.'
            ) from error
        if self._extras is not None:
            try:
                self._extras.restore(path).expect_partial()
            except (ValueError, tf.errors.OpError) as error:
                raise LogdirError(
                    f'The checkpoint {path} does not fit a hook of this run '
                    f'({_first_line(error)}): use the hook it was trained with, or another '
                    '--logdir.'
                ) from error
        self._last_attempt = self.wall_seconds
        self._latest = path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [''])[0].rstrip('.')


def _fault(path: str) -> str:
    """Reads a whole checkpoint; returns its fault, '' if it has none.

    TensorFlow stores a checksum of every block of the index and of every tensor, and compares it
    only when it reads that block or tensor.
    """
    if not os.path.exists(f'{path}.index'):
        return 'its .index file is missing'
    try:
        reader = tf.train.load_checkpoint(path)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except Exception as error:
        # The type depends on the place of the damage; even IndexError occurs.
        return _reason(error)
    return ''


def _reason(error: Exception) -> str:
    """Returns the reason that the system or TensorFlow gives, without names of ops and devices."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = getattr(error, 'message', None) or str(error)
    text = (text.strip().splitlines() or [type(error).__name__])[0]
    text = re.sub(r'^(\{\{.*?\}\}\s*)+', '', text)
    text = re.sub(r'^TensorBundle at .* shard \d+ \(\d+ bytes\): ', '', text)
    text = re.sub(r'\s*\[Op:\w+\].*$', '', text)
    return text.rpartition('; ')[2].rstrip('.')


def _remove_checkpoint(path: str) -> None:
    for name in glob.glob(f'{glob.escape(path)}.*'):
        with contextlib.suppress(OSError):
            os.remove(name)
    shutil.rmtree(f'{path}_temp', ignore_errors=True)
    state = os.path.join(glob.escape(os.path.dirname(path)), 'checkpoint.tmp*')
    for name in glob.glob(state):
        with contextlib.suppress(OSError):
            os.remove(name)
