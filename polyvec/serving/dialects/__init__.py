"""One module per dialect: its words in, its words out, and one call of ``Service`` between."""
