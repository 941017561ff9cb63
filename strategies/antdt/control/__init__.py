"""Watches ranks, decides, and says what each is to do."""
