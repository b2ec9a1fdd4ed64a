"""Raw text to a prepared corpus on disk, and batches from it."""
