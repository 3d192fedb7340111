"""What survives a run in its `--logdir`: checkpoints and the flag file.

Everything here fails with a `LogdirError`, whose text is one sentence for the user.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable

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
    """All checkpoints, or the one asked for, are damaged, or not written to their end yet."""


class Checkpointer:
    """Saves and restores a learner under `<logdir>/checkpoints`.

    A checkpoint holds all variables of the learner (weights, optimizer, counters of updates and
    agent steps) and the seconds spent training. Checkpoints are found by their files, not by
    TensorFlow's state file, so that a lost or damaged state file does not make a run start anew.
    """

    def __init__(
        self,
        logdir: str,
        learner: tf.Module,
        save_secs: float = 600.0,
        max_to_keep: int = 3,
        report: Callable[[str], None] = report_to_stderr,
    ):
        """Makes nothing on disk.

        Args:
          logdir: the log directory.
          learner: what is saved; its variables exist already. To restore an agent alone, give a
            module that has it under the learner's attribute name.
          save_secs: seconds of training between checkpoints of `maybe_save`.
          max_to_keep: how many checkpoints stay; at least 2, so that there is one to fall back to.
          report: takes a line for the user about what went wrong without ending the run.

        Raises:
          LogdirError: if TensorFlow cannot restore from a directory of this name.
        """
        if max_to_keep < 2:
            raise ValueError(f'max_to_keep must be at least 2, not {max_to_keep}.')
        if re.search(r'[][*?\\]', logdir):
            # TensorFlow would save there, but takes the path for a pattern when it restores.
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
        self._checkpoint = tf.train.Checkpoint(learner=learner, wall_seconds=self._wall_seconds)
        # Made on first use; one that is missing while restoring leads to warnings of TensorFlow.
        self._save_counter = self._checkpoint.save_counter
        self._manager: tf.train.CheckpointManager | None = None
        self._last_attempt = 0.0
        self._latest: str | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds of training behind the checkpoint saved or restored last; 0 if there is none."""
        return float(self._wall_seconds.numpy())

    @property
    def latest(self) -> str | None:
        """Path of the checkpoint saved or restored last, without file extension."""
        return self._latest

    def restore(self, path: str | None = None) -> bool:
        """Restores the newest intact checkpoint, or a given one.

        Damaged newer ones are reported and passed over: at most some minutes of training are
        lost, where refusing would stop a run that restarts unattended. Another process may be
        writing and removing checkpoints all the while.

        Args:
          path: of the checkpoint, without file extension; None for the newest.

        Returns:
          Whether there was a checkpoint.

        Raises:
          NoIntactCheckpointError: if there are checkpoints and all are damaged, or the given one
            is or is not there.
          LogdirError: if the one restored does not fit the learner.
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
                # Or it has just been removed.
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
                    f'WARNING: damaged checkpoint {", ".join(damaged)}: going on from the newest '
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

        A failure is reported, and tried again after the next `save_secs`.

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
                f'WARNING: {error} Training goes on, next attempt in {self._save_secs:.0f} s.'
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
          LogdirError: if it cannot be written; the checkpoints from before are untouched and
            nothing of the new one stays.
        """
        self._last_attempt = wall_seconds
        before = checkpoint_paths(self._logdir)
        number = checkpoint_number(before[-1]) if before else 0
        path = os.path.join(self._folder, f'{CHECKPOINT_PREFIX}-{number + 1}')
        self._wall_seconds.assign(wall_seconds)
        try:
            if self._manager is None:
                self._manager = self._create_manager(before)
            # A failed attempt has counted already.
            self._save_counter.assign(number)
            self._manager.save()
        except (OSError, tf.errors.OpError) as error:
            # The last thing written is TensorFlow's state file, which nothing depends on.
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
            # The manager deletes old checkpoints by the state file, which may be lost or damaged.
            # It takes only those into its care that are newer than what it has preserved for good.
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
            self._checkpoint, self._folder, self._max_to_keep, checkpoint_name=CHECKPOINT_PREFIX
        )

    def _read(self, path: str) -> None:
        try:
            status = self._checkpoint.restore(path).expect_partial()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            first_line = (str(error).strip().splitlines() or [''])[0].rstrip('.')
            raise LogdirError(
                f'The checkpoint {path} does not fit the network of this run ({first_line}): '
                'use the flags it was trained with, or another --logdir.'
            ) from error
        self._last_attempt = self.wall_seconds
        self._latest = path


def _fault(path: str) -> str:
    """Reads all of a checkpoint; returns what is wrong with it, '' if nothing is.

    TensorFlow keeps a checksum of every block of the index and of every tensor, and compares it
    only when that tensor is read.
    """
    if not os.path.exists(f'{path}.index'):
        return 'its .index file is missing'
    try:
        reader = tf.train.load_checkpoint(path)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except Exception as error:
        # Which type of exception comes depends on where the damage lies; IndexError is among them.
        return _reason(error)
    return ''


def _reason(error: Exception) -> str:
    """Returns the operating system's or TensorFlow's reason without names of ops and devices."""
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
