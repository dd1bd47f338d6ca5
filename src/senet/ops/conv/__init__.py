"""Convolutions and gates at inference: in C++, in Triton, and in plain PyTorch."""
