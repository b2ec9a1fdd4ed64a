"""Tables, plots and one page, from results on disk only."""
