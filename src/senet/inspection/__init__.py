"""Records what gates do over a data set, diagnoses them, and shows the result as figures and an HTML page."""
