"""The comparison Space: what it can run, its files, and running it here."""
