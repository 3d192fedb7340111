"""Errors that are sentences for the user."""


class LevelError(Exception):
    """A level that cannot be played; its text is one sentence for the user, and one line."""

    def __str__(self) -> str:
        return ' '.join(super().__str__().split())
