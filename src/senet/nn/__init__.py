"""The SE block, and SE blocks attached to modules."""
