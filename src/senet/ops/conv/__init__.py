"""Convolutions and gates of inference: in C++, in Triton, and as PyTorch's own."""
