"""What every architecture shares: configuration, block, model, cache, attention layers, registry."""
