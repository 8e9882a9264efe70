"""The command line: one file per command. It parses, calls the pipeline and prints."""
