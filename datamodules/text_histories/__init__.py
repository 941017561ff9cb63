"""Histories of behaviours as lists of texts, and candidates to click on."""
