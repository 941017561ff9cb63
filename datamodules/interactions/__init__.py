"""Users, items and their interactions over time, for recommendation."""
