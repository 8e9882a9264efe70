"""Quality, size and speed at several ratios: record, report, recommendation."""
