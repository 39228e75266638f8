"""`compress`: make model checkpoints smaller, and prove what that cost."""

__version__ = "0.1.0"
