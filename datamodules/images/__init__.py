"""Images: in memory, in folders, as cached latents."""
