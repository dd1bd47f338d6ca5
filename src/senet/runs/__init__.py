"""Runs: their settings, recipe, data, and folder."""
