"""Models: A3, and the controls that it is compared with."""
