"""Starts actor processes quickly, as forks of one small process without TensorFlow.

Run by `unroll_batcher_test.Nursery` with the segment's file descriptor; reads a JSON object per
line of stdin and answers each with a line. Kills its processes when stdin closes.
"""

import json
import os
import signal
import sys

import numpy as np

from dynamic_batching.actor_client import ActorClient, ClosedError
from impala.trajectory import ArraySpec

TERMINATED, LIFE_LOST = 1, 3
EPISODE_STEPS = 7
MOST_FRAMES = 4  # An action lasts its counter modulo this.
OBSERVATION = [ArraySpec((3,), 'int64'), ArraySpec((40,), 'uint8')]
CLOSED, WRONG_ANSWER = 10, 11  # Exit codes.


class WaitingClient(ActorClient):
    """A client that waits for the action of every row that it sends."""

    def start(self, end, observation):
        super().start(end, observation)
        return self.wait()

    def step(self, reward, end, observation, frames=1):
        self.send(reward, end, observation, frames)
        return self.wait()


def right_action(actor, incarnation, counter):
    """Returns the action with which the test's policy answers this row and no other."""
    return (actor * 1000 + incarnation) * 100000 + counter


def observation(actor, incarnation, counter):
    """Returns arrays that identify the row."""
    byte = (actor + 3 * incarnation + counter) % 256
    return np.array([actor, incarnation, counter]), np.full([40], byte, np.uint8)


def count(fd, actor, incarnation, report):
    """Sends rows numbered from 0 until the batcher is closed; checks every answer."""
    client = WaitingClient(fd, actor, OBSERVATION)
    os.write(report, b'.')
    try:
        counter = 0
        action = client.start(TERMINATED, observation(actor, incarnation, counter))
        while action == right_action(actor, incarnation, counter):
            counter += 1
            end = 0
            if counter % EPISODE_STEPS == 0:
                end = TERMINATED
            elif counter % EPISODE_STEPS == 3:
                end = LIFE_LOST
            row = observation(actor, incarnation, counter)
            action = client.step(float(counter % 5), end, row, counter % MOST_FRAMES)
    except ClosedError:
        return CLOSED
    return WRONG_ANSWER


def main(fd):
    children = set()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if command['do'] == 'start':
                read_end, write_end = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os._exit(count(fd, command['actor'], command['incarnation'], write_end))
                children.add(pid)
                os.close(write_end)
                # Answer only once the process is connected.
                if not os.read(read_end, 1):
                    raise RuntimeError('an actor did not start')
                os.close(read_end)
                answer = pid
            else:
                _, status = os.waitpid(command['pid'], 0)
                children.remove(command['pid'])
                answer = os.waitstatus_to_exitcode(status)
            print(answer, flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == '__main__':
    main(int(sys.argv[1]))
