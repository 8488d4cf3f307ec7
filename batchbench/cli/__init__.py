"""The command line: it parses options and prints reports; results are computed elsewhere."""
