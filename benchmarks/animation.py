"""Makes a short animation for a page of a video that `--save_video` has written.

    python -m benchmarks.animation VIDEO docs/animations/pong.gif --start=5 --seconds=6

Several videos play one after the other, each from `--start` for at most `--seconds`; `--speed=0.5`
plays at half their speed. The ending of the name says the format: `.gif`, or `.webp`, which is
smaller if the picture has many colours. Both show on GitHub.
"""

import argparse
import sys
from typing import Any

import cv2
import numpy as np
from PIL import Image


def read(path: str, start: float, seconds: float) -> tuple[list[np.ndarray], float]:
    """Reads a part of a video.

    Args:
      path: of the video.
      start: in seconds; a negative one counts from the end.
      seconds: length of the part.

    Returns:
      The pictures, uint8 `[height, width, 3]` (RGB), and their number per second.

    Raises:
      ValueError: the video cannot be read, or has nothing there.
    """
    video = cv2.VideoCapture(path)
    rate = video.get(cv2.CAP_PROP_FPS)
    pictures = []
    while True:
        is_there, picture = video.read()
        if not is_there:
            break
        pictures.append(picture[..., ::-1])
    video.release()
    if not pictures:
        raise ValueError(f'{path} cannot be read as a video.')
    first = round(start * rate) + (len(pictures) if start < 0 else 0)
    first = max(0, first)
    chosen = pictures[first : first + max(1, round(seconds * rate))]
    if not chosen:
        raise ValueError(f'{path} lasts {len(pictures) / rate:.1f} s: nothing is at {start:g} s.')
    return chosen, rate


def write(path: str, pictures: list[np.ndarray], rate: float, height: int) -> None:
    """Writes an animation that repeats.

    Args:
      path: ends in `.gif` or `.webp`.
      pictures: uint8 `[height, width, 3]` (RGB).
      rate: pictures per second; GIF rounds the time of each to 10 ms.
      height: of the animation, pixels.
    """
    width = round(pictures[0].shape[1] * height / pictures[0].shape[0])
    frames = [
        Image.fromarray(np.ascontiguousarray(picture)).resize(
            (width, height), Image.Resampling.LANCZOS
        )
        for picture in pictures
    ]
    # How much time has passed decides, so that rounding does not add up.
    ticks = 10 if path.endswith('.gif') else 1
    ends = [ticks * round(1000 * (i + 1) / rate / ticks) for i in range(len(frames))]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    options: dict[str, Any] = {} if path.endswith('.gif') else {'quality': 60, 'method': 6}
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options
    )


def main(argv: list[str]) -> int:
    """Makes the animation that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('videos', nargs='+', metavar='video', help='MP4 file; several play in turn')
    parser.add_argument('output', help='file that ends in .gif or .webp')
    parser.add_argument('--start', type=float, default=0.0, help='seconds; negative: from the end')
    parser.add_argument('--seconds', type=float, default=6.0, help='length')
    parser.add_argument('--speed', type=float, default=1.0, help="share of the videos' own speed")
    parser.add_argument('--height', type=int, default=210, help='pixels')
    args = parser.parse_args(argv)
    if not args.output.endswith(('.gif', '.webp')):
        parser.error('the output must end in .gif or .webp')
    try:
        pictures: list[np.ndarray] = []
        for video in args.videos:
            part, rate = read(video, args.start, args.seconds)
            pictures += part
        rate *= args.speed
        write(args.output, pictures, rate, args.height)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f'{args.output}: {len(pictures)} pictures, {len(pictures) / rate:.1f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
