"""What a network costs, counted and timed."""
