"""Training: runs that can be interrupted and resumed."""
