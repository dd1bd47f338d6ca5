"""Functions that run at the same time."""

import threading


def run_together(function, arguments):
    """Call a function in a thread for each argument; an error in one of them, lost otherwise, is raised here."""
    errors = []

    def run(argument):
        try:
            function(argument)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
