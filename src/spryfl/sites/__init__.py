"""What a user meets around a federation of sites: the app folder, certificates and keys, checks before a long run."""
