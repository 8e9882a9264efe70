"""The comparison Space: the plan of what it runs, its files, and a local server."""
