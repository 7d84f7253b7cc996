"""PyTorch reference of the Robust RFSQ action tokenizer: the definition of right."""
