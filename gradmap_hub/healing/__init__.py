"""Distil the original into the pruned model on a budget of tokens: text, teacher, objective, training."""
