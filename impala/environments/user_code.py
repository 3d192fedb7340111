"""The user's own code: how it is imported, and a sentence for each of its failures."""

import importlib
import os
import traceback
from typing import Any

from impala.errors import LevelError

# Errors of code that is wrong and will fail again. Others may come from the machine or from a seed:
# after those, a new actor starts.
MISTAKES = (ImportError, TypeError, AttributeError, NameError)
HOW_TO_NAME_ONES_OWN = (
    'write my_module:make for a callable, or my_module:MyGame-v0 for an id that the module '
    'registers with Gymnasium'
)


def import_module(level_name: str, module_name: str) -> Any:
    """Imports the module that defines a level.

    Raises:
      LevelError: the import failed, for whatever reason.
    """
    if not module_name:
        raise LevelError(
            f'{level_name!r} names no Python module in front of its colon: {HOW_TO_NAME_ONES_OWN}.'
        )
    asks = f'{level_name!r} asks for the Python module {module_name!r}, which cannot be'
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + '.').startswith(error.name + '.'):
            raise LevelError(f'{asks} imported: {describe_failure(error)}.') from error
        raise LevelError(f'{asks} found.') from error
    except (Exception, SystemExit) as error:
        raise LevelError(f'{asks} imported: {describe_failure(error)}.') from error


def describe_failure(error: BaseException) -> str:
    """Returns the type, text and place of an error in the user's code, on one line."""
    text = f'{type(error).__name__}: {one_line(error).removesuffix(".")}'
    # Gymnasium raises some errors again with another text.
    cause = error.__cause__ or error
    # Frames of Python's import system and of this package say nothing about the user's code.
    places = [
        f'{os.path.basename(frame.filename)}, line {frame.lineno}'
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith('<')
        and frame.filename != importlib.__file__
        and os.path.dirname(frame.filename) != os.path.dirname(__file__)
    ]
    # The text of a syntax error includes its place.
    return f'{text} ({places[-1]})' if places and not isinstance(error, SyntaxError) else text


def one_line(error: BaseException) -> str:
    """Returns the text of an error without its line breaks."""
    return ' '.join(str(error).split())
