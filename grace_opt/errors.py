"""The one exception that a user can cause: the command line prints it as a sentence and exits with 2."""


class InputError(ValueError):
    """Bad input. The message is one sentence that names the thing and the cure."""
