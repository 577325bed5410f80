"""A backend of triton for a CPU on which kernels are only interpreted. Nothing here is ever called but what says that it is
there."""
