"""Systems: the only files that know a whole method."""
