"""Updates: what a training method adds to one weight matrix, every kind on one shelf."""
