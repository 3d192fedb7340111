"""Learner and actor processes for learner_service_test.py.

remote_peer.py learner PORT
remote_peer.py actor ADDRESS FIRST
"""

import json
import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import tensorflow as tf

from impala.cluster.exchange import UnrollInbox
from impala.cluster.learner_service import LearnerConnection, LearnerService
from impala.trajectory import UnrollArray

COMPONENTS = [
    UnrollArray((), 'int64', 'version', time_major=False, low=0),
    UnrollArray((), 'int32', 'number', time_major=False, low=0),
    UnrollArray((5, 2), 'float32', 'reward'),
    UnrollArray((5, 300, 400, 3), 'uint8', 'frame'),
]


def make_unroll(number):
    """Returns an unroll that is determined by its number."""
    random = np.random.default_rng(number)
    return [
        np.int64(number),
        np.int32(number),
        random.normal(size=[5, 2]).astype('float32'),
        random.integers(256, size=[5, 300, 400, 3], dtype='uint8'),
    ]


def learn(port):
    """Serves until stdin closes; takes one unroll per line of input."""
    inbox = UnrollInbox(4, COMPONENTS, 'version')
    inbox.set_latest_version(1000)
    service = LearnerService(f'localhost:{port}', inbox, {}, None, print)
    service.publish(7, [tf.constant([1.0, 2.0])])
    print(json.dumps({'port': service.port}), flush=True)
    for _ in sys.stdin:
        batch = inbox.take(1)
        number = int(batch.components[1][0])
        whole = all(
            np.array_equal(component[:, 0] if array.ndim else component[0], array)
            for component, array in zip(batch.components, make_unroll(number), strict=True)
        )
        answer = {'numbers': [number] if whole else [], 'actors': batch.actors.numpy().tolist()}
        print(json.dumps(answer), flush=True)


def act(address, number):
    """Sends unrolls until it is killed."""
    connection = LearnerConnection(address, COMPONENTS)
    while True:
        connection.put(make_unroll(number), 0, 'rooms', number + 1)
        number += 1


if __name__ == '__main__':
    if sys.argv[1] == 'learner':
        learn(int(sys.argv[2]))
    else:
        act(sys.argv[2], int(sys.argv[3]))
