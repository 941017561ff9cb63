"""The room that language-model systems share: generation, and means over whole optimizer steps."""
