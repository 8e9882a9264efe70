"""One file per verb: each reads as the story of its command."""
