"""Training: recipes, runs that survive interruption, evaluation, and the comparison of twins."""
