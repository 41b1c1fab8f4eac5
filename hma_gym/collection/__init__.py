"""Recording, importing and looking at datasets."""
