"""What gates do over a data set: recorded, judged, and shown as figures and a page."""
