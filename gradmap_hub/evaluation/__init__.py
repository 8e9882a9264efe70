"""What is measured on a finished model, and whether a measurement still describes its files."""
