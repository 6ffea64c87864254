"""What runs a plan: a GPU, Triton's interpreter, or torch's kernels on the cpu."""
