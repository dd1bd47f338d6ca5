"""Does SE help: an SE network against its plain twin over seeds."""
