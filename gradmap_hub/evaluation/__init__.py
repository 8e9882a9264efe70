"""Measurements of a finished model and its original, and whether they are still valid for its files."""
