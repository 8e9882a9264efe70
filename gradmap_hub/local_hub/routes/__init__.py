"""The routes of the hub, by subject. Each module lists its own in a function ``routes(hub)``."""
