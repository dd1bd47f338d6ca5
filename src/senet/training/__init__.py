"""Training: recipes, runs that survive interruption, evaluation, and the comparison of a network with its plain twin."""
