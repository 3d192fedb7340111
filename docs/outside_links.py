"""Lets the pages of the site link to files of the project outside docs/, as they do on GitHub.

MkDocs knows only files in docs/. Each file outside that a page links to becomes a part of the site,
below `project/`, and the link leads there. A link to a folder becomes its text. A link to nothing
is a warning, with which `mkdocs build --strict` fails.
"""

import logging
import os
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LINK = re.compile(r'\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s#]*)(?P<anchor>#[^)]*)?\)')
_LOG = logging.getLogger('mkdocs.hooks.outside_links')


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to."""
    for page in files.documentation_pages():
        for link in _LINK.finditer(page.content_string):
            path = _outside(page, link['target'])
            if path is None:
                continue
            uri = _uri(path)
            if not path.exists():
                _LOG.warning("'%s' links to '%s', which does not exist.", page.src_uri, link[0])
            elif path.is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of a page to what `on_files` has added; nests lists as MkDocs needs it."""

    def replaced(link: re.Match[str]) -> str:
        path = _outside(page.file, link['target'])
        if path is None:
            return link[0]
        if not path.is_file():
            return link['text']
        here = pathlib.PurePosixPath(page.file.src_uri).parent
        return f'[{link["text"]}]({os.path.relpath(_uri(path), here)})'

    # GitHub takes two spaces for a list within a list, Python-Markdown only four.
    nested = re.sub(r'^  - ', '    - ', markdown, flags=re.MULTILINE)
    return _LINK.sub(replaced, nested)


def _outside(page: File, target: str) -> pathlib.Path | None:
    """Returns the path that a page links to, or None if it is in docs/."""
    path = (_ROOT / 'docs' / page.src_uri).parent / target
    path = pathlib.Path(os.path.normpath(path))
    return None if path.is_relative_to(_ROOT / 'docs') else path


def _uri(path: pathlib.Path) -> str:
    # A page of Markdown would need all that it links to in turn, so it is shown as text.
    name = path.relative_to(_ROOT).as_posix()
    return f'project/{name}.txt' if path.suffix == '.md' else f'project/{name}'
