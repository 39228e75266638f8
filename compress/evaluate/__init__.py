"""What a compressed model is worth, measured on data."""
