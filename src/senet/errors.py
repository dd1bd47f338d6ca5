"""The error for invalid input: the command line prints its message without a traceback."""

from senet.text import shown


class InputError(ValueError):
    """Invalid input from the user: an argument, a file, a folder, or a recipe.

    The message is a single line that says what is wrong, where, and what to do. The command line prints it and exits
    with code 2; in Python, it is a ``ValueError``. Unprintable characters in the message are replaced.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))
