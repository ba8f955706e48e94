"""Errors of configurations: what a user wrote, what was expected, how to repair it."""

from omegaconf.errors import InterpolationToMissingValueError, ValidationError


class ConfigError(Exception):
    """A configuration cannot be used; the message is one complete sentence for the user."""


class UnknownKeyError(ConfigError, TypeError):
    """A key is not a field of the config that it was given to."""


class WrongTypeError(ConfigError, ValidationError):
    """A value has another type than its field."""


class MissingValueError(ConfigError, InterpolationToMissingValueError):
    """A value that the user must give is missing."""


class ConfigValueError(ConfigError, ValueError):
    """A value has the right type but cannot be used."""


class ConfigFileError(ConfigError, FileNotFoundError):
    """A file that the configuration names is missing or cannot be read."""
