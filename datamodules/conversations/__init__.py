"""Conversations and preferences for language models."""
