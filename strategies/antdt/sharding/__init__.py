"""Which rank has which samples, each exactly once."""
