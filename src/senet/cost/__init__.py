"""Parameters, multiply-adds and memory, counted; and those that the paper prints."""
