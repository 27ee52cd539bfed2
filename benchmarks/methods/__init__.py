"""Methods: published methods of choosing a skip set, one file each, written from the papers."""
