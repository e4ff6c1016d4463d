"""What `rnnzoo bench` measures: our kernels beside what else is installed, in the same run."""
