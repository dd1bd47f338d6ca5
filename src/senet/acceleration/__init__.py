"""``senet.accelerate``: a network's own maths in fewer passes over its maps."""
