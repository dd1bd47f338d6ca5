"""``python -m senet.cli``: the command line without the installed script, for torchrun among others."""

from senet.cli.main import run

run()
