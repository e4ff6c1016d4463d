"""Griffin and RecurrentGemma: two layers of RG-LRU, one of local attention, and so on."""
