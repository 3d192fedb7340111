"""The user's own code: how it is imported, and a sentence for each of its failures."""

import bdb
import importlib
import inspect
import os
import re
import sysconfig
import traceback
from typing import Any

# Errors of code that is wrong and will fail again. Others may come from the machine or from a seed:
# after those, a new actor starts.
MISTAKES = (ImportError, TypeError, AttributeError, NameError)

_PACKAGE = os.path.dirname(__file__)


class UserCodeError(Exception):
    """The user's code cannot be used; the text says why, without a subject or a full stop."""


def is_own(name: str) -> bool:
    """Returns whether a name is of the form `my_module:Name`."""
    return re.fullmatch(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*', name) is not None


def load(name: str) -> Any:
    """Returns what a name of the form `my_module:Name` refers to.

    Raises:
      UserCodeError: the module cannot be imported or lacks the name.
    """
    module_name, _, attribute = name.partition(':')
    module = import_module(module_name)
    if not hasattr(module, attribute):
        raise UserCodeError(f'the Python module {module_name!r} has no {attribute!r}')
    return getattr(module, attribute)


def import_module(module_name: str) -> Any:
    """Imports a module.

    Raises:
      UserCodeError: the import failed, for whatever reason.
    """
    subject = f'the Python module {module_name!r} cannot be'
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + '.').startswith(error.name + '.'):
            raise UserCodeError(f'{subject} imported: {describe_failure(error)}') from error
        raise UserCodeError(f'{subject} found') from error
    except (Exception, SystemExit) as error:
        raise UserCodeError(f'{subject} imported: {describe_failure(error)}') from error


def describe_failure(error: BaseException) -> str:
    """Returns the type, text and place of an error in the user's code, on one line.

    Raises:
      BdbQuit: the error is one: the user has left a debugger.
    """
    if isinstance(error, bdb.BdbQuit):
        raise error
    # TensorFlow puts names of nodes in front of some errors.
    text = re.sub(r'{{.*?}} ?', '', one_line(error)).removesuffix('.')
    text = f'{type(error).__name__}: {text}'
    # Gymnasium raises some errors again with another text.
    cause = error.__cause__ or error
    # Frames of Python's import system and of this package say nothing about the user's code.
    frames = [
        frame
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith(('<', _PACKAGE)) and frame.filename != importlib.__file__
    ]
    # The user's own line, rather than one of a library that it calls.
    frames = [frame for frame in frames if not _is_of_library(frame.filename)] or frames
    # The text of a syntax error includes its place.
    if not frames or isinstance(error, SyntaxError):
        return text
    return f'{text} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})'


def place_of(thing: Any) -> str:
    """Returns where a class or function is defined, as ` (file.py, line 3)`; '' if unknown."""
    try:
        line = inspect.getsourcelines(thing)[1]
        return f' ({os.path.basename(inspect.getfile(thing))}, line {line})'
    except (OSError, TypeError):
        return ''


def _is_of_library(filename: str) -> bool:
    folders = ('stdlib', 'purelib', 'platlib')
    return filename.startswith(tuple(sysconfig.get_path(folder) + os.sep for folder in folders))


def one_line(error: BaseException) -> str:
    """Returns the text of an error without its line breaks."""
    return ' '.join(str(error).split())
