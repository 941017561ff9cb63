"""Text for language models and for character models."""
