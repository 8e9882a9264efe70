"""Formats a model folder can be written in. Each exporter takes a folder and returns what it wrote and how it was
checked; nothing here talks to the Hub."""
