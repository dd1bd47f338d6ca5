"""SE as an operation on networks that exist already."""
