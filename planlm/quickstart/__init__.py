"""The whole path on real text and real pre-trained weights, from installed packages alone."""
