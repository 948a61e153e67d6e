"""Errors that a user can cause and mend; the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A wrong file, option or environment; the message says what was expected, what came and what to do."""


class DataError(UserError):
    """A data file, image or label that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or fits no known network."""
