"""Text in, token sequences out."""
