"""Latent diffusion: noise schedules, samplers, guidance, and what is made with them."""
