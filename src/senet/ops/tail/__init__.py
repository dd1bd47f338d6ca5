"""The tail of a residual block in training: norm, SE, shortcut and ReLU in two sweeps, for each backend."""
