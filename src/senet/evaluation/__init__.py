"""Evaluation of and predictions with trained networks."""
