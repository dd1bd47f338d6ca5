"""Tensor math only: the reference and its fast forms. Imports nothing but torch."""
