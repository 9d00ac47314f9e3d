"""What each kind hands to its Triton kernels, and the test that a kernel passes before its first use."""
