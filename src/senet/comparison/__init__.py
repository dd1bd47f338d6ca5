"""Comparison of an SE network with its plain twin over several seeds: does SE help?"""
