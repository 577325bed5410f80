"""Models: A3 and the controls it is compared with."""
