"""What `fastbn.torch` is made of: the kernels over tensors, custom operators, autograd in eager mode, batches of several processes."""
