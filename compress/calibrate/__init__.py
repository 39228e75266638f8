"""What data tells about a model: statistics of the inputs that each weight meets."""
