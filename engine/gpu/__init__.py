"""What runs inside the generation process: the only package that may import torch, diffusers or numpy."""
