"""The data sharding service: its process, its words, those who call it."""
