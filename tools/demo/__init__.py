"""How the embedded model is made: its world, its words, its latents, its training and its judge."""
