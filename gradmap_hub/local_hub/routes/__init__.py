"""The routes of the hub, by subject. Each module defines ``routes(hub)``."""
