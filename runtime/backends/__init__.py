"""What runs the graphs of a bundle: one contract, one small class for each library."""
