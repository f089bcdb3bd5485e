"""The operators: beside each a float64 reference, and one entry that picks the code to run."""
