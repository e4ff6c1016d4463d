"""Kimi Delta Attention: the delta rule on a state that decays channel by channel; and latent attention beside it."""
