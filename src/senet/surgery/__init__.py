"""Analyzing networks: the data flow of a run, an input to run on, and the gates."""
