import pytest

from impala.acting.crash_log import STACK, CrashLog

TRACEBACK = """Traceback (most recent call last):
  File "/lib/impala/acting/actor.py", line 70, in act
    reward, end, observation = environment.step(client.wait())
  File "/home/joystick.py", line {line}, in step
    raise RuntimeError('broke')
RuntimeError: the joystick {number} broke at 0x{address}"""


def error(number, line=12):
    return TRACEBACK.format(number=number, line=line, address=f'{number:x}')


def test_the_same_error_is_shown_once_and_then_counted():
    log = CrashLog()
    shown = [log.take(f'Actor {i} (Pong)', 'ended with exit code 1', error(i)) for i in range(40)]
    assert shown[0] == f'Actor 0 (Pong) ended with exit code 1 and is restarted.\n{error(0)}'
    # The 1st, 2nd, 4th, 8th, 16th and 32nd.
    reported = [i for i, text in enumerate(shown) if text is not None]
    assert reported == [0, 1, 3, 7, 15, 31]
    assert shown[31] == (
        'Actor 31 (Pong) ended with exit code 1: RuntimeError: the joystick 31 broke at 0x1f '
        '(/home/joystick.py, line 12) (as before, 32 times so far)'
    )
    assert log.summary() == (
        'Actor processes died and were restarted 40 times. The last: Actor 39 (Pong) ended with '
        'exit code 1: RuntimeError: the joystick 39 broke at 0x27 (/home/joystick.py, line 12)'
    )


@pytest.mark.parametrize(
    ('how', 'text'),
    [
        ('ended with exit code 1', error(0, line=13)),
        ('ended with exit code 1', error(0).replace('joystick', 'screen')),
        ('ended with signal 9', error(0)),
        ('ended with signal 9', ''),
    ],
)
def test_another_error_is_shown_in_full(how, text):
    log = CrashLog()
    log.take('Actor 0 (Pong)', 'ended with exit code 1', error(0))
    assert log.take('Actor 1 (Pong)', how, text) == (
        f'Actor 1 (Pong) {how} and is restarted.\n{text}'.strip()
    )


def test_several_actors_of_a_process_take_the_plural():
    shown = CrashLog().take('Actors 0-1 (Pong)', 'ended with signal 9', '')
    assert shown == 'Actors 0-1 (Pong) ended with signal 9 and are restarted.'


def test_a_hang_is_identified_by_its_location():
    stack = (
        f'noise\n{STACK}\n  File "/home/joystick.py", line 9 in step\n'
        '  File "/lib/impala/acting/actor.py", line 70 in act'
    )
    log = CrashLog()
    for _ in range(2):
        last = log.take('Actor 1 (Pong)', 'was silent', stack)
    assert (
        last == 'Actor 1 (Pong) was silent: /home/joystick.py, line 9 (as before, 2 times so far)'
    )


def test_summary_without_error_text():
    log = CrashLog()
    assert log.summary() is None
    log.take('Actor 1 (Pong)', 'ended with signal 9', '')
    assert log.summary() == (
        'Actor processes died and were restarted once. The last: Actor 1 (Pong) ended with signal 9'
    )
