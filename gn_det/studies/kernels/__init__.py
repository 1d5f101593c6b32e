"""What the kernels cost: counted traffic, machine code, peers, times."""
