"""What is decided before a run: which calls of the sampler compute the network."""
