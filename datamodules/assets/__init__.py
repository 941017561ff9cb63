"""Real data and pretrained weights that package registries carry: manifest, fetching, cache."""
