"""The report as one page that opens without a server and without a network."""
