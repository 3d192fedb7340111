"""Tests of impala/tools/flags_page.py."""

import pathlib

from impala.config import all_settings
from impala.tools import flags_page

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'flags.md'


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == flags_page.page(), (
        'docs/flags.md is stale: python -m impala.tools.flags_page > docs/flags.md'
    )


def test_every_flag_has_a_line():
    lines = PAGE.read_text().splitlines()
    for name in all_settings():
        assert sum(line.startswith(f'| `--{name}` ') for line in lines) == 1
