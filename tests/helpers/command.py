"""``senet`` in a process of its own."""

import sys


def command(*words):
    return [sys.executable, "-m", "senet.cli", *map(str, words)]
