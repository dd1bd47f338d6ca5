"""The one error that means "the input is wrong": a clear line for a person, never a traceback."""

from senet.text import shown


class InputError(ValueError):
    """Bad input from the user: an argument, a file, a folder, a recipe.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and exits
    with code 2; in Python it is a plain ``ValueError``. What a name in it cannot show is replaced.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))
