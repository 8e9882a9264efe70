"""The model card: text, figures, and results in the Hub's format."""
