"""Names of the samplers, in a file that loads no PyTorch: commands name them in their --help."""

SAMPLERS = ("flow_map", "euler")
