"""Other libraries by their own names, on the solvers and the noise of this one: `torchsde` and `torchdiffeq`."""
