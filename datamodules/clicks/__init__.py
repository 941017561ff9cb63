"""Tables of clicks and other binary outcomes."""
