"""The one error that means "the input is wrong": a clear line for a person, never a traceback."""


class InputError(ValueError):
    """Bad input from the user: an argument, a file, a folder, a recipe.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and exits
    with code 2; in Python it is a plain ``ValueError``.
    """
