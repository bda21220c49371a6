"""What kvq raises when something is wrong that its user can mend. The command line prints these as their message alone."""

from collections.abc import Sequence


class KvqError(Exception):
    """Base of every error with a message for the user.

    `exit_code` is the status that the command line ends with: 2 where the input was wrong, 1 where something failed on the way.
    """

    exit_code = 2


class ConfigError(KvqError):
    """A configuration that does not exist, does not parse, or asks for what is not allowed.

    `misfits` are the keys, as `quantizer.decay`, that a section does not have or lacks.
    """

    def __init__(self, message: str, misfits: Sequence[str] = ()):
        super().__init__(message)
        self.misfits = tuple(misfits)


class DataError(KvqError):
    """Images that are missing, unreadable or do not fit the configuration."""


class BadImageError(DataError):
    """One image that cannot be used, called `name`, for a `reason`. Training puts another in its place."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} cannot be decoded: {reason}. Remove or replace it.")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return BadImageError, (self.name, self.reason)


class BackendError(KvqError):
    """A Keras backend, or a package that some feature needs, is not installed."""


class RunError(KvqError):
    """A run folder that cannot be written, is in use, or is not kvq's."""


class ArtifactError(KvqError):
    """A model folder that is not kvq's, or whose tensors do not fit its config."""


class TokensError(KvqError):
    """A token data set that is broken, not complete, or of another model."""


class WorkerError(KvqError):
    """A process that encoded elsewhere failed, or could not be reached."""

    exit_code = 1


class TrainingError(KvqError):
    """Training could not go on."""

    exit_code = 1


class ExportError(KvqError):
    """An exported model did not run in its runtime, or did not agree with the original."""

    exit_code = 1


def installing(*extras: str) -> str:
    """The way out where packages are missing, as README.md has it: in the versions that the tests ran with.

    Args:
        extras: Of pyproject.toml. Without any, what kvq always needs.
    """
    what = f'".[{",".join(extras)}]"' if extras else "."
    return f"pip install -c constraints.txt {what} (in a clone of kvq)"
