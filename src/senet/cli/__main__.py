"""``python -m senet.cli``: the command line without the installed script, for example under torchrun."""

from senet.cli.main import run

run()
