"""Errors that users can cause and correct; the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A wrong file, option or environment; the message says what was expected and what was found."""


class DataError(UserError):
    """A data file, image or label that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or fits no known network."""


class ProcessError(UserError):
    """Another process of the run, such as a loader's worker, has died or is silent."""
