"""The progress of a run on the terminal."""

import contextlib
import os
from collections.abc import Mapping
from typing import TextIO

import tqdm

from impala.runs.learning_curve import LearningCurve


class Console:
    """Shows progress: a bar on a terminal, plain lines in a file or pipe.

    A terminal that closes does not end the run.

    Attributes:
      unrolls_discarded: since the process started; shown if it is not 0.
    """

    def __init__(
        self,
        stream: TextIO,
        frames: int,
        total_frames: int,
        num_action_repeats: int,
        shows_bar: bool = True,
    ):
        """Shows a bar if the stream is a terminal.

        Args:
          stream: to print to.
          frames: of the run so far.
          total_frames: frames at which the run ends.
          num_action_repeats: frames per agent step.
          shows_bar: False for plain lines on a terminal, too.
        """
        self.unrolls_discarded = 0
        self._stream = stream
        self._total_frames = total_frames
        self._num_action_repeats = num_action_repeats
        self._bar: tqdm.tqdm | None = None
        if shows_bar and _has_width(stream):
            self._bar = _Bar(
                total=total_frames,
                initial=min(frames, total_frames),
                unit=' frames',
                unit_scale=True,
                file=stream,
                dynamic_ncols=True,
                mininterval=0.5,
                miniters=1,
                smoothing=0.05,
                bar_format='{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames, '
                '{rate_noinv_fmt}{postfix}, {remaining} left',
            )

    def print(self, text: str) -> None:
        """Shows a line above the bar."""
        with contextlib.suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def advance(self, frames: int, curve: LearningCurve) -> None:
        """Moves the bar, which redraws itself at most twice a second."""
        if self._bar is None:
            return
        parts = []
        rate = self._bar.format_dict['rate']
        if rate and self._num_action_repeats > 1:
            parts.append(f'{rate / self._num_action_repeats:,.0f} steps/s')
        parts += _shown_return(curve) + self._shown_discarded()
        self._bar.set_postfix_str(', '.join(parts), refresh=False)
        self._bar.update(min(frames, self._total_frames) - self._bar.n)

    def line(self, line: Mapping[str, float], curve: LearningCurve) -> None:
        """Prints a line of metrics as text, unless there is a bar."""
        if self._bar is not None:
            return
        frames, speed = int(line['frames']), line['frames_per_second']
        parts = [
            f'{frames:,} of {self._total_frames:,} frames '
            f'({100 * frames / max(self._total_frames, 1):.1f}%)',
            f'{speed:,.0f} frames/s',
            f'{line["agent_steps_per_second"]:,.0f} steps/s',
        ]
        parts += _shown_return(curve) + self._shown_discarded()
        if 'loss/total' in line:
            parts.append(f'loss {line["loss/total"]:.4g}')
        if speed > 0:
            left = max(self._total_frames - frames, 0) / speed
            parts.append(f'{tqdm.tqdm.format_interval(left)} left')
        self.print(', '.join(parts))

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _shown_discarded(self) -> list[str]:
        count = self.unrolls_discarded
        return [f'{count:,} unrolls not learned from'] if count else []


def _shown_return(curve: LearningCurve) -> list[str]:
    """Returns a line's text about the mean return; empty before the first episode has ended."""
    if curve.num_episodes:
        return [f'return {curve.mean:.4g}']
    return ['no return is finite'] if curve.num_not_finite else []


def _has_width(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal with columns; in containers some have none."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _Bar(tqdm.tqdm):
    """A progress bar without tqdm's watching thread, which would outlive the run."""

    monitor_interval = 0
