"""Weights into networks: found, read, recognized, renamed, and made to fit."""
