"""Export formats of a model folder. Each exporter takes a folder and returns the files it wrote and the result of its
check. Nothing here accesses the Hub."""
