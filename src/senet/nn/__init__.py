"""The SE block and the tail of a residual block."""
