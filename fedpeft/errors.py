"""The errors that a user can mend, and the exit code that each becomes."""


class InputError(ValueError):
    """Bad config, file or argument: names the key, what was seen and what is allowed. Exit code 2."""


class RunError(RuntimeError):
    """A run that started could not go on. Exit code 1."""


class Stopped(BaseException):
    """SIGINT (Ctrl-C) or SIGTERM reached the command line. Exit code 128 + number of the signal.

    `advice` is what a command can say of how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.advice = ""
