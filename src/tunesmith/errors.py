"""One exception family: every message says what, where, what was found, and how to fix it.

TunesmithError
├── ConfigError       exit code 2   a recipe, a flag, an argument, a folder that is in the way
│   └── UnknownTemplateError        a chat template's name (a TemplateError, too)
├── DataError         exit code 3   a file, a row, a column; nothing left to train
│   └── TemplateError exit code 3   a chat template that cannot tell what to train
├── CheckpointError   exit code 4   a checkpoint that is damaged or belongs to another run
├── MemoryLimitError  exit code 5   the smallest possible batch does not fit
├── NonFiniteError    exit code 6   a loss or gradient that is not a number
└── ModelError        exit code 2   a model or tokenizer that cannot be loaded or used as asked

ConfigError, DataError and ModelError are ValueErrors too: that is what scripts written for TRL catch.
"""


class TunesmithError(Exception):
    """Base of all errors a person can act on; the command line prints the sentence and exits with `exit_code`."""

    exit_code = 1


class ConfigError(TunesmithError, ValueError):
    """A recipe key, a flag, an argument or an output folder is wrong."""

    exit_code = 2


class ModelError(TunesmithError, ValueError):
    """A model, adapter or tokenizer cannot be loaded or used as asked."""

    exit_code = 2


class DataError(TunesmithError, ValueError):
    """A file, row or column is wrong, or nothing is left to train."""

    exit_code = 3


class TemplateError(DataError):
    """A chat template cannot render a conversation, or cannot tell which part of it the loss covers."""


class UnknownTemplateError(ConfigError, TemplateError):
    """A recipe names a chat template that does not exist."""


class CheckpointError(TunesmithError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""

    exit_code = 4


class MemoryLimitError(TunesmithError):
    """The smallest possible batch does not fit into memory."""

    exit_code = 5


class NonFiniteError(TunesmithError):
    """A loss or gradient is NaN or infinite."""

    exit_code = 6
