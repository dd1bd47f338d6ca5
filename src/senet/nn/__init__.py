"""The SE block and the end of a residual block."""
