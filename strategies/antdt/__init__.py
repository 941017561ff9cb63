"""AntDT: stragglers and leaders, dynamic data sharding, and a controller that balances them (arXiv 2404.09679)."""
