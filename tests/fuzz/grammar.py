"""The grammars of the fuzzer: command lines, suites, environments and damaged run folders.

A grammar maps a symbol to its alternatives, strings in which `<symbol>` stands for an alternative
of another symbol. A random generator picks the alternatives, so a case follows from its seed.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence

Grammar = Mapping[str, Sequence[str]]

# Flags that would make a case wait for another process, or forever.
_WAITING_FLAGS = frozenset({'watch', 'task', 'job_name', 'learner_addresses', 'replay_addresses'})
# Keep accepted runs short.
_SHORT_RUN = (
    '--total_environment_frames=200',
    '--num_actors=2',
    '--envs_per_process=2',
    '--unroll_length=10',
)

VALUES: Grammar = {
    'any': ['<number>', '<number>', '<word>', '', '<path>'],
    'number': ['<small>', '<small>', '-<small>', '<small>.<digit>', '<huge>', '<special>', '<odd>'],
    'small': ['0', '1', '2', '<digit>'],
    'digit': list('0123456789'),
    'huge': ['1<zeros>', '9<zeros>', '1e<digit><digit>', '1e999', '18446744073709551616'],
    'zeros': ['0000000', '000000000', '000000000000000', '<zeros>0'],
    'special': ['inf', '-inf', 'nan', 'NaN', 'Infinity', 'None', 'null'],
    'odd': ['0x10', '1_000', ' 3', '3 ', '+1', '--1', '٣', '1,000', '1e', '.', '1/2', '½'],
    'word': ['true', 'false', 'auto', 'all', 'cartpole', 'ü', '<word><word>', "'", '*', '%s', '{}'],
    # Root may start a run in each of them.
    'path': ['/dev/null', '/dev/null/run', '/proc/none', '.', '..', 'gs://bucket/run', 's3://b'],
}

LEVELS: Grammar = {
    'level': ['CartPole-v1', '<id>', '<id>', '<callable>', '<list>', '<text>'],
    'id': ['<name>', '<name>-v', '<name>-v<digit>', '<name>-v99', 'ALE/<name>-v5', 'ALE/', '-v1'],
    'name': ['CartPole', 'Cartpole', 'Pong', 'Pendulum', 'MiniGrid-Empty-5x5', 'FrozenLake', 'ü'],
    'callable': [':', ':make', 'own:', 'own:nothing', 'no_such_module:make', 'os:getcwd', 'a:b:c'],
    'list': ['<id>,<id>', 'CartPole-v1,', ',', 'CartPole-v1,CartPole-v1', 'CartPole-v1,<callable>'],
    'text': ['', ' ', 'dmlab', 'atari5', 'explore_goal_locations_small', 'no.csv', '/', '.csv'],
    'digit': list('0123456789'),
}

SUITES: Grammar = {
    'file': ['<header><rows>', '<header><rows>', '<header><rows>', '', '<rows>', '<header>'],
    'header': ['level,random,human\n', 'level,test_level,random,human\n', '<cell>,<cell>,<cell>\n'],
    'rows': ['<row>', '<row><row>', '<row><rows>'],
    'row': ['CartPole-v1,20,500\n', '<cell>,<cell>,<cell>\n', '<cell>,<cell>\n', '\n', '<junk>\n'],
    'cell': ['CartPole-v1', 'CartPole-v<digit>', 'level', 'random', 'human', '<digit>', '-<digit>',
             '1e<digit><digit>', 'nan', 'inf', '', '"', '"a,b"', 'ü', '<cell> '],
    'junk': ['\x00', '\t', ';', '"', ',,,,,,,', '<cell>;<cell>', '\ufeff', '\x1b[31m'],
    'digit': list('0123456789'),
}  # fmt: skip

# Most alternatives are right, else nearly all cases would be refused for their first mistake.
ENVIRONMENTS: Grammar = {
    'module': [
        'import numpy as np\n'
        'from environments import Environment\n'
        'from impala.trajectory import ArraySpec, EnvironmentSpec, EpisodeEnd\n\n\n'
        'class Own(Environment):\n'
        '    def __init__(self):\n'
        '        self.steps = 0\n'
        '        self.spec = <spec>\n\n'
        '    def reset(self):\n'
        '        self.steps = 0\n'
        '        return <observation>\n\n'
        '    def step(self, action):\n'
        '        self.steps += 1\n'
        '        end = <end> if self.steps == 5 else EpisodeEnd.NOT_ENDED\n'
        '        observation = self.reset() if end else <observation>\n'
        '        return <result>\n\n\n'
        'def make(<arguments>):\n'
        '    return <made>\n'
    ],
    'spec': ['EnvironmentSpec(<specs>, <actions>, <repeats>)'] * 12 + ['None', '3', '{}'],
    'specs': ["{'frame': <array>}"] * 8
    + ["{'frame': <array>, 'more': <array>}", '{}', "{'image': <array>}", "{'frame': (4,)}"],
    'array': ["ArraySpec((4,), 'float32')"] * 10
    + ["ArraySpec((4,), <dtype>)", "ArraySpec(<shape>, 'float32')", 'ArraySpec(<shape>, <dtype>)'],
    'shape': ['()', '(0,)', '(5,)', '(2, 2)', '(2, 2, 2, 2)', '(-1,)', '4', "('4',)", '(4.0,)'],
    'dtype': ["'uint8'", "'float64'", "'int32'", "'flaot32'", 'None', "'object'", "'bool'", '8'],
    'actions': ['2'] * 8 + ['1', '0', '-1', '2.0', 'None', "'2'", '10**9'],
    'repeats': ['1'] * 8 + ['4', '0', '-1', 'None', '1.5'],
    'observation': ["{'frame': <frame>}"] * 10 + ['None', '{}', '<frame>', "{'image': <frame>}"],
    'frame': ['np.zeros(4, np.float32)'] * 12
    + ['np.zeros(5, np.float32)', 'np.zeros(4)', '[0, 0, 0, 0]', 'np.zeros((2, 2), np.float32)',
       'np.zeros(8, np.float32)[::2]', 'np.zeros(4, np.uint8)', 'None', "'0000'"],
    'reward': ['1.0'] * 8
    + ['1', 'True', 'np.float32(1)', 'np.ones(1)', 'np.ones(2)', 'None', "'1'"],
    'end': ['EpisodeEnd.TERMINATED', 'EpisodeEnd.TRUNCATED'] * 4
    + ['7', 'True', "'over'", '-1', '1'],
    'result': ['<reward>, end, observation'] * 8
    + ['<reward>, end', '<reward>, end, observation, {}', 'None', '[<reward>, end, observation]'],
    'arguments': ['seed, config'] * 10 + ['', 'seed', 'seed, config, more', '*all'],
    'made': ['Own()'] * 10 + ['None', 'Own', '{}', '[Own()]', '1 / 0', 'missing()'],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """The input of one run of the command.

    Attributes:
      kind: of the generated input.
      flags: of the command line; `{folder}` stands for the case's own folder.
      files: name within that folder -> content.
      is_finished: whether `{folder}/run` is a copy of a finished run; otherwise it is missing.
      damage: to that copy; None for no damage.
    """

    kind: str
    flags: tuple[str, ...]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    is_finished: bool = False
    damage: 'Damage | None' = None


@dataclasses.dataclass(frozen=True)
class Damage:
    """Damage to a file of a run.

    Attributes:
      file: path within the run's folder.
      how: name of the damage.
      where: relative position in the file, from 0 to 1.
      text: what is written there, if the damage writes anything.
    """

    file: str
    how: str
    where: float
    text: str


DAMAGES: Mapping[str, Callable[[bytes, int, bytes], bytes]] = {
    'cut': lambda content, at, text: content[:at],
    'insert': lambda content, at, text: content[:at] + text + content[at:],
    'overwrite': lambda content, at, text: content[:at] + text + content[at + len(text) :],
    'add a line': lambda content, at, text: content + text + b'\n',
    'repeat': lambda content, at, text: content + content,
    'change a number': lambda content, at, text: re.sub(rb'\d+', text, content, count=1),
    'change a value': lambda content, at, text: re.sub(rb'(?<=[=:,]).', text, content, count=1),
    'empty': lambda content, at, text: b'',
}
# These remove the file, or put a folder in its place.
MISSING, FOLDER = 'remove', 'folder'
_DAMAGED_FILES = (
    'flags.txt', 'network.json', 'metrics.jsonl', 'episodes.csv', 'checkpoints/checkpoint',
    'checkpoints/ckpt-1.index', 'checkpoints/ckpt-1.data-00000-of-00001',
)  # fmt: skip
_JUNK = (
    *(
        'null',
        'NaN',
        '-1',
        '1e999',
        '99999999999999999999',
        '{}',
        '[]',
        '"',
        '\x00',
        '--',
        ',,,,,,',
    ),
    *('{"agent_steps": null, "wall_seconds": 3}', '{"agent_steps": "1", "wall_seconds": []}'),
    *(
        '--no_such_flag=3',
        '--num_actors=many',
        '--level_name=',
        '1,2,3,Pong,x,4,over',
        '\udcff\udcfe',
    ),
)


def make_case(seed: int, number: int, flag_types: Mapping[str, str]) -> Case:
    """Returns a case that follows from a seed and a number.

    Args:
      seed: of the fuzzing.
      number: of the case.
      flag_types: name of a flag -> `'bool'`, or anything else for flags with values.
    """
    source = random.Random(f'{seed}/{number}')
    kind = source.choices(
        ('flags', 'level', 'suite', 'environment', 'folder'), (50, 12, 12, 14, 12)
    )[0]
    if kind == 'flags':
        names = sorted(set(flag_types) - _WAITING_FLAGS)
        chosen = source.sample(names, source.choice((1, 1, 1, 2, 3)))
        flags = [_flag(source, name, flag_types[name]) for name in chosen]
        flags = ['--level_name=CartPole-v1', '--logdir={folder}/run', *_SHORT_RUN, *flags]
        if 'total_environment_frames' in chosen:
            # Accepted, a great number would make the run last for days.
            flags.append('--stop_at_frames=200')
        # A finished run has nothing left to do, so these cases take a fraction of the time.
        return Case(kind, tuple(flags), is_finished=source.random() < 0.8)
    if kind == 'level':
        level_name = expand(LEVELS, 'level', source)
        return Case(kind, (f'--level_name={level_name}', '--logdir={folder}/run', *_SHORT_RUN))
    if kind == 'suite':
        content = expand(SUITES, 'file', source).encode()
        if source.random() < 0.1:
            content = content.replace(b'1', b'\xff')
        flags = ['--level_name={folder}/suite.csv', '--logdir={folder}/run', *_SHORT_RUN]
        return Case(kind, tuple(flags), {'suite.csv': content})
    if kind == 'environment':
        content = expand(ENVIRONMENTS, 'module', source).encode()
        flags = ['--level_name=own:make', '--logdir={folder}/run', *_SHORT_RUN]
        return Case(kind, tuple(flags), {'own.py': content})
    flags = source.choice(
        (
            ['--flagfile={folder}/run/flags.txt', '--logdir={folder}/run'],
            ['--flagfile={folder}/run/flags.txt'],
            ['--mode=test', '--logdir={folder}/run', '--test_num_episodes=1'],
        )
    )
    damage = Damage(
        source.choice(_DAMAGED_FILES),
        source.choice((*DAMAGES, MISSING, FOLDER)),
        source.random(),
        source.choice(_JUNK),
    )
    return Case(kind, tuple(flags), is_finished=True, damage=damage)


def _flag(source: random.Random, name: str, flag_type: str) -> str:
    if flag_type == 'bool':
        return source.choice(
            (f'--{name}', f'--no{name}', f'--{name}={expand(VALUES, "any", source)}')
        )
    form = source.choices(('--{}={}', '--no{}={}', '--{}', '-{}={}', '--{} {}'), (20, 1, 1, 1, 1))[
        0
    ]
    return form.format(name, expand(VALUES, 'any', source))


def expand(grammar: Grammar, symbol: str, source: random.Random) -> str:
    """Returns a random expansion of a symbol."""
    return re.sub(
        r'<(\w+)>', lambda match: expand(grammar, match[1], source), source.choice(grammar[symbol])
    )
