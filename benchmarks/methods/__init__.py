"""Published ways of choosing what the draft skips, one file per method, written from the papers' descriptions."""
