"""What layers save for the backward: the estimate, the policies, recomputation, and fused kernels."""
