"""What a checkpoint is: families, files, and the decoder that computes layer by layer."""
