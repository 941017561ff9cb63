"""Lightning callbacks of the zoo."""
