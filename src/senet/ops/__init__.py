"""Pure tensor maths: the reference, and its fast forms. Imports torch alone."""
