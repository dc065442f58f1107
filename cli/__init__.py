"""The command line; click and tqdm live only here."""
