"""The errors that a user can mend, and the exit code that each becomes."""


class InputError(ValueError):
    """Bad config, file or argument: names the key, what was seen and what is allowed. Exit code 2."""


class RunError(RuntimeError):
    """A run that started could not go on. Exit code 1."""
