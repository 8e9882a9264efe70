"""One file per command, and the stages that several commands share."""
