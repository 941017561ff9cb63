"""Lightning strategies: where things run, never what they compute."""
