"""The model card: text, figures, and results in the formats of the Hub."""
