"""The tail of a residual block in training, for each backend: norm, SE, shortcut, and ReLU in two sweeps."""
