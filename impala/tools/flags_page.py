"""Writes the reference page of all flags: `python -m impala.tools.flags_page > docs/flags.md`."""

import itertools
from typing import Any

import tabulate

from impala.config import Known, all_settings

_HEAD = """\
# Flags

Every setting of `experiment.py`, by group, as defined in `impala/config.py`. This page is
generated: `python -m impala.tools.flags_page > docs/flags.md`.

In the last column: *fixed*: a run cannot be resumed with another value; *schedule*: it may change,
and the learning rate or entropy cost then continues on another line; *not stored*: the setting is
not written to the run's `flags.txt`; *agreed*: learner and actor jobs must have the same value
(*learners*: only the learners).
"""
_ON_RESUME = {'fixed': 'fixed', 'schedule': 'schedule', 'not_stored': 'not stored'}
_AGREEMENT = {'jobs': 'agreed', 'learners': 'learners'}


def page() -> str:
    """Returns the page as Markdown."""
    parts = [_HEAD]
    for group, members in itertools.groupby(all_settings().items(), lambda item: item[1].group):
        rows = [_row(name, known) for name, known in members]
        table = tabulate.tabulate(
            rows,
            ['flag', 'default', 'values', 'meaning', ''],
            tablefmt='github',
            disable_numparse=True,
        )
        parts.append(f'## {group}\n\n{table}\n')
    return '\n'.join(parts)


def _row(name: str, known: Known) -> tuple[str, str, str, str, str]:
    described = known.setting
    marks = [_ON_RESUME.get(described.on_resume), _AGREEMENT.get(described.agreement)]
    meaning = described.help
    if described.only_with is not None:
        meaning = f'With `--{"=".join(described.only_with)}`: {meaning[0].lower()}{meaning[1:]}'
    # A bar would end the cell.
    return (
        f'`--{name}`',
        _default(known.default),
        _values(known),
        meaning.replace('|', '\\|'),
        ', '.join(mark for mark in marks if mark),
    )


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if value in (None, '', ()):
        return ''
    return f'`{value}`'


def _values(known: Known) -> str:
    described = known.setting
    if described.choices:
        own = ('my_module:Name',) if described.allows_own else ()
        return ', '.join(f'`{choice}`' for choice in (*described.choices, *own))
    if described.low is not None and described.high is not None:
        unit = f' {described.unit}' if described.unit else ''
        return f'{described.low:,.15g} to {described.high:,.15g}{unit}'
    return {bool: 'on or off', tuple: 'list'}.get(known.kind, 'text')


if __name__ == '__main__':
    print(page(), end='')
