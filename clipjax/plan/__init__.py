"""A run compiled for machines that are not here: what it would hold, send and take on them."""
