"""What the actors of a batcher are doing, for whoever watches over their processes."""

import enum
from typing import NamedTuple


class ActorState(enum.IntEnum):
    """The state of an actor: `RequestState` of `dynamic_batching/cc/shared_segment.h`."""

    IDLE = 0  # No row was sent since the batcher was made or the actor was reset.
    REQUESTED = 1  # A row waits for its action.
    SLEEPING = 2  # As REQUESTED, and the process sleeps until the action arrives.
    ANSWERED = 3  # The action has arrived, but the actor has not taken it yet.
    ACTING = 4  # The environment executes the action.


class Activity(NamedTuple):
    """The present activity of all actors.

    Attributes:
      states: state of each actor.
      progress: for each actor, a number that changes with each row sent and each action taken.
      closed: whether the batcher is closed.
    """

    states: list[ActorState]
    progress: list[int]
    closed: bool
