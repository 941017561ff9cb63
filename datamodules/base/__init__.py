"""Foundation of every DataModule: loaders, exact resumption, held-out sets, files."""
