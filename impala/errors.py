"""Errors whose texts are sentences for the user."""


class LevelError(Exception):
    """A level cannot be played; the text is one sentence for the user, on one line."""

    def __str__(self) -> str:
        return ' '.join(super().__str__().split())


class TrainingError(Exception):
    """A run cannot continue; the text is one sentence for the user."""
