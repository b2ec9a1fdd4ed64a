"""What preparation and generation must do identically: split, embed and tokenise text."""
