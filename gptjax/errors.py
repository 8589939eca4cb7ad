"""Errors that a person can mend. Commands print them as one sentence and exit with status 2."""


class GptjaxError(Exception):
    """Base of the project's own errors; the message names the key or file and the fix."""


class ConfigError(GptjaxError):
    """A configuration that cannot be run."""


class FormatError(GptjaxError):
    """A file that is not what its format says it should be."""


class DataError(GptjaxError):
    """A corpus that cannot be found, made or batched."""


class CheckpointError(GptjaxError):
    """A checkpoint that cannot be written or resumed."""
