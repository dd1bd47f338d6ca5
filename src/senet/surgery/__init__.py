"""What a network is made of: its data flow in a run, an input to run it on, and the gates in it."""
